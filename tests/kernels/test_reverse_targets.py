"""The reverse KL as a policy gradient on a CPU: against dense float64, its own expectation, edges, compilation."""

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.soft_cases import inputs, reverse_targets
from helpers.tensors import assert_same, assert_same_bits, with_gradients
from micota_fast.kernels import ReverseTargets, chunks, linear_cross_entropy
from micota_fast.kernels.reference import dense_linear_cross_entropy

implementation = sys.modules[linear_cross_entropy.__module__]


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(0, 20),
    h=st.integers(1, 9),
    v=st.integers(1, 33),
    alpha=st.sampled_from([1.0, 0.5, 0.3]),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    absent=st.sampled_from([0.0, 0.4, 1.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    told=st.booleans(),
    chunk_rows=st.sampled_from([1, 7, 1000]),
    seed=st.integers(0, 2**31),
)
def test_equals_dense_float64(
    n: int,
    h: int,
    v: int,
    alpha: float,
    ignored: float,
    absent: float,
    reduction: Any,
    told: bool,
    chunk_rows: int,
    seed: int,
) -> None:
    hidden, weight = inputs(n, h, v, seed=seed)
    reverse = reverse_targets(n, v, ignored=ignored, absent=absent, alpha=alpha, seed=seed)
    count = {"n_supervised": int((reverse.tokens != -100).sum())} if told else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.LOGITS_BYTES, "cpu", chunk_rows * v * 8)
        got = with_gradients(linear_cross_entropy, hidden, weight, reverse, reduction=reduction, **count)
    expected = with_gradients(dense_linear_cross_entropy, hidden, weight, reverse, reduction=reduction)
    assert_same(got, expected, rtol=1e-10, atol=1e-12)


def test_in_expectation_over_the_student_it_is_the_divergence_and_its_gradient() -> None:
    """Every token of the vocabulary once, weighted by the student's probability: KL(p || q) by torch's autograd."""
    v = 23
    hidden, weight = inputs(4)
    q = torch.randn(4, v, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(1)
    own = (hidden @ weight.T).softmax(1).detach()

    def sampled(hidden: Tensor, weight: Tensor, _: None) -> Tensor:
        reverse = ReverseTargets(torch.arange(v).repeat(4), q.flatten())
        each = hidden.repeat_interleave(v, 0)
        return linear_cross_entropy(each, weight, reverse, reduction="sum", token_weights=own.flatten())

    def dense(hidden: Tensor, weight: Tensor, _: None) -> Tensor:
        p = (hidden @ weight.T).log_softmax(1)
        return (p.exp() * (p - q)).sum()

    got, expected = (with_gradients(loss, hidden, weight, None) for loss in (sampled, dense))
    assert_same(got, expected, rtol=1e-10, atol=1e-12)


def test_where_the_student_is_the_teacher_nothing_moves() -> None:
    hidden, weight = inputs(9)
    tokens = torch.arange(9)
    own = (hidden @ weight.T).log_softmax(1)[tokens, tokens]
    got = with_gradients(linear_cross_entropy, hidden, weight, ReverseTargets(tokens, own))
    assert all(tensor.abs().max() < 1e-14 for tensor in got)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tokens_that_the_teacher_has_not_scored_are_hard_targets_to_the_bit(alpha: float, reduction: Any) -> None:
    """Of a certain token whose logit is -inf, too."""
    hidden, weight = inputs(9, dtype=torch.float32)
    weight[8] = -math.inf
    hidden.abs_()
    tokens = torch.arange(9)
    tokens[2] = -100
    nothing = ReverseTargets(tokens, torch.full((9,), math.nan), alpha)
    hard = linear_cross_entropy(hidden, weight, tokens, reduction=reduction)
    assert torch.equal(linear_cross_entropy(hidden, weight, nothing, reduction=reduction), hard)
    weight[8] = 0.5
    hard_all = with_gradients(linear_cross_entropy, hidden, weight, tokens, reduction=reduction)
    assert_same_bits(with_gradients(linear_cross_entropy, hidden, weight, nothing, reduction=reduction), hard_all)


def test_float32_error_is_small_at_any_certainty() -> None:
    hidden, weight = inputs(200, 32, 300, torch.float32)
    hidden *= torch.linspace(0.1, 4, 200).unsqueeze(1)
    reverse = reverse_targets(200, 300)
    got = with_gradients(linear_cross_entropy, hidden, weight, reverse)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), reverse)
    for ours, theirs in zip(got, exact, strict=True):
        assert (ours.double() - theirs).norm() < 1e-5 * theirs.norm()


