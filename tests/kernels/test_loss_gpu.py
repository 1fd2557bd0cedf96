"""The loss on an NVIDIA GPU at real vocabularies: exactness, equal bits, memory, no waiting for the device."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from micota_fast.kernels import SoftTargets, chunks, linear_cross_entropy
from micota_fast.kernels.reference import dense_linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

VOCABULARIES = [151_936, 50_257]  # Qwen2.5's, and one that no tile divides (GPT-2's)


def inputs(
    n: int, h: int, v: int, dtype: torch.dtype = torch.bfloat16, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Also the number of supervised rows. Half of the rows are near certain of their targets."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    hidden, weight = normal(n, h), normal(v, h) / math.sqrt(h)
    targets = torch.randint(0, v, (n,), device="cuda", generator=generator)
    hidden[::2] += 20 * weight[targets[::2]]
    targets[: int(n * ignored)] = -100
    return hidden.to(dtype), weight.to(dtype), targets, n - int(n * ignored)


def with_gradients(function: Any, hidden: Tensor, weight: Tensor, targets: Any, **options: Any) -> list[Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, targets, **options)
    loss.backward(torch.linspace(-1, 2, len(hidden), device="cuda") if loss.ndim else None)
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def relative_errors(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> list[float]:
    got = with_gradients(function, hidden, weight, targets, **options)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), targets)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


@pytest.fixture(params=["a lone chunk", "several chunks"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "several chunks":
        monkeypatch.setitem(chunks.LOGITS_BYTES, "cuda", 1 << 20)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("v", VOCABULARIES)
def test_float32_error_is_below_1e_5(v: int) -> None:
    hidden, weight, targets, count = inputs(96, 64, v, torch.float32)
    assert max(relative_errors(linear_cross_entropy, hidden, weight, targets, n_supervised=count)) < 1e-5


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("v", VOCABULARIES)
def test_bfloat16_is_no_worse_than_dense(v: int) -> None:
    hidden, weight, targets, count = inputs(512, 256, v)
    ours = relative_errors(linear_cross_entropy, hidden, weight, targets, n_supervised=count)
    dense = relative_errors(dense_linear_cross_entropy, hidden, weight, targets)
    assert all(a <= b * 1.01 for a, b in zip(ours, dense, strict=True)), (ours, dense)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_row_filter_gives_the_gradients_of_the_rows_that_stay(v: int, dtype: torch.dtype) -> None:
    hidden, weight, targets, count = inputs(300, 128, v, dtype)
    nll_N = linear_cross_entropy(hidden, weight, targets, reduction="none")
    kept = (nll_N > -math.log1p(-0.01)) & (targets != -100)
    assert 0 < int(kept.sum()) < count, "the filter has nothing to leave out, or nothing to keep"
    got = with_gradients(linear_cross_entropy, hidden, weight, targets, row_filter=0.01, n_supervised=count)
    others_ignored = targets.where(kept, -100)
    exact = with_gradients(linear_cross_entropy, hidden, weight, others_ignored, normalizer=count)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip(got[1:], exact[1:], strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.double().norm()


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("options", [{}, {"row_filter": 0.01}, {"reduction": "none"}])
def test_same_bits_twenty_times(options: dict[str, Any]) -> None:
    hidden, weight, targets, count = inputs(2048, 256, VOCABULARIES[0])
    first = with_gradients(linear_cross_entropy, hidden, weight, targets, n_supervised=count, **options)
    for _ in range(19):
        again = with_gradients(linear_cross_entropy, hidden, weight, targets, n_supervised=count, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("options", [{"normalizer": 700}, {"normalizer": "device"}, {}, {"reduction": "none"}])
@pytest.mark.parametrize("row_filter", [0.0, 0.01])
def test_nothing_waits_for_the_device(options: dict[str, Any], row_filter: float) -> None:
    hidden, weight, targets, count = inputs(512, 64, 8000)
    options = options | {"row_filter": row_filter, "n_supervised": count}
    if options.get("normalizer") == "device":
        options["normalizer"] = torch.tensor(700, device="cuda")
    with_gradients(linear_cross_entropy, hidden, weight, targets, **options)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(linear_cross_entropy, hidden, weight, targets, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


SOFT = ({}, {"tail": "bucket"}, {"tail": "bucket", "temperature": 2.0, "alpha": 0.5})


def distributions(targets: Tensor, v: int, k: int = 32, **options: Any) -> SoftTargets:
    """Random ones of k tokens, the first of which is the target, and the targets as hard ones."""
    generator = torch.Generator("cuda").manual_seed(1)
    ids = (targets.clamp(min=0).unsqueeze(1) + torch.arange(k, device="cuda") * (v // k)) % v
    logits = torch.randn(len(targets), k + 1, device="cuda", generator=generator) * 2
    return SoftTargets(ids, logits.log_softmax(1)[:, :k].contiguous(), targets, **options)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("how", SOFT)
@pytest.mark.parametrize("k", [32, 128])
def test_float32_error_of_distributions_is_below_2e_5(v: int, how: dict[str, Any], k: int) -> None:
    hidden, weight, targets, count = inputs(96, 64, v, torch.float32)
    soft = distributions(targets, v, k, **how)
    got = with_gradients(linear_cross_entropy, hidden, weight, soft, n_supervised=count)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), soft)
    assert all((a.double() - b).norm() < 2e-5 * b.norm() for a, b in zip(got, exact, strict=True))


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", ["ignore", "bucket"])
def test_one_token_of_probability_1_is_a_hard_target_to_the_bit(v: int, dtype: torch.dtype, tail: Any) -> None:
    hidden, weight, targets, count = inputs(300, 128, v, dtype)
    soft = SoftTargets(targets.unsqueeze(1), torch.zeros(300, 1, device="cuda"), tail=tail)
    got, hard = (with_gradients(linear_cross_entropy, hidden, weight, t, n_supervised=count) for t in (soft, targets))
    assert all(torch.equal(a, b) for a, b in zip(got, hard, strict=True))


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("how", SOFT)
def test_distributions_give_the_same_bits_ten_times_and_wait_for_nothing(how: dict[str, Any]) -> None:
    hidden, weight, targets, count = inputs(1024, 256, VOCABULARIES[0])
    soft = distributions(targets, VOCABULARIES[0], **how)
    options = {"normalizer": 700, "n_supervised": count}
    first = with_gradients(linear_cross_entropy, hidden, weight, soft, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [with_gradients(linear_cross_entropy, hidden, weight, soft, **options) for _ in range(9)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def peak_bytes(function: Callable[[], Any]) -> int:
    """Highest allocation above the start."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


