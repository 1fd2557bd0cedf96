"""From the inputs to the numbers of the report, and to the sentences that say which way they fell."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from micota_fast.common.schema import Absent
from micota_fast.corpus.results import BenchmarkOverlap
from micota_fast.evaluation.results import BenchmarkResult
from micota_fast.report.comparison import Comparison, compare
from micota_fast.report.inputs import EvaluatedModel, Inputs, LossCurve
from micota_fast.statistics.intervals import Estimate, clustered_se, macro_average, mean_and_sd, mean_pass_at
from micota_fast.statistics.paired import RESAMPLES

BASE = "base"
METHOD_ARM = "mid"
"""The arm that the method (arXiv 2507.01887) predicts to come first: the one the headline is about."""

INTERVAL_METHOD = (
    "Accuracies are means over seeds; ± is the sample standard deviation over seeds, [ ] a 95% interval. The interval "
    "combines two sources of error by adding the squared distances to each bound (MOVER, Zou & Donner 2008): the "
    "sample of problems (the Wilson interval of the mean accuracy; more seeds do not shrink it, as all answer the "
    "same problems) and training (Student's t over seeds). A single run has only the first. The average weights each "
    "benchmark alike. Differences between arms are paired on the problems where the graded rows of both arms are "
    f"available: problems are drawn with replacement, {RESAMPLES:,} times, within each benchmark, and with a problem "
    "both arms' answers to it, averaged over samples and seeds; the interval runs from the 2.5th to the 97.5th "
    "percentile. "
    "Two problems are added to each benchmark before, one that only the first arm solves and one that only the second "
    "does (the bootstrap of Bonett & Price's adjusted interval, 2012): that two arms agree on 30 problems is no proof "
    "that they always do. Seeds are not drawn, as two or three say too little of the rest: Student's t over each arm's "
    "seeds is added as above. Where rows are missing, the arms count as if they had answered different problems, "
    "which makes the interval wide; the table says where. Intervals are not corrected for the number of comparisons; "
    "the p-values of the differences to the untouched student are, by Holm's method over all of them (every arm on "
    "every benchmark and on average), since any of them may be quoted. A difference counts as distinguishable from "
    "zero if its interval is clear of zero and its corrected p-value, where there is one, is at most 0.05."
)


ONE_SEED = "Arms trained once say nothing about training noise: their intervals cover the sample of problems only."


@dataclass(frozen=True)
class Answers:
    """How an arm's answers look. `mean_tokens` and its `sd` over seeds; the rest are fractions of all answers."""

    mean_tokens: float | None
    mean_tokens_sd: float | None
    truncated: float | None
    no_answer: float | None
    timeout: float | None


@dataclass(frozen=True)
class Sampled:
    """One benchmark with several answers per problem, of one arm, mean over seeds.

    `accuracy` is the mean over all answers, `standard_error` covers the sample of problems but not training; None for a
    single problem. `pass_at` holds pass@k for k = 1, 2, 4, ... and `samples`, that of the seed with the fewest.
    `majority` is maj@samples; None if the seeds have another number of samples, or results of earlier versions lack it.
    `pass95` and `majority95` are intervals as of `Estimate`.
    """

    samples: int
    accuracy: float
    standard_error: float | None
    pass_at: dict[int, float]
    pass95: tuple[float, float]
    majority: float | None
    majority95: tuple[float, float] | None


@dataclass(frozen=True)
class Arm:
    """One row of the table. `delta` is the average minus the base's, None for the base itself; `deltas` the same by
    benchmark; `sampled` has the benchmarks with several answers to each problem."""

    name: str
    benchmarks: dict[str, Estimate]
    average: Estimate
    delta: Comparison | None
    deltas: dict[str, Comparison]
    sampled: dict[str, Sampled]
    answers: Answers


