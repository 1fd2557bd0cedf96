"""The arithmetic of merging: kernels bit for bit, each method by hand and against plain torch, and what all share."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from helpers.merge_arrays import NAME, Array, f32, merge_arrays
from helpers.merge_reference import mask, merged, philox
from micota_fast.errors import InputError
from micota_fast.merge import kernels, methods, tensor_merge
from micota_fast.merge.methods import METHODS, mask_key

pytestmark = pytest.mark.usefixtures("small_chunks")

EVERY = tuple(METHODS)
SPARSE = tuple(name for name, spec in METHODS.items() if spec.sparsify is not None)
AT_BASE = tuple(name for name, spec in METHODS.items() if spec.starts_at_base)
# Those that the reference computes; others have a reference in a test of their own.
IN_REFERENCE = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")


# multiples of 1/64: float32 sums and halves of them are exact, so equality can be asked for exactly
ELEMENTS = st.integers(-512, 512).map(lambda n: n / 64)
SIZES = st.integers(1, 200)


@st.composite
def models_st(draw: Any, count: int = 3, elements: Any = ELEMENTS) -> list[Array]:
    size = draw(SIZES)
    return [draw(hnp.arrays(np.float32, size, elements=elements)) for _ in range(count)]


class TestKernels:
    def test_halves_are_widened_exactly(self) -> None:
        every = np.arange(1 << 16, dtype=np.uint16)
        out = np.empty(every.size, np.float32)
        for widen, dtype in ((kernels.widen_bfloat16, torch.bfloat16), (kernels.widen_float16, torch.float16)):
            wanted = torch.from_numpy(every).view(dtype).float().numpy()
            finite = np.isfinite(wanted)
            assert not widen(every, out)
            assert np.array_equal(out.view(np.uint32)[finite], wanted.view(np.uint32)[finite])
            finite_only = every[finite]
            assert widen(finite_only, out[: finite_only.size])

    @given(hnp.arrays(np.uint32, st.integers(1, 300), elements=st.integers(0, 2**32 - 1)), st.booleans())
    @settings(max_examples=200, deadline=None)
    def test_results_are_rounded_to_nearest_even(self, bits: Any, near_half: bool) -> None:
        if near_half:  # exponents that float16 has, subnormal ones among them
            bits = (bits & np.uint32(0x807FFFFF)) | (np.uint32(100) + (bits >> np.uint32(23)) % np.uint32(45)) << 23
        values = bits.astype(np.uint32).view(np.float32)
        values = values[np.isfinite(values)]
        for narrow, dtype in ((kernels.narrow_bfloat16, torch.bfloat16), (kernels.narrow_float16, torch.float16)):
            wanted = torch.from_numpy(values).to(dtype)
            finite = torch.isfinite(wanted).numpy()
            out = np.empty(values.size, np.uint16)
            assert narrow(values, out) == finite.all()
            assert np.array_equal(out[finite], wanted.view(torch.uint16).numpy()[finite])

    def test_philox_of_the_reference_has_the_published_values(self) -> None:
        # Random123's kat_vectors
        for counter, high, key, wanted in (
            (0, (0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            (2**64 - 1, (2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
            (
                0x85A308D3243F6A88,
                (0x13198A2E, 0x03707344),
                (0xA4093822, 0x299F31D0),
                (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
            ),
        ):
            assert philox(np.array([counter], np.uint64), key, high)[:, 0].tolist() == list(wanted)

    @given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**40), st.integers(1, 40))
    @settings(max_examples=100, deadline=None)
    def test_random_words_are_philox(self, low: int, high: int, block: int, count: int) -> None:
        words = np.empty(4 * count, np.uint32)
        kernels.random_words((low, high), 4 * block, words)
        counters = np.arange(block, block + count, dtype=np.uint64)
        assert np.array_equal(words.reshape(count, 4), philox(counters, (low, high)).T)

    @given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-8, 8, width=32)), st.data())
    @settings(max_examples=100, deadline=None)
    def test_the_digest_sees_every_bit(self, block: Array, data: Any) -> None:
        before = int(kernels.digest(block))
        i = data.draw(st.integers(0, block.size - 1))
        changed = block.copy()
        changed.view(np.uint32)[i] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
        assert int(kernels.digest(changed)) != before
        assert int(kernels.digest(block.copy())) == before


class TestByHand:
    BASE = f32(1, 1, 1, 1)

    def test_linear_normalizes_by_the_weights(self) -> None:
        tensors = [f32(0, 4, 8, -4), f32(4, 0, 0, 4)]
        assert merge_arrays("linear", self.BASE, tensors, [3, 1], normalize=True).tolist() == [1, 3, 6, -2]
        assert merge_arrays("linear", self.BASE, tensors, [3, 1]).tolist() == [4, 12, 24, -8]

    def test_task_arithmetic_adds_weighted_task_vectors_times_lambda(self) -> None:
        tensors = [f32(3, 1, 1, 1), f32(1, 2, 1, 0)]
        result = merge_arrays("task_arithmetic", self.BASE, tensors, [0.5, 2], lambda_=3.0)
        assert result.tolist() == [1 + 3 * 1, 1 + 3 * 2, 1, 1 - 3 * 2]

    def test_slerp_of_perpendicular_vectors(self) -> None:
        result = merge_arrays("slerp", f32(2, 0), [f32(0, 4)], [1 / 3])
        assert result == pytest.approx([2 * 0.75**0.5, 4 * 0.5])  # sin 60° and sin 30°

    def test_slerp_of_all_but_parallel_vectors_is_linear(self) -> None:
        assert merge_arrays("slerp", f32(1, 0), [f32(3, 0.03)], [0.25]) == pytest.approx([1.5, 0.0075])
        assert merge_arrays("slerp", f32(1, 0), [f32(-1, 0)], [0.25]) == pytest.approx([0.5, 0])

    def test_ties_trims_elects_a_sign_and_averages_who_agrees(self) -> None:
        # task vectors: (4, -3, 1, 0) and (2, 6, -1, 5); the two largest of each: (4, -3, 0, 0) and (0, 6, 0, 5)
        tensors = [self.BASE + f32(4, -3, 1, 0), self.BASE + f32(2, 6, -1, 5)]
        result = merge_arrays("ties", self.BASE, tensors, [1, 1], [0.5, 0.5], normalize=True)
        assert result.tolist() == [5, 7, 1, 6]

    def test_sign_consensus_weighs_and_a_tie_goes_to_plus(self) -> None:
        # weighted task vectors: (2, -2) and (-1, 2): sums 1 and 0, so plus in both places
        assert merge_arrays("dare_ties", f32(0, 0), [f32(2, -2), f32(-2, 4)], [1, 0.5]).tolist() == [2, 2]

    def test_trim_takes_the_first_of_equals(self) -> None:
        def kept(delta: Array, density: float) -> list[bool]:
            zero = np.zeros_like(delta)
            return (merge_arrays("ties", zero, [delta], [1], [density]) != 0).tolist()

        assert kept(f32(1, -1, 1, 1), 0.5) == [True, True, False, False]
        assert kept(f32(1, -2, 1, 3), 0.75) == [True, True, False, True]
        assert kept(f32(1, 2), 0.4) == [False, True], "one stays at least"
        assert kept(f32(1, 2), 0.0) == [False, False]
        equal = np.ones(300, np.float32)  # in five blocks
        assert kept(equal, 0.5) == [True] * 150 + [False] * 150

    def test_rescale(self) -> None:
        n = 4
        keep = mask(mask_key(0, NAME, 0), n, 0.5).numpy()
        assert 0 < keep.sum() < n, "the seed does nothing here"
        delta = f32(1, 2, 3, 4)
        for rescale, factor in (("none", 1), ("density", 2), ("l1", 10 / delta[keep].sum())):
            result = merge_arrays("dare_linear", self.BASE, [self.BASE + delta], [0.5], [0.5], rescale=rescale)
            assert result == pytest.approx(self.BASE + 0.5 * factor * np.where(keep, delta, 0)), rescale


finite = st.floats(-8, 8, width=32)


class TestAgainstPlainTorch:
    @given(
        st.sampled_from(IN_REFERENCE),
        st.one_of(models_st(4), models_st(4, finite)),
        st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=3),
        st.lists(st.sampled_from((0.0, 0.01, 0.3, 0.5, 0.9, 1.0)), min_size=3, max_size=3),
        st.booleans(),
        st.sampled_from(("none", "density", "l1")),
        st.sampled_from((1.0, 0.7)),
        st.integers(0, 5),
    )
    @settings(max_examples=200, deadline=None)
    def test_every_method(
        self,
        method: str,
        models: list[Array],
        weights: list[float],
        densities: list[float],
        normalize: bool,
        rescale: str,
        lambda_: float,
        seed: int,
    ) -> None:
        base, *tensors = models
        if method == "slerp":
            tensors, weights, normalize = tensors[:1], [abs(weights[0]) / 1.5], False
        if method == "linear" and abs(sum(weights)) < 0.01:
            normalize = False
        options: dict[str, Any] = {"normalize": normalize, "lambda_": lambda_ if method != "linear" else 1.0}
        options["rescale"] = rescale if method in SPARSE else "none"
        got = merge_arrays(method, base, tensors, weights, densities[: len(tensors)], seed=seed, **options)
        masks = [mask(mask_key(seed, NAME, i), base.size, d) for i, d in enumerate(densities)]
        as_torch = [torch.from_numpy(t) for t in tensors]
        wanted = merged(method, torch.from_numpy(base), as_torch, weights, densities, masks=masks, **options).numpy()
        if method == "slerp" or options["rescale"] == "l1":  # a factor of a sum, which torch adds up in another order
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
        else:
            assert np.array_equal(got, wanted)

    @pytest.mark.parametrize("method", IN_REFERENCE)
    def test_over_many_rows_and_chunks(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensor_merge, "CHUNK", 4 * kernels.ROW)
        rng = np.random.default_rng(0)
        n = 9 * kernels.ROW + 7
        # Few different magnitudes, so that many equal TIES' threshold.
        base, *tensors = ((rng.normal(size=n) * 8).round().astype(np.float32) / 8 for _ in range(3))
        weights, densities = [0.6, -0.4], [0.5, 0.3]
        if method == "slerp":
            tensors, weights, densities = tensors[:1], [0.3], [1.0]
        rescale = "l1" if method in SPARSE else "none"
        got = merge_arrays(method, base, tensors, weights, densities, rescale=rescale, seed=3)
        masks = [mask(mask_key(3, NAME, i), n, density) for i, density in enumerate(densities)]
        as_torch = [torch.from_numpy(tensor) for tensor in tensors]
        wanted = merged(method, torch.from_numpy(base), as_torch, weights, densities, rescale=rescale, masks=masks)
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-6)


class TestProperties:
    @given(models_st(), st.sampled_from(SPARSE))
    @settings(max_examples=60, deadline=None)
    def test_density_one_is_the_plain_method(self, models: list[Array], method: str) -> None:
        base, *tensors = models
        plain = "task_arithmetic" if METHODS[method].combine == "task vectors" else "ties"
        got = merge_arrays(method, base, tensors, [0.5, 0.25], [1, 1], rescale="l1")
        assert np.array_equal(got, merge_arrays(plain, base, tensors, [0.5, 0.25]))

    @given(models_st(), st.sampled_from(AT_BASE), st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_weight_zero_is_the_base(self, models: list[Array], method: str, normalize: bool) -> None:
        base, *tensors = models
        if method == "slerp":
            assert merge_arrays(method, base, tensors[:1], [0]) == pytest.approx(base)
            return
        got = merge_arrays(method, base, tensors, [0, 0], [0.5, 0.5], rescale="l1", normalize=normalize)
        assert np.array_equal(got, base)

    @given(models_st(1, finite), st.sampled_from(EVERY), st.floats(0.1, 2))
    @settings(max_examples=60, deadline=None)
    def test_a_model_merged_with_itself_is_that_model(self, models: list[Array], method: str, weight: float) -> None:
        (tensor,) = models
        if method == "slerp":
            got = merge_arrays(method, tensor, [tensor], [weight / 2])
        else:
            rescale = "l1" if method in SPARSE else "none"
            densities = [0.5, 0.5] if method in SPARSE else None
            got = merge_arrays(method, tensor, [tensor] * 2, [weight, 1], densities, rescale=rescale, normalize=True)
        np.testing.assert_allclose(got, tensor, rtol=3e-7)

    @given(models_st(4), st.permutations(range(3)), st.sampled_from(("linear", "task_arithmetic", "ties")))
    @settings(max_examples=60, deadline=None)
    def test_the_order_of_models_does_not_matter(self, models: list[Array], order: list[int], method: str) -> None:
        # weights and elements with few bits: float32 sums of them are exact, so equality is exact too
        base, *tensors = models
        weights, densities = [0.5, 0.25, 1.0], [0.5, 0.75, 0.5] if method == "ties" else [1.0] * 3
        first = merge_arrays(method, base, tensors, weights, densities)
        permuted = [[part[i] for i in order] for part in (tensors, weights, densities)]
        assert np.array_equal(merge_arrays(method, base, *permuted), first)  # type: ignore[arg-type]

    @given(models_st(2, finite), st.sampled_from(AT_BASE), st.lists(st.floats(0, 1), min_size=1, max_size=3))
    @settings(max_examples=60, deadline=None)
    def test_several_weights_in_one_reading(self, models: list[Array], method: str, weights: list[float]) -> None:
        base, tensor = models
        rescale = "l1" if method in SPARSE else "none"
        options: dict[str, Any] = {"densities": [0.5] if method in SPARSE else None, "rescale": rescale}
        together = merge_arrays(method, base, [tensor], [[w] for w in weights], **options)
        for weight, got in zip(weights, together, strict=True):
            assert got.tobytes() == merge_arrays(method, base, [tensor], [weight], **options).tobytes()

    @given(models_st(3), st.sampled_from(EVERY), st.sampled_from(("NaN", "infinity")), st.data())
    @settings(max_examples=60, deadline=None)
    def test_what_is_not_finite_is_named(self, models: list[Array], method: str, kind: str, data: Any) -> None:
        base, *tensors = models
        tensors = tensors[:1] if method == "slerp" else tensors
        at = data.draw(st.integers(0, base.size - 1))
        tensors[-1][at] = np.nan if kind == "NaN" else -np.inf
        with pytest.raises(InputError, match=f"x holds {kind}"):
            merge_arrays(method, base, tensors, [0.5] * len(tensors), [0.5] * len(tensors))


class TestMask:
    def words(self, seed: int, name: str, index: int, n: int) -> NDArray[np.uint32]:
        words = np.empty(-(-n // 4) * 4, np.uint32)
        kernels.random_words(mask_key(seed, name, index), 0, words)
        return words[:n]

    def test_the_stated_share_stays_and_masks_are_independent(self) -> None:
        n = 1_000_000
        for density in (0.1, 0.5, 0.9):
            masks = [
                self.words(seed, name, index, n) < methods.keep_limit(density)
                for seed, name, index in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
            ]
            sd = (density * (1 - density) / n) ** 0.5
            for i, one in enumerate(masks):
                assert abs(one.mean() - density) < 5 * sd
                for other in masks[:i]:  # independent: both keep with probability density^2
                    assert abs((one & other).mean() - density**2) < 5 * (density**2 * (1 - density**2) / n) ** 0.5

    def test_published_merges_stay_what_they_are(self) -> None:
        # Fixed values: the mask of a published merge must come out the same with any later version.
        assert np.flatnonzero(self.words(7, "w", 0, 24) < methods.keep_limit(0.3)).tolist() == PINNED

    def test_expectation_and_variance_over_seeds(self) -> None:
        rng = np.random.default_rng(0)
        base, tensor = (rng.normal(size=200).astype(np.float32) for _ in range(2))
        runs = np.stack(
            [
                merge_arrays("dare_linear", base, [tensor], [0.7], [0.4], rescale="density", seed=seed)
                for seed in range(2000)
            ]
        )
        wanted = merge_arrays("task_arithmetic", base, [tensor], [0.7])
        sd = 0.7 * np.abs(tensor - base) * np.sqrt((1 - 0.4) / 0.4)  # of one entry of one run
        assert np.abs((runs.mean(0) - wanted) / sd).max() < 5 / np.sqrt(2000)
        assert np.allclose(runs.std(0), sd, rtol=0.12)


PINNED = [4, 19, 21, 22]
