"""What `micota align` writes of each corpus: NAME.json.

A default is the value of a key that a file may lack, because an earlier version wrote it or it was made by hand.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from micota_fast.common.schema import ABSENT, Absent, Bounds, Count, NonNegative, Share

STEPS = 30
"""Lines of an answer that are distinguished; the last entry of `by_step` is of all lines from this one on."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A quantity over the documents of a corpus: mean, standard deviation, and quantiles by linear interpolation."""

    total: Count | Absent = ABSENT
    """The sum, of token counts only."""
    mean: NonNegative
    sd: NonNegative
    p1: NonNegative
    p10: NonNegative
    p25: NonNegative
    p50: NonNegative
    p75: NonNegative
    p90: NonNegative
    p99: NonNegative


@dataclass(frozen=True, kw_only=True)
class Learnability:
    """The learnability score and what it is compared with; see `alignment.learnability`."""

    nats_per_answer: Distribution
    """Negative log-likelihood of a whole answer: its mean is the score."""
    departures_per_answer: Distribution
    """Tokens of an answer that are not the student's first choice."""
    rank_surprisal_ratio: NonNegative
    """Sum of ranks, each clipped, over the sum of nats (arXiv 2601.14249)."""
    top1: Share | None = None
    """Share of all tokens that are the student's first choice."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The lines at one place of their answers: mean negative log-likelihood (nats per token) and number of tokens."""

    nll: NonNegative
    tokens: Count


@dataclass(frozen=True, kw_only=True)
class Markers:
    """Phrases of reflection per 1,000 tokens: all of them, and the most frequent by name."""

    total: NonNegative
    by_phrase: dict[str, NonNegative]


@dataclass(frozen=True, kw_only=True)
class OwnOverlap:
    """Share of an answer's runs of words that the student's own answers to the problem hold: mean over `answers`."""

    mean: Share
    answers: Count


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How likely the untrained student finds a corpus. Tokens are supervised ones, in the student's vocabulary."""

    corpus: str = ""
    model: str = ""
    documents: Count | None = None
    dropped: Count | None = None
    """Documents above the limit of tokens, which are not measured."""
    perplexity: Annotated[float, Bounds(1)]
    """exp(`nll`)."""
    nll: NonNegative
    """Mean negative log-likelihood over all tokens, nats."""
    document_nll: Distribution | None = None
    """The mean of each document, nats per token."""
    tokens: Distribution
    lengths: tuple[Count, ...] = ()
    """Tokens of each document, in file order."""
    documents_fingerprint: str = ""
    learnability: Learnability | None = None
    by_position: tuple[NonNegative | None, ...] = ()
    """Mean nll of each tenth of the documents; None: no document is long enough to have this tenth."""
    by_step: tuple[Step, ...] = ()
    """The answers' first, second ... line; see STEPS."""
    unlikely: dict[str, Share] = field(default_factory=dict)
    """Probability -> share of the tokens that are less likely."""
    markers: Markers | None = None
    own_overlap: OwnOverlap | None = None
    """None: the student's own answers were not given, or answer none of the problems."""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
