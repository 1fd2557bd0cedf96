"""avg@k's clustered standard error against statsmodels, pass@k against enumeration, coverage by simulation."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from micota_fast.statistics.intervals import (
    clustered_se,
    difference,
    macro_average,
    mean_pass_at,
    median95,
    pass_at_k,
    student_t95,
    wilson95,
)


class TestClusteredSe:
    @pytest.mark.parametrize(("problems", "samples"), [(2, 3), (30, 1), (30, 16), (400, 4)])
    def test_is_that_of_statsmodels(self, problems: int, samples: int) -> None:
        """OLS on a constant; its small-sample factor G / (G - 1) * (N - 1) / (N - K) is ours, as K = 1."""
        rng = np.random.default_rng([problems, samples])
        correct_PS = (rng.random((problems, samples)) < rng.beta(0.5, 0.7, (problems, 1))).astype(float)
        groups = np.repeat(np.arange(problems), samples)
        fit = sm.OLS(correct_PS.ravel(), np.ones(correct_PS.size)).fit(
            cov_type="cluster", cov_kwds={"groups": groups, "use_correction": True}
        )
        assert clustered_se(correct_PS) == pytest.approx(float(fit.bse[0]), rel=1e-9)

    def test_copies_of_an_answer_change_nothing(self) -> None:
        once = np.array([[1.0], [0.0], [1.0], [1.0]])
        assert clustered_se(np.repeat(once, 8, axis=1)) == pytest.approx(clustered_se(once))
        assert clustered_se(once) == pytest.approx(once.std(ddof=1) / 2)

    def test_one_problem_tells_nothing(self) -> None:
        with pytest.raises(ValueError, match="two problems or more, got 1"):
            clustered_se(np.ones((1, 8)))

    def test_is_the_spread_of_avg_at_k_over_draws_of_problems(self) -> None:
        rng = np.random.default_rng(0)
        draws = rng.random((4000, 50, 4)) < rng.beta(0.5, 0.7, (4000, 50, 1))
        squares = [clustered_se(correct_PS.astype(float)) ** 2 for correct_PS in draws]
        assert np.mean(squares) == pytest.approx(draws.mean(axis=(1, 2)).var(ddof=1), rel=0.08)


class TestPassAtK:
    @pytest.mark.parametrize("n", [1, 2, 5, 8])
    def test_is_the_share_of_all_choices_with_a_right_one(self, n: int) -> None:
        for c in range(n + 1):
            for k in range(1, n + 1):
                choices = [any(i < c for i in chosen) for chosen in itertools.combinations(range(n), k)]
                assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(choices), len(choices))), abs=1e-12)

    def test_is_the_accuracy_at_one_and_stable_for_many(self) -> None:
        assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-9)
        assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, rel=1e-9)
        assert pass_at_k(10_000, 5_000, 1_000) == 1.0

    @pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
    def test_what_cannot_be_told_is_refused(self, n: int, c: int, k: int) -> None:
        with pytest.raises(ValueError, match=rf"pass@{k} from {c} right of {n} answers"):
            pass_at_k(n, c, k)

    def test_of_a_benchmark_is_the_mean_at_powers_of_two_and_the_most(self) -> None:
        correct = [6, 3, 0]
        got = mean_pass_at(correct, 6, 6)
        assert list(got) == [1, 2, 4, 6]
        assert got == pytest.approx({k: sum(pass_at_k(6, c, k) for c in correct) / 3 for k in got})
        assert list(mean_pass_at(correct, 6, 4)) == [1, 2, 4]  # where another seed has but four
        with pytest.raises(ValueError, match=r"pass@8 from 6 right of 6 answers"):
            mean_pass_at(correct, 6, 8)


class TestAgainstLibraries:
    def test_wilson_is_that_of_statsmodels(self) -> None:
        for n in (1, 2, 3, 30, 675):
            for count in range(n + 1):
                theirs = proportion_confint(count, n, method="wilson")
                assert wilson95(count / n, n) == pytest.approx(theirs, abs=1e-12)

    def test_student_t_is_that_of_scipy(self) -> None:
        for degrees in range(1, 200):
            assert student_t95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=2e-4)

    def test_the_median_s_ranks_are_those_of_the_binomial(self) -> None:
        for n in range(1, 300):
            rank = int(np.argmax(stats.binom.cdf(np.arange(n), n, 0.5) > 0.025))
            assert median95(range(n), n) == (None if rank == 0 else (rank - 1, n - rank))

    @pytest.mark.parametrize("counts", [(10, 30, 20, 30), (0, 30, 30, 30), (3, 40, 5, 675), (7, 7, 7, 7)])
    def test_one_benchmark_and_seed_is_newcombe_s_method_10(self, counts: tuple[int, int, int, int]) -> None:
        a, n_a, b, n_b = counts
        gap = difference(macro_average([[a / n_a]], [n_a]), macro_average([[b / n_b]], [n_b]))
        theirs = confint_proportions_2indep(a, n_a, b, n_b, method="newcomb", compare="diff")
        assert (gap.low, gap.high) == pytest.approx(theirs, abs=1e-12)


def test_a_difference_of_fractions_is_no_more_than_one() -> None:
    """Two seeds far apart: Student's t with one degree of freedom is 12.7 deviations."""
    gap = difference(macro_average([[1.0], [0.7]], [30]), macro_average([[0.0]], [30]))
    assert (gap.low, gap.high) == (-1.0, 1.0)
    assert gap.spans_zero


