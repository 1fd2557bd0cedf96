"""RMSNorm, RoPE and SwiGLU: Liger-Kernel's Triton kernels for training on a GPU, torch's own operations elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from micota_fast.model.rope import rotate


@dataclass(frozen=True)
class Pointwise:
    """The three operations between matrix products that are worth a kernel of their own."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]  # x[..., d], weight[d], eps -> [..., d]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q_TNd, k_TKd, cos_T1R, sin_T1R -> q, k
    swiglu: Callable[[Tensor, Tensor], Tensor]  # gate, up -> silu(gate) * up (arXiv 2002.05202)


TORCH = Pointwise(
    rms_norm=lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps),
    rotate=lambda q_TNd, k_TKd, cos_T1R, sin_T1R: (rotate(q_TNd, cos_T1R, sin_T1R), rotate(k_TKd, cos_T1R, sin_T1R)),
    swiglu=lambda gate, up: F.silu(gate) * up,
)


def choose_pointwise(device: torch.device, compiled: bool) -> tuple[Pointwise, str]:
    """Choose once, at start.

    Args:
        device: where the model runs.
        compiled: whether torch.compile has the blocks, and so fuses these operations with their neighbours itself.

    Returns:
        The operations and, for the log, whose they are and why.
    """
    if device.type != "cuda":
        return TORCH, f"torch (the device is {device.type}, not cuda)"
    if compiled:
        return TORCH, "torch.compile fuses them"
    try:
        return liger(), "liger-kernel"
    except Exception as error:  # absent, or broken in one of the many ways of a package built for another torch
        return TORCH, f"torch (no liger-kernel: {type(error).__name__}: {error})"


def liger() -> Pointwise:
    """Return Liger-Kernel's, by the signatures that releases 0.5 to 0.8 share.

    Raises:
        ImportError: it is not installed.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # No offset; "llama": rounded as in Hugging Face's models; not in place, as a gradient may have other readers.
        y: Tensor = LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
        return y

    def rotate(q_TNd: Tensor, k_TKd: Tensor, cos_T1R: Tensor, sin_T1R: Tensor) -> tuple[Tensor, Tensor]:
        # It wants [1, N, T, d] as a view of [1, T, N, d], cos and sin as wide as a head, and turns q and k in place
        # without telling autograd: without copies, products kept by selective checkpointing would be turned twice.
        q_1NTd, k_1KTd = (x.clone()[None].transpose(1, 2) for x in (q_TNd, k_TKd))
        cos_1Td, sin_1Td = (torch.cat((x, x), dim=-1).transpose(0, 1) for x in (cos_T1R, sin_T1R))
        q_1NTd, k_1KTd = LigerRopeFunction.apply(q_1NTd, k_1KTd, cos_1Td, sin_1Td)
        return q_1NTd.transpose(1, 2)[0], k_1KTd.transpose(1, 2)[0]

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        y: Tensor = LigerSiLUMulFunction.apply(gate, up)
        return y

    return Pointwise(rms_norm, rotate, swiglu)
