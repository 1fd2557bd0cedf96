"""FlashAttention 4 (package flash-attn-4) over packed documents, as one operation.

Its own entry point, `flash_attn.cute.flash_attn_varlen_func`, is a plain autograd function: torch.compile cannot trace
into it, and selective activation checkpointing does not see it. So its two halves are wrapped here as an operator, as
torch's `activate_flash_attention_impl("FA4")` does.

Written from the wheel of release 4.0.0b36: signatures, shapes and head sizes were read, nothing was run on a GPU.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def head_dims(capability_major: int) -> Collection[int]:
    """Return the head sizes that it takes on GPUs of this compute capability: 9 (Hopper) or 10 (Blackwell)."""
    return {9: range(8, 257, 8), 10: (*range(8, 129, 8), 256)}.get(capability_major, ())


@torch.library.custom_op("micota::flash_attention_4", mutates_args=())
def flash_attention_4(
    q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """Let each token attend to those of its own document up to itself; scores are scaled by 1/sqrt(d).

    Args:
        q_TNd, k_TKd, v_TKd: bfloat16 or float16 on a GPU; query heads n to n + N/K - 1 share key head n K/N.
        cu_seqlens: int32 `[B+1]` on the GPU: where each document begins, and T.
        max_seqlen: tokens of the longest document.

    Returns:
        `[T, N, d]`, and the logarithms of the softmax's sums `[N, T]`, float32, which the backward pass wants.
    """
    from flash_attn.cute import interface

    # By name, as the fourth in order is not `cu_seqlens_q`. Releases differ in how much more they return.
    out_TNd, lse_NT, *_ = interface._flash_attn_fwd(
        q_TNd, k_TKd, v_TKd, causal=True, return_lse=True, **_documents(cu_seqlens, max_seqlen)
    )
    return out_TNd, lse_NT


@flash_attention_4.register_fake
def _(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    lse_NT = q_TNd.new_empty((q_TNd.shape[1], q_TNd.shape[0]), dtype=torch.float32)
    return torch.empty_like(q_TNd, memory_format=torch.contiguous_format), lse_NT


@torch.library.custom_op("micota::flash_attention_4_backward", mutates_args=())
def flash_attention_4_backward(
    grad_TNd: Tensor,
    q_TNd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    out_TNd: Tensor,
    lse_NT: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    from flash_attn.cute import interface

    dq_TNd, dk_TKd, dv_TKd, *_ = interface._flash_attn_bwd(
        q_TNd, k_TKd, v_TKd, out_TNd, grad_TNd, lse_NT, causal=True, **_documents(cu_seqlens, max_seqlen)
    )
    return dq_TNd.contiguous(), dk_TKd.contiguous(), dv_TKd.contiguous()


@flash_attention_4_backward.register_fake
def _(
    grad_TNd: Tensor,
    q_TNd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    out_TNd: Tensor,
    lse_NT: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_TNd, k_TKd, v_TKd)]
    return like[0], like[1], like[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, cu_seqlens, ctx.max_seqlen = inputs
    ctx.save_for_backward(*qkv, *output, cu_seqlens)


def _gradients(ctx: Any, grad_TNd: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    return *flash_attention_4_backward(grad_TNd, *ctx.saved_tensors, ctx.max_seqlen), None, None


flash_attention_4.register_autograd(_gradients, setup_context=_keep)


def _documents(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    cu, longest = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens), ("max_seqlen_q", "max_seqlen_k")
    return cu | dict.fromkeys(longest, max_seqlen)