@pytest.mark.parametrize("accuracy", [0.05, 0.3, 0.9])
def test_wilson_covers_the_truth(accuracy: float) -> None:
    """Of 4,000 sets of 30 problems, and averaged over accuracies nearby, for the count of so few is coarse."""
    rng = np.random.default_rng(1)
    truths = np.clip(rng.normal(accuracy, 0.02, 4000), 0.01, 0.99)
    bounds = [wilson95(count / 30, 30) for count in rng.binomial(30, truths)]
    covered = np.mean([low <= truth <= high for (low, high), truth in zip(bounds, truths, strict=True)])
    assert 0.935 <= covered <= 0.985


class TestByHand:
    def test_wilson_by_hand(self) -> None:
        # 8 of 10: centre (0.8 + z²/20) / (1 + z²/10), as in any textbook: 0.4902 to 0.9433.
        assert wilson95(0.8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
        low, high = wilson95(0.0, 20)
        assert low == 0.0
        assert high == pytest.approx(1.959964**2 / (20 + 1.959964**2), abs=1e-7)

    def test_one_seed_and_benchmark_is_wilson(self) -> None:
        estimate = macro_average([[0.3]], [50])
        assert (estimate.low, estimate.high) == pytest.approx(wilson95(0.3, 50))
        assert estimate.sd is None

    def test_student_t(self) -> None:
        # Printed tables of the two-sided 95% point.
        for degrees, expected in ((1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (20, 2.086), (60, 2.000)):
            assert student_t95(degrees) == pytest.approx(expected, abs=1.1e-3)

    def test_seeds_widen_by_their_own_interval(self) -> None:
        estimate = macro_average([[0.50], [0.52], [0.54]], [400])
        low, high = wilson95(0.52, 400)
        of_seeds = 4.30265 * 0.02 / math.sqrt(3)
        assert estimate.sd == pytest.approx(0.02)
        assert estimate.mean - estimate.low == pytest.approx(math.hypot(0.52 - low, of_seeds))
        assert estimate.high - estimate.mean == pytest.approx(math.hypot(high - 0.52, of_seeds))

    def test_average_weights_benchmarks_alike(self) -> None:
        estimate = macro_average([[0.2, 0.6]], [30, 1000])
        halves = [(0.2 - wilson95(0.2, 30)[0]) / 2, (0.6 - wilson95(0.6, 1000)[0]) / 2]
        assert estimate.mean == pytest.approx(0.4)
        assert estimate.below == pytest.approx(math.hypot(*halves))

    def test_difference_is_newcombes(self) -> None:
        # Newcombe 1998, Table II, method 10 for 56/70 - 48/80: 0.0524 to 0.3339.
        gap = difference(macro_average([[56 / 70]], [70]), macro_average([[48 / 80]], [80]))
        assert (gap.value, gap.low, gap.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
        assert not gap.spans_zero


def test_wilson_interval_against_its_definition() -> None:
    # the bounds p are where |share - p| = z sqrt(p (1 - p) / n)
    for share, n in ((0.1, 30), (0.5, 40), (0.884, 500), (1 / 3, 675)):
        for p in wilson95(share, n):
            assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-6)
    assert wilson95(0, 30) == pytest.approx((0, 0.113513), abs=1e-6)  # z^2 / (n + z^2)
    assert wilson95(1, 30) == pytest.approx((0.886487, 1), abs=1e-6)


class TestMedian:
    @pytest.mark.parametrize("n", [6, 7, 20, 101, 200, 1500])
    def test_the_interval_has_the_greatest_rank_that_covers_95_percent(self, n: int) -> None:
        interval = median95(range(1, n + 1), n)
        assert interval is not None
        rank = int(interval[0])
        assert interval[1] == n + 1 - rank
        below = [sum(math.comb(n, i) for i in range(r)) / 2**n for r in (rank, rank + 1)]
        assert below[0] <= 0.025 < below[1]

    def test_few_draws_and_copies(self) -> None:
        assert median95([1, 2, 3, 4, 5], 5) is None
        assert median95([x for x in range(1, 21) for _ in range(3)], 20) == median95(range(1, 21), 20) == (6, 15)
