"""The chunked loss on a CPU against a dense float64 reference: values, gradients, edges, compilation, memory."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.tensors import assert_same, assert_same_bits, with_gradients
from micota_fast.kernels import chunks, linear_cross_entropy
from micota_fast.kernels.reference import dense_linear_cross_entropy

implementation = sys.modules[linear_cross_entropy.__module__]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven float64 rows of 11 logits a chunk, so that a handful of rows takes several chunks."""
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", 7 * 11 * 8)


def inputs(
    n: int, h: int = 5, v: int = 11, dtype: torch.dtype = torch.float64, ignored: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < ignored] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def sure_inputs(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Also 1 - p of each row's target: as of a trained model, from near 0 to near 1, with a third below 1e-3."""
    hidden, weight, targets = inputs(n, 16, 40, torch.float64)
    targets = targets.where(targets >= 0, 3)
    with torch.no_grad():
        target_weight = weight[targets]
        hidden += torch.linspace(0, 2, n).unsqueeze(1) * target_weight
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        p_miss = -torch.expm1(-dense_linear_cross_entropy(hidden.double(), weight.double(), targets, reduction="none"))
    return hidden.requires_grad_(), weight.requires_grad_(), targets, p_miss


def weighted_dense(hidden: Tensor, weight: Tensor, targets: Tensor, *, token_weights: Tensor, **options: Any) -> Tensor:
    """The reference with a factor for each row."""
    nll_N = dense_linear_cross_entropy(
        hidden, weight, targets, reduction="none", ignore_index=options.get("ignore_index", -100)
    )
    if options["reduction"] == "sum":
        return (nll_N * token_weights).sum()
    normalizer = options.get("normalizer")
    if normalizer is None:
        normalizer = (targets != options.get("ignore_index", -100)).sum().clamp(min=1)
    return (nll_N * token_weights).sum() / normalizer


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(0, 40),
    h=st.integers(1, 9),
    v=st.integers(1, 33),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    normalizer=st.sampled_from([None, 17, 2.5, "tensor"]),
    ignore_index=st.sampled_from([-100, 0]),
    told=st.booleans(),
    weighted=st.booleans(),
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
    told: bool,
    weighted: bool,
    chunk_rows: int,
    seed: int,
) -> None:
    hidden, weight, targets = inputs(n, h, v, ignored=ignored, seed=seed)
    targets = targets.where(targets != -100, ignore_index)
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index}
    if reduction == "mean":
        options["normalizer"] = torch.tensor(17.0) if normalizer == "tensor" else normalizer
    reference = dense_linear_cross_entropy
    if weighted and reduction != "none":
        options["token_weights"] = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        reference = weighted_dense
    count = {"n_supervised": int((targets != ignore_index).sum())} if told else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.LOGITS_BYTES, "cpu", chunk_rows * v * 8)
        got = with_gradients(linear_cross_entropy, hidden, weight, targets, **options, **count)
    assert_same(got, with_gradients(reference, hidden, weight, targets, **options), rtol=1e-10, atol=1e-12)


def relative_errors(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[float]:
    """Of loss, d hidden, d weight, to float64 on the same (rounded) inputs."""
    got = with_gradients(function, hidden, weight, targets)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), targets)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


