"""One chunk of rows on CUDA: products by cuBLAS, the softmax between them by one Triton kernel, in place."""

from typing import Any

import torch
import triton
from torch import Tensor

from .kept_products import grad_hidden_of_kept, grad_weight_of_kept
from .reverse_targets import ReverseRows
from .rows import kept_rows
from .soft_targets import SoftRows
from .triton_rows import soft_softmax_rows, softmax_rows

# One row per SM at a time, so that the second pass finds its row in the L2 cache: V = 152,064 in bfloat16 makes 40 MB
# on the 132 SMs of an H100, which has 50, and 33 MB on the 108 of an A100, which has 40. Two programs of 1,024 threads
# do not fit on an SM if a thread has more than 32 registers, as with blocks of this size it has in bfloat16. There is
# then no second program to hide the wait for memory, so the next two blocks are on their way while one is computed: 64
# KB, where 18 KB would do for the bandwidth of an H100 (3.35 TB/s over 132 SMs, 700 ns away). Not measured.
BLOCK_BYTES = 32 << 10
NUM_STAGES = 3
NUM_WARPS = 32


def triton_chunk(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    target_C: Tensor,
    scale: Tensor,
    logits_CV: Tensor,
    *,
    soft: SoftRows | None,
    reverse: ReverseRows | None = None,
    ignore_index: int,
    threshold: float,
    nll_C: Tensor,
    grad_CH: Tensor | None,
    grad_VH: Tensor | None,
    first: bool,
) -> None:
    """Do as `torch_chunk`; logits have the inputs' type, `grad_VH` float32 or, for a lone chunk, the weight's."""
    torch.mm(hidden_CH, weight_VH.T, out=logits_CV)
    want_gradient = grad_CH is not None or grad_VH is not None
    common: dict[str, Any] = {
        "SCALE_STRIDE": 1 if scale.ndim else 0,
        "WANT_GRADIENT": want_gradient,
        "BLOCK_V": BLOCK_BYTES // logits_CV.element_size(),
        "NUM_STAGES": NUM_STAGES,
        "num_warps": NUM_WARPS,
    }
    rows = logits_CV, target_C, scale, nll_C, logits_CV.shape[1], logits_CV.stride(0)
    if soft is None:
        softmax_rows[(len(target_C),)](
            *rows,
            threshold,
            ignore_index,
            reverse_logprobs_ptr=None if reverse is None else reverse.logprobs,
            reverse_alpha_ptr=None if reverse is None else reverse.alpha,
            REVERSE=want_gradient and reverse is not None,
            FILTER=want_gradient and threshold > 0,
            **common,
        )
    else:
        k = soft.ids.shape[1]
        soft_softmax_rows[(len(target_C),)](
            *rows,
            soft.ids,
            soft.probs,
            soft.tail,
            soft.entropy,
            soft.alpha,
            ignore_index,
            soft.temperature,
            K=k,
            BLOCK_K=triton.next_power_of_2(k),
            HOT=soft.temperature != 1,
            MIXED=soft.mixed,
            **common,
        )
    if not want_gradient:
        return
    if threshold > 0:
        kept_C = ~(nll_C <= threshold)  # NaN is kept
        rows_C, count = kept_rows(kept_C, len(kept_C)), kept_C.sum()
        if grad_CH is not None:
            grad_hidden_of_kept(logits_CV, weight_VH, rows_C, count, grad_CH)
        if grad_VH is not None:
            grad_weight_of_kept(logits_CV, hidden_CH, rows_C, count, grad_VH, first)
        return
    if grad_CH is not None:
        torch.mm(logits_CV, weight_VH, out=grad_CH)
    if grad_VH is not None:
        _add_product(logits_CV.T, hidden_CH, grad_VH, first)


def _add_product(a: Tensor, b: Tensor, total: Tensor, first: bool) -> None:
    """total = a @ b, or += for all but the first, summed in float32."""
    if a.dtype == total.dtype:
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
