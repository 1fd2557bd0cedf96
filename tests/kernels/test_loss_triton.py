"""The loss as it runs on CUDA, against float64: Triton's kernels and the driver that calls them.

Where there is a GPU all of it runs there. Elsewhere Triton's interpreter runs the kernels on CPU tensors, and the
driver goes the way that it goes on CUDA.
"""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.cuda_way import DEVICE, HAS_GPU, as_on_cuda, chunks_of
from micota_fast.kernels import (
    SoftTargets,
    chunks,
    in_place,
    kept_products,
    linear_cross_entropy,
    triton_chunk,
    triton_rows,
)
from micota_fast.kernels.reference import dense_linear_cross_entropy
from micota_fast.kernels.rows import LossInputs, kept_rows

implementation = sys.modules[linear_cross_entropy.__module__]

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
NAN, INF = float("nan"), float("inf")
FEW = settings(deadline=None, max_examples=200 if HAS_GPU else 25)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True, scope="module")
def the_way_of_cuda() -> Iterator[None]:
    with as_on_cuda():
        yield


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The rows' kernel


def softmax_rows(
    logits_CV: Tensor,
    targets: Tensor,
    scale: Tensor,
    *,
    threshold: float = 0.0,
    want_gradient: bool = True,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Loss of each row, and the buffer afterwards, [C, V and padding], which held NaN past the columns."""
    c, v = logits_CV.shape
    aligned = chunks.ALIGNED_BYTES // logits_CV.element_size()
    buffer = logits_CV.new_full((c, math.ceil(v / aligned) * aligned), NAN)
    buffer[:, :v] = logits_CV
    buffer, nll_C = buffer.to(DEVICE), torch.full((c,), 7.0, device=DEVICE)
    triton_rows.softmax_rows[(c,)](
        buffer,
        targets.to(DEVICE),
        scale.to(DEVICE),
        nll_C,
        v,
        buffer.stride(0),
        threshold,
        ignore_index,
        SCALE_STRIDE=1 if scale.ndim else 0,
        WANT_GRADIENT=want_gradient,
        FILTER=threshold > 0,
        BLOCK_V=triton_chunk.BLOCK_BYTES // buffer.element_size(),
        NUM_STAGES=triton_chunk.NUM_STAGES,
        num_warps=triton_chunk.NUM_WARPS,
    )
    return nll_C.cpu(), buffer.cpu()


def reference_rows(logits_CV: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64: loss of each row, gradient of sum(scale * loss)."""
    logits_CV = logits_CV.double().requires_grad_()
    nll_C = torch.nn.functional.cross_entropy(logits_CV, targets, reduction="none")
    (nll_C * scale.double()).sum().backward()
    assert logits_CV.grad is not None
    return nll_C.detach(), logits_CV.grad


@FEW
@given(
    c=st.integers(1, 4),
    v=st.integers(1, 150),
    dtype=DTYPES,
    spread=st.sampled_from([1.0, 30.0]),
    ignored=st.sampled_from([0.0, 0.4]),
    ignore_index=st.sampled_from([-100, 0]),
    scaled_each=st.booleans(),
    threshold=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31),
)
def test_rows_equal_float64(
    c: int,
    v: int,
    dtype: torch.dtype,
    spread: float,
    ignored: float,
    ignore_index: int,
    scaled_each: bool,
    threshold: float,
    seed: int,
) -> None:
    generator = seeded(seed)
    logits = (torch.randn(c, v, generator=generator) * spread).to(dtype)
    targets = torch.randint(0, v, (c,), generator=generator)
    targets[torch.rand(c, generator=generator) < ignored] = ignore_index
    scale = torch.randn(c, generator=generator) if scaled_each else torch.tensor(0.37)
    kept = targets != ignore_index
    nll, gradient = reference_rows(logits, targets.where(kept, -100), scale)

    got_nll, got = softmax_rows(logits, targets, scale, threshold=threshold, ignore_index=ignore_index)
    torch.testing.assert_close(got_nll.double(), nll, rtol=1e-5, atol=1e-5)
    computed = kept & ~(got_nll <= threshold) if threshold else torch.ones_like(kept)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8 * 1.01, "atol": 1e-6}
    torch.testing.assert_close(got[computed, :v].double(), gradient[computed], **tolerance)
    assert not got[computed, v:].any(), "the padding of a row that the products read is not 0"
    assert torch.equal(got[~computed, :v], logits[~computed]), "a row that is left out was written"

    only_nll, untouched = softmax_rows(logits, targets, scale, want_gradient=False, ignore_index=ignore_index)
    assert torch.equal(only_nll, got_nll)
    assert torch.equal(untouched[:, :v], logits)


