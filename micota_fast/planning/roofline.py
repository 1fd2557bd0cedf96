"""The least time that the loss can take on a GPU, from what it computes and what it moves.

Williams et al., "Roofline" (CACM 52(4), 2009): no part of a program is faster than its FLOPs at the GPU's peak, or than
its bytes at the bandwidth of the GPU's memory. Both peaks are those of the data sheet, which no kernel reaches, so a
measured time lies above. The parts run one after another, as the loss launches them.
"""

from dataclasses import dataclass

import torch

from micota_fast.common.gpu_specs import GPU
from micota_fast.kernels.chunks import Plan


@dataclass(frozen=True)
class Part:
    """One kind of kernel of the loss, over all chunks.

    Attributes:
        name: what it does.
        flops: floating-point operations on the tensor cores; 0 for what only moves memory.
        bytes: read from and written to the GPU's memory.
        product: whether it is a product that no exact loss can do without (three; two if the output matrix is frozen).
    """

    name: str
    flops: float
    bytes: float
    product: bool = False

    def seconds(self, gpu: GPU) -> float:
        """Return the least time on `gpu`."""
        return max(self.flops / gpu.flops, self.bytes / gpu.bandwidth)


def loss_parts(
    n: int, h: int, v: int, gpu: GPU, dtype: torch.dtype = torch.bfloat16, frozen: bool = False
) -> list[Part]:
    """Return the parts of `linear_cross_entropy` with its gradients, on CUDA, without row filter.

    A product reads each of its inputs once per chunk. The softmax reads a row of logits twice, first for the maximum
    and the sum, then for the gradient. Each SM has one row at a time (two in float32); if these fit in the L2 cache
    together, the second read is taken to cost nothing. A backward pass that is given a gradient of 1, as in training,
    has nothing to do.

    Args:
        n: supervised rows.
        h: hidden size.
        v: rows of the output matrix.
        gpu: on which it runs.
        dtype: of hidden states and output matrix.
        frozen: whether the output matrix has no gradient.
    """
    plan = Plan.of(n, h, v, dtype, "cuda")
    chunks = -(-n // plan.chunk_rows)
    low, sums = dtype.itemsize, plan.grad_weight_dtype.itemsize
    hidden, weight, logits = n * h * low, v * h * low, n * plan.row_stride * low
    rows = gpu.sms * (1 if low == 2 else 2)
    cached = rows * plan.row_stride * low <= gpu.l2
    product = 2.0 * n * h * v
    parts = [
        Part("logits", product, hidden + chunks * weight + logits, product=True),
        Part("softmax", 0, (2 if cached else 3) * logits),
        Part("d hidden", product, logits + chunks * weight + hidden, product=True),
    ]
    if frozen:
        return parts
    parts.append(Part("d weight", product, logits + hidden + (2 * chunks - 1) * v * h * sums, product=True))
    if chunks > 1:
        parts.append(Part("d weight rounded", 0, v * h * sums + weight))
    return parts


def loss_seconds(
    n: int, h: int, v: int, gpu: GPU, dtype: torch.dtype = torch.bfloat16, frozen: bool = False
) -> tuple[float, float]:
    """Return the least time of the loss on `gpu`, and that of its products alone; see `loss_parts`."""
    parts = loss_parts(n, h, v, gpu, dtype, frozen)
    return sum(part.seconds(gpu) for part in parts), sum(part.seconds(gpu) for part in parts if part.product)