@dataclass(frozen=True)
class Summary:
    """The numbers of the report. `problems` maps each benchmark to its size; `arms` starts with the base; `gaps` maps
    two arms' names, the later first, to the difference of their averages; `chance` maps the benchmarks where it is
    known to the accuracy of a guess."""

    problems: dict[str, int]
    arms: tuple[Arm, ...]
    gaps: dict[tuple[str, str], Comparison]
    chance: dict[str, float]

    @property
    def average_chance(self) -> float | None:
        """The average of a guess; None if chance is not known on every benchmark."""
        return None if len(self.chance) < len(self.problems) else math.fsum(self.chance.values()) / len(self.chance)

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
        if not others or not all(self.gap(self.best, other).clear for other in others):
            return None
        return self.best

    def gap(self, a: Arm, b: Arm) -> Comparison:
        """Return the average of `a` minus that of `b`."""
        return self.gaps[a.name, b.name] if (a.name, b.name) in self.gaps else self.gaps[b.name, a.name].reversed()


def summarise(inputs: Inputs) -> Summary:
    """Compute the numbers of every arm from checked inputs."""
    problems = {name: result.size for name, result in inputs.base.benchmarks.items()}
    models = {BASE: [inputs.base], **inputs.arms}
    estimates = {name: _estimates(of_arm, problems) for name, of_arm in models.items()}
    comparisons = compare(models, estimates)
    arms = []
    for name, (*benchmarks, average) in estimates.items():
        deltas = comparisons.get((name, BASE), [])
        arms.append(
            Arm(
                name,
                benchmarks=dict(zip(problems, benchmarks, strict=True)),
                average=average,
                delta=deltas[-1] if deltas else None,
                deltas=dict(zip(problems, deltas, strict=False)),  # the average's comes last
                sampled=_sampled(models[name]),
                answers=_answers(models[name]),
            )
        )
    gaps = {pair: of_pair[-1] for pair, of_pair in comparisons.items()}
    return Summary(problems, tuple(arms), gaps, inputs.chance)


def _estimates(models: Sequence[EvaluatedModel], problems: dict[str, int]) -> list[Estimate]:
    """The accuracy of one arm on each benchmark and, last, on average."""
    accuracies = [[model.benchmarks[benchmark].accuracy for benchmark in problems] for model in models]
    columns = zip(zip(*accuracies, strict=True), problems.values(), strict=True)
    return [
        *(macro_average([[accuracy] for accuracy in column], [n]) for column, n in columns),
        macro_average(accuracies, list(problems.values())),
    ]


def _sampled(models: Sequence[EvaluatedModel]) -> dict[str, Sampled]:
    """The benchmarks of one arm that have several answers per problem; none if graded rows are missing."""
    every = [model.graded for model in models if model.graded is not None]
    if len(every) < len(models):
        return {}
    found = {}
    for name in models[0].benchmarks:
        graded = [of_seed[name] for of_seed in every]
        samples = min(of_seed.samples for of_seed in graded)
        if samples == 1:
            continue
        score_PS = np.stack([np.array(of_seed.correct) / of_seed.samples for of_seed in graded], axis=1)
        passed = [mean_pass_at(of_seed.correct, of_seed.samples, samples) for of_seed in graded]
        pass_at = {k: math.fsum(of_seed[k] for of_seed in passed) / len(passed) for k in passed[0]}
        standard_error = clustered_se(score_PS) if len(score_PS) > 1 else None
        of_pass = macro_average([[of_seed[samples]] for of_seed in passed], [len(score_PS)])
        majority = majority95 = None
        voted = [of_seed.benchmarks[name].majority for of_seed in models]
        shares = [share for share in voted if not isinstance(share, Absent)]
        if len(shares) == len(graded) and all(of_seed.samples == samples for of_seed in graded):
            of_majority = macro_average([[share] for share in shares], [len(score_PS)])
            majority, majority95 = of_majority.mean, (of_majority.low, of_majority.high)
        found[name] = Sampled(
            samples=samples,
            accuracy=float(score_PS.mean()),
            standard_error=standard_error,
            pass_at=pass_at,
            pass95=(of_pass.low, of_pass.high),
            majority=majority,
            majority95=majority95,
        )
    return found


def _answers(models: Sequence[EvaluatedModel]) -> Answers:
    every = [result for model in models for result in model.benchmarks.values()]
    total = sum(result.n for result in every)

    def share(counts: list[int | None]) -> float | None:
        known = [count for count in counts if count is not None]
        return sum(known) / total if len(known) == len(counts) else None

    tokens = [_mean_tokens(list(model.benchmarks.values())) for model in models]
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
    """The mean over all answers of a model, so that each benchmark weighs by its size."""
    known = [result.mean_tokens * result.n for result in results if result.mean_tokens is not None]
    return math.fsum(known) / sum(result.n for result in results) if len(known) == len(results) else None