def test_the_loss_of_a_sure_row_is_not_lost_to_rounding() -> None:
    """Logits around 1,000 are 6e-5 apart in float32; their difference to the target's is what counts."""
    logits = torch.full((1, 200), 1000.0)
    logits[0, 150] = 1014
    nll, gradient = reference_rows(logits, torch.tensor([150]), torch.tensor(1.0))
    got_nll, got = softmax_rows(logits, torch.tensor([150]), torch.tensor(1.0))
    assert abs(float(got_nll - nll)) < 2e-7
    assert (got[:, :200] - gradient).abs().max() < 2e-7


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_infinite_logits_and_nan(dtype: torch.dtype) -> None:
    v = 70
    logits = torch.randn(7, v, generator=seeded(0)).to(dtype)
    targets = torch.arange(7) * 10
    logits[0, 3], logits[1, 65], logits[2, 40], logits[3, 5] = NAN, INF, -INF, -INF
    logits[3, :65] = -INF  # all of the first block
    logits[4] = -INF
    logits[5, 50] = -INF  # the target's
    nll, gradient = reference_rows(logits, targets, torch.ones(()))
    got_nll, got = softmax_rows(logits, targets, torch.ones(()))
    torch.testing.assert_close(got_nll.double(), nll, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got_nll.isnan().tolist() == [True, True, False, False, True, False, False]
    assert got_nll[5] == INF
    torch.testing.assert_close(got[:, :v].double(), gradient, rtol=2**-8, atol=1e-5, equal_nan=True)
    filtered_nll, filtered = softmax_rows(logits, targets, torch.ones(()), threshold=0.5)
    assert filtered_nll.isnan().tolist() == got_nll.isnan().tolist()
    assert filtered[got_nll.isnan(), :v].isnan().all(), "a row with NaN fell below the threshold"


@pytest.mark.parametrize("bad", [100, -1, 128, 2**40, -(2**40)])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_target_out_of_range_makes_its_row_nan(bad: int, threshold: float) -> None:
    logits = torch.randn(3, 100, generator=seeded(0))
    targets = torch.tensor([5, bad, 99])
    got_nll, got = softmax_rows(logits, targets, torch.ones(()), threshold=threshold)
    assert got_nll.isnan().tolist() == [False, True, False]
    assert got[1, :100].isnan().all()
    assert got[::2, :100].isfinite().all()


# The products over some rows


@FEW
@given(
    size=st.integers(0, 20), n=st.integers(0, 30), share=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 2**31)
)
def test_kept_rows(size: int, n: int, share: float, seed: int) -> None:
    kept = torch.rand(n, generator=seeded(seed)) < share
    expected = kept.nonzero().flatten().tolist()[:size]
    got = kept_rows(kept.to(DEVICE), size)
    assert got.dtype == torch.int64
    assert got.tolist() == expected + [0] * (size - len(expected))


