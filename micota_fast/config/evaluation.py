"""Options of evaluation, and of what compares corpora with benchmarks and students.

"MiCoTA" is arXiv 2507.01887 and its repository; "SMLG" is the Small-Model-Learnability-Gap repository, whose scripts
MiCoTA builds on; "ours" marks what both leave open.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from micota_fast.config.checks import at_least, check_names
from micota_fast.config.generation import (
    COLUMNS,
    PROBLEMS,
    ChatConfig,
    OpenAIConfig,
    SamplingSettings,
    ServeConfig,
    check_url,
)
from micota_fast.config.loader import option
from micota_fast.config.suggestions import did_you_mean
from micota_fast.errors import InputError


def shipped_benchmarks() -> dict[str, dict[str, Any]]:
    """Return the definitions of benchmarks.yaml, by name."""
    known: dict[str, dict[str, Any]] = yaml.safe_load(
        (Path(__file__).parent.parent / "evaluation" / "benchmarks.yaml").read_text(encoding="utf-8")
    )
    return known


def shipped_benchmark(name: str) -> dict[str, Any]:
    """Return the keys of `BenchmarkConfig` that benchmarks.yaml gives for a benchmark.

    Raises:
        InputError: there is no benchmark of this name.
    """
    known = shipped_benchmarks()
    if name not in known:
        asked = did_you_mean(name, known, f"known: {', '.join(known)}")
        raise InputError(f"`preset`: there is no {name!r}; {asked}")
    return {key: value for key, value in known[name].items() if key != "hub"}


@dataclass(kw_only=True)
class OwnSampling:
    """Sampling of one evaluation set; null: as for all sets."""

    samples: int | None = option(None, doc="answers per problem")
    temperature: float | None = option(None, doc="0: greedy")
    top_p: float | None = option(None, doc="nucleus sampling; used if temperature > 0")
    top_k: int | None = option(None, doc="sample from the K likeliest tokens; -1: from all; used if temperature > 0")
    max_new_tokens: int | None = option(None, doc="longest answer, in tokens")


@dataclass(kw_only=True)
class BenchmarkConfig:
    """One evaluation set."""

    preset: str | None = option(
        None,
        doc="name of a shipped benchmark (aime2024, amc2023, olympiad, math500, gsm8k; aime2025, hmmt_feb_2025, "
        "minerva_math, gpqa_diamond), whose definition supplies every option that is not given here",
        alias="like",
    )
    name: str = option("", doc="its name in the table; required without `preset`")
    path: str = option("", doc=f"{PROBLEMS}; required without `preset`")
    columns: dict[str, str] = option({}, doc=COLUMNS, newer=True)
    prompt: str | None = option(None, doc="user message with {problem}; null: chat.prompt")
    stop: list[str] = option([], doc="strings that end an answer, besides those in `stop` for all sets")
    rule: Literal["box", "box_zeros_trimmed", "last_number", "choice"] | None = option(
        None,
        doc="how the `paper` protocol reads and compares the final answer (choice: the letter of an option); null: box",
    )
    problems: list[int] = option([], doc="allowed numbers of problems in the file; []: any")
    chance: float | None = option(
        None,
        doc="accuracy of a guess, % (10 for one digit, 25 for four choices); shown in the report's tables and plots; "
        "null: not known",
        operational=True,  # to the answers and their grades; the report's identity has it
    )
    limit: int | None = option(None, doc="only the first N problems; null: all")
    sampling: OwnSampling = option(
        OwnSampling(), doc="sampling of this set if it differs, e.g. {samples: 16, temperature: 0.6}"
    )

    def __post_init__(self) -> None:
        if self.preset is not None:
            for key, value in shipped_benchmark(self.preset).items():
                if not getattr(self, key):
                    setattr(self, key, value)
        for key in ("name", "path"):
            if not getattr(self, key):
                raise InputError(f"`{key}` is required without `preset`")
        self.rule = self.rule or "box"
        if self.chance is not None and not 0 <= self.chance < 100:
            raise InputError(f"`chance` must be a percentage from 0 to below 100, not {self.chance}")
        if self.limit is not None:
            at_least(self, limit=1)

    def check_number(self, number: int, where: str) -> None:
        """Raise InputError if `where` has another number of problems than this set."""
        if self.problems and number not in self.problems:
            raise InputError(f"{where} has {number} problems; {self.name} has {' or '.join(map(str, self.problems))}")


@dataclass(kw_only=True)
class JudgeConfig:
    """A model that judges answers that the paper's string rule rejects."""

    model: str = option(doc="checkpoint (folder or hub name); the paper's: Qwen/Qwen2.5-32B-Instruct", source="SMLG")
    url: str | list[str] | None = option(
        None, doc="servers that already serve it; null: one is started", operational=True
    )
    api: Literal["sglang", "openai"] = option(
        "sglang",
        doc="API of the servers at `url`; with openai, `model` is only their name for the model",
        newer=True,
    )
    openai: OpenAIConfig = option(OpenAIConfig(), doc="settings of the servers if `api` is openai", operational=True)
    serve: ServeConfig = option(ServeConfig(), doc="the server that is started for it")

    def __post_init__(self) -> None:
        check_url(self)


