"""The loss of soft targets on a CPU: against dense float64, hard targets as its case of K = 1, edges, compilation."""

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.soft_cases import inputs, soft_targets
from helpers.tensors import assert_same, assert_same_bits, with_gradients
from micota_fast.kernels import SoftTargets, chunks, linear_cross_entropy
from micota_fast.kernels.reference import dense_linear_cross_entropy

implementation = sys.modules[linear_cross_entropy.__module__]

TAILS = ("ignore", "bucket")


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(0, 20),
    h=st.integers(1, 9),
    v=st.integers(1, 33),
    k=st.integers(1, 33),
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
    hidden, weight = inputs(n, h, v, seed=seed)
    how = {"tail": tail, "temperature": temperature, "alpha": alpha}
    soft = soft_targets(n, v, min(k, v), ignored=ignored, absent=absent, hard=alpha < 1, seed=seed, **how)
    count = {"n_supervised": int((soft.row_targets() != -100).sum())} if told else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.LOGITS_BYTES, "cpu", chunk_rows * v * 8)
        got = with_gradients(linear_cross_entropy, hidden, weight, soft, reduction=reduction, **count)
    expected = with_gradients(dense_linear_cross_entropy, hidden, weight, soft, reduction=reduction)
    assert_same(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_token_of_probability_1_is_a_hard_target_to_the_bit(
    tail: Any, dtype: torch.dtype, reduction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are several of which the others are absent, or have no probability."""
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", 7 * 40 * 4)
    hidden, weight = inputs(30, 16, 40, dtype)
    hidden[::3] *= 5  # some rows are sure
    targets = torch.randint(0, 40, (30,), generator=torch.Generator().manual_seed(1))
    targets[::4] = -100
    weights = {"token_weights": torch.linspace(0, 2, 30)} if reduction == "mean" else {}
    hard = with_gradients(linear_cross_entropy, hidden, weight, targets, reduction=reduction, **weights)
    ids = targets.unsqueeze(1)
    others = torch.where(ids >= 0, (ids + torch.arange(1, 4)) % 40, -100)
    for soft in (
        SoftTargets(ids, torch.zeros(30, 1), tail=tail),
        SoftTargets(torch.cat([ids, torch.full((30, 3), -100)], 1), torch.zeros(30, 4), tail=tail),
        SoftTargets(torch.cat([ids, others], 1), torch.tensor([0.0] + 3 * [-math.inf]).repeat(30, 1), tail=tail),
        SoftTargets(ids.clamp(min=0), torch.zeros(30, 1), hard=targets, tail=tail),
    ):
        got = with_gradients(linear_cross_entropy, hidden, weight, soft, reduction=reduction, **weights)
        assert_same_bits(got, hard)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_tokens_are_the_dense_divergence(tail: Any, temperature: float) -> None:
    """torch's own, which is KL and not cross entropy; and 0 where the student is the teacher."""
    hidden, weight = inputs(12)
    soft = soft_targets(12, 23, 23, tail=tail, temperature=temperature)
    teacher = torch.zeros(12, 23, dtype=torch.float64).scatter_(1, soft.ids, soft.logprobs.double())
    teacher = teacher - teacher.logsumexp(1, keepdim=True)

    def dense(hidden: Tensor, weight: Tensor, soft: SoftTargets) -> Tensor:
        student = (hidden @ weight.T / temperature).log_softmax(1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2

    got = with_gradients(linear_cross_entropy, hidden, weight, soft)
    assert_same(got, with_gradients(dense, hidden, weight, soft), rtol=1e-6, atol=1e-9)
    own = (hidden @ weight.T / temperature).log_softmax(1)
    itself = replace(soft, ids=torch.arange(23).repeat(12, 1), logprobs=own)
    assert all(tensor.abs().max() < 1e-14 for tensor in with_gradients(linear_cross_entropy, hidden, weight, itself))


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", TAILS)
def test_float32_error_is_small_at_any_certainty(tail: Any, temperature: float, alpha: float) -> None:
    hidden, weight = inputs(200, 32, 300, torch.float32)
    hidden *= torch.linspace(0.1, 4, 200).unsqueeze(1)
    how = {"tail": tail, "temperature": temperature, "alpha": alpha, "hard": alpha < 1}
    for peaked in (1.0, 12.0):
        soft = soft_targets(200, 300, 32, peaked=peaked, **how)
        got = with_gradients(linear_cross_entropy, hidden, weight, soft)
        exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), soft)
        for ours, theirs in zip(got, exact, strict=True):
            assert (ours.double() - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize("gap", [20.0, 60.0, 200.0])
def test_a_tail_of_the_student_far_below_rounding_is_exact(gap: float) -> None:
    """1 - sum(p) is 0 in float32 from a gap of 17 on; of 200 the tail's probability is too."""
    hidden, weight = torch.eye(1, 4), torch.tensor([[gap, 1, -1, 0.5]]).T.expand(4, 4).contiguous()
    soft = SoftTargets(torch.tensor([[0]]), torch.tensor([[0.9]]).log(), tail="bucket")
    got = with_gradients(linear_cross_entropy, hidden, weight, soft)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), soft)
    assert float(exact[0]) > 0.1 * (gap - 7)
    assert_same([t.double() for t in got], exact, rtol=1e-6, atol=1e-7)


