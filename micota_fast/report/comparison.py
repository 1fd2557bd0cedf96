"""Differences between arms: paired on the problems if the graded rows of both are there, else not."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from micota_fast.report.inputs import EvaluatedModel
from micota_fast.statistics.intervals import Difference, Estimate, difference, with_training
from micota_fast.statistics.paired import Floats, holm, mcnemar_exact, paired_bootstrap, sign_flip

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison(Difference):
    """A difference of two arms. `paired` says how its interval was made; only paired differences to the base have a
    p-value."""

    paired: bool
    p: float | None = None
    p_holm: float | None = None

    @property
    def clear(self) -> bool:
        """Whether zero lies outside the interval and the corrected p-value, if there is one, is at most 5%."""
        return not self.spans_zero and (self.p_holm is None or self.p_holm <= LEVEL)

    def reversed(self) -> "Comparison":
        """Return b - a, of a - b."""
        return replace(self, value=0.0 - self.value, low=0.0 - self.high, high=0.0 - self.low)


def compare(
    models: Mapping[str, Sequence[EvaluatedModel]], estimates: Mapping[str, Sequence[Estimate]]
) -> dict[tuple[str, str], list[Comparison]]:
    """Compare every arm with every one before it.

    Args:
        models: the seeds of each arm; the first arm is the base.
        estimates: of each arm, on each benchmark and, last, on average.

    Returns:
        (a, b) -> a - b on each benchmark and, last, on average. Those to the base are tested, and Holm's correction
        includes all of them, benchmarks and averages of all arms, since a reader may pick any. If there is one
        benchmark, the average is the same comparison and counts once.
    """
    found = {
        (a, b): [Comparison(gap.value, gap.low, gap.high, paired=False) for gap in map(difference, *both)]
        for b, a in itertools.combinations(estimates, 2)
        for both in [(estimates[a], estimates[b])]
    }
    base = next(iter(models))
    benchmarks = list(models[base][0].benchmarks)
    scores = {name: score for name in models if (score := _scores(models[name], benchmarks)) is not None}
    pairs = [pair for pair in found if scores.keys() >= set(pair)]
    if not pairs:
        return found
    differences = [np.stack([scores[a][k] - scores[b][k] for a, b in pairs], axis=1) for k in range(len(benchmarks))]
    bounds = np.stack(paired_bootstrap(differences), axis=-1)
    for column, (a, b) in enumerate(pairs):
        for row, (of_a, of_b) in enumerate(zip(estimates[a], estimates[b], strict=True)):
            gap = with_training(Difference(of_a.mean - of_b.mean, *bounds[row, column].tolist()), of_a, of_b)
            found[a, b][row] = Comparison(gap.value, gap.low, gap.high, paired=True)
    tested = [column for column, pair in enumerate(pairs) if base in pair]
    p_values = _p_values([difference_PC[:, tested] for difference_PC in differences])
    rows = range(len(benchmarks) + 1) if len(benchmarks) > 1 else [1]
    family = [(pairs[column], row, p_values[row][k]) for k, column in enumerate(tested) for row in rows]
    for (pair, row, p), p_holm in zip(family, holm([p for *_, p in family]), strict=True):
        found[pair][row] = replace(found[pair][row], p=p, p_holm=p_holm)
    return found


def _scores(models: Sequence[EvaluatedModel], benchmarks: Sequence[str]) -> list[Floats] | None:
    """Share of correct answers to each problem, mean over seeds, by benchmark; None if rows are missing."""
    every = [model.graded for model in models if model.graded is not None]
    if len(every) < len(models):
        return None
    return [
        np.mean([np.array(graded[name].correct) / graded[name].samples for graded in every], axis=0)
        for name in benchmarks
    ]


def _p_values(differences: Sequence[Floats]) -> list[list[float]]:
    """P-values of each benchmark and of the average, by comparison: exact if all differences are -1, 0 and 1."""
    p_values: list[list[float]] = sign_flip(differences).tolist()
    for row, difference_PC in enumerate(differences):
        for column, difference_P in enumerate(difference_PC.T):
            if np.isin(difference_P, (-1.0, 0.0, 1.0)).all():
                p_values[row][column] = mcnemar_exact(int((difference_P > 0).sum()), int((difference_P < 0).sum()))
    # If there is one benchmark, the average is the same comparison.
    return [*p_values[:-1], p_values[0] if len(differences) == 1 else p_values[-1]]
