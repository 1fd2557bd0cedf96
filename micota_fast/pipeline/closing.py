"""What `micota run` says at its end: the result in one small table, and where to go from there."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from micota_fast.common.schema import NonNegative, Share, load

HEADS = ("arm", "average, %", "delta, points", "answer, tokens")


@dataclass(frozen=True)
class Average:
    """The average accuracy of an arm, mean over seeds."""

    mean: Share


@dataclass(frozen=True)
class Delta:
    """The difference of an arm's average to the untouched student's, as a fraction, with its 95% interval."""

    value: float
    interval95: tuple[float, float]


@dataclass(frozen=True)
class Answers:
    """The mean length of an arm's answers."""

    mean_tokens: NonNegative | None


@dataclass(frozen=True)
class Arm:
    """A row of the table; `delta` is None for the untouched student."""

    average: Average
    delta: Delta | None
    answers: Answers


@dataclass(frozen=True)
class Report:
    """What the closing needs of the report stage's report.json, which has more keys."""

    arm_order: tuple[str, ...]
    arms: dict[str, Arm]


def closing(folder: Path, first_seed: int) -> str:
    """Return the small table of a finished run's report and three lines: the report, the answers, the next step.

    Args:
        folder: of the run.
        first_seed: of the recipe, whose student of the best arm is the one to try.

    Raises:
        InputError: the report.json there is missing or damaged.
    """
    report = load(Report, folder / "report" / "report.json")
    arms = {name: report.arms[name] for name in report.arm_order}
    rows = [HEADS, *(_row(name, arm) for name, arm in arms.items())]
    trained = [name for name, arm in arms.items() if arm.delta is not None]
    if trained:
        best = max(trained, key=lambda name: arms[name].average.mean)
        student = folder / "student" / f"{best}-seed{first_seed}" / "model"
        following = f"ask the student of {best}: micota serve {shlex.quote(str(student))}"
    else:
        following = "name corpora under `arms` in the recipe, to train students on"
    return "\n".join(
        [
            *_aligned(rows),
            "",
            f"report:  {folder / 'report' / 'report.html'}",
            f"answers: {folder / 'report' / 'answers.html'}",
            f"next:    {following}",
        ]
    )


def _row(name: str, arm: Arm) -> tuple[str, ...]:
    delta = "-"
    if arm.delta is not None:
        low, high = arm.delta.interval95
        delta = f"{100 * arm.delta.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    tokens = arm.answers.mean_tokens
    return name, f"{100 * arm.average.mean:.1f}", delta, "-" if tokens is None else f"{tokens:,.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
