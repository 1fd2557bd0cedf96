"""Ranks against sorting, and the measures against sums written out."""

import numpy as np
import pytest
import torch

from micota_fast.alignment import learnability
from micota_fast.alignment.learnability import target_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 7, 1 << 25])  # logits at a time: one column, uneven blocks, all
def test_ranks_are_places_in_the_sorted_logits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    monkeypatch.setattr(learnability, "BLOCK", block)
    random = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(5, 16, generator=random).to(dtype)
    weight_VH = torch.randn(101, 16, generator=random).to(dtype)
    order_NV = (hidden_NH.double() @ weight_VH.double().T).argsort(descending=True)
    for place in (0, 1, 50, 100):
        assert target_ranks(hidden_NH, weight_VH, order_NV[:, place]).tolist() == [place + 1] * 5


def test_equal_logits_are_not_greater() -> None:
    hidden_NH, weight_VH = torch.ones(2, 3), torch.ones(9, 3)
    weight_VH[4] = 2.0
    assert target_ranks(hidden_NH, weight_VH, torch.tensor([0, 4])).tolist() == [2, 1]


def test_no_place_that_is_told() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert target_ranks(torch.zeros(0, 3), torch.ones(9, 3), nothing).tolist() == []


def test_measures_of_three_answers() -> None:
    nll_N = np.array([1.0, 2.0, 4.0, 0.5, 0.5, 8.0], np.float32)
    rank_N = np.array([1, 2, 200, 1, 1, 100])
    measured = learnability.learnability(nll_N, rank_N, np.array([3, 2, 1]))
    assert measured.nats_per_answer.mean == (7 + 1 + 8) / 3
    assert measured.nats_per_answer.p50 == 7
    assert measured.nats_per_answer.sd == np.std([7, 1, 8])
    assert measured.departures_per_answer.mean == (2 + 0 + 1) / 3
    assert measured.top1 == 3 / 6
    assert measured.rank_surprisal_ratio == (1 + 2 + 100 + 1 + 1 + 100) / 16
