"""The plainest statement of the loss, against which the fast one is tested: dense logits, torch's own cross entropy."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["none", "sum", "mean"] = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Compute what `linear_cross_entropy` does; keeps all N x V logits, softmax in float32 (float64 stays float64).

    Give it float64 inputs for a reference of full precision.
    """
    logits_NV = hidden_NH @ weight_VH.T
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    nll_N = F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return nll_N
    if reduction == "sum":
        return nll_N.sum()
    if normalizer is None:
        normalizer = (targets_N != ignore_index).sum().clamp(min=1)
    return nll_N.sum() / normalizer
