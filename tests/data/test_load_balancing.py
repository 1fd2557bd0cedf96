"""Load balancing: against every other assignment of few packs, and the idle share against what was assigned."""

import math
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from micota_fast.data.load_balancing import assign_packs, attention_parity, idle_share, pack_costs
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder

COSTS = st.lists(st.integers(1, 20).map(float), min_size=1, max_size=30)
WORLD = st.integers(1, 5)


def time_of(costs: list[float], world: int) -> float:
    """Sum over micro-steps of the costliest pack, as assigned."""
    return sum(max(costs[p] for p in packs if p >= 0) for packs in assign_packs(np.array(costs), world).tolist())


def least_time(costs: tuple[float, ...], world: int) -> float:
    """Reference: the least over every way to split packs into micro-steps of at most `world`."""
    if not costs:
        return 0.0
    first, rest = costs[0], costs[1:]
    best = math.inf
    for n in range(min(world, len(costs))):
        for others in combinations(range(len(rest)), n):
            after = tuple(c for i, c in enumerate(rest) if i not in others)
            best = min(best, max(first, *(rest[i] for i in others), 0) + least_time(after, world))
    return best


@given(COSTS, WORLD)
@settings(max_examples=100, deadline=None)
def test_every_pack_is_assigned_once_and_only_the_last_micro_step_has_gaps(costs: list[float], world: int) -> None:
    packs_MR = assign_packs(np.array(costs), world)
    assert packs_MR.shape == (math.ceil(len(costs) / world), world)
    assert sorted(packs_MR[packs_MR >= 0]) == list(range(len(costs)))
    assert (packs_MR[:-1] >= 0).all()


@given(st.lists(st.integers(1, 9).map(float), min_size=1, max_size=7), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_no_other_assignment_takes_less_time(costs: list[float], world: int) -> None:
    assert time_of(costs, world) == least_time(tuple(costs), world)


def test_the_rank_with_less_to_do_gets_the_costlier_pack() -> None:
    assert assign_packs(np.array([1.0, 9, 2, 7]), 2).tolist() == [[1, 3], [0, 2]]
    assert assign_packs(np.array([5.0, 5, 4, 1, 3]), 2).tolist() == [[0, 1], [2, 4], [-1, 3]]
    assert assign_packs(np.array([5.0]), 3).tolist() == [[0, -1, -1]]


@given(COSTS, WORLD)
@settings(max_examples=100, deadline=None)
def test_sums_differ_between_ranks_by_no_more_than_one_micro_step_makes(costs: list[float], world: int) -> None:
    packs_MR = assign_packs(np.array(costs), world)
    costs_MR = np.where(packs_MR >= 0, np.array(costs)[packs_MR], 0)
    assert np.ptp(costs_MR.sum(axis=0)) <= np.ptp(costs_MR, axis=1).max()


@given(COSTS, st.integers(1, 12), WORLD)
@settings(max_examples=100, deadline=None)
def test_the_idle_share_is_that_of_the_assignment(costs: list[float], packs_per_step: int, world: int) -> None:
    steps = [costs[i : i + packs_per_step] for i in range(0, len(costs), packs_per_step)]
    busy, time = sum(costs), sum(time_of(step, world) for step in steps)
    assert idle_share(np.array(costs), packs_per_step, world) == pytest.approx(1 - busy / (world * time), abs=1e-12)


def test_idle_shares_known_beforehand() -> None:
    costs = np.array([4.0, 1, 3, 2])
    assert idle_share(costs, 4, 1) == 0
    assert idle_share(costs, 4, 2) == pytest.approx(1 - 10 / 12)  # 4 with 3, 2 with 1
    assert idle_share(costs, 2, 2) == pytest.approx(1 - 10 / 14)  # 4 with 1, 3 with 2
    assert idle_share(costs, 1, 2) == 0.5
    assert idle_share(costs, 10**12, 4) == pytest.approx(1 - 10 / 16)
    assert idle_share(np.ones(9), 4, 2) == pytest.approx(0.1)  # of ten turns one is empty


@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=5), min_size=1, max_size=8))
def test_costs_are_tokens_and_squares(packs: list[list[int]]) -> None:
    lengths = np.array([n for p in packs for n in p])
    offsets = np.cumsum([0, *map(len, packs)])
    got = pack_costs(lengths, offsets, 70.5)
    for cost, (a, b) in zip(got, pairwise(offsets), strict=True):
        assert cost == sum(lengths[a:b]) + sum(n**2 for n in lengths[a:b]) / 70.5
    assert pack_costs(lengths, offsets, math.inf).tolist() == [sum(p) for p in packs]


def test_costs_are_a_models_flops(qwen2_checkpoint: Path) -> None:
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_checkpoint(qwen2_checkpoint))
    parity = attention_parity(model.flops_per_token)
    assert model.flops_per_token(parity) == pytest.approx(2 * model.flops_per_token(0))
    lengths = np.array([100, 900, 1])
    flops = [n * model.flops_per_token(int(n)) for n in lengths]
    costs = pack_costs(lengths, np.arange(4), parity)
    assert costs * model.flops_per_token(0) == pytest.approx(flops)
