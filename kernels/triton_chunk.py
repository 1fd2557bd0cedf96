"""One chunk of rows on CUDA: products by cuBLAS, the softmax between them by one Triton kernel, in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kept_products import grad_hidden_of_kept, grad_weight_of_kept
from .rows import kept_rows

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
    softmax_rows[(len(target_C),)](
        logits_CV,
        target_C,
        scale,
        nll_C,
        logits_CV.shape[1],
        logits_CV.stride(0),
        threshold,
        ignore_index,
        SCALE_STRIDE=1 if scale.ndim else 0,
        WANT_GRADIENT=want_gradient,
        FILTER=want_gradient and threshold > 0,
        BLOCK_V=BLOCK_BYTES // logits_CV.element_size(),
        NUM_STAGES=NUM_STAGES,
        num_warps=NUM_WARPS,
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


# At least as many elements as a row's stride may exceed its columns by (`chunks.ALIGNED_BYTES`).
PADDING = tl.constexpr(128)


@triton.jit
def softmax_rows(
    logits_ptr,
    target_ptr,
    scale_ptr,
    nll_ptr,
    n_columns,
    row_stride,
    threshold,
    ignore_index,
    SCALE_STRIDE: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
    FILTER: tl.constexpr,
    BLOCK_V: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Compute the loss of one row, then scale * (softmax - onehot) in place of its logits. One program per row.

    The maximum and the sum of exponentials are kept together over one pass (arXiv 1805.02867). With FILTER, rows that
    are ignored or of at most `threshold` keep their logits, which nobody reads again.

    A row is read and written up to its stride, so that all goes 16 bytes at a time whatever the number of columns;
    what lies past the columns is made -inf, and then 0. The L2 cache is asked to keep what will be read again, and
    to give up first what was written.
    """
    POLICY: tl.constexpr = "evict_last" if WANT_GRADIENT else "evict_first"
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        tl.store(nll_ptr + row, 0.0)
        if WANT_GRADIENT and not FILTER:
            for start in range(0, row_stride, BLOCK_V):
                columns = start + tl.arange(0, BLOCK_V)
                zeros = tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + columns, zeros, mask=columns < row_stride)
        return

    in_range = (target >= 0) & (target < n_columns)
    # Before the reductions: their barriers keep a fast warp from writing over it while a slow one has yet to read it.
    target_logit = tl.load(logits_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
    padding = n_columns + tl.arange(0, PADDING)
    tl.store(logits_ptr + padding, -float("inf"), mask=padding < row_stride)
    tl.debug_barrier()  # so that all threads read it
    top = -float("inf")
    total = 0.0
    for start in tl.range(0, row_stride, BLOCK_V, num_stages=NUM_STAGES):
        columns = start + tl.arange(0, BLOCK_V)
        mask = columns < row_stride
        x = tl.load(logits_ptr + columns, mask=mask, other=-float("inf"), eviction_policy=POLICY).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far: no inf - inf
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = new_top
    # The logits' difference first: exact where the target is (near) the top, as it is in a trained model.
    nll = (top - target_logit) + tl.log(total)
    tl.store(nll_ptr + row, nll)

    if WANT_GRADIENT:
        if FILTER and nll <= threshold:
            return
        scale = tl.load(scale_ptr + row * SCALE_STRIDE)
        scale = tl.where(in_range, scale, float("nan"))
        target_column = target.to(tl.int32)
        share = 1.0 / total
        # Backwards: the end of the row was read last, and is the likeliest to be still in the cache.
        last = (row_stride - 1) // BLOCK_V * BLOCK_V
        for back in tl.range(0, row_stride, BLOCK_V, num_stages=NUM_STAGES):
            columns = last - back + tl.arange(0, BLOCK_V)
            mask = columns < row_stride
            x = tl.load(logits_ptr + columns, mask=mask, other=-float("inf"), eviction_policy="evict_first")
            x = x.to(tl.float32)
            gradient = scale * (tl.exp(x - top) * share - tl.where(columns == target_column, 1.0, 0.0))
            gradient = gradient.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + columns, gradient, mask=mask, eviction_policy="evict_first")
