"""DELLA (arXiv 2406.11617): the larger an entry of a task vector is in its row, the likelier it stays."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file
from torch import Tensor

from helpers.merge_arrays import NAME, Array, merge_arrays
from helpers.merge_reference import philox
from helpers.mergekit_parity import (
    LAYERS,
    SEED,
    assert_near,
    assert_same_moments,
    needs_mergekit,
    ours_and_theirs,
)
from micota_fast.errors import InputError
from micota_fast.merge import kernels
from micota_fast.merge.mergekit import MergePlan, parse_mergekit
from micota_fast.merge.methods import mask_key
from micota_fast.merge.settings import depth_of

pytestmark = pytest.mark.usefixtures("small_chunks")

METHODS = ("della", "della_linear")


def probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """With which each element stays, as mergekit 0.1.5 computes it; float64."""
    rows = delta.abs().reshape(-1, delta.shape[-1])
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1).double()
    return (density - epsilon + 2 * epsilon * ranks / max(rows.shape[1] - 1, 1)).reshape(delta.shape)


def mask(delta: Tensor, density: float, epsilon: float, key: tuple[int, int]) -> Tensor:
    """Which elements stay: where the random word is below the probability."""
    words = philox(np.arange(-(-delta.numel() // 4), dtype=np.uint64), key).T.reshape(-1)[: delta.numel()]
    return torch.from_numpy(words.astype(np.float64) / 2**32) < probabilities(delta, density, epsilon).flatten()


@given(
    hnp.arrays(
        np.float32, st.integers(1, 300), elements=st.one_of(st.sampled_from((0, 1, 2)), st.floats(-8, 8, width=32))
    )
)
@settings(max_examples=200, deadline=None)
def test_the_order_is_that_of_a_stable_sort(row: Array) -> None:
    order, room = np.empty(row.size, np.int32), np.empty(row.size, np.int32)
    kernels.sort_by_magnitude(row, order, room)
    assert np.array_equal(order, np.argsort(np.abs(row), kind="stable"))


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=2, max_side=90), elements=st.floats(-8, 8, width=32)),
    st.sampled_from(((0.5, 0.15), (0.3, 0.29), (0.7, 0.0))),
    st.integers(0, 5),
)
@settings(max_examples=200, deadline=None)
def test_every_element_stays_or_goes_by_its_rank_in_its_row(
    delta: Array, shares: tuple[float, float], seed: int
) -> None:
    density, epsilon = shares
    base = np.zeros_like(delta)
    got = merge_arrays("della_linear", base, [delta], [1.0], [density], seed=seed, own={"epsilon": [epsilon]})
    stays = mask(torch.from_numpy(delta), density, epsilon, mask_key(seed, NAME, 0)).numpy()
    assert np.array_equal(got, np.where(stays, delta.flatten(), 0))


def test_rescaling_keeps_the_sum_of_magnitudes() -> None:
    delta = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    base, own = np.zeros_like(delta), {"epsilon": [0.1]}
    got = merge_arrays("della_linear", base, [delta], [1.0], [0.4], rescale="l1", own=own)
    assert np.abs(got).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-6)
    assert 0.3 < (got != 0).mean() < 0.5


def test_the_densities_0_and_1_draw_nothing() -> None:
    delta, base = np.arange(1, 11, dtype=np.float32), np.zeros(10, np.float32)
    own = {"epsilon": [0.3, 0.3]}
    assert np.array_equal(merge_arrays("della_linear", base, [delta, delta], [1, 1], [0.0, 1.0], own=own), delta)


@pytest.mark.parametrize("at", [0, 70, 199])
def test_what_is_not_finite_is_named_from_any_chunk_of_its_row(at: int) -> None:
    delta = np.ones(200, np.float32)
    delta[at] = np.nan
    with pytest.raises(InputError, match="x holds NaN"):
        merge_arrays("della", np.zeros_like(delta), [delta], [1.0], [0.5])


def plan_of(method: str, **own: Any) -> MergePlan:
    models = [{"model": "a", "parameters": {"weight": 1, **own}}]
    return parse_mergekit({"merge_method": method, "base_model": "b", "models": models}, "x.yaml")


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_mergekit(method: str) -> None:
    at = plan_of(method).at("t", 0)
    assert (at.of_models["epsilon"], at.densities, at.normalize, at.rescale) == (
        (0.15,),
        (1.0,),
        method == "della",
        "l1",
    )


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.1), (0.1, 0.15), (0.5, 0.5)])
def test_probabilities_lie_between_0_and_1(density: float, epsilon: float) -> None:
    plan = plan_of("della", density=density, epsilon=epsilon)
    with pytest.raises(InputError, match=rf"tensor {NAME}: `density` {density} with `epsilon` {epsilon}: "):
        plan.at(NAME, 0)


TWO = [
    {"model": "a", "parameters": {"weight": 0.6, "density": 0.5, "epsilon": 0.2}},
    {"model": "b", "parameters": {"weight": 0.4, "density": 0.3}},
]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"models": TWO},
    "by place": {
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("a", "b")],
        "parameters": {"density": [0.2, 0.8], "epsilon": [{"filter": "mlp", "value": 0.19}, {"value": 0.1}]},
    },
    "not rescaled": {"models": TWO, "parameters": {"rescale": False, "lambda": 0.9}},
}


@needs_mergekit
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_mergekit_merges_the_same_with_equal_masks(models: Path, tmp_path: Path, method: str, case: str) -> None:
    base, *others = (load_file(models / name / "model.safetensors") for name in ("base", "a", "b"))
    chances: dict[str, Tensor] = {}

    def masks(plan: MergePlan, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        drawn = {}
        for tensor in ours:
            at = plan.at(tensor, depth_of(tensor, LAYERS))
            for i, (density, epsilon) in enumerate(zip(at.densities, at.of_models["epsilon"], strict=True)):
                delta = others[i][tensor].float() - base[tensor].float()
                chances[f"{tensor}|{i}"] = probabilities(delta, density, epsilon)
                drawn[f"{tensor}|{i}"] = mask(delta, density, epsilon, mask_key(SEED, tensor, i))
        return drawn

    ours, theirs = ours_and_theirs(models, tmp_path, method, CASES[case], masks)
    assert_near(ours, theirs, ulps=1, share=0.001)
    drawn_with = load_file(tmp_path / "probabilities.safetensors")
    assert drawn_with.keys() == chances.keys()
    for name, chance in drawn_with.items():
        torch.testing.assert_close(chance.flatten().double(), chances[name].flatten(), rtol=0, atol=1e-6)


@needs_mergekit
def test_mergekit_has_the_same_expectation_and_variance_over_seeds(tmp_path: Path) -> None:
    assert_same_moments(tmp_path, "della_linear", "della_magprune", 0.4, epsilon=0.2)
