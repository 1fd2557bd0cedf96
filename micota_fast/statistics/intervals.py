"""95% intervals for accuracies, their averages over benchmarks and their differences.

One rule applies throughout: every source of error has its own interval, and independent sources combine by adding the
squared distances from the estimate to each bound (MOVER: Zou & Donner 2008, "Construction of confidence limits about
effect measures", Statistics in Medicine 27; for two proportions it is method 10 of Newcombe 1998, Statistics in
Medicine 17). With one benchmark and one seed it is exactly the Wilson interval; it never collapses at 0% or 100%.

- Problems: the Wilson interval of the accuracy on n problems. Several answers to one problem count as one: they are
  treated as copies of each other (conservative). The mean over seeds is treated as one run: all seeds answer the same
  problems, so more seeds do not make the sample of problems larger (conservative).
- Training: Student's t interval of the mean over S seeds, S - 1 degrees of freedom. One seed says nothing about
  training; the interval then covers the problems only.
- A difference of two arms: `difference` adds both arms' distances as if they had answered different problems. They
  answered the same ones, so this interval is too wide if they agree on which are hard. `paired` computes the interval
  over problems from the answers themselves, and `with_training` adds the spread over seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
        """Whether zero lies within the interval: the difference is then not distinguishable from zero."""
        return self.low <= 0.0 <= self.high


def wilson95(accuracy: float, n: int) -> tuple[float, float]:
    """Compute the Wilson score interval (95%) of a fraction `accuracy` of `n` independent problems.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927); recommended for all
    n by Brown, Cai & DasGupta, Statistical Science 16 (2001). Unlike p +- 1.96 sd it keeps its level near 0 and 1.
    """
    z2 = Z95 * Z95
    centre = (accuracy + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_se(correct_PS: NDArray[np.float64]) -> float:
    """Compute the standard error of avg@k, the mean over S answers to each of P >= 2 problems, clustered by problem.

    Miller, "Adding error bars to evals" (arXiv 2411.00640), section 2.2, on the sandwich estimator of Liang & Zeger,
    Biometrika 73 (1986): the squares of the clusters' summed residuals, so that answers to one problem may depend on
    each other in any way. The factor P / (P - 1) makes its square unbiased here, since it is the variance of the
    problems' means over P. A standard error of 0 (all problems alike) is not certainty: `wilson95` still holds then.

    Args:
        correct_PS: 1 if the answer is correct, else 0; or any score.

    Raises:
        ValueError: there is a single problem, which has no spread.
    """
    problems, samples = correct_PS.shape
    if problems < 2:
        raise ValueError(f"a standard error needs two problems or more, got {problems}")
    residual_P = correct_PS.sum(axis=1) - samples * correct_PS.mean()
    return math.sqrt(float((residual_P**2).sum()) * problems / (problems - 1)) / (problems * samples)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate, without bias, the chance that one of k answers to a problem is correct if c of n answers are.

    1 - C(n - c, k) / C(n, k), as a product: Chen et al., "Evaluating large language models trained on code"
    (arXiv 2107.03374), section 2.1 and figure 3.

    Raises:
        ValueError: not 0 <= c <= n or not 1 <= k <= n: fewer than k answers are not enough.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} from {c} right of {n} answers: needs 0 <= right <= answers and 1 <= k <= answers")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def mean_pass_at(correct: Sequence[int], n: int, most: int) -> dict[int, float]:
    """Average `pass_at_k` over problems, for k = 1, 2, 4, ... and `most`.

    Args:
        correct: of each problem, how many of its `n` answers are correct.
        n: answers to each problem.
        most: the largest k, at most `n`.
    """
    ks = [*(1 << i for i in range(most.bit_length())), most]
    return {k: math.fsum(pass_at_k(n, c, k) for c in correct) / len(correct) for k in ks}


def median95(values: Sequence[float], n: int) -> tuple[float, float] | None:
    """Compute the 95% interval of a median from `n` independent draws of any distribution, by order statistics.

    It runs from the l-th smallest value to the l-th largest, with the greatest l for which a binomial(n, 1/2) variable
    lies below l with probability <= 2.5% (David & Nagaraja, "Order Statistics", 3rd ed. 2003, section 7.1). None if
    there is no such l: below 6 draws.

    Args:
        values: `n` of them; or several per draw, which then count as copies of each other (conservative).
        n: the number of draws.
    """
    rank, probability, log_term = 0, 0.0, -n * math.log(2)  # of `rank` heads in n throws
    while (probability := probability + math.exp(log_term)) <= 0.025:
        log_term += math.log((n - rank) / (rank + 1))
        rank += 1
    if rank == 0:
        return None
    ordered = sorted(values)
    at = (rank - 1) * len(ordered) // n
    return ordered[at], ordered[-1 - at]


def student_t95(degrees: int) -> float:
    """Return the two-sided 95% point of Student's t (above 10 degrees by Abramowitz & Stegun 26.7.5, three terms)."""
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
    """Compute the mean and the sample standard deviation (n - 1); the deviation of one value is None."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def macro_average(accuracies: Sequence[Sequence[float]], n: Sequence[int]) -> Estimate:
    """Average the mean over seeds over benchmarks, each weighted alike.

    Args:
        accuracies: one row per seed, one fraction per benchmark.
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
    """Compute a - b, the two taken as independent (see the module's docstring)."""
    value = a.mean - b.mean
    below, above = math.hypot(a.below, b.above), math.hypot(a.above, b.below)
    return Difference(value, max(-1.0, value - below), min(1.0, value + above))


def with_training(problems: Difference, a: Estimate, b: Estimate) -> Difference:
    """Compute a - b, the interval of the `problems` widened by each arm's Student t interval over its seeds.

    The spread over seeds contains the part of the problems' error that differs from seed to seed, and so does the mean
    over seeds: it counts twice (conservative; for two crossed sources of error no resampling is exact either, Owen,
    "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007). An arm of one seed adds nothing.
    """
    of_training = [
        student_t95(len(arm.seeds) - 1) * arm.sd / math.sqrt(len(arm.seeds)) for arm in (a, b) if arm.sd is not None
    ]
    # The bounds lie around the bootstrap's centre, which is not quite the estimate.
    below = math.hypot(max(0.0, problems.value - problems.low), *of_training)
    above = math.hypot(max(0.0, problems.high - problems.value), *of_training)
    return Difference(problems.value, max(-1.0, problems.value - below), min(1.0, problems.value + above))
