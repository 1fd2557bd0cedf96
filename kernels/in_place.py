"""Multiplies a tensor in place by a factor that only the device knows, at no cost if that is 1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
PROGRAMS = 1024  # a few per SM; each takes every 1,024th block, so that a factor of 1 costs as many exits and no more


def multiply_in_place(x: Tensor, factor: Tensor) -> Tensor:
    """Compute x *= factor in float32, rounded once, and return `x`.

    Args:
        x: contiguous, bfloat16 or float32.
        factor: 0-d, float32, on the same device. If it is 1, `x` is neither read nor written.
    """
    n_blocks = triton.cdiv(x.numel(), BLOCK)
    if n_blocks:
        with torch.cuda.device_of(x):  # Triton launches on the current device
            multiply_kernel[(min(n_blocks, PROGRAMS),)](x, factor, x.numel(), BLOCK=BLOCK, num_warps=8)
    return x


@triton.jit(do_not_specialize=["size"])  # hidden states of other counts of tokens need no other kernel
def multiply_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """Multiply blocks of x, every program's first and each n-th after it for n programs."""
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        at = block * tl.full((), BLOCK, tl.int64) + tl.arange(0, BLOCK)
        mask = at < size
        x = tl.load(x_ptr + at, mask=mask)
        tl.store(x_ptr + at, (x.to(tl.float32) * factor).to(x.dtype), mask=mask)
