"""What filtering and the contamination test write: OUT.counts.json and contamination.json.

A default is the value of a key that a file may lack, because an earlier version wrote it or it was made by hand.
"""

from dataclasses import dataclass, field
from typing import Any

from micota_fast.common.schema import Count, InvalidValueError, NonNegative, PositiveCount


@dataclass(frozen=True, kw_only=True)
class AcceptedTokens:
    """The lengths of accepted completions in tokens of the model that wrote them; all 0 if none was accepted."""

    mean: NonNegative
    min: Count
    max: Count
    p1: NonNegative
    p10: NonNegative
    p25: NonNegative
    p50: NonNegative
    p75: NonNegative
    p90: NonNegative
    p99: NonNegative


@dataclass(frozen=True, kw_only=True)
class CorpusCounts:
    """The content of counts.json: of `total` completions, `accepted`, which answer `problems` different problems.

    `rejected` counts the others by reason, `lengths` lists the accepted ones' tokens in file order, `rules` are the
    options that the decision depends on.
    """

    total: Count
    accepted: Count
    problems: Count | None = None
    rejected: dict[str, Count] = field(default_factory=dict)
    tokens: AcceptedTokens
    lengths: tuple[Count, ...] = ()
    rules: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.accepted > self.total:
            raise InvalidValueError("accepted", f"is {self.accepted}, more than 'total', {self.total}")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOverlap:
    """What one corpus and one benchmark of `problems` problems share.

    `exact` are the ids of problems that some row holds word for word, `gram13` of those with which some row shares 13
    words in a run; `rows` counts the rows of the corpus that do either, and `examples` are some of them: (row, id).
    """

    problems: PositiveCount
    exact: tuple[str, ...]
    gram13: tuple[str, ...]
    rows: Count
    examples: tuple[tuple[PositiveCount, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class CorpusOverlap:
    """A value of contamination.json, whose keys are corpora: the corpus's rows, and what it shares by benchmark."""

    rows: Count
    benchmarks: dict[str, BenchmarkOverlap]


Contamination = dict[str, CorpusOverlap]