@pytest.mark.parametrize(("n", "ignored"), [(8192, 0.0), (8192, 0.7), (32768, 0.0)])
def test_peak_memory_is_the_budget_above_the_gradients(n: int, ignored: float) -> None:
    """At the shape of Qwen2.5-7B: the chunk's logits, and for several chunks the weight's gradient in float32."""
    h, v = 3584, 151_936
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB")
    hidden, weight, targets, count = inputs(n, h, v, ignored=ignored)
    peak = peak_bytes(
        lambda: with_gradients(linear_cross_entropy, hidden, weight, targets, normalizer=count, n_supervised=count)
    )
    above = peak - hidden.nbytes - weight.nbytes
    assert above < chunks.LOGITS_BYTES["cuda"] + weight.nbytes + (256 << 20)
    assert above < 4 << 30
    if ignored:
        assert above < max(count * v * 2, weight.nbytes) + (256 << 20)


def test_what_targets_and_counts_belie_is_nan_and_in_debug_mode_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, count = inputs(64, 32, 1000)
    for wrong in (0, count - 1, count + 1, 64):
        got = with_gradients(linear_cross_entropy, hidden, weight, targets, n_supervised=wrong)
        assert all(t.isnan().all() for t in got)
    bad = targets.clone()
    bad[40] = 1000
    assert linear_cross_entropy(hidden, weight, bad).isnan()
    monkeypatch.setenv("MICOTA_DEBUG", "1")
    with pytest.raises(IndexError, match=r"targets\[40\] = 1000 lies outside the vocabulary \[0, 1000\)"):
        linear_cross_entropy(hidden, weight, bad)
    with pytest.raises(ValueError, match=f"n_supervised is 5, and {count} targets differ"):
        linear_cross_entropy(hidden, weight, targets, n_supervised=5)
    assert linear_cross_entropy(hidden, weight, targets).isfinite()


def test_a_scaled_loss_is_not_scaled_by_a_rounded_factor() -> None:
    """1/3 in bfloat16 is 0.1% off, all in one direction."""
    hidden, weight, targets, _ = inputs(64, 32, 1000)
    _, once_hidden, once_weight = with_gradients(linear_cross_entropy, hidden, weight, targets)
    _, grad_hidden, grad_weight = with_gradients(
        lambda *args: linear_cross_entropy(*args) * (1 / 3), hidden, weight, targets
    )
    assert torch.equal(grad_hidden, (once_hidden.float() * (1 / 3)).bfloat16())
    assert torch.equal(grad_weight, (once_weight.float() * (1 / 3)).bfloat16())


def test_float64_takes_the_way_of_a_cpu() -> None:
    hidden, weight, targets, count = inputs(64, 32, 1000, torch.float64)
    for row_filter in (0.0, 1e-12):
        got = with_gradients(linear_cross_entropy, hidden, weight, targets, row_filter=row_filter, n_supervised=count)
        for ours, exact in zip(got, with_gradients(dense_linear_cross_entropy, hidden, weight, targets), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_compiled_whole() -> None:
    compiled = torch.compile(lambda *args, **options: linear_cross_entropy(*args, **options) * 2, fullgraph=True)
    for n in (100, 120, 140):
        hidden, weight, targets, count = inputs(n, 64, 5000)
        options = {"n_supervised": count, "normalizer": n}
        got = with_gradients(compiled, hidden, weight, targets, **options)
        eager = with_gradients(lambda *a, **o: linear_cross_entropy(*a, **o) * 2, hidden, weight, targets, **options)
        for ours, theirs in zip(got, eager, strict=True):
            torch.testing.assert_close(ours, theirs)
