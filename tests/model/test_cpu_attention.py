"""The CPU's packed attention as an operator: its contract with autograd and the compiler, and documents kept apart."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from micota_fast.model.cpu_attention import cpu_attention, cpu_attention_backward

# Documents' lengths; none; key heads; query heads that share one; channels of a head.
SHAPES = (st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), *[st.integers(1, 3)] * 2, st.integers(1, 9))


def inputs(lengths: list[int], N: int, K: int, d: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), heads, d) for heads in (N, K, K))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [*(x.requires_grad_() for x in tensors), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)]


def dense(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """All T x T scores at once, those of other documents and of later tokens masked."""
    (T, N, d), K = q_TNd.shape, k_TKd.shape[1]
    document_T = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff().long())
    visible_TT = (document_T[:, None] == document_T) & torch.ones(T, T, dtype=torch.bool).tril()
    k_TNd, v_TNd = (x.repeat_interleave(N // K, dim=1) for x in (k_TKd, v_TKd))
    scores_NTT = torch.einsum("snd,tnd->nst", q_TNd, k_TNd) / d**0.5
    scores_NTT = scores_NTT.masked_fill(~visible_TT, -torch.inf)
    return torch.einsum("nst,tnd->snd", scores_NTT.softmax(-1), v_TNd), scores_NTT.logsumexp(-1).T


@given(*SHAPES)
@settings(max_examples=60, deadline=None)
def test_it_equals_the_dense_computation(lengths: list[int], K: int, share: int, d: int) -> None:
    tensors = inputs(lengths, K * share, K, d)
    out_TNd, lse_TN = cpu_attention(*tensors)
    expected_TNd, expected_TN = dense(*tensors)
    torch.testing.assert_close(out_TNd, expected_TNd, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse_TN, expected_TN, rtol=1e-10, atol=1e-10)
    grad_TNd = torch.randn_like(out_TNd)
    found = torch.autograd.grad(out_TNd, tensors[:3], grad_TNd)
    for a, b in zip(found, torch.autograd.grad(expected_TNd, tensors[:3], grad_TNd), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@given(*SHAPES, st.data())
@settings(max_examples=30, deadline=None)
def test_no_document_reaches_another(lengths: list[int], K: int, share: int, d: int, data: st.DataObject) -> None:
    """Whatever the others hold, NaN too, the same bits come out, forward and backward."""
    tensors = inputs(lengths, K * share, K, d, torch.float32)
    kept = data.draw(st.sampled_from([i for i, length in enumerate(lengths) if length]))
    start, stop = list(pairwise(tensors[3].tolist()))[kept]
    other = [x.detach().clone() for x in tensors[:3]]
    for x in other:
        x[:start], x[stop:] = torch.nan, torch.nan
        x.requires_grad_()
    results = []
    for qkv in (tensors[:3], other):
        out_TNd, lse_TN = cpu_attention(*qkv, tensors[3])
        grads = torch.autograd.grad(out_TNd, qkv, torch.ones_like(out_TNd))
        results.append([x[start:stop] for x in (out_TNd, lse_TN, *grads)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(x.isnan().any() for x in results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_keeps_an_operators_contract(dtype: torch.dtype) -> None:
    """Schema, shapes without values, autograd and the compiler with sizes unknown, by torch's own checks."""
    tensors = inputs([5, 1, 0, 7], 4, 2, 8, dtype)
    opcheck(cpu_attention, tuple(tensors))
    out_TNd, lse_TN = cpu_attention(*(x.detach() for x in tensors))
    assert (out_TNd.dtype, lse_TN.dtype) == (dtype, torch.float32)
    saved = (torch.randn_like(out_TNd), *(x.detach() for x in tensors[:3]), out_TNd, lse_TN, tensors[3])
    opcheck(cpu_attention_backward, saved)


def test_views_that_are_not_contiguous() -> None:
    """q, k and v as parts of one product, and a gradient that is a view."""
    qkv_T8d = torch.randn(9, 8, 6, dtype=torch.float64, requires_grad=True)
    q_TNd, k_TKd, v_TKd = qkv_T8d.split([4, 2, 2], dim=1)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    grad_TNd = torch.randn(9, 6, 4, dtype=torch.float64).transpose(1, 2)
    results = [
        torch.autograd.grad(attend(q_TNd, k_TKd, v_TKd, cu_seqlens)[0], qkv_T8d, grad_TNd, retain_graph=True)[0]
        for attend in (cpu_attention, dense)
    ]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_the_same_bits_twice() -> None:
    tensors = inputs([30, 2, 17], 4, 2, 16, torch.float32)
    first, second = (cpu_attention(*tensors)[0] for _ in range(2))
    assert torch.equal(first, second)
    grads = [torch.autograd.grad(out, tensors[:3], torch.ones_like(out)) for out in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
