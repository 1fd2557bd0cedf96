"""The reverse KL as it runs on CUDA, against float64; see test_loss_triton.py."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cuda_way import DEVICE, HAS_GPU, as_on_cuda, chunks_of, inputs
from helpers.soft_cases import reverse_targets
from helpers.tensors import with_gradients
from micota_fast.kernels import ReverseTargets, linear_cross_entropy
from micota_fast.kernels.reference import dense_linear_cross_entropy

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
FEW = settings(deadline=None, max_examples=200 if HAS_GPU else 20)


@pytest.fixture(autouse=True, scope="module")
def the_way_of_cuda() -> Iterator[None]:
    with as_on_cuda():
        yield


def on_device(reverse: ReverseTargets) -> ReverseTargets:
    return replace(reverse, tokens=reverse.tokens.to(DEVICE), logprobs=reverse.logprobs.to(DEVICE))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@FEW
@given(
    n=st.integers(1, 12),
    v=st.integers(2, 150),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
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
    v: int,
    dtype: torch.dtype,
    alpha: float,
    ignored: float,
    absent: float,
    reduction: Any,
    told: bool,
    chunk_rows: int,
    seed: int,
) -> None:
    hidden, weight = inputs(n, 16, v, dtype, seed)
    reverse = on_device(reverse_targets(n, v, ignored=ignored, absent=absent, alpha=alpha, seed=seed))
    options = {"n_supervised": int((reverse.tokens != -100).sum())} if told else {}
    with chunks_of(chunk_rows, v, dtype):
        got = with_gradients(linear_cross_entropy, hidden, weight, reverse, reduction=reduction, **options)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), reverse, reduction=reduction)
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype]
    for ours, reference in zip(got, exact, strict=True):
        assert ours.isfinite().all()
        # As for hard targets, times a factor that itself has the rounding of the logits.
        tolerance = 3e-5 if dtype == torch.float32 else 0.3
        assert (ours.double() - reference).norm() <= tolerance * (reference.norm() + 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_tokens_that_the_teacher_has_not_scored_are_hard_targets_to_the_bit() -> None:
    hidden, weight = inputs(12, 16, 90, torch.bfloat16)
    nothing = on_device(reverse_targets(12, 90, ignored=0.3, absent=1.0, alpha=0.4))
    with chunks_of(8, 90, torch.bfloat16):
        hard, got = (with_gradients(linear_cross_entropy, hidden, weight, t) for t in (nothing.tokens, nothing))
    assert all(torch.equal(a, b) for a, b in zip(got, hard, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [0.02, math.inf, -math.inf])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_log_probability_that_is_none_reaches_loss_and_gradients(reduction: Any, value: float) -> None:
    hidden, weight = inputs(9, 8, 90, torch.float32)
    reverse = reverse_targets(9, 90)
    reverse.logprobs[4] = value
    reverse = on_device(reverse)
    loss, grad_hidden, grad_weight = with_gradients(linear_cross_entropy, hidden, weight, reverse, reduction=reduction)
    assert loss.isnan().tolist() == ([i == 4 for i in range(9)] if reduction == "none" else True)
    assert grad_hidden.isnan().any(dim=1).tolist() == [i == 4 for i in range(9)]
    assert grad_weight.isnan().all()
    reverse.tokens[4] = -100
    got = with_gradients(linear_cross_entropy, hidden, weight, reverse, reduction=reduction)
    assert all(tensor.isfinite().all() for tensor in got), "an ignored row may be anything"
