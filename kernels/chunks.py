"""The rows of the loss, chunk by chunk: logits, their softmax, and the two products of the backward pass.

Memory above the inputs and their gradients:

- one chunk of logits: of the inputs' type where Triton's kernels run; float32, and a copy in the inputs' type where
  that is another, where torch's own operations do (and there for bfloat16 once more what a product is rounded from);
- the gradient of `weight` in float32 until the last chunk (V = 151,936, H = 3,584: 2.2 GB), if there are several
  chunks: sums over chunks must not be rounded in between. On CUDA one chunk alone writes it in the weight's type, so
  such a chunk may be larger by as much memory as that saves;
- in the backward pass nothing: the gradients as stored are passed on, on CUDA multiplied in place by that of the loss
  unless it is 1. A second copy of them is made where they are still needed or cannot be looked at without waiting:
  with `retain_graph`, in a compiled backward pass, in float64 on CUDA, and on a CPU if the gradient of the loss is
  not 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .reverse_targets import reverse_rows
from .rows import LossInputs, kept_rows
from .soft_targets import soft_rows
from .torch_chunk import torch_chunk

# Bytes of logits held at a time, small beside the activations of a pack. N has no part in it, so it has none in the
# peak. On CUDA 5,300 rows of 151,936 in bfloat16. From 4 x FLOP/s / bandwidth rows on (1,181 on an H100, 612 on an
# A100, 1,125 on a B200) the product that is added to the weight's gradient, 2 FLOPs per row to 8 bytes, is bound by its
# FLOPs, and more rows gain nothing until one chunk holds all. By the model of planning/roofline.py eight times these
# bytes make the loss at most 3% faster for H of 896 to 5,120 and V of 152,000, and a quarter of them makes it up to 7%
# slower.
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 3 << 29}
# Rows of a chunk are a multiple of the largest tile of a GEMM, columns of the buffer one of 128 bytes, which the
# fastest GEMMs need for their loads (a vocabulary of odd size would get the slow ones).
TILE_ROWS = 256
ALIGNED_BYTES = 128


def takes_triton(device: str, dtype: torch.dtype) -> bool:
    """Return whether Triton's kernels run: on CUDA, except in float64, which is for tests."""
    return device == "cuda" and dtype != torch.float64


@dataclass(frozen=True)
class Plan:
    """How `n_rows` rows are cut."""

    chunk_rows: int  # of each chunk but the last, which has what is left
    logits_dtype: torch.dtype
    row_stride: int  # of the buffer of logits, elements
    grad_weight_dtype: torch.dtype  # float32 (float64) where chunks are summed, else the weight's

    @classmethod
    def of(cls, n_rows: int, h: int, v: int, dtype: torch.dtype, device: str, want_weight: bool = True) -> "Plan":
        """Return the plan for hidden [n_rows, h] and weight [v, h] of `dtype` on a device of this type."""
        exact = torch.promote_types(dtype, torch.float32)
        budget = LOGITS_BYTES["cuda" if device == "cuda" else "cpu"]
        if not takes_triton(device, dtype):
            return cls(max(1, budget // (v * exact.itemsize)), exact, v, exact)
        aligned = ALIGNED_BYTES // dtype.itemsize
        stride = math.ceil(v / aligned) * aligned
        row_bytes = stride * dtype.itemsize
        saved_bytes = v * h * (exact.itemsize - dtype.itemsize) if want_weight else 0
        if n_rows * row_bytes <= budget + saved_bytes:
            return cls(max(1, n_rows), dtype, stride, dtype)
        most = max(1, budget // row_bytes)
        unit = TILE_ROWS if most >= TILE_ROWS else 1
        n_chunks = math.ceil(n_rows / (most // unit * unit))
        # Alike, as a small last one would waste its share of reading the weight.
        return cls(math.ceil(n_rows / (n_chunks * unit)) * unit, dtype, stride, exact)


def run(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `linear_cross_entropy._by_chunks` returns, of which this is the body."""
    hidden, weight, targets, scale = inputs[:4]
    (n, h), v = hidden.shape, weight.shape[0]
    rows_S = None  # indices of the rows to compute; None: all
    n_rows = n
    valid = torch.ones((), dtype=scale.dtype, device=hidden.device)
    if inputs.n_supervised is not None:
        kept_N = targets != inputs.ignore_index
        valid.masked_fill_(kept_N.sum() != inputs.n_supervised, math.nan)
        if inputs.n_supervised < n:
            rows_S, n_rows = kept_rows(kept_N, inputs.n_supervised), inputs.n_supervised

    device = hidden.device.type
    plan = Plan.of(n_rows, h, v, hidden.dtype, device, inputs.want_weight)
    chunk = _triton_chunk() if takes_triton(device, hidden.dtype) else torch_chunk
    nll_N = torch.zeros(n, dtype=scale.dtype, device=hidden.device)
    # Zeros are what a chunk leaves unwritten: rows that are ignored, and rows below the threshold.
    grad_hidden = hidden.new_zeros((n, h) if inputs.want_hidden else 0)
    grad_weight = weight.new_empty((v, h) if inputs.want_weight else 0, dtype=plan.grad_weight_dtype)
    if n_rows == 0:
        grad_weight.zero_()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    buffer = torch.empty(min(plan.chunk_rows, n_rows), plan.row_stride, dtype=plan.logits_dtype, device=hidden.device)

    for start in range(0, n_rows, plan.chunk_rows):
        stop = min(start + plan.chunk_rows, n_rows)
        at = slice(start, stop) if rows_S is None else rows_S[start:stop]
        hidden_CH, target_C = hidden[at].contiguous(), targets[at].contiguous()
        grad_CH = None
        if inputs.want_hidden:  # in place, or gathered as its rows were
            grad_CH = grad_hidden[at] if rows_S is None else torch.zeros_like(hidden_CH)
        nll_C = torch.empty(stop - start, dtype=scale.dtype, device=hidden.device)
        chunk(
            hidden_CH,
            weight,
            target_C,
            scale[at].contiguous() if scale.ndim else scale,
            buffer[: stop - start, :v],
            soft=soft_rows(inputs, at),
            reverse=reverse_rows(inputs, at),
            ignore_index=inputs.ignore_index,
            threshold=inputs.threshold,
            nll_C=nll_C,
            grad_CH=grad_CH,
            grad_VH=grad_weight if inputs.want_weight else None,
            first=start == 0,
        )
        nll_N[at] = nll_C
        if grad_CH is not None and rows_S is not None:
            grad_hidden[at] = grad_CH
    del buffer
    return nll_N, valid, grad_hidden, grad_weight.to(weight.dtype)


def _triton_chunk() -> Callable[..., None]:
    from .triton_chunk import triton_chunk  # without a GPU there need be no Triton

    return triton_chunk
