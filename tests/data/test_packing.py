"""Packing against a plain first-fit decreasing, an optimum found by search, and what no packing can beat."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from micota_fast.common.numba_cache import compiled
from micota_fast.data.packing import _fill, efficiency, pack
from micota_fast.errors import InputError

Packer = Callable[[NDArray[np.int64], int], tuple[NDArray[np.int64], NDArray[np.int64]]]
BY_RULE: list[Packer] = [
    lambda lengths, capacity: _fill(lengths, capacity, False),
    lambda lengths, capacity: _fill(lengths, capacity, True),
]


def packs_of(lengths: list[int], capacity: int, packer: Packer = pack) -> list[list[int]]:
    order, offsets = packer(np.array(lengths, dtype=np.int64), capacity)
    assert order.dtype == offsets.dtype == np.int64
    assert offsets[0] == 0
    assert offsets[-1] == len(lengths)
    return [order[a:b].tolist() for a, b in pairwise(offsets)]


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Reference: lengths in each bin, in the plainest way."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [b for b in bins if sum(b) + length <= capacity]
        if fitting:
            fitting[0].append(length)
        else:
            bins.append([length])
    return bins


def fewest_packs(lengths: list[int], capacity: int) -> int:
    """Reference: the optimum, by trying every placement."""

    def search(rest: list[int], bins: tuple[int, ...], best: int) -> int:
        if len(bins) >= best:
            return best
        if not rest:
            return len(bins)
        for i in range(len(bins)):
            if bins[i] + rest[0] <= capacity:
                best = search(rest[1:], (*bins[:i], bins[i] + rest[0], *bins[i + 1 :]), best)
        return search(rest[1:], (*bins, rest[0]), best)

    return search(sorted(lengths, reverse=True), (), len(lengths) + 1)


@st.composite
def lengths_and_capacity(draw: st.DrawFn, max_docs: int = 200) -> tuple[list[int], int]:
    capacity = draw(st.one_of(st.integers(1, 200), st.sampled_from([4095, 4096, 16384, 300_000])))
    longest = draw(st.sampled_from([capacity, -(-capacity // 2), -(-capacity // 4)]))
    return draw(st.lists(st.integers(1, longest), max_size=max_docs)), capacity


@pytest.mark.parametrize("packer", [pack, *BY_RULE], ids=["pack", "longest", "exact"])
@given(case=lengths_and_capacity())
@settings(max_examples=100, deadline=None)
def test_every_document_lies_in_one_pack_and_no_pack_overflows(packer: Packer, case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = packs_of(lengths, capacity, packer)
    assert sorted(d for p in packs for d in p) == list(range(len(lengths)))
    for p in packs:
        sizes = [lengths[d] for d in p]
        assert sum(sizes) <= capacity
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) > 0


@given(lengths_and_capacity(max_docs=80))
@settings(max_examples=150, deadline=None)
def test_the_first_rule_is_first_fit_decreasing_and_never_beats_both(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    plain = first_fit_decreasing(lengths, capacity)
    assert [[lengths[d] for d in p] for p in packs_of(lengths, capacity, BY_RULE[0])] == plain
    assert len(packs_of(lengths, capacity)) <= len(plain)


@given(st.integers(6, 40).flatmap(lambda c: st.tuples(st.lists(st.integers(-(-c // 6), c), max_size=8), st.just(c))))
@settings(max_examples=60, deadline=None)
def test_close_to_the_fewest_packs_possible(case: tuple[list[int], int]) -> None:
    # Dosa (2007): first-fit decreasing takes at most 11/9 of the optimum plus 6/9.
    lengths, capacity = case
    assert 9 * len(packs_of(lengths, capacity)) <= 11 * fewest_packs(lengths, capacity) + 6


@pytest.mark.parametrize("packer", BY_RULE, ids=["longest", "exact"])
@given(case=lengths_and_capacity(), random=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_deterministic_and_the_number_of_packs_does_not_depend_on_the_order(packer, case, random) -> None:  # type: ignore[no-untyped-def]
    lengths, capacity = case
    packs = packs_of(lengths, capacity, packer)
    assert packs_of(lengths, capacity, packer) == packs
    shuffled = list(range(len(lengths)))
    random.shuffle(shuffled)
    again = packs_of([lengths[d] for d in shuffled], capacity, packer)
    assert [[lengths[shuffled[d]] for d in p] for p in again] == [[lengths[d] for d in p] for p in packs]


def test_equal_lengths_are_placed_in_the_order_given() -> None:
    assert packs_of([4, 4, 4, 4, 4], 8) == [[0, 1], [2, 3], [4]]


def test_many_long_tailed_documents_waste_next_to_nothing() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(50), np.log(16384), 50_000)).astype(np.int64)
    order, offsets = pack(lengths, 16384)
    assert np.array_equal(np.sort(order), np.arange(50_000))
    assert np.add.reduceat(lengths[order], offsets[:-1]).max() <= 16384
    n_packs = len(offsets) - 1
    assert n_packs <= -(-lengths.sum() // 16384) + 3  # the first term no packing can beat
    assert efficiency(lengths, n_packs, 16384) == lengths.sum() / (n_packs * 16384)


@pytest.mark.parametrize(("median", "sigma", "capacity"), [(4000, 0.8, 16384), (4000, 0.5, 16384), (8000, 0.7, 32768)])
def test_long_chains_of_thought_fill_their_packs(median: int, sigma: float, capacity: int) -> None:
    lengths = np.exp(np.random.default_rng(0).normal(np.log(median), sigma, 50_000)).astype(np.int64) + 30
    lengths = lengths[lengths <= capacity]
    least, by_longest = -(-lengths.sum() // capacity), len(BY_RULE[0](lengths, capacity)[1]) - 1
    assert by_longest > 1.0005 * least, "the first rule alone would do"
    assert len(pack(lengths, capacity)[1]) - 1 <= 1.0001 * least + 1


def test_nothing_to_pack() -> None:
    order, offsets = pack(np.array([], dtype=np.int32), 16)
    assert order.tolist() == []
    assert offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([3, 9, 8], 8, "document 1 has 9 tokens"),
        ([3, 0], 8, "document 1 has 0 tokens"),
        ([-1], 8, "document 0 has -1 tokens"),
        ([1], 0, "pack_tokens must be at least 1"),
    ],
)
def test_a_document_that_fits_no_pack_is_named(lengths: list[int], capacity: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pack(np.array(lengths), capacity)


def test_compiles_where_no_cache_can_be_written() -> None:
    namespace: dict = {}
    exec("def successor(x): return x + 1", namespace)  # no source file: numba finds no place for its cache either
    assert compiled(namespace["successor"])(1) == 2
