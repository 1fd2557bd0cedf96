"""The loss of soft targets as it runs on CUDA, against float64; see test_loss_triton.py."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cuda_way import DEVICE, HAS_GPU, as_on_cuda, chunks_of, inputs
from helpers.soft_cases import soft_targets
from helpers.tensors import assert_same, with_gradients
from micota_fast.kernels import SoftTargets, linear_cross_entropy
from micota_fast.kernels.reference import dense_linear_cross_entropy

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
FEW = settings(deadline=None, max_examples=200 if HAS_GPU else 30)
TAILS = ("ignore", "bucket")


@pytest.fixture(autouse=True, scope="module")
def the_way_of_cuda() -> Iterator[None]:
    with as_on_cuda():
        yield


def on_device(soft: SoftTargets) -> SoftTargets:
    hard = None if soft.hard is None else soft.hard.to(DEVICE)
    return replace(soft, ids=soft.ids.to(DEVICE), logprobs=soft.logprobs.to(DEVICE), hard=hard)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@FEW
@given(
    n=st.integers(1, 12),
    h=st.integers(1, 20),
    v=st.integers(2, 150),
    k=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tail=st.sampled_from(TAILS),
    temperature=st.sampled_from([1.0, 2.0, 0.5]),
    alpha=st.sampled_from([1.0, 0.3]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    absent=st.sampled_from([0.0, 0.4]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    told=st.booleans(),
    chunk_rows=st.sampled_from([1, 7, 1000]),
    seed=st.integers(0, 2**31),
)
def test_equals_dense_float64(
    n: int,
    h: int,
    v: int,
    k: int,
    dtype: torch.dtype,
    tail: Any,
    temperature: float,
    alpha: float,
    ignored: float,
    absent: float,
    reduction: Any,
    told: bool,
    chunk_rows: int,
    seed: int,
) -> None:
    hidden, weight = inputs(n, h, v, dtype, seed)
    how = {"tail": tail, "temperature": temperature, "alpha": alpha, "hard": alpha < 1}
    soft = on_device(soft_targets(n, v, min(k, v), ignored=ignored, absent=absent, seed=seed, **how))
    options = {"n_supervised": int((soft.row_targets() != -100).sum())} if told else {}
    with chunks_of(chunk_rows, v, dtype):
        got = with_gradients(linear_cross_entropy, hidden, weight, soft, reduction=reduction, **options)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), soft, reduction=reduction)
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype]
    for ours, reference in zip(got, exact, strict=True):
        assert ours.isfinite().all()
        # As for hard targets; a temperature below 1 makes the rounding of the logits that much larger.
        tolerance = (3e-5 if dtype == torch.float32 else 0.3) / min(1, temperature)
        assert (ours.double() - reference).norm() <= tolerance * (reference.norm() + 0.1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_token_of_probability_1_is_a_hard_target_to_the_bit(tail: Any, dtype: torch.dtype, reduction: Any) -> None:
    hidden, weight = inputs(12, 16, 90, dtype)
    targets = torch.randint(0, 90, (12,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets[::4] = -100
    weights = {"token_weights": torch.linspace(0, 2, 12, device=DEVICE)} if reduction == "mean" else {}
    ids, zeros = targets.unsqueeze(1), torch.zeros(12, 1, device=DEVICE)
    others = torch.where(ids >= 0, (ids + torch.arange(1, 3, device=DEVICE)) % 90, -100)
    with chunks_of(8, 90, dtype):
        hard = with_gradients(linear_cross_entropy, hidden, weight, targets, reduction=reduction, **weights)
        for soft in (
            SoftTargets(ids, zeros, tail=tail),
            SoftTargets(
                torch.cat([ids, others], 1), torch.cat([zeros, zeros - math.inf, zeros - math.inf], 1), tail=tail
            ),
            SoftTargets(torch.cat([ids, ids * 0 - 100], 1), torch.cat([zeros, zeros], 1), hard=targets, tail=tail),
        ):
            got = with_gradients(linear_cross_entropy, hidden, weight, soft, reduction=reduction, **weights)
            assert all(torch.equal(a, b) for a, b in zip(got, hard, strict=True))


@pytest.mark.parametrize("tail", TAILS)
def test_bfloat16_is_no_worse_than_dense(tail: Any) -> None:
    hidden, weight = inputs(40, 32, 200, torch.bfloat16)
    soft = on_device(soft_targets(40, 200, 16, tail=tail))
    ours, dense = (with_gradients(f, hidden, weight, soft) for f in (linear_cross_entropy, dense_linear_cross_entropy))
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), soft)
    for a, b, reference in zip(ours, dense, exact, strict=True):
        assert (a.double() - reference).norm() <= 1.01 * (b.double() - reference).norm()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("gap", [20.0, 60.0, 200.0])
def test_a_tail_of_the_student_far_below_rounding_is_exact(gap: float) -> None:
    hidden = torch.eye(1, 4, device=DEVICE)
    weight = torch.tensor([[gap, 1, -1, 0.5]], device=DEVICE).T.expand(4, 4).contiguous()
    soft = on_device(SoftTargets(torch.tensor([[0]]), torch.tensor([[0.9]]).log(), tail="bucket"))
    got = with_gradients(linear_cross_entropy, hidden, weight, soft)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), soft)
    for ours, reference in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_row_without_a_token_has_the_hard_loss_alone(tail: Any, alpha: float, temperature: float) -> None:
    hidden, weight = inputs(9, 8, 90, torch.float32)
    soft = soft_targets(9, 90, 3, tail=tail, hard=True, alpha=alpha, temperature=temperature)
    soft.ids[::2] = -100
    got = with_gradients(linear_cross_entropy, hidden, weight, on_device(soft))
    dense = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), soft)
    assert_same([tensor.cpu().double() for tensor in got], dense, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "changed",
    [
        {"ids": {(4, 1): 90}},
        {"ids": {(4, 0): -1}},
        {"ids": {(4, 1): 2**40}},
        {"ids": {(4, 0): 7, (4, 2): 7}},
        {"logprobs": {(4, 1): math.nan}},
        {"logprobs": {(4, 1): math.inf}},
        {"logprobs": {(4, 1): 0.02}},
        {"hard": {4: 90}},
    ],
)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_row_that_is_no_distribution_reaches_loss_and_gradients(
    tail: Any, reduction: Any, changed: dict[str, Any]
) -> None:
    hidden, weight = inputs(9, 8, 90, torch.float32)
    soft = soft_targets(9, 90, 3, tail=tail, hard=True, alpha=0.5 if "hard" in changed else 1.0)
    for name, entries in changed.items():
        for at, value in entries.items():
            getattr(soft, name)[at] = value
    soft = on_device(soft)
    loss, grad_hidden, grad_weight = with_gradients(linear_cross_entropy, hidden, weight, soft, reduction=reduction)
    assert loss.isnan().tolist() == ([i == 4 for i in range(9)] if reduction == "none" else True)
    assert grad_hidden.isnan().any(dim=1).tolist() == [i == 4 for i in range(9)]
    assert grad_weight.isnan().all()
    assert soft.hard is not None
    soft.hard[4] = -100
    got = with_gradients(linear_cross_entropy, hidden, weight, soft, reduction=reduction)
    assert all(tensor.isfinite().all() for tensor in got), "an ignored row may be anything"


@pytest.mark.parametrize("how", [{}, {"tail": "bucket", "temperature": 2.0, "alpha": 0.5, "hard": True}])
def test_same_bits_twice(how: dict[str, Any]) -> None:
    hidden, weight = inputs(20, 16, 90, torch.bfloat16)
    soft = on_device(soft_targets(20, 90, 8, ignored=0.3, **how))
    with chunks_of(8, 90, torch.bfloat16):
        first, second = (with_gradients(linear_cross_entropy, hidden, weight, soft) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
