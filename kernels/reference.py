"""The plainest statement of the loss, against which the fast one is tested: dense logits, torch's own operations."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .reverse_targets import ReverseTargets
from .soft_targets import SoftTargets


def dense_linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor | SoftTargets | ReverseTargets,
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
    if isinstance(targets_N, SoftTargets):
        soft, targets_N = targets_N, targets_N.row_targets()
        nll_N = soft.temperature**2 * _divergence(logits_NV / soft.temperature, soft, ignore_index)
        if soft.hard is not None:
            hard_N = F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="none")
            given_N = (soft.ids != ignore_index).any(1)
            nll_N = (soft.alpha * nll_N + (1 - soft.alpha) * hard_N).where(given_N, hard_N)
        nll_N = nll_N.where(targets_N != ignore_index, 0)
    elif isinstance(targets_N, ReverseTargets):
        reverse, targets_N = targets_N, targets_N.tokens
        hard_N = F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="none")
        estimate_N = (-hard_N - reverse.logprobs.nan_to_num()).detach()
        # Of this value, and with the gradient of estimate * log p.
        divergence_N = estimate_N - estimate_N * (hard_N - hard_N.detach())
        mixed_N = reverse.alpha * divergence_N + (1 - reverse.alpha) * hard_N
        nll_N = mixed_N.where(~reverse.logprobs.isnan(), hard_N).where(targets_N != ignore_index, 0)
        nll_N = nll_N.to(logits_NV.dtype)
    else:
        nll_N = F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return nll_N
    if reduction == "sum":
        return nll_N.sum()
    if normalizer is None:
        normalizer = (targets_N != ignore_index).sum().clamp(min=1)
    return nll_N.sum() / normalizer


def _divergence(logits_NV: Tensor, soft: SoftTargets, ignore_index: int) -> Tensor:
    """KL(q || softmax of the logits) of each row [N], over the K tokens and the bucket of all others."""
    given_NK = soft.ids != ignore_index
    # One column more, for absent entries: no row has it.
    ids_NK = soft.ids.where(given_NK, logits_NV.shape[1])
    log_p_NV = F.pad(logits_NV.log_softmax(1), (0, 1), value=-torch.inf)
    q_NK = soft.logprobs.double().masked_fill(~given_NK, -torch.inf).exp()
    sum_N1 = q_NK.sum(1, keepdim=True)
    whole_N1 = (sum_N1 >= 1) | (given_NK.sum(1, keepdim=True) == logits_NV.shape[1])
    if soft.tail == "ignore":
        whole_N1 = torch.ones_like(whole_N1)
    q_NK = q_NK / sum_N1.where(whole_N1, 1)
    tail_N = (1 - sum_N1).where(~whole_N1, 0).squeeze(1)
    taken_NV = torch.zeros_like(log_p_NV, dtype=torch.bool).scatter_(1, ids_NK, True)
    taken_NV[:, -1] = False
    # Not -inf, as the logarithm of a sum over nothing has no gradient.
    log_p_tail_N = log_p_NV.masked_fill(taken_NV, -1e30).logsumexp(1)
    terms_NK = torch.xlogy(q_NK, q_NK) - q_NK * log_p_NV.gather(1, ids_NK).where(q_NK > 0, 0)
    tail_terms_N = torch.xlogy(tail_N, tail_N) - tail_N * log_p_tail_N.where(tail_N > 0, 0)
    return (terms_NK.sum(1) + tail_terms_N).to(logits_NV.dtype)
