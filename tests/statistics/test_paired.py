"""Paired tests and intervals against scipy, statsmodels, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from micota_fast.statistics.intervals import Difference, macro_average, with_training
from micota_fast.statistics.paired import Floats, holm, mcnemar_exact, paired_bootstrap, resampled_means, sign_flip

SIZES = (30, 40, 120)


def arms(rng: np.random.Generator, problems: int, datasets: int, shift: float = 0.0) -> tuple[Floats, Floats]:
    """0/1 answers [problems, datasets] of two arms that find the same problems hard; `shift` moves a's log-odds."""
    hardness = rng.normal(0.0, 2.0, (problems, datasets))
    draw = rng.random((2, problems, datasets))
    return tuple((draw[arm] < stats.logistic.cdf(hardness + shift * (arm == 0))).astype(float) for arm in (0, 1))


class TestMcNemar:
    @given(st.integers(0, 400), st.integers(0, 400))
    def test_is_that_of_scipy_and_statsmodels(self, b: int, c: int) -> None:
        p = mcnemar_exact(b, c)
        assert p == pytest.approx(float(mcnemar([[7, b], [c, 9]], exact=True).pvalue), rel=1e-9)
        if b + c:
            assert p == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-9)

    def test_at_its_ends(self) -> None:
        assert mcnemar_exact(0, 0) == 1.0
        assert mcnemar_exact(5, 5) == 1.0
        assert mcnemar_exact(0, 6) == 2 / 64
        assert mcnemar_exact(1319, 1319) == 1.0
        assert mcnemar_exact(0, 1000) == 2.0**-999


class TestHolm:
    def test_is_that_of_statsmodels(self) -> None:
        rng = np.random.default_rng(0)
        for count in (1, 2, 3, 7, 24, 60):
            p_values = rng.choice(rng.beta(0.4, 2.0, count), count).tolist()  # some of them equal
            assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist(), rel=1e-12)

    def test_by_hand(self) -> None:
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([]) == []


