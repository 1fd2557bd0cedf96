"""Options of what makes corpora from files: `filter` and `mix`.

"MiCoTA" is arXiv 2507.01887 and its repository; "SMLG" is the Small-Model-Learnability-Gap repository, whose scripts
MiCoTA builds on; "ours" marks what both leave open.
"""

from dataclasses import dataclass

from micota_fast.config.checks import at_least
from micota_fast.config.loader import option
from micota_fast.errors import InputError


@dataclass(kw_only=True)
class FilterSettings:
    """Rules that decide which completions enter a corpus."""

    max_tokens: int = option(16000, doc="an answer must have fewer tokens than this", source="MiCoTA")
    require_correct: bool = option(True, doc="the final answer must equal the problem's", source="MiCoTA")
    require_boxed: bool = option(True, doc="the answer must contain a final \\boxed{}", source="MiCoTA")
    max_foreign: float | None = option(
        None,
        doc="largest share of an answer's letters in scripts that its problem does not use; null: any",
        source="ours; MiCoTA has no such rule",
    )
    max_repeated: float | None = option(
        None,
        doc="largest share of an answer's words in runs of 16 words that occurred in it before; null: any",
        source="ours, after Gopher's repetition filters (arXiv 2112.11446, table A1); MiCoTA has no such rule",
    )
    timeout_s: float = option(10.0, doc="time limit for comparing one pair of answers, in seconds", source="ours")
    workers: int = option(2, doc="grading processes", operational=True)

    def __post_init__(self) -> None:
        at_least(self, max_tokens=1, timeout_s=0.1, workers=1)
        for name in ("max_foreign", "max_repeated"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise InputError(f"`{name}` must be at least 0 and below 1, not {share}")


@dataclass(kw_only=True)
class FilterConfig(FilterSettings):
    """`micota filter`: completions in; corpus, rejects and counts out."""

    completions: str = option(
        doc="completions as `micota generate` writes them: JSONL, a JSON list (both also .gz or .zst), Parquet or "
        "hf://datasets/ORG/NAME[:SPLIT]"
    )
    out: str = option(doc="JSONL of accepted rows; OUT.rejects.jsonl and OUT.counts.json are written next to it")
    allow_empty: bool = option(
        True,
        doc="false, as in the rounds of a recipe (`on_policy`): that no completion is accepted is an error, and OUT is "
        "not written",
        operational=True,
    )


@dataclass(kw_only=True)
class MixConfig:
    """`micota mix`: several corpora combined in a stated ratio, with at most one row per problem."""

    parts: dict[str, int] = option(doc="corpus file -> its share, e.g. {long.jsonl: 1, short.jsonl: 4}")
    out: str = option(doc="JSONL of the mixed corpus")
    seed: int = option(0, doc="seed of the choice of a part for each problem")
