"""A model's opinion on the answers that the paper's string rule rejects.

The authors' evaluation (Small-Model-Learnability-Gap at 814cf97, math_metric_llm_eval_general.py) asks
Qwen2.5-32B-Instruct, greedily, about every answer that was read and is not equal to the gold answer, and counts those
that it calls True besides those that are equal. The question below is theirs.
"""

from collections.abc import Sequence
from pathlib import Path

from micota_fast.generate import finished, generate_corpus, open_problems, servers_for
from micota_fast.grade import Verdict
from micota_fast.recipe import ChatConfig, GenerateConfig, JudgeConfig
from micota_fast.records import Completion, Problem, encode_row, read_completions, write_atomic

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QUESTION = (
    "Given a math problem, its correct answer, and the model's generated answer, determine if the model's generated "
    "answer is correct. Respond with 'True' if the answer is correct and 'False' if it is incorrect. Directly provide "
    "your judgement 'True' or 'False' without any other description.\nProblem: {problem}\nCorrect Answer: {gold}\n"
    "Model's Generated Answer: {answer}\nYour judgement:"
)
MAX_NEW_TOKENS = 20


def second_opinions(
    judge: JudgeConfig, graded: Sequence[tuple[Sequence[Completion], Sequence[Verdict]]], folder: Path
) -> list[list[bool | None]]:
    """What the judge says of each answer of each benchmark: True, False, or None where it says neither.

    Answers that are correct count as True, those without a final answer as False; neither is asked about. Questions and
    replies stay in `folder`, so an interrupted run goes on and a finished one asks nothing.

    Args:
        judge: the model and its server.
        graded: for each benchmark its answers and their verdicts by the string rule.
        folder: made if missing.

    Raises:
        InputError: as `micota_fast.generate`.
    """
    opinions: list[list[bool | None]] = []
    asked: list[tuple[GenerateConfig, list[int]]] = []
    for number, (rows, verdicts) in enumerate(graded):
        opinions.append([verdict.status == "correct" for verdict in verdicts])
        open_ = [i for i, verdict in enumerate(verdicts) if verdict.status == "wrong"]
        if open_:
            path = folder / f"questions-{number}.jsonl"
            lines = [encode_row(_question(rows[i], verdicts[i].extracted or "")) for i in open_]
            write_atomic(path, lines)
            asked.append((_config(judge, path, folder / f"replies-{number}.jsonl"), open_))
    problems = [open_problems(config.problems, None, config.out) for config, _ in asked]
    if not all(finished(p, config, config.out) for p, (config, _) in zip(problems, asked, strict=True)):
        with servers_for(asked[0][0], folder / "server.log") as urls:
            for p, (config, _) in zip(problems, asked, strict=True):
                generate_corpus(p, config, urls, config.out)
    for config, open_ in asked:
        number = int(Path(config.out).stem.rpartition("-")[2])
        for i, reply in zip(open_, read_completions(config.out), strict=True):
            opinions[number][i] = _opinion(reply.completion)
    return opinions


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