class TestBootstrap:
    @pytest.mark.parametrize("samples", [1, 4])
    def test_is_that_of_scipy(self, samples: int) -> None:
        """Both draw at random; each bound is within a tenth of the interval's half of scipy's."""
        rng = np.random.default_rng(samples)
        a_PS, b_PS = arms(rng, 200, samples, shift=0.4)
        a_P, b_P = a_PS.mean(axis=1), b_PS.mean(axis=1)
        low, high = np.quantile(resampled_means([(a_P - b_P)[:, None]]), (0.025, 0.975))
        theirs = stats.bootstrap(
            (a_P, b_P),
            lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=10_000,
            rng=np.random.default_rng(5),
        ).confidence_interval
        assert (low, high) == pytest.approx(tuple(theirs), abs=0.05 * (theirs.high - theirs.low))

    def test_the_interval_is_that_of_the_enlarged_benchmark(self) -> None:
        rng = np.random.default_rng(0)
        differences = [np.subtract(*arms(rng, n, 3)) for n in SIZES]
        low, high = paired_bootstrap(differences, seed=3)
        enlarged = [np.concatenate([d, np.ones((1, 3)), -np.ones((1, 3))]) for d in differences]
        means_RBC = resampled_means(enlarged, seed=3)
        expected = np.quantile(means_RBC, (0.025, 0.975), axis=0)
        assert np.array_equal(low[:-1], expected[0])
        assert np.array_equal(high[:-1], expected[1])
        # Bonett & Price's variance of the difference, and the sum of independent benchmarks' for the average.
        variances = [(np.abs(d).sum(0) + 2 - d.sum(0) ** 2 / (len(d) + 2)) / (len(d) + 2) ** 2 for d in differences]
        for benchmark, variance in enumerate(variances):
            assert means_RBC[:, benchmark].std(axis=0) == pytest.approx(np.sqrt(variance), rel=0.03)
        half = 1.96 * np.sqrt(sum(variances)) / len(SIZES)
        assert (high[-1] - low[-1]) / 2 == pytest.approx(half, rel=0.04)

    def test_benchmarks_are_drawn_apart(self) -> None:
        """Even two of the same size, whose random words are of streams of their own."""
        difference_PC = np.subtract(*arms(np.random.default_rng(9), 60, 1))
        first, second = resampled_means([difference_PC, difference_PC])[:, :, 0].T
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.05

    def test_of_three_resampled_by_hand(self) -> None:
        """All 27 equally likely draws of three problems from three."""
        value_PC = np.array([[1.0], [0.25], [-0.5]])
        means_R = resampled_means([value_PC], resamples=60_000)[:, 0, 0]
        values, counts = np.unique(means_R, return_counts=True)
        expected = {}
        for draw in itertools.product(value_PC[:, 0], repeat=3):
            expected[round(sum(draw) / 3, 9)] = expected.get(round(sum(draw) / 3, 9), 0) + 1
        assert [round(v, 9) for v in values] == sorted(expected)
        frequencies = [60_000 * expected[key] / 27 for key in sorted(expected)]
        assert stats.chisquare(counts, frequencies).pvalue > 0.001

    def test_same_bits_however_the_columns_are_grouped(self) -> None:
        rng = np.random.default_rng(1)
        differences = [rng.integers(-6, 7, (n, 7)) / 6 for n in SIZES]
        together = np.stack(paired_bootstrap(differences, seed=2))
        p_values = sign_flip(differences, seed=2)
        for column in range(7):
            alone = [d[:, [column]] for d in differences]
            assert np.array_equal(np.stack(paired_bootstrap(alone, seed=2))[..., 0], together[..., column])
            assert np.array_equal(sign_flip(alone, seed=2)[:, 0], p_values[:, column])
        assert not np.array_equal(np.stack(paired_bootstrap(differences, seed=3)), together)

    def test_arms_that_agree_on_30_problems_may_differ_on_others(self) -> None:
        low, high = paired_bootstrap([np.zeros((30, 1))])
        assert low[0, 0] < -0.02
        assert high[0, 0] > 0.02

    @pytest.mark.parametrize(
        ("sizes", "shift"), [((30,), 0.0), ((30,), 1.5), ((30, 40, 120), 0.0), ((30, 40, 120), 1.0)]
    )
    def test_covers_the_truth(self, sizes: tuple[int, ...], shift: float) -> None:
        """Of 2,000 pairs of arms, at least 94% of the intervals hold the difference in a great many problems, and
        they are no wider than 98% need."""
        rng = np.random.default_rng([sum(sizes), int(10 * shift)])
        differences = [np.subtract(*arms(rng, n, 2000, shift)) for n in sizes]
        truth = np.subtract(*arms(rng, 2000, 2000, shift)).mean()
        low, high = paired_bootstrap(differences, resamples=2000)
        covered = ((low[-1] <= truth) & (truth <= high[-1])).mean()
        assert 0.94 <= covered <= 0.98


