"""From the inputs to the numbers of the report, and to the sentences that say which way they fell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from micota_fast.intervals import Difference, Estimate, difference, macro_average, mean_and_sd
from micota_fast.report.inputs import BenchmarkResult, Inputs, LossCurve, Results

BASE = "base"
METHOD_ARM = "mid"
"""The arm that the method (arXiv 2507.01887) predicts to come first: the one the headline is about."""

INTERVAL_METHOD = (
    "Accuracies are means over seeds; ± is the sample standard deviation over seeds, [ ] a 95% interval. The interval "
    "combines two sources of error by adding the squared distances to each bound (MOVER, Zou & Donner 2008): the "
    "sample of problems (the Wilson interval of the mean accuracy; more seeds do not shrink it, as all answer the "
    "same problems) and training (Student's t over seeds). A single run has only the first. The average weights each "
    "benchmark alike. The interval of Δ treats the two arms as if they had answered different problems, which makes it "
    "wide; paired tests are not part of this report, and nothing is corrected for the number of comparisons."
)


ONE_SEED = "Arms trained once say nothing of training noise: their intervals cover the sample of problems only."


@dataclass(frozen=True)
class Answers:
    """How an arm's answers look. `mean_tokens` and its `sd` over seeds; the rest are fractions of all answers."""

    mean_tokens: float | None
    mean_tokens_sd: float | None
    truncated: float | None
    no_answer: float | None
    timeout: float | None


@dataclass(frozen=True)
class Arm:
    """One row of the table. `delta` is the average minus the base's; None for the base itself."""

    name: str
    benchmarks: dict[str, Estimate]
    average: Estimate
    delta: Difference | None
    answers: Answers


@dataclass(frozen=True)
class Summary:
    """The numbers of the report. `problems` maps each benchmark to its size; `arms` starts with the base."""

    problems: dict[str, int]
    arms: tuple[Arm, ...]

    @property
    def trained(self) -> tuple[Arm, ...]:
        return self.arms[1:]

    @property
    def best(self) -> Arm:
        """The arm with the highest average (the first of equals)."""
        return max(self.arms, key=lambda arm: arm.average.mean)

    @property
    def winner(self) -> Arm | None:
        """The best arm if its average is distinguishable from that of every other arm, else None."""
        others = [arm for arm in self.arms if arm is not self.best]
        if not others or any(difference(self.best.average, other.average).spans_zero for other in others):
            return None
        return self.best


def summarise(inputs: Inputs) -> Summary:
    """Compute every arm's row from checked inputs."""
    problems = {name: result.problems for name, result in inputs.base.benchmarks.items()}
    base = _arm(BASE, [inputs.base], problems, None)
    arms = (_arm(name, runs, problems, base.average) for name, runs in inputs.arms.items())
    return Summary(problems, (base, *arms))


def _arm(name: str, runs: Sequence[Results], problems: dict[str, int], base: Estimate | None) -> Arm:
    benchmarks = {
        benchmark: macro_average([[run.benchmarks[benchmark].accuracy] for run in runs], [n])
        for benchmark, n in problems.items()
    }
    average = macro_average(
        [[run.benchmarks[benchmark].accuracy for benchmark in problems] for run in runs], list(problems.values())
    )
    return Arm(name, benchmarks, average, difference(average, base) if base else None, _answers(runs))


def _answers(runs: Sequence[Results]) -> Answers:
    every = [result for run in runs for result in run.benchmarks.values()]
    total = sum(result.n for result in every)

    def share(counts: list[int | None]) -> float | None:
        known = [count for count in counts if count is not None]
        return sum(known) / total if len(known) == len(counts) else None

    tokens = [_mean_tokens(list(run.benchmarks.values())) for run in runs]
    known = [value for value in tokens if value is not None]
    mean, sd = mean_and_sd(known) if len(known) == len(tokens) else (None, None)
    return Answers(
        mean_tokens=mean,
        mean_tokens_sd=sd,
        truncated=share([result.truncated for result in every]),
        no_answer=share([result.no_answer for result in every]),
        timeout=share([result.timeout for result in every]),
    )


def _mean_tokens(results: Sequence[BenchmarkResult]) -> float | None:
    """Mean over all answers of a run, so each benchmark weighs by its size."""
    known = [result.mean_tokens * result.n for result in results if result.mean_tokens is not None]
    return math.fsum(known) / sum(result.n for result in results) if len(known) == len(results) else None


