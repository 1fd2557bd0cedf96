"""The two products of the backward pass over some rows alone, which and how many only the device knows.

cuBLAS wants its shapes from the host. Here a launch covers all rows, and what lies past the count, which is read on the
device, ends at once. Each tile of the result is summed by one program in a fixed order: no atomics, equal bits.

Both take the gradient of the logits as `triton_chunk.softmax_rows` leaves it: 0 past the columns, up to the stride.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# Tiles by the bytes of an element. There is no autotuning: another choice would sum in another order.
TILES: dict[int, dict[str, Any]] = {
    2: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 8, "num_warps": 8, "num_stages": 2},
}


def grad_hidden_of_kept(grad_CV: Tensor, weight_VH: Tensor, rows_C: Tensor, count: Tensor, out_CH: Tensor) -> None:
    """Compute out[kept] = grad[kept] @ weight, kept = rows_C[:count]; the other rows of `out` stay as they are."""
    (c, v), h = grad_CV.shape, weight_VH.shape[1]
    tiles = TILES[grad_CV.element_size()]
    grid = (triton.cdiv(c, tiles["BLOCK_M"]) * triton.cdiv(h, tiles["BLOCK_N"]),)
    grad_hidden_kernel[grid](
        grad_CV, weight_VH, rows_C, count, out_CH, c, h, v, grad_CV.stride(0), weight_VH.stride(0), **tiles
    )


def grad_weight_of_kept(
    grad_CV: Tensor, hidden_CH: Tensor, rows_C: Tensor, count: Tensor, total_VH: Tensor, first: bool
) -> None:
    """Compute total = grad[kept].T @ hidden[kept], kept = rows_C[:count], or += for all but the first chunk."""
    v, h = total_VH.shape
    tiles = dict(TILES[grad_CV.element_size()])
    tiles["num_stages"] = 2 * tiles["num_stages"] - 1  # as far ahead, with the rows' indices loaded before the rows
    grid = (triton.cdiv(v, tiles["BLOCK_M"]) * triton.cdiv(h, tiles["BLOCK_N"]),)
    grad_weight_kernel[grid](grad_CV, hidden_CH, rows_C, count, total_VH, v, h, grad_CV.stride(0), FIRST=first, **tiles)


@triton.jit
def _tile_of(program, n_tiles_m, n_tiles_n, GROUP_M: tl.constexpr):
    """Programs that run together work on GROUP_M rows of tiles, whose operands then fit in the L2 cache."""
    per_group = GROUP_M * n_tiles_n
    first_m = program // per_group * GROUP_M
    group_m = min(n_tiles_m - first_m, GROUP_M)
    return first_m + program % per_group % group_m, program % per_group // group_m


@triton.jit(do_not_specialize=["n_rows"])  # which changes from step to step, and no address depends on it
def grad_hidden_kernel(
    grad_ptr,
    weight_ptr,
    rows_ptr,
    count_ptr,
    out_ptr,
    n_rows,
    H,
    V,
    grad_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute one tile of out[rows[:count]] = grad[rows[:count]] @ weight."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP_M)
    count = tl.load(count_ptr)
    if tile_m * BLOCK_M >= count:
        return
    slot = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(rows_ptr + slot, mask=slot < count, other=0)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_h = column < H
    a_ptrs = grad_ptr + row[:, None] * grad_stride
    b_ptrs = weight_ptr + column[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, V, BLOCK_K):
        v = start + tl.arange(0, BLOCK_K)
        in_v = v < V
        a = tl.load(a_ptrs + v[None, :], mask=(v < grad_stride)[None, :], other=0.0)
        b = tl.load(b_ptrs + v[:, None].to(tl.int64) * weight_stride, mask=in_v[:, None] & in_h[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    out_ptrs = out_ptr + row[:, None] * H + column[None, :]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=(slot < count)[:, None] & in_h[None, :])


@triton.jit
def grad_weight_kernel(
    grad_ptr,
    hidden_ptr,
    rows_ptr,
    count_ptr,
    total_ptr,
    V,
    H,
    grad_stride,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute one tile of total (+)= grad[rows[:count]].T @ hidden[rows[:count]]."""
    tile_m, tile_n = _tile_of(tl.program_id(0), tl.cdiv(V, BLOCK_M), tl.cdiv(H, BLOCK_N), GROUP_M)
    count = tl.load(count_ptr)
    v = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row, in_h = v < grad_stride, column < H
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, count, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        taken = slot < count
        row = tl.load(rows_ptr + slot, mask=taken, other=0)
        a = tl.load(
            grad_ptr + row[:, None] * grad_stride + v[None, :], mask=taken[:, None] & in_row[None, :], other=0.0
        )
        b = tl.load(hidden_ptr + row[:, None] * H + column[None, :], mask=taken[:, None] & in_h[None, :], other=0.0)
        sums = tl.dot(tl.trans(a), b, sums, input_precision="ieee")
    total_ptrs = total_ptr + v[:, None].to(tl.int64) * H + column[None, :]
    mask = (v < V)[:, None] & in_h[None, :]
    if not FIRST:
        sums += tl.load(total_ptrs, mask=mask, other=0.0)
    tl.store(total_ptrs, sums.to(total_ptr.dtype.element_ty), mask=mask)