class TestSignFlip:
    def test_of_one_answer_each_is_mcnemars(self) -> None:
        rng = np.random.default_rng(2)
        difference_PC = np.subtract(*arms(rng, 60, 12, shift=0.8))
        p_values = sign_flip([difference_PC], resamples=100_000)
        exact = [mcnemar_exact(int((d > 0).sum()), int((d < 0).sum())) for d in difference_PC.T]
        assert p_values[0] == pytest.approx(exact, abs=5e-3)
        assert np.array_equal(p_values[0], p_values[1])

    def test_of_averages_is_that_of_all_flips(self) -> None:
        """Two benchmarks of 5 and 7 problems: 4,096 ways to flip, thirds among the differences."""
        rng = np.random.default_rng(4)
        differences = [rng.integers(-3, 5, (n, 1)).clip(-3, 3) / 3 for n in (5, 7)]
        observed = sum(d.mean() for d in differences)
        signs = np.array(list(itertools.product((-1, 1), repeat=12)))
        flipped = sum(
            signs[:, s] @ d[:, 0] / len(d) for s, d in zip((slice(5), slice(5, 12)), differences, strict=True)
        )
        exact = (np.abs(flipped) >= abs(observed) - 1e-9).mean()
        assert sign_flip(differences, resamples=100_000)[-1, 0] == pytest.approx(exact, abs=5e-3)

    def test_is_that_of_scipy(self) -> None:
        rng = np.random.default_rng(6)
        a_P, b_P = (arm.mean(axis=1) for arm in arms(rng, 50, 3, shift=0.5))
        theirs = stats.permutation_test(
            (a_P, b_P),
            lambda a, b, axis: (a - b).mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=50_000,
            rng=np.random.default_rng(7),
        )
        assert sign_flip([(a_P - b_P)[:, None]], resamples=50_000)[0, 0] == pytest.approx(theirs.pvalue, abs=0.01)

    def test_level_and_bounds(self) -> None:
        rng = np.random.default_rng(8)
        p_values = sign_flip([np.subtract(*arms(rng, n, 2000)) for n in SIZES], resamples=1000)
        assert 0.03 < (p_values[-1] <= 0.05).mean() < 0.065
        certain = sign_flip([np.ones((400, 1)), np.zeros((9, 1))], resamples=999)
        assert certain[:, 0].tolist() == [0.001, 1.0, 0.001]


class TestTraining:
    def test_one_seed_leaves_the_interval_of_the_problems(self) -> None:
        gap = Difference(0.1, 0.02, 0.19)
        one = macro_average([[0.5]], [100])
        widened = with_training(gap, one, one)
        assert (widened.low, widened.high) == pytest.approx((0.02, 0.19))

    def test_seeds_of_both_arms_add(self) -> None:
        gap = Difference(0.1, 0.02, 0.19)
        three, two = macro_average([[0.50], [0.52], [0.54]], [100]), macro_average([[0.40], [0.41]], [100])
        widened = with_training(gap, three, two)
        of_three, of_two = 4.30265 * 0.02 / math.sqrt(3), 12.7062 * 0.01 / math.sqrt(2) / math.sqrt(2)
        assert widened.low == pytest.approx(0.1 - math.hypot(0.08, of_three, of_two))
        assert widened.high == pytest.approx(0.1 + math.hypot(0.09, of_three, of_two))

    @pytest.mark.parametrize("seeds", [2, 3, 5])
    def test_covers_the_truth_over_other_seeds_too(self, seeds: int) -> None:
        """400 studies: an arm trained on a few seeds, each of them lifted or lowered, and the base."""
        rng, studies, problems = np.random.default_rng(seeds), 400, 100
        hardness_P1D = rng.normal(0.0, 2.0, (problems, 1, studies))
        lift_SD = rng.normal(0.5, 0.3, (seeds, studies))
        arm_PSD = rng.random((problems, seeds, studies)) < stats.logistic.cdf(hardness_P1D + lift_SD)
        base_PD = rng.random((problems, studies)) < stats.logistic.cdf(hardness_P1D[:, 0])
        normal = rng.normal(0.0, 1.0, (3, 400_000))
        truth = (stats.logistic.cdf(2 * normal[0] + 0.5 + 0.3 * normal[1]) - stats.logistic.cdf(2 * normal[2])).mean()
        low, high = paired_bootstrap([arm_PSD.mean(axis=1) - base_PD], resamples=1000)
        covered = 0
        for study in range(studies):
            arm = macro_average(arm_PSD[:, :, study].mean(axis=0)[:, None].tolist(), [problems])
            base = macro_average([[base_PD[:, study].mean()]], [problems])
            gap = Difference(arm.mean - base.mean, float(low[0, study]), float(high[0, study]))
            whole = with_training(gap, arm, base)
            covered += whole.low <= truth <= whole.high
        assert covered / studies >= 0.94