def mean_curve(curves: Sequence[LossCurve]) -> LossCurve:
    """Average the seeds at the steps that every seed logged."""
    by_step = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in curves]
    steps = tuple(step for step in curves[0].steps if all(step in seed for seed in by_step))
    return LossCurve(steps, tuple(math.fsum(seed[step] for seed in by_step) / len(by_step) for step in steps))


def percent(fraction: float) -> str:
    """Format a fraction: 0.4321 -> '43.2'."""
    return f"{100 * fraction:.1f}"


def points(fraction: float) -> str:
    """Format a difference in percentage points, with a true minus sign: '+3.4', '−0.2'. Zero has no sign."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def p_value(p: float) -> str:
    """Format a p-value: 'p = 0.012', 'p < 0.001'."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def headline(summary: Summary) -> tuple[str, str]:
    """State the finding in one sentence, and what qualifies it, whichever way the numbers fall."""
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
    if delta.p_holm is not None:
        spread += f"; {p_value(delta.p_holm)} after Holm's correction"
    reference = f"the untouched student's {percent(base.average.mean)}%"
    start = f"The {focus.name} arm averages {percent(focus.average.mean)}% {over}"
    if not delta.clear:
        first = (
            f"{start}; its difference of {points(delta.value)} points to {reference} is not distinguishable from zero "
            f"({spread})."
        )
    else:
        side = "above" if delta.value > 0 else "below"
        first = f"{start}, {percent(abs(delta.value))} points {side} {reference} ({spread})."
    rest = [
        _compared(summary, focus),
        _others_against_base(summary, focus),
    ]
    if summary.best.average.mean > focus.average.mean:
        rest.append(_highest(summary, focus))
    if any(arm.average.sd is None for arm in summary.trained):
        rest.append(ONE_SEED)
    return first, " ".join(sentence for sentence in rest if sentence)


def _compared(summary: Summary, focus: Arm) -> str:
    others = [(arm.name, summary.gap(focus, arm)) for arm in summary.trained if arm is not focus]
    groups = _by_side(others)
    parts = [f"{side} {_list(names)}" for side, names in groups.items() if names]
    return f"Against the other trained arms, {focus.name} is {_list(parts, '; ')}." if parts else ""


def _others_against_base(summary: Summary, focus: Arm) -> str:
    groups = _by_side([(arm.name, arm.delta) for arm in summary.trained if arm is not focus and arm.delta is not None])
    parts = [
        f"{_list(names)} {'is' if len(names) == 1 else 'are'} {side} it" for side, names in groups.items() if names
    ]
    return f"Against the untouched student, {_list(parts, '; ')}." if parts else ""


def _highest(summary: Summary, focus: Arm) -> str:
    apart = "distinguishable from" if summary.gap(summary.best, focus).clear else "not distinguishable from"
    label = "the untouched student's" if summary.best is summary.arms[0] else f"that of {summary.best.name}"
    return f"The highest average is {label}, {percent(summary.best.average.mean)}%, {apart} that of {focus.name}."


def _by_side(gaps: Sequence[tuple[str, Comparison]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"above": [], "below": [], "not distinguishable from": []}
    for name, gap in gaps:
        side = "not distinguishable from" if not gap.clear else "above" if gap.value > 0 else "below"
        groups[side].append(f"{name} ({points(gap.value)})")
    return groups


def _list(items: Sequence[str], separator: str = "") -> str:
    if separator or len(items) < 2:
        return separator.join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def contamination_finding(overlaps: Mapping[str, Mapping[str, BenchmarkOverlap]]) -> str:
    """State in one sentence whether the training corpora hold benchmark problems."""
    held = {
        corpus: [name for name, overlap in of_corpus.items() if overlap.rows] for corpus, of_corpus in overlaps.items()
    }
    named = [f"{corpus} ({', '.join(names)})" for corpus, names in held.items() if names]
    if not named:
        return "No text of a benchmark was found in the training corpora."
    return f"Text of benchmarks was found in {', '.join(named)}: accuracy there may be memory."