@pytest.mark.parametrize("sure", [False, True])
def test_float32_error_is_below_1e_5(sure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", 64 * 500 * 4)
    given = sure_inputs(300, torch.float32)[:3] if sure else inputs(300, 64, 500, torch.float32)
    assert max(relative_errors(linear_cross_entropy, *given)) < 1e-5


@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_bfloat16_is_no_worse_than_dense(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where the loss is scaled by what bfloat16 cannot hold."""

    def times(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: function(*args, **options) * factor

    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", 64 * 500 * 4)
    given = inputs(300, 64, 500, torch.bfloat16)
    exact = with_gradients(times(dense_linear_cross_entropy), *(t.double() for t in given[:2]), given[2])
    ours, dense = (
        [
            float((a.double() - b).norm() / b.norm())
            for a, b in zip(with_gradients(times(function), *given), exact, strict=True)
        ]
        for function in (linear_cross_entropy, dense_linear_cross_entropy)
    )
    # Twice rounded, d weight once to bfloat16 and once when it is scaled, is sqrt(2) times the error of once.
    allowed = 1.01 if factor == 1 else 1.42
    assert all(a <= b * allowed for a, b in zip(ours, dense, strict=True)), (ours, dense)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", [{}, {"row_filter": 0.5}, {"reduction": "none"}])
def test_same_bits_twice(options: dict[str, Any]) -> None:
    first, second = (with_gradients(linear_cross_entropy, *inputs(40), **options) for _ in range(2))
    assert_same_bits(first, second)


# n_supervised, normalizer, token_weights, row_filter


def test_n_supervised_changes_nothing_and_must_be_right() -> None:
    hidden, weight, targets = inputs(30)
    count = int((targets != -100).sum())
    told = with_gradients(linear_cross_entropy, hidden, weight, targets, n_supervised=count)
    assert_same_bits(told, with_gradients(linear_cross_entropy, hidden, weight, targets))
    for wrong in (0, count - 1, count + 1, 30):
        with pytest.raises(ValueError, match=f"n_supervised is {wrong}, and {count} targets differ from ignore_index"):
            linear_cross_entropy(hidden, weight, targets, n_supervised=wrong)
    for wrong in (-1, 31):
        with pytest.raises(ValueError, match=f"n_supervised {wrong} of 30 targets"):
            linear_cross_entropy(hidden, weight, targets, n_supervised=wrong)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_a_normalizer_on_the_device_is_as_one_on_the_host(dtype: torch.dtype) -> None:
    given = inputs(20, dtype=torch.float32)
    on_host = with_gradients(linear_cross_entropy, *given, normalizer=23)
    on_device = with_gradients(linear_cross_entropy, *given, normalizer=torch.tensor(23, dtype=dtype))
    assert on_device[0].dtype == torch.float32
    assert_same(on_device, on_host, rtol=1e-6, atol=0)


def test_no_gradient_flows_to_token_weights() -> None:
    given = inputs(20)
    weights = torch.rand(20, dtype=torch.float64, requires_grad=True)
    linear_cross_entropy(*given, token_weights=weights).backward()
    assert weights.grad is None


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("row_filter", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_row_filter_keeps_its_bounds(row_filter: float, reduction: str) -> None:
    hidden, weight, targets, p_miss = sure_inputs(120)
    targets[::9] = -100
    exact = with_gradients(linear_cross_entropy, hidden, weight, targets, reduction=reduction)
    got = with_gradients(linear_cross_entropy, hidden, weight, targets, reduction=reduction, row_filter=row_filter)
    supervised = targets != -100
    out = supervised & (p_miss <= row_filter)
    kept = supervised & ~out
    assert min(int(out.sum()), int(kept.sum())) > 10

    assert torch.equal(got[0], exact[0]), "the loss is exact"
    torch.testing.assert_close(got[1][kept], exact[1][kept])
    assert not got[1][out].any()
    factor = torch.linspace(-1, 2, 120).double().abs() if reduction == "none" else 1 / supervised.sum().expand(120)
    norms = weight.detach().norm(dim=1)
    bound = row_filter * (norms[targets.clamp(min=0)] + norms.max()) * factor
    error = (got[1] - exact[1]).norm(dim=1)
    assert (error[out] <= bound[out]).all()
    assert error[out].max() > 0
    # The weight's gradient loses a matrix of rank one for each row left out; together at most the sum of their norms.
    bound = (2**0.5 * row_filter * hidden.detach().norm(dim=1) * factor)[out].sum()
    assert 0 < (got[2] - exact[2]).norm() <= bound


def test_the_row_filter_bounds_one_row_alone() -> None:
    """Of rank one, and of the norm promised: seen where a single row is left out."""
    hidden, weight, targets, p_miss = sure_inputs(120)
    for row in (p_miss < 0.2).nonzero().flatten().tolist():
        only = torch.full_like(targets, -100).index_copy(0, torch.tensor([row]), targets[row : row + 1])
        row_filter = min(float(p_miss[row]) * 1.001, 0.999)
        exact = with_gradients(linear_cross_entropy, hidden, weight, only)
        got = with_gradients(linear_cross_entropy, hidden, weight, only, row_filter=row_filter)
        assert not got[2].any()
        assert exact[2].norm() <= 2**0.5 * row_filter * hidden[row].detach().norm()
        assert torch.linalg.matrix_rank(exact[2]) <= 1


def test_the_row_filter_is_off_by_default() -> None:
    given = sure_inputs(120)[:3]
    assert_same_bits(
        with_gradients(linear_cross_entropy, *given), with_gradients(linear_cross_entropy, *given, row_filter=0.0)
    )
    assert with_gradients(linear_cross_entropy, *given)[1].any(dim=1).all()


# Who wants a gradient


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_frozen_input_gets_no_gradient(frozen: str, reduction: str) -> None:
    hidden, weight, targets = inputs(20)
    _, grad_hidden, grad_weight = with_gradients(dense_linear_cross_entropy, hidden, weight, targets, reduction="sum")
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    with products() as rows:
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()  # type: ignore[arg-type]
        assert loss.requires_grad == (frozen != "both")
        if frozen != "both":
            loss.backward()
    logits_twice = reduction == "none" and frozen != "both"
    assert len(rows) == 1 + logits_twice + (frozen != "both"), "a product that nobody wants"
    for tensor, expected in ((hidden, grad_hidden), (weight, grad_weight)):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected)


@pytest.mark.usefixtures("small_chunks")
def test_a_tied_embedding_gets_both_gradients() -> None:
    _, weight, targets = inputs(30)
    ids = torch.randint(0, 11, (30,), generator=torch.Generator().manual_seed(1))

    def gradient(function: Callable[..., Tensor]) -> Tensor:
        table = weight.detach().requires_grad_()
        function(torch.nn.functional.embedding(ids, table).sin(), table, targets).backward()
        assert table.grad is not None
        return table.grad

    torch.testing.assert_close(gradient(linear_cross_entropy), gradient(dense_linear_cross_entropy))


def test_a_second_backward_pass_adds_the_same_again() -> None:
    """Even where what the first one left in .grad was changed in place meanwhile."""
    hidden, weight, targets = inputs(9)
    _, once_hidden, once_weight = with_gradients(linear_cross_entropy, hidden, weight, targets)
    for factor in (1, 3):
        hidden.grad = weight.grad = None
        loss = linear_cross_entropy(hidden, weight, targets) * factor
        loss.backward(retain_graph=True)
        assert hidden.grad is not None
        assert weight.grad is not None
        hidden.grad *= 10
        weight.grad *= 10
        loss.backward()
        torch.testing.assert_close(hidden.grad, 11 * factor * once_hidden)
        torch.testing.assert_close(weight.grad, 11 * factor * once_weight)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_of_the_gradient_is_refused(reduction: str) -> None:
    hidden, weight, targets = inputs(9)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_gradient_work_where_none_is_wanted() -> None:
    given = inputs(9, ignored=0)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, products() as rows:
            linear_cross_entropy(*given)
        assert rows == [9]


# Edges


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_strided_inputs(reduction: str) -> None:
    hidden, weight, targets = inputs(30)
    expected = with_gradients(dense_linear_cross_entropy, hidden, weight, targets, reduction=reduction)
    every_third = targets.repeat_interleave(3)[::3]
    for strided_hidden in (hidden.detach().T.contiguous().T, hidden.detach().repeat(1, 2)[:, :5]):
        for strided_weight in (weight.detach().repeat_interleave(2, 0)[::2], weight.detach().T.contiguous().T):
            assert not strided_hidden.is_contiguous()
            assert not strided_weight.is_contiguous()
            args = strided_hidden, strided_weight, every_third
            assert_same(with_gradients(linear_cross_entropy, *args, reduction=reduction), expected)


def test_an_expanded_gradient_of_the_rows_losses() -> None:
    hidden, weight, targets = inputs(9)
    linear_cross_entropy(hidden, weight, targets, reduction="none").sum().backward()  # whose gradient has stride 0
    _, grad_hidden, _ = with_gradients(dense_linear_cross_entropy, hidden, weight, targets, reduction="sum")
    torch.testing.assert_close(hidden.grad, grad_hidden)


@pytest.mark.parametrize(("n", "ignored"), [(0, 0.0), (9, 1.0)])
@pytest.mark.parametrize("options", [{}, {"normalizer": 5, "n_supervised": 0}, {"row_filter": 0.1}])
def test_nothing_supervised_is_zero_without_nan(n: int, ignored: float, options: dict[str, Any]) -> None:
    for reduction in ("mean", "none"):
        if reduction == "none":
            options = {k: v for k, v in options.items() if k != "normalizer"}
        got = with_gradients(linear_cross_entropy, *inputs(n, ignored=ignored), reduction=reduction, **options)
        assert not any(tensor.any() for tensor in got)  # NaN is true


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_a_non_finite_input_reaches_the_loss(value: float, where: str) -> None:
    hidden, weight, targets = inputs(9, ignored=0)
    with torch.no_grad():
        (hidden if where == "hidden" else weight)[3] = value
    for options in ({}, {"row_filter": 0.5}):
        loss, grad_hidden, grad_weight = with_gradients(linear_cross_entropy, hidden, weight, targets, **options)
        assert not loss.isfinite()
        assert not grad_hidden.isfinite().all()
        assert not grad_weight.isfinite().all()


def test_an_ignored_row_may_be_anything() -> None:
    hidden, weight, targets = inputs(9, ignored=0)
    targets[3] = -100
    with torch.no_grad():
        hidden[3] = float("nan")
    got = with_gradients(linear_cross_entropy, hidden, weight, targets)
    assert all(tensor.isfinite().all() for tensor in got)
    assert not got[1][3].any()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = inputs(9, dtype=torch.float32)
    got = with_gradients(linear_cross_entropy, hidden * 1e4, weight, targets)
    assert all(tensor.isfinite().all() for tensor in got)
    assert_same(got, with_gradients(dense_linear_cross_entropy, hidden * 1e4, weight, targets))


@pytest.mark.parametrize("bad", [11, -1, -(2**40)])
def test_a_target_out_of_range_is_named(bad: int) -> None:
    hidden, weight, targets = inputs(9)
    targets[4] = bad
    with pytest.raises(IndexError, match=rf"targets\[4\] = {bad} lies outside the vocabulary \[0, 11\)"):
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": torch.ones(9, 4, dtype=torch.float64)}, r"\[N, H\] and weight \[V, H\] expected, not \[9, 4\]"),
        ({"weight": torch.ones(0, 5, dtype=torch.float64)}, r"expected, not \[9, 5\], \[0, 5\]"),
        ({"targets": torch.ones(5, dtype=torch.int64)}, r"targets: int64 \[9\] expected, not torch.int64 \[5\]"),
        ({"targets": torch.ones(9, dtype=torch.int32)}, "not torch.int32"),
        ({"weight": torch.ones(11, 5)}, "hidden is torch.float64 and weight is torch.float32"),
        ({"hidden": torch.ones(9, 5).half(), "weight": torch.ones(11, 5).half()}, "must have one type of"),
        ({"reduction": "average"}, "'average' is not one of none, sum, mean"),
        ({"reduction": "sum", "normalizer": 3}, "a normalizer goes with reduction='mean', not 'sum'"),
        ({"normalizer": 0}, "the normalizer is 0"),
        ({"normalizer": torch.ones(9)}, r"a 0-d tensor expected, not \[9\]"),
        ({"token_weights": torch.ones(8)}, r"token_weights: \[N\]"),
        ({"token_weights": torch.ones(9), "reduction": "none"}, "multiply what 'none' returns"),
        ({"row_filter": 1.0}, r"row_filter 1.0 is not in \[0, 1\)"),
        ({"row_filter": -1e-3}, r"row_filter -0.001 is not in \[0, 1\)"),
    ],
)
def test_misfits_are_refused(wrong: dict[str, Any], message: str) -> None:
    hidden, weight, targets = inputs(9)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "targets": targets} | wrong))


def test_autocast_changes_no_product() -> None:
    given = inputs(20, dtype=torch.float32)
    expected = with_gradients(linear_cross_entropy, *given)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(with_gradients(linear_cross_entropy, *given), expected)


# Compilation


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("told", [False, True])
def test_compiled_whole_and_not_again_for_other_counts(reduction: str, told: bool) -> None:
    """As a trainer calls it, with other numbers of rows, of supervised rows and of the step's tokens each time."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")

    def loss(
        hidden: Tensor, weight: Tensor, targets: Tensor, n_supervised: int | None = None, normalizer: int | None = None
    ) -> Tensor:
        by_step = {"normalizer": normalizer} if reduction == "mean" else {}
        return linear_cross_entropy(
            hidden.tanh(),
            weight,
            targets,
            reduction=reduction,  # type: ignore[arg-type]
            n_supervised=n_supervised,
            **by_step,
        )

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    frames = []
    for n, supervised in ((20, 13), (20, 11), (24, 9), (31, 17), (40, 22), (40, 0), (40, 1), (40, 40), (12, 5)):
        hidden, weight, targets = inputs(n, ignored=0, seed=n)
        targets[: n - supervised] = -100
        options = {"n_supervised": supervised if told else None, "normalizer": 100 + n if told else None}
        got = with_gradients(compiled, hidden, weight, targets, **options)
        assert_same(got, with_gradients(loss, hidden, weight, targets, **options))
        frames.append(backend.frame_count)
    # Once as first seen, once for any counts, once for any number of rows; then never again.
    assert frames[0] == 1
    assert frames[2] <= 3
    assert frames[-1] == frames[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_supervised", [None, 6])
def test_the_operator_keeps_the_rules_of_torch_library(dtype: torch.dtype, n_supervised: int | None) -> None:
    hidden, weight, targets = inputs(9, dtype=dtype, ignored=0)
    targets[:3] = -100
    for scale in (torch.tensor(0.5), torch.rand(9)):
        for wants in ((True, True), (False, True), (False, False)):
            args = hidden.detach(), weight.detach(), targets, scale, -100, n_supervised, 0.1, *wants
            torch.library.opcheck(implementation._by_chunks, args)


# Work and memory


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_enter_no_product(reduction: str) -> None:
    given = inputs(200)
    supervised = int((given[2] != -100).sum())
    with products() as rows:
        with_gradients(linear_cross_entropy, *given, reduction=reduction)
    assert rows == [supervised] * (3 if reduction == "mean" else 4)


@contextmanager
def products() -> Iterator[list[int]]:
    """How many rows of `hidden` or of the logits' gradient enter each matrix product, known at the end."""
    rows: list[int] = []
    with torch.profiler.profile(record_shapes=True) as profile:
        yield rows
    for event in sorted(profile.events(), key=lambda event: event.time_range.start):
        if event.name == "aten::mm":
            rows.append(event.input_shapes[0][0])
        elif event.name == "aten::addmm_":
            rows.append(event.input_shapes[1][1])  # d weight: a sum over rows


def peak_bytes(function: Any, *args: Tensor, **options: Any) -> int:
    """Highest sum of live allocations above the start, from the profiler's record of the CPU allocator."""
    with torch.profiler.profile(profile_memory=True) as profile:
        with_gradients(function, *args, **options)
    return max(live_bytes(profile))


def live_bytes(profile: torch.profiler.profile) -> Iterator[int]:
    live = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            yield live


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the workspace of a product grows with threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("h", "v"), [(16, 3000), (256, 1500)])
def test_peak_memory_is_one_chunk_above_the_gradients(
    dtype: torch.dtype, h: int, v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, rows = 2000, 100
    chunk = rows * v * 4
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", chunk)
    given = inputs(n, h, v, dtype, ignored=0)
    assert peak_bytes(dense_linear_cross_entropy, *given) > n * v * 4, "the measurement misses the logits"

    gradients = (n + v) * h * dtype.itemsize
    above = chunk
    if dtype == torch.bfloat16:
        rounded = chunk // 2  # the chunk's logits or their gradient, as the product has them
        repacked = v * h * 2  # by oneDNN, which multiplies
        sums = v * h * 4  # d weight in float32, before and while it is rounded
        above = max(chunk + rounded + repacked + sums - v * h * 2, sums)
    small = chunk // 3  # losses and indices of rows; rows of a chunk
    assert peak_bytes(linear_cross_entropy, *given) < gradients + above + small


def test_peak_memory_does_not_grow_with_rows_or_ignored_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    h, v = 16, 3000
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", 100 * v * 4)
    each = []
    for n, ignored in ((500, 0.0), (4000, 0.0), (4000, 0.7)):
        given = inputs(n, h, v, torch.float32, ignored)
        each.append((peak_bytes(linear_cross_entropy, *given) - n * h * 4) / (100 * v * 4))
    # In chunks of logits, of which 3,500 rows more would be 35; what is left are a few numbers for each row.
    assert each[1] - each[0] < 0.3
    assert each[2] - each[1] < 0.3
