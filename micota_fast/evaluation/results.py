"""What an evaluation writes: results.json, and the graded answers in rows/NAME.jsonl.

A default is the value of a key that a file may lack, because an earlier version wrote it or it was made by hand.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from micota_fast.common.json_io import parse_json
from micota_fast.common.records import Completion, read_lines
from micota_fast.common.schema import (
    ABSENT,
    Absent,
    Count,
    InvalidValueError,
    NonNegative,
    PositiveCount,
    Share,
    from_json,
)

Outcome = Literal["correct", "wrong", "no_answer", "truncated", "aborted", "timeout", "crashed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
ABORTED = ("abort", "content_filter")
"""Finish reasons of answers that count as `aborted`, whatever they hold."""


@dataclass(frozen=True, kw_only=True)
class ProtocolScore:
    """The score of a benchmark's answers by one protocol; see `Score` for the keys of the same names."""

    correct: Count | None = None
    accuracy: Share
    standard_error: NonNegative | Absent | None = ABSENT
    majority: Share | Absent = ABSENT
    pass_at: dict[str, Share] | Absent = ABSENT
    undecided: Count | Absent = ABSENT
    """Answers of which the judge said neither True nor False; absent for the other protocols."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How `n` answers to `problems` problems were graded.

    `n` = `correct` + `wrong` + `no_answer` (no final answer found) + `truncated` (cut off at the token limit, and not
    correct by then) + `aborted` (the server failed) + `timeout` + `crashed` (the comparison reached its limit).
    `accuracy` = correct / n, `wilson95` its interval over the problems, `mean_tokens` of an answer.
    """

    problems: PositiveCount | None = None
    n: PositiveCount
    correct: Count | None = None
    wrong: Count | None = None
    no_answer: Count | None = None
    truncated: Count | None = None
    aborted: Count | None = None
    timeout: Count | None = None
    crashed: Count | None = None
    accuracy: Share
    wilson95: tuple[Share, Share] | None = None
    mean_tokens: NonNegative | None = None
    # Present if there are several answers per problem:
    samples: PositiveCount | Absent = ABSENT
    """Answers per problem."""
    standard_error: NonNegative | Absent | None = ABSENT
    """Of `accuracy`, as a fraction, with the problems as clusters; None for a single problem."""
    majority: Share | Absent = ABSENT
    """maj@samples: of the problems, the share whose most frequent answer is right; earlier versions lack it."""
    majority95: tuple[Share, Share] | Absent = ABSENT
    """Its Wilson interval over the problems."""
    pass_at: dict[str, Share] | Absent = ABSENT
    """"k" -> pass@k."""
    pass95: tuple[Share, Share] | Absent = ABSENT
    """The Wilson interval over the problems of pass@samples; earlier versions lack it."""

    def __post_init__(self) -> None:
        if self.size > self.n:
            raise InvalidValueError("problems", f"is {self.size}, more than 'n', {self.n} answers")
        if self.correct is not None and abs(self.correct / self.n - self.accuracy) > 1e-6:
            share = f"{self.correct} correct of {self.n} is {self.correct / self.n:.6f}"
            raise InvalidValueError("accuracy", f"is {self.accuracy}, but {share}")

    @property
    def size(self) -> int:
        """The number of problems; earlier versions, which had one answer per problem, did not write it."""
        return self.n if self.problems is None else self.problems


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Score):
    """The score by the protocol that counts, and by every other.

    `made_by` is what the answers depend on, `grading` what the verdicts depend on.
    """

    protocol: str | None = None
    protocols: dict[str, ProtocolScore] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    grading: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocols and self.protocol is None:
            raise InvalidValueError("protocol", "is missing, but there are 'protocols'")


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """The content of scores/NAME.json: an entry of results.json, all that it was made of, and the sha256 of
    rows/NAME.jsonl, so that it need not be computed again while these are the same."""

    made_of: dict[str, Any]
    rows: str
    result: BenchmarkResult


@dataclass(frozen=True)
class Judge:
    """The model that judged what the string rule rejects, and what its verdicts depend on besides the answers."""

    model: str
    made_by: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """The content of results.json. `average` is the plain mean of the accuracies, as in the paper, and `average95` its
    interval over the benchmarks' problems."""

    model: str = ""
    average: Share | None = None
    average95: tuple[Share, Share] | None = None
    benchmarks: dict[str, BenchmarkResult]
    versions: dict[str, str] = field(default_factory=dict)
    judge: Judge | Absent = ABSENT


@dataclass(frozen=True)
class ProtocolVerdict:
    """What one protocol says of an answer. `correct` is None if the comparison did not end, or the judge said neither
    True nor False; `extracted` is the final answer that a rule has read, absent for the judge."""

    correct: bool | None
    extracted: str | Absent | None = ABSENT


@dataclass(frozen=True, kw_only=True)
class GradedAnswer(Completion):
    """A row of rows/NAME.jsonl: an answer with the verdict that counts, and that of each protocol."""

    outcome: Outcome
    extracted: str | None = None
    protocols: dict[str, ProtocolVerdict] = field(default_factory=dict)


def read_graded(path: Path) -> Iterator[tuple[str, GradedAnswer]]:
    """Yield "path:line" and the row of every row in rows/NAME.jsonl.

    Raises:
        InputError: the file cannot be read or a row is bad (file:line).
    """
    for where, line in read_lines(path):
        yield where, from_json(GradedAnswer, parse_json(line, where), where)
