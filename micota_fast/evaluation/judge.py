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
from micota_fast.common.fingerprint import Fingerprints
from micota_fast.common.records import Completion, Problem, encode_row, model_name
from micota_fast.config.evaluation import JudgeConfig
from micota_fast.config.generation import ChatConfig, GenerateConfig
from micota_fast.evaluation.results import Judge
from micota_fast.generation.generate import Generation
from micota_fast.generation.model_identity import model_identity
from micota_fast.generation.request import sampling_params
from micota_fast.generation.servers import servers_for
from micota_fast.grading.grader import Verdict
from micota_fast.sources.completions import read_completions

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QUESTION = (
    "Given a math problem, its correct answer, and the model's generated answer, determine if the model's generated "
    "answer is correct. Respond with 'True' if the answer is correct and 'False' if it is incorrect. Directly provide "
    "your judgement 'True' or 'False' without any other description.\nProblem: {problem}\nCorrect Answer: {gold}\n"
    "Model's Generated Answer: {answer}\nYour judgement:"
)
MAX_NEW_TOKENS = 20


class ModelJudge:
    """The model that is asked, and the folder that keeps its replies.

    Questions and replies stay there in one file per benchmark, so an interrupted run resumes, a finished one asks
    nothing, and benchmarks may be added, removed and reordered.

    Args:
        config: the model and its server.
        folder: made if missing.
        wait_for_server_s: seconds in which a server that `config.url` names must reply.
    """

    def __init__(self, config: JudgeConfig, folder: Path, wait_for_server_s: float) -> None:
        self._config, self._folder, self._wait_for_server_s = config, folder, wait_for_server_s
        self._hashes = Fingerprints(None)

    def verdicts(
        self, graded: Mapping[str, tuple[Sequence[Completion], Sequence[Verdict]]]
    ) -> dict[str, list[bool | None]]:
        """Return what the judge says of each answer of each benchmark: True, False, or None if it says neither.

        Answers that are correct count as True, those without a final answer as False; neither is asked about.

        Args:
            graded: file name of each benchmark -> its answers, and their verdicts by the string rule.

        Raises:
            InputError: as `micota_fast.generation.generate`.
        """
        opinions: dict[str, list[bool | None]] = {}
        open_: dict[str, list[int]] = {}
        asked: dict[str, Generation] = {}
        for file, (rows, verdicts) in graded.items():
            opinions[file] = [verdict.status == "correct" for verdict in verdicts]
            wrong = [i for i, verdict in enumerate(verdicts) if verdict.status == "wrong"]
            if wrong:
                open_[file] = wrong
                questions = b"".join(encode_row(_question(rows[i], verdicts[i].extracted or "")) for i in wrong)
                asked[file] = self._asked(file, questions)
        if not all(generation.is_finished() for generation in asked.values()):
            with servers_for(self._settings(Path(), Path()), self._folder / "server.log") as urls:
                for generation in asked.values():
                    generation.run(urls)
        for file, wrong in open_.items():
            for i, reply in zip(wrong, read_completions(asked[file].out), strict=True):
                opinions[file][i] = _opinion(reply.completion)
        return opinions

    def describe(self) -> Judge:
        """Describe the judge: the model, and its sampling, server and question, on which its verdicts depend."""
        settings = self._settings(Path(), Path())
        known = model_identity(settings, self._hashes)
        return Judge(
            model=model_name(self._config.model),
            made_by={
                "model": known.pop("model"),
                "prompt": {"system": SYSTEM, "prompt": QUESTION},
                "sampling": sampling_params(settings),
                **known,
            },
        )

    def _asked(self, file: str, questions: bytes) -> Generation:
        """Write a file of questions; replies to other questions than these are worth nothing and are removed."""
        path, replies = self._folder / "questions" / file, self._folder / "replies"
        if path.exists() and path.read_bytes() != questions:
            for reply in replies.glob(f"{glob.escape(file)}*"):
                shutil.rmtree(reply) if reply.is_dir() else reply.unlink()
        write_atomic(path, [questions])
        out = replies / file
        return Generation(path, self._settings(path, out), out, hashes=self._hashes)

    def _settings(self, questions: Path, out: Path) -> GenerateConfig:
        return GenerateConfig(
            model=self._config.model,
            problems=str(questions),
            out=str(out),
            url=self._config.url,
            api=self._config.api,
            openai=self._config.openai,
            serve=self._config.serve,
            chat=ChatConfig(system=SYSTEM, prompt="{problem}"),
            max_new_tokens=MAX_NEW_TOKENS,
            wait_for_server_s=self._wait_for_server_s,
        )


def _question(row: Completion, answer: str) -> Problem:
    text = QUESTION.format(problem=row.problem, gold=row.answer, answer=answer)
    return Problem(f"{row.id}#{row.sample}", text, "")


def _opinion(reply: str) -> bool | None:
    if "True" in reply:
        return True
    return False if "False" in reply else None