def test_the_estimate_is_that_of_scored_rows_alone_and_adds_up() -> None:
    hidden, weight = inputs(20)
    estimate = torch.zeros(2)
    reverse = reverse_targets(20, 23, ignored=0.3, absent=0.4, alpha=0.3, estimate=estimate)
    scored = (reverse.tokens != -100) & ~reverse.logprobs.isnan()
    own = (hidden @ weight.T).log_softmax(1).gather(1, reverse.tokens.clamp(min=0).unsqueeze(1)).squeeze(1)
    wanted = (own - reverse.logprobs)[scored].sum()
    for times in (1, 2):
        linear_cross_entropy(hidden, weight, reverse, token_weights=torch.rand(20))
        torch.testing.assert_close(estimate, torch.tensor([times * wanted, times * scored.sum()]), check_dtype=False)


# What is refused


@pytest.mark.parametrize("value", [0.02, math.inf, -math.inf])
def test_a_log_probability_that_is_none_is_named(value: float) -> None:
    hidden, weight = inputs(9)
    reverse = reverse_targets(9, 23)
    reverse.logprobs[4] = value
    with pytest.raises(ValueError, match=rf"logprobs\[4\] is {value:.4g}; a finite number"):
        linear_cross_entropy(hidden, weight, reverse)
    reverse.tokens[4] = -100
    got = with_gradients(linear_cross_entropy, hidden, weight, reverse)
    assert all(tensor.isfinite().all() for tensor in got), "an ignored row may be anything"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": torch.zeros(8, dtype=torch.int64)}, r"tokens: int64 \[9\] expected, not torch.int64 \[8\]"),
        ({"tokens": torch.zeros(9)}, r"tokens: int64 \[9\] expected, not torch.float32"),
        ({"logprobs": torch.zeros(9, 2)}, r"logprobs: floating point \[9\] expected, not torch.float32 \[9, 2\]"),
        ({"logprobs": torch.zeros(9, dtype=torch.int64)}, r"logprobs: floating point \[9\] expected"),
        ({"alpha": 0.0}, r"alpha 0.0 is not in \(0, 1\]"),
        ({"estimate": torch.zeros(3)}, r"estimate: \[2\] expected, not \[3\]"),
    ],
)
def test_misfits_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*inputs(9), replace(reverse_targets(9, 23), **wrong))


@pytest.mark.parametrize(
    ("how", "options", "message"),
    [
        ({}, {"row_filter": 0.1}, r"row_filter 0\.1 with reverse targets"),
        ({"estimate": torch.zeros(2)}, {"reduction": "none"}, "an estimate goes with reduction"),
    ],
)
def test_options_that_do_not_go_together_are_refused(how: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*inputs(9), reverse_targets(9, 23, **how), **options)


def test_no_gradient_flows_to_the_teacher() -> None:
    hidden, weight = inputs(9)
    reverse = reverse_targets(9, 23)
    reverse.logprobs.requires_grad_()
    linear_cross_entropy(hidden.requires_grad_(), weight, reverse).backward()
    assert reverse.logprobs.grad is None


# Compilation, memory


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(reduction: Any) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")

    def loss(hidden: Tensor, weight: Tensor, reverse: ReverseTargets) -> Tensor:
        return linear_cross_entropy(hidden.tanh(), weight, reverse, reduction=reduction)

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    frames = []
    for n in (20, 24, 31):
        hidden, weight = inputs(n, seed=n)
        reverse = reverse_targets(n, 23, ignored=0.3, absent=0.3, seed=n, alpha=0.5)
        assert_same(with_gradients(compiled, hidden, weight, reverse), with_gradients(loss, hidden, weight, reverse))
        frames.append(backend.frame_count)
    assert frames[0] == 1
    assert frames[-1] == frames[1] <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_rules_of_torch_library(dtype: torch.dtype) -> None:
    hidden, weight = inputs(9, dtype=dtype)
    reverse = reverse_targets(9, 23, absent=0.3)
    for wants in ((True, True), (False, False)):
        args = (hidden, weight, reverse.tokens, torch.rand(9), -100, None, 0.0, *wants, None, None, False, 1.0, 0.5)
        torch.library.opcheck(implementation._by_chunks, (*args, False, reverse.logprobs))


def test_peak_memory_is_that_of_hard_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    n, h, v = 2000, 16, 3000
    chunk = 100 * v * 4
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", chunk)
    hidden, weight = inputs(n, h, v, torch.float32)
    reverse = reverse_targets(n, v)

    def peak(targets: Any) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            with_gradients(linear_cross_entropy, hidden, weight, targets)
        live = highest = 0
        for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                live += event.nbytes()
                highest = max(highest, live)
        return highest

    assert peak(reverse) < peak(reverse.tokens) + chunk // 8