def mean_curve(curves: Sequence[LossCurve]) -> LossCurve:
    """The mean over seeds at the steps that every seed logged."""
    by_step = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in curves]
    steps = tuple(step for step in curves[0].steps if all(step in seed for seed in by_step))
    return LossCurve(steps, tuple(math.fsum(seed[step] for seed in by_step) / len(by_step) for step in steps))


def percent(fraction: float) -> str:
    """43.21% -> '43.2'."""
    return f"{100 * fraction:.1f}"


def points(fraction: float) -> str:
    """A signed difference in percentage points, with a true minus sign: '+3.4', '−0.2'. Zero carries no sign."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def headline(summary: Summary) -> tuple[str, str]:
    """The finding in one sentence, and what qualifies it, whichever way the numbers fall."""
    count = len(summary.problems)
    over = f"over {count} benchmark{'s' if count > 1 else ''}"
    base = summary.arms[0]
    if not summary.trained:
        return f"Only the untouched student was evaluated: it averages {percent(base.average.mean)}% {over}.", ""
    named = [arm for arm in summary.trained if arm.name == METHOD_ARM]
    focus = named[0] if named else max(summary.trained, key=lambda arm: arm.average.mean)
    delta = focus.delta
    assert delta is not None  # a trained arm always has one
    spread = f"95% interval {points(delta.low)} to {points(delta.high)}"
    reference = f"the untouched student's {percent(base.average.mean)}%"
    start = f"The {focus.name} arm averages {percent(focus.average.mean)}% {over}"
    if delta.spans_zero:
        first = (
            f"{start}; its difference of {points(delta.value)} points to {reference} is not distinguishable from zero "
            f"({spread})."
        )
    else:
        side = "above" if delta.value > 0 else "below"
        first = f"{start}, {percent(abs(delta.value))} points {side} {reference} ({spread})."
    rest = [
        _compared(f"Against the other trained arms, {focus.name}", focus, summary.trained),
        _others_against_base(summary, focus),
    ]
    if summary.best.average.mean > focus.average.mean:
        rest.append(_highest(summary, focus))
    if any(arm.average.sd is None for arm in summary.trained):
        rest.append(ONE_SEED)
    return first, " ".join(sentence for sentence in rest if sentence)


def _compared(subject: str, focus: Arm, arms: Sequence[Arm]) -> str:
    return _verdicts(
        subject, [(arm.name, difference(focus.average, arm.average)) for arm in arms if arm.name != focus.name]
    )


def _others_against_base(summary: Summary, focus: Arm) -> str:
    groups: dict[str, list[str]] = {"above": [], "below": [], "not distinguishable from": []}
    for arm in summary.trained:
        if arm is not focus and arm.delta is not None:
            side = "not distinguishable from" if arm.delta.spans_zero else "above" if arm.delta.value > 0 else "below"
            groups[side].append(f"{arm.name} ({points(arm.delta.value)})")
    parts = [
        f"{_list(names)} {'is' if len(names) == 1 else 'are'} {side} it" for side, names in groups.items() if names
    ]
    return f"Against the untouched student, {_list(parts, '; ')}." if parts else ""


def _highest(summary: Summary, focus: Arm) -> str:
    gap = difference(summary.best.average, focus.average)
    apart = "not distinguishable from" if gap.spans_zero else "distinguishable from"
    label = "the untouched student's" if summary.best is summary.arms[0] else f"that of {summary.best.name}"
    return f"The highest average is {label}, {percent(summary.best.average.mean)}%, {apart} that of {focus.name}."


def _verdicts(subject: str, against: Sequence[tuple[str, Difference]]) -> str:
    groups: dict[str, list[str]] = {"above": [], "below": [], "not distinguishable from": []}
    for name, gap in against:
        side = "not distinguishable from" if gap.spans_zero else "above" if gap.value > 0 else "below"
        groups[side].append(f"{name} ({points(gap.value)})")
    parts = [f"{side} {_list(names)}" for side, names in groups.items() if names]
    return f"{subject} is {_list(parts, '; ')}." if parts else ""


def _list(items: Sequence[str], separator: str = "") -> str:
    if separator or len(items) < 2:
        return separator.join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"
