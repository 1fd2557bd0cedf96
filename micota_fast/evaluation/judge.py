"""A model's opinion on the answers that the paper's string rule rejects.

The authors' evaluation (Small-Model-Learnability-Gap at 814cf97, math_metric_llm_eval_general.py) asks
Qwen2.5-32B-Instruct, greedily, about every answer that was read and is not equal to the gold answer, and counts those
that it calls True besides those that are equal. The question below is theirs.
"""

import glob
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from micota_fast.common.files import write_atomic
from micota_fast.common.records import Completion, Problem, encode_row, model_name, read_completions
from micota_fast.config import loader
from micota_fast.config.evaluation import JudgeConfig
from micota_fast.config.generation import ChatConfig, GenerateConfig
from micota_fast.evaluation.results import Judge
from micota_fast.generation.generate import finished, generate_corpus, model_fingerprint, open_problems, servers_for
from micota_fast.generation.request import sampling_params
from micota_fast.grading.grader import Verdict
from micota_fast.model.folder import resolve_checkpoint

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QUESTION = (
    "Given a math problem, its correct answer, and the model's generated answer, determine if the model's generated "
    "answer is correct. Respond with 'True' if the answer is correct and 'False' if it is incorrect. Directly provide "
    "your judgement 'True' or 'False' without any other description.\nProblem: {problem}\nCorrect Answer: {gold}\n"
    "Model's Generated Answer: {answer}\nYour judgement:"
)
MAX_NEW_TOKENS = 20


def second_opinions(
    judge: JudgeConfig, graded: Mapping[str, tuple[Sequence[Completion], Sequence[Verdict]]], folder: Path
) -> dict[str, list[bool | None]]:
    """What the judge says of each answer of each benchmark: True, False, or None where it says neither.

    Answers that are correct count as True, those without a final answer as False; neither is asked about. Questions and
    replies stay in `folder`, in a file for each benchmark, so an interrupted run goes on, a finished one asks nothing,
    and benchmarks may come, go and change places.

    Args:
        judge: the model and its server.
        graded: file name of each benchmark -> its answers, and their verdicts by the string rule.
        folder: made if missing.

    Raises:
        InputError: as `micota_fast.generation.generate`.
    """
    opinions: dict[str, list[bool | None]] = {}
    open_: dict[str, list[int]] = {}
    for file, (rows, verdicts) in graded.items():
        opinions[file] = [verdict.status == "correct" for verdict in verdicts]
        wrong = [i for i, verdict in enumerate(verdicts) if verdict.status == "wrong"]
        if wrong:
            _ask_no_other(
                folder, file, b"".join(encode_row(_question(rows[i], verdicts[i].extracted or "")) for i in wrong)
            )
            open_[file] = wrong
    asked = [_config(judge, folder / "questions" / file, folder / "replies" / file) for file in open_]
    problems = [open_problems(config.problems, None, config.out) for config in asked]
    if not all(finished(p, config, config.out) for p, config in zip(problems, asked, strict=True)):
        with servers_for(asked[0], folder / "server.log") as urls:
            for p, config in zip(problems, asked, strict=True):
                generate_corpus(p, config, urls, config.out)
    for (file, wrong), config in zip(open_.items(), asked, strict=True):
        for i, reply in zip(wrong, read_completions(config.out), strict=True):
            opinions[file][i] = _opinion(reply.completion)
    return opinions


def asked_of(judge: JudgeConfig) -> Judge:
    """Describe the judge: the model, and its sampling, server and question, on which its verdicts depend."""
    config = _config(judge, Path(), Path())
    return Judge(
        model=model_name(judge.model),
        made_by={
            "model": model_fingerprint(resolve_checkpoint(judge.model)),
            "prompt": {"system": SYSTEM, "prompt": QUESTION},
            "sampling": sampling_params(config),
            "serve": loader.identity(judge.serve),
        },
    )


def _ask_no_other(folder: Path, file: str, questions: bytes) -> None:
    """Write a file of questions; replies to others than these are worth nothing and go."""
    path = folder / "questions" / file
    if path.exists() and path.read_bytes() != questions:
        for reply in (folder / "replies").glob(f"{glob.escape(file)}*"):
            shutil.rmtree(reply) if reply.is_dir() else reply.unlink()
    write_atomic(path, [questions])


def _question(row: Completion, answer: str) -> Problem:
    text = QUESTION.format(problem=row.problem, gold=row.answer, answer=answer)
    return Problem(f"{row.id}#{row.sample}", text, "")


def _config(judge: JudgeConfig, questions: Path, out: Path) -> GenerateConfig:
    return GenerateConfig(
        model=judge.model,
        problems=str(questions),
        out=str(out),
        url=judge.url,
        serve=judge.serve,
        chat=ChatConfig(system=SYSTEM, prompt="{problem}"),
        max_new_tokens=MAX_NEW_TOKENS,
    )


def _opinion(reply: str) -> bool | None:
    if "True" in reply:
        return True
    return False if "False" in reply else None
