"""Model Breadcrumbs (arXiv 2312.06795): the largest and the smallest entries of a task vector are dropped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from helpers.merge_arrays import Array, f32, merge_arrays
from helpers.mergekit_parity import assert_near, needs_mergekit, ours_and_theirs
from micota_fast.merge.mergekit import parse_mergekit

pytestmark = pytest.mark.usefixtures("small_chunks")

METHODS = ("breadcrumbs", "breadcrumbs_ties")


def kept(delta: Array, density: float, gamma: float) -> list[bool]:
    """Which elements of a task vector without zeros stay."""
    merged = merge_arrays("breadcrumbs", np.zeros_like(delta), [delta], [1.0], [density], own={"gamma": [gamma]})
    assert np.array_equal(merged[merged != 0], delta[merged != 0]), "what stays is not rescaled by default"
    return (merged != 0).tolist()


def wanted(delta: Array, density: float, gamma: float) -> list[bool]:
    """The same from a stable sort, as mergekit 0.1.5 computes it."""
    if density >= 1:
        return [True] * delta.size
    keep, most = int(density * delta.size), int(gamma * delta.size)
    least = max(0, delta.size - keep - most)
    order = np.argsort(np.abs(delta), kind="stable")
    mask = np.zeros(delta.size, bool)
    mask[order[least : least + keep]] = True
    return mask.tolist()


def test_by_hand() -> None:
    delta = f32(1, -5, 3, 2, -4, 6, 8, 7, -10, 9)
    assert kept(delta, 0.5, 0.2) == [abs(x) in (4, 5, 6, 7, 8) for x in delta]
    assert kept(delta, 0.5, 0.0) == [abs(x) > 5 for x in delta]
    assert kept(delta, 0.9, 0.3) == [abs(x) < 10 for x in delta], "the density comes first"
    assert kept(f32(2, 2, -2, 2, 2), 0.4, 0.2) == [False, False, True, True, False], "the first is the smallest"
    assert not any(kept(delta, 0.0, 0.1))
    assert all(kept(delta, 1.0, 0.1))


# Few magnitudes, so that many equal the limits, and any.
MAGNITUDES = st.one_of(st.integers(1, 4).map(float), st.floats(2.0**-140, 8, width=32))


@given(
    hnp.arrays(np.float32, st.integers(1, 300), elements=MAGNITUDES),
    st.sampled_from((0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 1.0)),
    st.sampled_from((0.0, 0.01, 0.2, 0.7, 1.0)),
)
@settings(max_examples=300, deadline=None)
def test_the_same_elements_stay_as_by_a_stable_sort(delta: Array, density: float, gamma: float) -> None:
    delta[::3] *= -1
    assert kept(delta, density, gamma) == wanted(delta, density, gamma)


@given(hnp.arrays(np.float32, st.integers(1, 300), elements=st.integers(0, 3).map(float)), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_zeros_are_the_smallest(delta: Array, density: float) -> None:
    merged = merge_arrays("breadcrumbs", np.zeros_like(delta), [delta], [1.0], [density], own={"gamma": [0.1]})
    assert np.array_equal(merged, np.where(wanted(delta, density, 0.1), delta, 0))


def test_each_model_has_its_own_density_and_gamma() -> None:
    zero = np.zeros(10, np.float32)
    one, other = np.arange(1, 11, dtype=np.float32), np.arange(10, 0, -1, dtype=np.float32) * 16
    merged = merge_arrays("breadcrumbs", zero, [one, other], [1, 1], [0.5, 0.2], own={"gamma": [0.2, 0.0]})
    expected = np.where(wanted(one, 0.5, 0.2), one, 0) + np.where(wanted(other, 0.2, 0.0), other, 0)
    assert np.array_equal(merged, expected)


def test_breadcrumbs_ties_adds_up_what_has_the_sign_of_the_sum() -> None:
    zero, own = np.zeros(4, np.float32), {"gamma": [0.0, 0.0]}
    models = [f32(4, -3, 1, 2), f32(2, 6, -1, 5)]  # the two largest of each: (4, -3, 0, 0) and (0, 6, 0, 5)
    assert merge_arrays("breadcrumbs_ties", zero, models, [1, 1], [0.5, 0.5], own=own).tolist() == [4, 6, 0, 5]
    assert merge_arrays("breadcrumbs", zero, models, [1, 1], [0.5, 0.5], own=own).tolist() == [4, 3, 0, 5]


@pytest.mark.parametrize("method", METHODS)
def test_defaults_are_those_of_mergekit(method: str) -> None:
    content = {"merge_method": method, "base_model": "b", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    at = parse_mergekit(content, "x").at("t", 0)
    assert (at.of_models["gamma"], at.densities, at.normalize, at.rescale) == ((0.01,), (1.0,), False, "none")


TWO = [
    {"model": "a", "parameters": {"weight": 0.6, "density": 0.5, "gamma": 0.05}},
    {"model": "b", "parameters": {"weight": 0.4, "density": 0.3}},
]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"models": TWO},
    "by place": {
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in ("a", "b")],
        "parameters": {"density": [0.2, 0.95], "gamma": [{"filter": "mlp", "value": 0.2}, {"value": 0}]},
    },
    "normalized": {"models": TWO, "parameters": {"normalize": True, "lambda": 0.9}},
    "rescaled": {"models": TWO, "parameters": {"rescale": True}},
}


@needs_mergekit
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_mergekit_merges_the_same(models: Path, tmp_path: Path, method: str, case: str) -> None:
    ours, theirs = ours_and_theirs(models, tmp_path, method, CASES[case])
    assert_near(ours, theirs, ulps=1 if case == "rescaled" else 0, share=0.001)
