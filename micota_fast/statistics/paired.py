"""Tests and intervals for the difference of two arms that answered the same problems.

Throughout, `difference_PC` holds a benchmark's differences of scores: P problems in one order for all arms, C
comparisons. Each entry is the share of one arm's answers to the problem that are correct, minus the other arm's. An
arm's answers to one problem, over samples and training seeds, are averaged first: the problem is the unit that is
drawn, and several answers to it are not several problems. The average over benchmarks weights each alike.

The error of training is not resampled: from two or three seeds a bootstrap sees half or two thirds of the variance. It
enters the interval by Student's t instead (`intervals.with_training`). The tests do not include it: their null
hypothesis is about the given models.

Random words are Philox 4x64's (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a stream of
words per benchmark; sums are exact (see `_grid`). So equal inputs give equal bits on every machine.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
_AT_ONCE = 256  # resamples; even, so that no half word is left over
_GRID = 2.0**32
_TIE = 1e-9  # above what the grid can move a mean by, 2**-33


def mcnemar_exact(a_right_b_wrong: int, b_right_a_wrong: int) -> float:
    """Compute the two-sided p-value that two arms are equally often correct, with one answer per problem each.

    Of the problems that only one arm solves, each arm's share is binomial with probability 1/2; the p-value is twice
    the smaller tail, at most 1 (McNemar, Psychometrika 12, 1947; the exact form as in Fagerland, Lydersen & Laake, "The
    McNemar test for binary matched-pairs data", BMC Medical Research Methodology 13:91, 2013). It is 1 if there are no
    such problems.
    """
    n, fewer = a_right_b_wrong + b_right_a_wrong, min(a_right_b_wrong, b_right_a_wrong)
    term, tail = 1, 0
    for successes in range(fewer + 1):
        tail += term
        term = term * (n - successes) // (successes + 1)
    return min(1.0, 2 * tail / 2**n)  # whole numbers up to here


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number: rejecting those up to 5% makes any error with probability at most 5%.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979). It
    holds however the tests depend on each other, as those of arms on the same problems do.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def paired_bootstrap(
    differences: Sequence[Floats], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Floats, Floats]:
    """Compute 95% percentile intervals of mean differences, with problems resampled within each benchmark.

    Each benchmark gets two more problems before it is resampled, one that only the first arm solves and one that only
    the second does. Without them a benchmark on which the arms never differ would have an interval of length 0, and one
    of 30 problems an interval that is too short: it contained the truth in 92 to 94% of 2,000 simulated pairs of arms,
    with them in 95 to 97%. With one answer each they make the bootstrap's centre and variance those of the adjusted
    Wald interval (Bonett & Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on
    paired data", Journal of Educational and Behavioral Statistics 37, 2012). Percentile, not BCa: on the same 30
    problems BCa contained the truth in 91 to 94% and was no shorter, so it helps nothing and is harder to explain.

    Args:
        differences: `difference_PC` of each benchmark.
        resamples: how many.
        seed: of the random words.

    Returns:
        Lower and upper bounds [benchmarks + 1, C]; the last row is the average's.
    """
    pseudo_PC = [np.stack([one := np.ones(difference_PC.shape[1]), -one]) for difference_PC in differences]
    enlarged = [np.concatenate(pair) for pair in zip(differences, pseudo_PC, strict=True)]
    means_RBC = resampled_means(enlarged, resamples=resamples, seed=seed)
    low, high = np.quantile(_with_average(means_RBC), (0.025, 0.975), axis=0)
    return low, high


def resampled_means(values: Sequence[Floats], *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Compute bootstrap means [R, benchmarks, C]: of each benchmark's P problems, P are drawn with replacement.

    All columns of `values` ([P, C], in [-1, 1]) share the draws. A problem's probability has a relative error of at
    most P / 2**32.
    """
    means_RBC = np.empty((resamples, len(values), values[0].shape[1]))
    for benchmark, value_PC in enumerate(values):
        whole_PC, n = _grid(value_PC), len(value_PC)
        for chunk, bits in _random_words(seed, benchmark, resamples, bits_each=32 * n):
            words_RP = bits.view("<u4").astype(np.int64)[: (chunk.stop - chunk.start) * n].reshape(-1, n)
            first_R1 = np.arange(len(words_RP))[:, None] * n
            counts = np.bincount(((words_RP * n >> 32) + first_R1).ravel(), minlength=words_RP.size)
            means_RBC[chunk, benchmark] = counts.reshape(-1, n).astype(np.float64) @ whole_PC / (_GRID * n)
    return means_RBC


def sign_flip(differences: Sequence[Floats], *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Compute two-sided p-values that the two arms are exchangeable on every problem, by flipping differences' signs.

    Fisher's randomisation test for pairs ("The Design of Experiments", 1935, section 21), over random flips: the share
    of them whose mean is at least as far from zero as the observed one, which is counted as a flip too (Phipson &
    Smyth, "Permutation p-values should never be zero", Statistical Applications in Genetics and Molecular Biology 9,
    2010). With one answer each it estimates McNemar's exact p-value.

    Args:
        differences: `difference_PC` of each benchmark.
        resamples: random flips; no p-value is below 1 / (resamples + 1).
        seed: of the random words.

    Returns:
        P-values [benchmarks + 1, C]; the last row is the average's.
    """
    flipped_RBC = np.empty((resamples, len(differences), differences[0].shape[1]))
    for benchmark, difference_PC in enumerate(differences):
        whole_PC, n = _grid(difference_PC), len(difference_PC)
        for chunk, bits in _random_words(seed, benchmark, resamples, bits_each=n):
            kept_RP = np.unpackbits(bits.view(np.uint8))[: (chunk.stop - chunk.start) * n].reshape(-1, n)
            sums_RC = 2 * (kept_RP.astype(np.float64) @ whole_PC) - whole_PC.sum(axis=0)
            flipped_RBC[chunk, benchmark] = sums_RC / (_GRID * n)
    observed_1BC = np.stack([_grid(d_PC).sum(axis=0) / (_GRID * len(d_PC)) for d_PC in differences])[None]
    flipped, observed = _with_average(flipped_RBC), _with_average(observed_1BC)
    return (1 + (np.abs(flipped) >= np.abs(observed) - _TIE).sum(axis=0)) / (resamples + 1)


def _with_average(means_RBC: Floats) -> Floats:
    """Append the average over benchmarks: [R, benchmarks + 1, C]. They are added one by one, in a fixed order."""
    total_RC = np.zeros_like(means_RBC[:, 0])
    for benchmark in range(means_RBC.shape[1]):
        total_RC += means_RBC[:, benchmark]
    return np.concatenate([means_RBC, total_RC[:, None] / means_RBC.shape[1]], axis=1)


def _grid(value_PC: Floats) -> Floats:
    """Round values in [-1, 1] to multiples of 2**-32. Sums of up to 2**21 are exact in float64, in any order."""
    return np.round(value_PC * _GRID)


def _random_words(seed: int, stream: int, resamples: int, bits_each: int) -> Iterator[tuple[slice, NDArray[np.uint64]]]:
    """Yield chunks of resamples with the random words for them, little-endian."""
    generator = np.random.Philox(key=np.array([seed, stream], np.uint64))
    for start in range(0, resamples, _AT_ONCE):
        chunk = slice(start, min(start + _AT_ONCE, resamples))
        words = -(-(chunk.stop - chunk.start) * bits_each // 64)
        yield chunk, generator.random_raw(words).astype("<u8")