@FEW
@given(
    c=st.integers(1, 70),
    v=st.sampled_from([1, 32, 50, 64, 70]),
    h=st.sampled_from([1, 16, 40]),
    dtype=DTYPES,
    share=st.sampled_from([0.0, 0.2, 1.0]),
    total_dtype=st.sampled_from([None, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_products_of_kept_rows(
    c: int, v: int, h: int, dtype: torch.dtype, share: float, total_dtype: torch.dtype | None, seed: int
) -> None:
    """Rows that are left out hold NaN, so that one which is read shows."""
    generator = seeded(seed)
    kept = torch.rand(c, generator=generator) < share
    aligned = chunks.ALIGNED_BYTES // dtype.itemsize
    buffer = torch.zeros(c, math.ceil(v / aligned) * aligned, dtype=dtype)
    buffer[:, :v] = torch.randn(c, v, generator=generator)
    grad, weight, hidden = buffer[:, :v], torch.randn(v, h, generator=generator), torch.randn(c, h, generator=generator)
    weight, hidden = weight.to(dtype), hidden.to(dtype)
    exact_hidden = torch.where(kept[:, None], grad.double() @ weight.double(), 7)
    exact_weight = grad[kept].double().T @ hidden[kept].double()
    buffer[~kept], hidden[~kept] = NAN, NAN

    buffer, weight, hidden, kept = (t.to(DEVICE) for t in (buffer, weight, hidden, kept))
    args = kept_rows(kept, c), kept.sum()
    out = torch.full((c, h), 7.0, dtype=dtype, device=DEVICE)
    kept_products.grad_hidden_of_kept(buffer[:, :v], weight, *args, out)
    total = torch.full((v, h), NAN, dtype=total_dtype or dtype, device=DEVICE)
    kept_products.grad_weight_of_kept(buffer[:, :v], hidden, *args, total, True)
    assert_near(out, exact_hidden, dtype, v)
    assert_near(total, exact_weight, total.dtype, c)
    if total.dtype == torch.float32:
        kept_products.grad_weight_of_kept(buffer[:, :v], hidden, *args, total, False)
        assert_near(total, 2 * exact_weight, total.dtype, c)


def assert_near(got: Tensor, exact: Tensor, dtype: torch.dtype, terms: int) -> None:
    """As exact as a float32 sum of that many terms of about 1, rounded to `dtype`."""
    rounding = {"rtol": 1e-5 if dtype == torch.float32 else 2**-8, "atol": 1e-6 * terms}
    torch.testing.assert_close(got.cpu().double(), exact, **rounding)


# The whole of it


def inputs(n: int, h: int, v: int, dtype: torch.dtype, ignored: float = 0.3, seed: int = 0) -> tuple[Tensor, ...]:
    generator = seeded(seed)
    hidden, weight = torch.randn(n, h, generator=generator), torch.randn(v, h, generator=generator)
    targets = torch.randint(0, v, (n,), generator=generator)
    with torch.no_grad():  # a third of the rows are near certain of their targets
        hidden[::3] += 4 * weight[targets[::3]]
    targets[torch.rand(n, generator=generator) < ignored] = -100
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE)


def with_gradients(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, targets, **options)
    loss.backward(torch.linspace(-1, 2, len(targets), device=DEVICE).to(loss.dtype) if loss.ndim else None)
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@FEW
@given(
    n=st.integers(0, 20),
    h=st.integers(1, 20),
    v=st.integers(2, 90),
    dtype=DTYPES,
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    told=st.booleans(),
    chunk_rows=st.sampled_from([1, 7, 1000]),
    seed=st.integers(0, 2**31),
)
def test_equals_dense_float64(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    ignored: float,
    reduction: str,
    told: bool,
    chunk_rows: int,
    seed: int,
) -> None:
    hidden, weight, targets = inputs(n, h, v, dtype, ignored, seed)
    options = {"n_supervised": int((targets != -100).sum())} if told else {}
    with chunks_of(chunk_rows, v, dtype):
        got = with_gradients(linear_cross_entropy, hidden, weight, targets, reduction=reduction, **options)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), targets, reduction=reduction)
    assert [t.dtype for t in got] == [torch.float32, dtype, dtype]
    for ours, reference in zip(got, exact, strict=True):
        assert ours.isfinite().all()
        # Logits of up to 100 rounded to bfloat16 are 0.25 off, as those of a dense head are. The absolute part is for
        # rows so sure of their targets that 1 - p is of the size of float32's rounding of p.
        tolerance = 2e-5 if dtype == torch.float32 else 0.3
        assert (ours.double() - reference).norm() <= tolerance * (reference.norm() + 0.1)