@dataclass(kw_only=True)
class EvaluateSettings(SamplingSettings):
    """Greedy answers to every benchmark, graded."""

    protocol: Literal["strict", "paper"] = option(
        "strict",
        doc="verdicts that the table shows: math-verify's (strict), or those of the string rules of the paper's "
        "evaluation (paper); results.json has both",
    )
    judge: JudgeConfig | None = option(
        None,
        doc="model that judges the answers that the `paper` rule rejects, which gives a third accuracy in the "
        "results; null: no judge",
    )
    max_new_tokens: int = option(16000, doc="longest answer, in tokens", source="MiCoTA")
    timeout_s: float = option(10.0, doc="time limit for comparing one pair of answers, in seconds", source="ours")
    workers: int = option(2, doc="grading processes", operational=True)
    benchmarks: list[BenchmarkConfig] = option([], doc="the sets, in the table's order")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, timeout_s=0.1, workers=1)
        if self.top_logprobs:
            raise InputError(
                "`top_logprobs`: nothing trains on an evaluation's answers, so their scores are not kept; leave it out "
                "(it is for `micota generate`)"
            )
        for benchmark in self.benchmarks:
            self.of(benchmark)

    def of(self, benchmark: BenchmarkConfig) -> Self:
        """Return the settings that this benchmark is sampled with.

        Raises:
            InputError: they contradict each other.
        """
        own = {key: value for key, value in vars(benchmark.sampling).items() if value is not None}
        try:
            return dataclasses.replace(self, benchmarks=[], **own)
        except InputError as error:
            raise InputError(f"sampling of {benchmark.name}: {error}") from None


@dataclass(kw_only=True)
class EvaluateConfig(EvaluateSettings):
    """`micota evaluate`: a checkpoint in, results.json and graded rows out."""

    model: str = option(doc="checkpoint (folder or hub name, or CHECKPOINT+ADAPTER of LoRA)")
    out: str = option(doc="folder: results.json, rows/BENCHMARK.jsonl")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_url(self)


@dataclass(kw_only=True)
class AlignSettings:
    """How a corpus is measured under an untrained student."""

    pack_tokens: int = option(16384, doc="tokens in one forward pass")
    max_doc_tokens: int | None = option(None, doc="longer documents are left out and counted; null: pack_tokens")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", doc="compute type")
    device: Literal["auto", "cpu", "cuda"] = option("auto", doc="auto: CUDA if there is a device")
    attention: Literal["auto", "flash", "varlen", "sdpa"] = option("auto", doc="as in training")
    chat: ChatConfig = option(ChatConfig(), doc="the model's prompt")


@dataclass(kw_only=True)
class AlignConfig(AlignSettings):
    """`micota align`: perplexity and length of corpora under a model."""

    model: str = option(doc="the untrained student (folder or hub name)")
    corpora: dict[str, str] = option(doc="name -> corpus, in any form that `micota train` reads")
    columns: dict[str, dict[str, str]] = option(
        {}, doc="name of a corpus -> {our key: the file's key}, as `columns` of `micota train`", newer=True
    )
    student_answers: str | None = option(
        None, doc="JSONL of the model's own completions of these problems; null: there are none", alias="own"
    )
    out: str = option(doc="folder: one NAME.json per corpus")

    def __post_init__(self) -> None:
        if not self.corpora:
            raise InputError("`corpora` names no corpus")
        check_names("corpora", self.corpora)
        if unknown := next((name for name in self.columns if name not in self.corpora), None):
            raise InputError(f"`columns` names {unknown!r}, which is not in `corpora`")


@dataclass(kw_only=True)
class ContaminationConfig:
    """`micota contamination`: which benchmark problems a training corpus contains."""

    corpora: dict[str, str] = option(doc="name -> corpus, in any form that `micota train` reads")
    benchmarks: list[BenchmarkConfig] = option(doc="the sets; only name, path, columns and limit of each are used")
    out: str = option(doc="folder: contamination.json")

    def __post_init__(self) -> None:
        if not self.corpora or not self.benchmarks:
            raise InputError("`corpora` and `benchmarks` must each name at least one")
        check_names("corpora", self.corpora)
