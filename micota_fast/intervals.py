"""95% intervals for accuracies, their averages over benchmarks and their differences.

One rule throughout: every source of error has an interval of its own, and independent sources combine by adding the
squared distances from the estimate to each bound (MOVER: Zou & Donner 2008, "Construction of confidence limits about
effect measures", Statistics in Medicine 27; for two proportions it is method 10 of Newcombe 1998, Statistics in
Medicine 17). With one benchmark and one seed it is exactly the Wilson interval; it never collapses at 0% or 100%.

- Problems: the Wilson interval of the accuracy on n problems. Several answers to one problem count as one: they are
  taken for copies of each other (conservative). The mean over seeds is treated as one run: all seeds
  answer the same problems, so more seeds do not make the sample of problems larger (conservative).
- Training: Student's t interval of the mean over S seeds, S - 1 degrees of freedom. One seed tells nothing about
  it; its interval then covers the problems only.
- A difference of two arms adds both arms' distances as if they had answered different problems. They answered the same
  ones, so this interval is too wide where they agree on which are hard. It is not a paired test.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
"""Two-sided 95% point of the normal distribution."""

# Two-sided 95% points of Student's t for 1 to 10 degrees of freedom; the series below is off by < 0.001 beyond them.
_T95 = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)


@dataclass(frozen=True)
class Estimate:
    """A fraction with its 95% interval.

    `below` and `above` are the distances to the bounds; the bounds themselves are kept within [0, 1].
    `seeds` holds the value of each seed; `sd` is their sample standard deviation, None for one seed.
    """

    mean: float
    sd: float | None
    below: float
    above: float
    seeds: tuple[float, ...]

    @property
    def low(self) -> float:
        return max(0.0, self.mean - self.below)

    @property
    def high(self) -> float:
        return min(1.0, self.mean + self.above)


@dataclass(frozen=True)
class Difference:
    """A difference of two fractions with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def spans_zero(self) -> bool:
        """Whether zero lies in the interval: the difference is then not distinguishable from zero."""
        return self.low <= 0.0 <= self.high


def wilson95(accuracy: float, n: int) -> tuple[float, float]:
    """Wilson score interval (95%) of a fraction `accuracy` of `n` independent problems.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927); recommended for all
    n by Brown, Cai & DasGupta, Statistical Science 16 (2001). Unlike p +- 1.96 sd it holds its level near 0 and 1.
    """
    z2 = Z95 * Z95
    centre = (accuracy + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def student_t95(degrees: int) -> float:
    """Two-sided 95% point of Student's t (beyond 10 degrees: Abramowitz & Stegun 26.7.5, to the third term)."""
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = Z95
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); the deviation of one value is None."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def macro_average(accuracies: Sequence[Sequence[float]], n: Sequence[int]) -> Estimate:
    """Average over benchmarks, each weighted alike, of the mean over seeds.

    Args:
        accuracies: one row a seed, one fraction a benchmark.
        n: number of problems of each benchmark.
    """
    count = len(n)
    seeds = tuple(math.fsum(row) / count for row in accuracies)
    mean, sd = mean_and_sd(seeds)
    below2 = above2 = 0.0
    for column, problems in zip(zip(*accuracies, strict=True), n, strict=True):
        accuracy = math.fsum(column) / len(column)
        low, high = wilson95(accuracy, problems)
        below2 += ((accuracy - low) / count) ** 2
        above2 += ((high - accuracy) / count) ** 2
    if sd is not None:
        of_training = (student_t95(len(seeds) - 1) * sd) ** 2 / len(seeds)
        below2, above2 = below2 + of_training, above2 + of_training
    return Estimate(mean, sd, math.sqrt(below2), math.sqrt(above2), seeds)


def difference(a: Estimate, b: Estimate) -> Difference:
    """a - b, the two taken as independent (see the module's docstring)."""
    value = a.mean - b.mean
    return Difference(value, value - math.hypot(a.below, b.above), value + math.hypot(a.above, b.below))