@pytest.mark.parametrize("chunk_rows", [64, 1000])
def test_bfloat16_is_no_worse_than_dense(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_chunk, "BLOCK_BYTES", 1024)
    args = inputs(150, 64, 500, torch.bfloat16, ignored=0)
    with chunks_of(chunk_rows, 500, torch.bfloat16):
        ours = with_gradients(linear_cross_entropy, *args)
    dense = with_gradients(dense_linear_cross_entropy, *args)
    exact = with_gradients(dense_linear_cross_entropy, *(t.double() for t in args[:2]), args[2])
    for a, b, reference in zip(ours, dense, exact, strict=True):
        assert relative_error(a, reference) <= 1.01 * relative_error(b, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_filter", [0.0, 1e-3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_twice(dtype: torch.dtype, row_filter: float, reduction: str) -> None:
    args = inputs(20, 16, 90, dtype)
    options = {"row_filter": row_filter, "n_supervised": int((args[2] != -100).sum()), "reduction": reduction}
    with chunks_of(8, 90, dtype):
        first, second = (with_gradients(linear_cross_entropy, *args, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@FEW
@given(
    n=st.integers(1, 20),
    dtype=DTYPES,
    row_filter=st.sampled_from([1e-12, 1e-3, 0.3, 0.999999]),
    told=st.booleans(),
    chunk_rows=st.sampled_from([7, 1000]),
    seed=st.integers(0, 2**31),
)
def test_the_row_filter_leaves_out_what_it_says(
    n: int, dtype: torch.dtype, row_filter: float, told: bool, chunk_rows: int, seed: int
) -> None:
    """From no row to all rows; those that stay get what they get without it."""
    hidden, weight, targets = inputs(n, 12, 60, dtype, seed=seed)
    options = {"n_supervised": int((targets != -100).sum())} if told else {}
    with chunks_of(chunk_rows, 60, dtype):
        exact, got = (
            with_gradients(linear_cross_entropy, hidden, weight, targets, reduction="sum", row_filter=eps, **options)
            for eps in (0.0, row_filter)
        )
        nll_N = linear_cross_entropy(hidden, weight, targets, reduction="none", **options)
    kept = (nll_N > -math.log1p(-row_filter)) & (targets != -100)
    assert torch.equal(got[0], exact[0])
    assert not got[1][~kept].any()
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-2}
    torch.testing.assert_close(got[1][kept], exact[1][kept], **tolerance)
    logits = hidden[kept].double() @ weight.double().T
    gradient = logits.softmax(1)
    gradient[torch.arange(len(gradient)), targets[kept]] -= 1
    sums = gradient.T @ hidden[kept].double()
    assert (got[2].double() - sums).norm() <= (1e-4 if dtype == torch.float32 else 0.1) * (1 + sums.norm())


@pytest.mark.parametrize("wrong", [0, 19, 21, 30])
@pytest.mark.parametrize("options", [{}, {"row_filter": 0.9999}, {"reduction": "none"}])
def test_a_wrong_n_supervised_makes_all_nan(wrong: int, options: dict[str, Any]) -> None:
    hidden, weight, targets = inputs(30, 8, 40, torch.bfloat16, ignored=0)
    targets[::3] = -100  # 20 are supervised
    got = with_gradients(linear_cross_entropy, hidden, weight, targets, n_supervised=20, **options)
    assert all(t.isfinite().all() for t in got)
    got = with_gradients(linear_cross_entropy, hidden, weight, targets, n_supervised=wrong, **options)
    assert all(t.isnan().all() for t in got)


@pytest.mark.parametrize("options", [{}, {"row_filter": 0.5}, {"reduction": "none"}])
def test_a_target_out_of_range_reaches_loss_and_gradients(options: dict[str, Any]) -> None:
    hidden, weight, targets = inputs(9, 8, 40, torch.float32, ignored=0)
    targets[4] = 40
    loss, grad_hidden, grad_weight = with_gradients(linear_cross_entropy, hidden, weight, targets, **options)
    assert loss.isnan().any()
    assert grad_hidden.isnan().any(dim=1).tolist() == [i == 4 for i in range(9)]
    assert grad_weight.isnan().all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("row_filter", [0.0, 1e-3])
def test_a_frozen_input_changes_nothing_for_the_other(frozen: str, row_filter: float) -> None:
    hidden, weight, targets = inputs(20, 8, 40, torch.float32)
    expected = with_gradients(linear_cross_entropy, hidden, weight, targets, row_filter=row_filter)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    linear_cross_entropy(hidden, weight, targets, row_filter=row_filter).backward()
    trained, gradient = (hidden, expected[1]) if frozen == "weight" else (weight, expected[2])
    assert torch.equal(trained.grad, gradient)  # type: ignore[arg-type]


def test_strided_inputs() -> None:
    hidden, weight, targets = inputs(20, 8, 40, torch.float32)
    expected = with_gradients(linear_cross_entropy, hidden, weight, targets)
    args = hidden.T.contiguous().T, weight.T.contiguous().T, targets.repeat_interleave(2)[::2]
    for ours, theirs in zip(with_gradients(linear_cross_entropy, *args), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    args = hidden.repeat(1, 2)[:, :8], weight.repeat_interleave(2, 0)[::2], targets
    for ours, theirs in zip(with_gradients(linear_cross_entropy, *args, row_filter=1e-12), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# The factor of the backward pass


@FEW
@given(
    size=st.integers(0, 200),
    dtype=DTYPES,
    factor=st.sampled_from([1.0, 1 / 3, -2.0, 0.0, NAN]),
    programs=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**31),
)
def test_a_tensor_is_multiplied_in_place_and_rounded_once(
    size: int, dtype: torch.dtype, factor: float, programs: int, seed: int
) -> None:
    x = torch.randn(size, generator=seeded(seed)).to(DEVICE, dtype)
    wanted = (x.float() * torch.tensor(factor)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "BLOCK", 16)
        patch.setattr(in_place, "PROGRAMS", programs)
        got = in_place.multiply_in_place(x, torch.tensor(factor, device=DEVICE))
    assert got is x
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_passes_multiply_by_what_comes_in_and_a_graph_that_is_kept_stays_as_it_is(dtype: torch.dtype) -> None:
    hidden, weight, targets = inputs(20, 16, 100, dtype)
    _, *once = with_gradients(linear_cross_entropy, hidden, weight, targets)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    for factor, keep in ((3.0, True), (1.0, True), (1 / 3, False)):
        incoming = torch.tensor(factor, device=DEVICE)
        got = torch.autograd.grad(loss, (hidden, weight), incoming, retain_graph=keep)
        for ours, expected in zip(got, once, strict=True):
            assert torch.equal(ours, (expected.float() * incoming).to(dtype)), factor
            ours.zero_()  # theirs to write to


def test_a_backward_pass_takes_no_second_copy_of_the_gradients() -> None:
    hidden, weight, targets = inputs(20, 16, 100, torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    stored = [x.data_ptr() for x in loss.grad_fn.saved_tensors[1:]]  # type: ignore[union-attr]
    got = torch.autograd.grad(loss * 2, (hidden, weight))
    assert [x.data_ptr() for x in got] == stored


def test_without_torchs_word_on_the_graph_the_gradients_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs(20, 16, 100, torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    expected = torch.autograd.grad(loss * 2, (hidden, weight))
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    loss = linear_cross_entropy(hidden, weight, targets)
    stored = [x.data_ptr() for x in loss.grad_fn.saved_tensors[1:]]  # type: ignore[union-attr]
    for keep in (True, False):
        got = torch.autograd.grad(loss * 2, (hidden, weight), retain_graph=keep)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
        assert not {x.data_ptr() for x in got} & set(stored)


# What can be seen of CUDA without one


@FEW
@given(
    n=st.integers(0, 100_000),
    h=st.sampled_from([896, 3584, 8192]),
    v=st.sampled_from([1, 50_257, 151_936, 152_064, 10**6]),
    dtype=DTYPES,
    want_weight=st.booleans(),
)
def test_the_plan_keeps_to_its_budget(n: int, h: int, v: int, dtype: torch.dtype, want_weight: bool) -> None:
    plan = chunks.Plan.of(n, h, v, dtype, "cuda", want_weight)
    row_bytes = plan.row_stride * dtype.itemsize
    assert v <= plan.row_stride < v + 128
    assert row_bytes % 128 == 0
    budget = chunks.LOGITS_BYTES["cuda"]
    if n <= plan.chunk_rows:  # alone: what d weight in float32 would take above d weight in bfloat16 goes to logits
        assert plan.grad_weight_dtype == dtype
        saved = v * h * (4 - dtype.itemsize) if want_weight else 0
        assert n * row_bytes <= max(budget + saved, row_bytes)
        return
    assert plan.grad_weight_dtype == torch.float32
    assert plan.chunk_rows * row_bytes <= max(budget, row_bytes)
    most = max(1, budget // row_bytes)
    if most >= 256:
        assert plan.chunk_rows % 256 == 0
    # No more chunks than whole tiles allow.
    assert math.ceil(n / plan.chunk_rows) == math.ceil(n / (most // 256 * 256 or most))


def test_the_plan_of_qwen2_5_7b() -> None:
    rows = {n: chunks.Plan.of(n, 3584, 152_064, torch.bfloat16, "cuda").chunk_rows for n in (8192, 16384, 32768)}
    assert rows == {8192: 8192, 16384: 4096, 32768: 4864}  # one chunk, four, and seven of which the last is smaller


class Waits(TorchDispatchMode):
    """Notes each operation, and which of them put a value from the host where one of the device belongs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.from_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        self.seen.add(func.__name__.partition(".")[0])
        if any(t.device.type != "meta" for t in tensors):
            self.from_host.append(str(func))
        return out


class Launches:
    """Stands in for a kernel: there is nothing that it could run on."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: None


@pytest.mark.parametrize(("row_filter", "soft"), [(0.0, False), (1e-3, False), (0.0, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_device(
    row_filter: float, soft: bool, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors without a value: what depends on one, as item(), nonzero() or a boolean index do, raises an error."""
    monkeypatch.setattr(chunks, "takes_triton", lambda device, dtype: True)
    # An operator's body is not run on such tensors.
    monkeypatch.setattr(implementation, "_by_chunks", lambda *arguments: chunks.run(LossInputs(*arguments)))
    for kernels, name in (
        (triton_chunk, "softmax_rows"),
        (triton_chunk, "soft_softmax_rows"),
        (kept_products, "grad_hidden_kernel"),
        (kept_products, "grad_weight_kernel"),
        (in_place, "multiply_kernel"),
    ):
        monkeypatch.setattr(kernels, name, Launches())
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", 512 * 2048 * dtype.itemsize)
    with torch.device("meta"):
        hidden, weight = (torch.empty(n, 64, dtype=dtype, requires_grad=True) for n in (2000, 2048))
        targets, count = torch.empty(2000, dtype=torch.int64), torch.empty((), dtype=torch.int64)
        ids, logprobs = torch.empty(2000, 32, dtype=torch.int64), torch.empty(2000, 32)
    of_rows = SoftTargets(ids, logprobs, targets, "bucket", 2.0, 0.5) if soft else targets
    options = {"normalizer": count} if reduction == "mean" else {}
    with Waits() as waits:
        loss = linear_cross_entropy(
            hidden, weight, of_rows, reduction=reduction, n_supervised=1500, row_filter=row_filter, **options
        )
        loss.backward(torch.empty_like(loss))
    assert hidden.grad is not None
    assert weight.grad is not None
    assert {"cumsum", "index", "index_put_", "masked_fill_", "mul"} <= waits.seen
    assert waits.from_host == []
