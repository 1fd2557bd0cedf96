"""What `micota length-sweep` writes: sweep.json."""

from dataclasses import dataclass

from micota_fast.common.schema import Count, NonNegative, PositiveCount, Share


@dataclass(frozen=True, kw_only=True)
class AnswerTokens:
    """The lengths of answers in tokens; quantiles are interpolated linearly."""

    mean: NonNegative
    p10: NonNegative
    p25: NonNegative
    p50: NonNegative
    p75: NonNegative
    p90: NonNegative


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured at a weight.

    `finished`, `truncated` and `aborted` are shares of the answers, `accuracy` is the share that is correct, including
    those that were cut off. Lengths are of all answers but aborted ones.
    """

    weight: float
    problems: PositiveCount
    answers: PositiveCount
    finished: Share
    truncated: Share
    aborted: Share
    tokens: AnswerTokens
    median95: tuple[NonNegative, NonNegative] | None
    """The median's 95% interval; None: there are too few problems for one."""
    median_is_cut: bool
    """At least half of the answers ended at the token limit, so the true median is no less than this, and unknown."""
    correct: Count
    accuracy: Share
    wilson95: tuple[Share, Share]


@dataclass(frozen=True, kw_only=True)
class Target:
    """The median length that was wanted, and the weight that gives it, or else the problem."""

    median_tokens: PositiveCount
    weight: float | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The content of sweep.json. `knee` and `elbow` are weights (see `curve.bend`), `model` is OUT/model's identity."""

    method: str
    seed: int
    points: tuple[Measurement, ...]
    knee: float | None
    elbow: float | None
    target: Target | None
    model: str | None
    versions: dict[str, str]
