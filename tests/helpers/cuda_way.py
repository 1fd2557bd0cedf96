"""The way that the loss takes on CUDA, for tensors of a CPU: where there is no GPU, Triton interprets its kernels."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from micota_fast.kernels import chunks, kept_products, linear_cross_entropy, triton_chunk

implementation = sys.modules[linear_cross_entropy.__module__]

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Blocks and tiles small enough that small shapes take several, and the way of CUDA for CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_chunk, "BLOCK_BYTES", 256)
        if not HAS_GPU:
            for tiles in kept_products.TILES.values():
                for name, size in (("BLOCK_M", 32), ("BLOCK_N", 16), ("BLOCK_K", 16), ("GROUP_M", 2)):
                    patch.setitem(tiles, name, size)
            patch.setattr(chunks, "takes_triton", lambda device, dtype: dtype != torch.float64)
            patch.setattr(implementation, "_checked", lambda targets, v, ignore_index, n_supervised: n_supervised)
            patch.setattr(implementation, "check_distributions", lambda inputs: None)
            patch.setattr(implementation, "check_logprobs", lambda inputs: None)
            patch.setattr(triton_chunk, "_add_product", add_product_on_cpu)
            make_bfloat16_faithful(patch)
        yield


def add_product_on_cpu(a: Tensor, b: Tensor, total: Tensor, first: bool) -> None:
    """Summed in float32, then rounded, as cuBLAS does: torch.mm and addmm have `out_dtype` on CUDA alone."""
    product = a.float() @ b.float()
    total.copy_(product if first else total + product)


def make_bfloat16_faithful(patch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off to bfloat16, where a GPU rounds, and multiplies bfloat16 as integers."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(data.astype(np.float32).reshape(-1)).bfloat16().view(torch.int16)
            return bits.numpy().view(np.uint16).reshape(data.shape)
        return convert(data, source, target, mode)

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, *rest)

    patch.setattr(interpreter, "_convert_float", rounded)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)


@contextmanager
def chunks_of(rows: int, v: int, dtype: torch.dtype) -> Iterator[None]:
    """That many rows of logits a chunk."""
    aligned = chunks.ALIGNED_BYTES // dtype.itemsize
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks.LOGITS_BYTES, DEVICE, rows * math.ceil(v / aligned) * aligned * dtype.itemsize)
        yield


def inputs(n: int, h: int, v: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states [n, h] and a weight [v, h], on the device the kernels run on."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(m, h, generator=generator) for m in (n, v))
    hidden[::3] *= 3  # some rows are sure
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)