def test_a_tail_of_the_teacher_near_nothing_changes_next_to_nothing() -> None:
    hidden, weight = inputs(6, dtype=torch.float32)
    ids, full = torch.arange(6).unsqueeze(1), torch.zeros(6, 1)
    whole = with_gradients(linear_cross_entropy, hidden, weight, SoftTargets(ids, full, tail="bucket"))
    for logprob in (-1e-12, -1e-7):
        near = SoftTargets(ids, full + logprob, tail="bucket")
        assert_same(with_gradients(linear_cross_entropy, hidden, weight, near), whole, rtol=1e-5, atol=1e-6)


def test_where_no_token_outside_has_a_probability_a_tail_is_infinitely_far() -> None:
    """With finite gradients, as of a hard target whose logit is -inf."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[2.0], [-math.inf], [-math.inf]])
    soft = SoftTargets(torch.tensor([[0]]), torch.tensor([[0.9]]).log(), tail="bucket")
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), soft)
    loss.backward()
    assert loss == math.inf
    torch.testing.assert_close(weight.grad, torch.tensor([[0.1], [0.0], [0.0]]))


@pytest.mark.parametrize("tail", TAILS)
def test_bfloat16_is_no_worse_than_dense(tail: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", 64 * 500 * 4)
    hidden, weight = inputs(300, 64, 500, torch.bfloat16)
    soft = soft_targets(300, 500, 32, tail=tail)
    exact = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), soft)
    ours, dense = (
        [
            float((a.double() - b).norm() / b.norm())
            for a, b in zip(with_gradients(f, hidden, weight, soft), exact, strict=True)
        ]
        for f in (linear_cross_entropy, dense_linear_cross_entropy)
    )
    assert all(a <= b * 1.01 for a, b in zip(ours, dense, strict=True)), (ours, dense)


# What is no distribution


def given_rows(**changed: Any) -> SoftTargets:
    """Nine rows of three tokens, with these entries changed: {(row, k): value}."""
    soft = soft_targets(9, 23, 3)
    for name, entries in changed.items():
        for at, value in entries.items():
            getattr(soft, name)[at] = value
    return soft


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ids": {(4, 1): 23}}, IndexError, r"ids\[4, 1\] = 23 lies outside the vocabulary \[0, 23\)"),
        ({"ids": {(4, 0): -1}}, IndexError, r"ids\[4, 0\] = -1 lies outside the vocabulary"),
        ({"ids": {(4, 0): 7, (4, 2): 7}}, ValueError, r"ids\[4, \d\] = 7 is in its row already"),
        ({"logprobs": {(4, 1): math.nan}}, ValueError, r"logprobs\[4\] are of probabilities that sum to nan"),
        ({"logprobs": {(4, 1): math.inf}}, ValueError, r"logprobs\[4\] are of probabilities that sum to inf"),
        ({"logprobs": {(4, 1): 0.02}}, ValueError, r"logprobs\[4\] are of probabilities that sum to 1\.\d+, which is"),
        ({"logprobs": {4: -math.inf}}, ValueError, r"logprobs\[4\] are of probabilities that sum to 0, which is"),
    ],
)
@pytest.mark.parametrize("tail", TAILS)
def test_a_row_that_is_no_distribution_is_named(
    tail: Any, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    hidden, weight = inputs(9)
    soft = replace(given_rows(**changed), tail=tail)
    if tail == "bucket" and "sum to 0" in message:  # all of it lies in the tail, which is a distribution
        loss = linear_cross_entropy(hidden, weight, soft)
        torch.testing.assert_close(loss, dense_linear_cross_entropy(hidden, weight, soft))
        return
    with pytest.raises(error, match=message):
        linear_cross_entropy(hidden, weight, soft)
    ignored = soft.ids[:, 0].masked_fill(torch.arange(9) == 4, -100)
    assert linear_cross_entropy(hidden, weight, replace(soft, hard=ignored)).isfinite(), (
        "an ignored row may be anything"
    )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_row_without_a_token_has_the_hard_loss_alone(tail: Any, alpha: float, temperature: float) -> None:
    hidden, weight = inputs(9, dtype=torch.float32)
    how = {"tail": tail, "alpha": alpha, "temperature": temperature}
    nothing = replace(given_rows(), ids=torch.full((9, 3), -100), hard=torch.arange(9), **how)
    hard = with_gradients(linear_cross_entropy, hidden, weight, torch.arange(9))
    got = with_gradients(linear_cross_entropy, hidden, weight, nothing)
    if temperature == 1:
        assert_same_bits(got, hard)
    else:
        assert_same(got, hard, rtol=1e-6, atol=1e-7)
    some = replace(nothing, ids=nothing.ids.where(torch.arange(9).unsqueeze(1) % 2 == 0, given_rows().ids))
    got = with_gradients(linear_cross_entropy, hidden, weight, some)
    dense = with_gradients(dense_linear_cross_entropy, hidden.double(), weight.double(), some)
    assert_same([tensor.double() for tensor in got], dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_a_sum_above_1_by_rounding_is_divided_by(tail: Any) -> None:
    hidden, weight = inputs(9)
    soft = replace(given_rows(), tail=tail)
    above = soft.logprobs - soft.logprobs.logsumexp(1, keepdim=True) + 5e-3
    got = with_gradients(linear_cross_entropy, hidden, weight, replace(soft, logprobs=above))
    expected = with_gradients(linear_cross_entropy, hidden, weight, replace(soft, logprobs=above - 5e-3, tail="ignore"))
    assert_same(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ids": torch.zeros(8, 3, dtype=torch.int64)}, r"ids: int64 \[9, K\] expected, not torch.int64 \[8, 3\]"),
        ({"ids": torch.zeros(9, 3, dtype=torch.int32)}, r"ids: int64 \[9, K\] expected, not torch.int32"),
        ({"ids": torch.zeros(9, 0, dtype=torch.int64)}, r"ids: int64 \[9, K\] expected, not torch.int64 \[9, 0\]"),
        ({"logprobs": torch.zeros(9, 2)}, r"logprobs: floating point \[9, 3\], as ids are, expected, not .* \[9, 2\]"),
        ({"logprobs": torch.zeros(9, 3, dtype=torch.int64)}, "floating point .* expected, not torch.int64"),
        ({"hard": torch.zeros(9)}, r"hard: int64 \[9\] expected, not torch.float32 \[9\]"),
        ({"tail": "spread"}, "tail 'spread' is not one of ignore, bucket"),
        ({"temperature": 0.0}, "temperature 0.0 is not a positive number"),
        ({"temperature": math.inf}, "temperature inf is not a positive number"),
        ({"alpha": 0.0}, r"alpha 0.0 is not in \(0, 1\]; for hard targets alone give them as targets"),
        ({"alpha": 0.5}, "alpha 0.5 mixes in hard targets, and there are none: give `hard`"),
    ],
)
def test_misfits_are_refused(wrong: dict[str, Any], message: str) -> None:
    hidden, weight = inputs(9)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, replace(given_rows(), **wrong))


def test_the_row_filter_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"row_filter 0\.1 with soft targets, whose loss does not bound their gradient"
    ):
        linear_cross_entropy(*inputs(9), given_rows(), row_filter=0.1)


def test_a_hard_target_out_of_range_is_named() -> None:
    hidden, weight = inputs(9)
    soft = replace(given_rows(), hard=torch.full((9,), 23), alpha=0.5)
    with pytest.raises(IndexError, match=r"targets\[0\] = 23 lies outside the vocabulary"):
        linear_cross_entropy(hidden, weight, soft)


def test_no_gradient_flows_to_the_teacher() -> None:
    hidden, weight = inputs(9)
    soft = given_rows()
    soft.logprobs.requires_grad_()
    linear_cross_entropy(hidden.requires_grad_(), weight, soft).backward()
    assert soft.logprobs.grad is None
    assert not linear_cross_entropy(hidden.detach(), weight, soft).requires_grad


@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.parametrize("tail", TAILS)
def test_a_non_finite_input_reaches_the_loss(where: str, tail: Any) -> None:
    hidden, weight = inputs(9)
    (hidden if where == "hidden" else weight)[3] = math.nan
    got = with_gradients(linear_cross_entropy, hidden, weight, soft_targets(9, 23, 5, tail=tail))
    assert all(not tensor.isfinite().all() for tensor in got)


# Compilation, memory, who wants a gradient


@pytest.mark.parametrize("how", [{}, {"tail": "bucket", "temperature": 2.0, "alpha": 0.5, "hard": True}])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(reduction: Any, how: dict[str, Any]) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")

    def loss(hidden: Tensor, weight: Tensor, soft: SoftTargets) -> Tensor:
        return linear_cross_entropy(hidden.tanh(), weight, soft, reduction=reduction)

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    frames = []
    for n in (20, 24, 31, 40):
        hidden, weight = inputs(n, seed=n)
        soft = soft_targets(n, 23, 5, ignored=0.3, seed=n, **how)
        assert_same(with_gradients(compiled, hidden, weight, soft), with_gradients(loss, hidden, weight, soft))
        frames.append(backend.frame_count)
    assert frames[0] == 1
    assert frames[-1] == frames[1] <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_the_rules_of_torch_library(dtype: torch.dtype) -> None:
    hidden, weight = inputs(9, dtype=dtype)
    soft = soft_targets(9, 23, 5, hard=True)
    for wants in ((True, True), (False, False)):
        args = (hidden, weight, soft.hard, torch.rand(9), -100, None, 0.0, *wants, soft.ids, soft.logprobs)
        torch.library.opcheck(implementation._by_chunks, (*args, True, 2.0, 0.5))


@pytest.mark.parametrize("how", [{"tail": "bucket"}, {"temperature": 2.0, "alpha": 0.5, "hard": True}])
def test_peak_memory_is_that_of_hard_targets(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    n, h, v, k = 2000, 16, 3000, 4
    chunk = 100 * v * 4
    monkeypatch.setitem(chunks.LOGITS_BYTES, "cpu", chunk)
    hidden, weight = inputs(n, h, v, torch.float32)
    soft = soft_targets(n, v, k, **how)

    def peak(targets: Any) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            with_gradients(linear_cross_entropy, hidden, weight, targets)
        live = highest = 0
        for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                live += event.nbytes()
                highest = max(highest, live)
        return highest

    assert peak(soft) < peak(soft.ids[:, 0].contiguous()) + chunk // 8
