"""The chunked loss against a dense float64 reference: values, gradients, memory, edges."""

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from micota_fast.kernels import linear_cross_entropy
from micota_fast.kernels.reference import dense_linear_cross_entropy

implementation = sys.modules[linear_cross_entropy.__module__]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven float64 rows of 11 logits a chunk, so that a handful of rows takes several chunks."""
    monkeypatch.setitem(implementation.LOGITS_BYTES, "cpu", 7 * 11 * 8)


def inputs(
    n: int, h: int = 5, v: int = 11, dtype: torch.dtype = torch.float64, ignored: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def with_gradients(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    """Loss, d hidden, d weight; each row of "none" is given a weight of its own."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, targets, **options)
    loss.backward(torch.linspace(-1, 2, len(targets), dtype=loss.dtype) if loss.ndim else None)
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 40),
    h=st.integers(1, 9),
    v=st.integers(1, 33),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    normalizer=st.sampled_from([None, 17, "tensor"]),
    ignore_index=st.sampled_from([-100, 0]),
    chunk_rows=st.sampled_from([1, 7, 1000]),
    seed=st.integers(0, 2**31),
)
def test_equals_dense_float64(
    n: int,
    h: int,
    v: int,
    ignored: float,
    reduction: str,
    normalizer: Any,
    ignore_index: int,
    chunk_rows: int,
    seed: int,
) -> None:
    hidden, weight, targets = inputs(n, h, v, ignored=ignored, seed=seed)
    targets = targets.where(targets != -100, ignore_index)
    options = {"reduction": reduction, "ignore_index": ignore_index}
    if reduction == "mean":
        options["normalizer"] = torch.tensor(17.0) if normalizer == "tensor" else normalizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(implementation.LOGITS_BYTES, "cpu", chunk_rows * v * 8)
        got = with_gradients(linear_cross_entropy, hidden, weight, targets, **options)
    dense = with_gradients(dense_linear_cross_entropy, hidden, weight, targets, **options)
    for ours, reference in zip(got, dense, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def relative_errors(dtype: torch.dtype, function: Any) -> list[float]:
    """Of loss, d hidden, d weight to float64 on the same (rounded) inputs; logits of a trained model's spread."""
    hidden, weight, targets = inputs(300, 64, 500, dtype=dtype)
    got = with_gradients(function, hidden, weight, targets)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), targets)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


def test_float32_error_is_below_1e_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(implementation.LOGITS_BYTES, "cpu", 64 * 500 * 4)
    assert max(relative_errors(torch.float32, linear_cross_entropy)) < 1e-5


def test_bfloat16_is_no_worse_than_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(implementation.LOGITS_BYTES, "cpu", 64 * 500 * 4)
    ours = relative_errors(torch.bfloat16, linear_cross_entropy)
    dense = relative_errors(torch.bfloat16, dense_linear_cross_entropy)
    assert all(a <= b * 1.01 for a, b in zip(ours, dense, strict=True)), (ours, dense)


@pytest.mark.usefixtures("small_chunks")
def test_same_bits_twice() -> None:
    first, second = (with_gradients(linear_cross_entropy, *inputs(40)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_frozen_input_gets_no_gradient(frozen: str, reduction: str) -> None:
    hidden, weight, targets = inputs(20)
    _, grad_hidden, grad_weight = with_gradients(dense_linear_cross_entropy, hidden, weight, targets, reduction="sum")
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()  # type: ignore[arg-type]
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for tensor, expected in ((hidden, grad_hidden), (weight, grad_weight)):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected)


@pytest.mark.usefixtures("small_chunks")
def test_strided_inputs() -> None:
    hidden, weight, targets = inputs(30)
    options = {"reduction": "sum"}
    expected = with_gradients(dense_linear_cross_entropy, hidden, weight, targets, **options)
    hidden, weight = hidden.detach().T.contiguous().T, weight.detach().repeat_interleave(2, 0)[::2]
    strided_targets = targets.repeat_interleave(3)[::3]
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    got = with_gradients(linear_cross_entropy, hidden, weight, strided_targets, **options)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("n", "ignored"), [(0, 0.0), (9, 1.0)])
def test_nothing_supervised_is_zero_without_nan(n: int, ignored: float) -> None:
    loss, grad_hidden, grad_weight = with_gradients(linear_cross_entropy, *inputs(n, ignored=ignored))
    assert loss == 0
    assert not grad_hidden.any()
    assert not grad_weight.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_a_non_finite_input_reaches_the_loss(value: float, where: str) -> None:
    hidden, weight, targets = inputs(9, ignored=0)
    with torch.no_grad():
        (hidden if where == "hidden" else weight)[3] = value
    assert not torch.isfinite(linear_cross_entropy(hidden, weight, targets))


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(9, dtype=torch.float32)
    got = with_gradients(linear_cross_entropy, hidden * 1e4, weight, targets)
    dense = with_gradients(dense_linear_cross_entropy, hidden * 1e4, weight, targets)
    for ours, theirs in zip(got, dense, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bad", [11, -1])
def test_a_target_out_of_range_is_named(bad: int) -> None:
    hidden, weight, targets = inputs(9)
    targets[4] = bad
    with pytest.raises(IndexError, match=rf"targets\[4\] = {bad} lies outside the vocabulary \[0, 11\)"):
        linear_cross_entropy(hidden, weight, targets)


def test_misfits_are_refused() -> None:
    hidden, weight, targets = inputs(9)
    for wrong in (
        {"hidden": hidden[:, :4]},
        {"targets": targets[:5]},
        {"targets": targets.int()},
        {"weight": weight.float()},
        {"reduction": "average"},
        {"reduction": "sum", "normalizer": 3},
    ):
        with pytest.raises(ValueError, match=r"expected|type|reduction"):
            linear_cross_entropy(**({"hidden": hidden, "weight": weight, "targets": targets} | wrong))


def test_a_second_backward_is_refused() -> None:
    hidden, weight, targets = inputs(9)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_no_gradient_work_where_none_is_wanted() -> None:
    hidden, weight, targets = inputs(9)
    with torch.no_grad(), LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, targets)
    assert "addmm_" not in seen.operations


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that any operation returned, and the operations' names."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operations = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.add(func.__name__.partition(".")[0])
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def peak_bytes(function: Any, *args: Tensor) -> int:
    """Highest sum of live allocations above the start, from the profiler's record of the CPU allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        with_gradients(function, *args)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_one_chunk_above_the_gradients(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    n, h, v = 2000, 16, 3000
    budget = 100 * v * 4
    monkeypatch.setitem(implementation.LOGITS_BYTES, "cpu", budget)
    hidden, weight, targets = inputs(n, h, v, dtype)
    gradients = n * h * dtype.itemsize + v * h * (4 + dtype.itemsize)
    dense = peak_bytes(dense_linear_cross_entropy, hidden, weight, targets)
    ours = peak_bytes(linear_cross_entropy, hidden, weight, targets)
    assert dense > n * v * 4, "the measurement misses the logits"
    # bfloat16: one more chunk of logits in that type, and the GEMM's own workspace.
    assert ours < gradients + 2.2 * budget
    with LargestTensor() as seen:
        with_gradients(linear_cross_entropy, hidden, weight, targets)
    assert seen.bytes <= max(budget, v * h * 4)
