"""One chunk of rows in torch's own operations: for CPUs, and for float64 anywhere."""

import torch
from torch import Tensor


def torch_chunk(
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
    """Compute the loss of each row, and the gradients of sum(scale * loss).

    Args:
        hidden_CH, weight_VH, target_C: of these rows.
        scale: factor of each row [C], or of all (0-d).
        logits_CV: to be overwritten; float32, or float64 for float64 inputs.
        ignore_index: target of rows that add nothing.
        threshold: rows of at most this loss stay out of the gradients if it is above 0.
        nll_C: out, the loss of each row, 0 where ignored.
        grad_CH: out, if wanted; rows below the threshold stay as they are.
        grad_VH: written by the first chunk, added to by the others, if wanted; the type of `logits_CV`.
        first: whether this is the first chunk.
    """
    target_C1, kept_C1 = target_C.unsqueeze(1), (target_C != ignore_index).unsqueeze(1)
    target_C1 = target_C1.where(kept_C1, 0)  # an ignored row takes part, to no effect
    exact = logits_CV.dtype
    if hidden_CH.dtype == exact:
        torch.mm(hidden_CH, weight_VH.T, out=logits_CV)
    else:
        logits_CV.copy_(hidden_CH @ weight_VH.T)

    logits_CV.sub_(logits_CV.amax(1, keepdim=True))
    target_logit_C1 = logits_CV.gather(1, target_C1)
    logits_CV.exp_()
    sum_C1 = logits_CV.sum(1, keepdim=True)
    nll_C.copy_((sum_C1.log() - target_logit_C1).where(kept_C1, 0).squeeze(1))
    if grad_CH is None and grad_VH is None:
        return

    scale_C1 = kept_C1 * scale.reshape(-1, 1)
    rows = None
    if threshold > 0:
        passed_C = ~(nll_C <= threshold)  # NaN passes
        if hidden_CH.is_cuda:  # which rows they are only the device knows: they are computed, as zeros
            scale_C1 = scale_C1 * passed_C.unsqueeze(1)
        else:
            rows = passed_C.nonzero().squeeze(1)
            hidden_CH, logits_CV = hidden_CH[rows], logits_CV[rows]
            target_C1, scale_C1, sum_C1 = target_C1[rows], scale_C1[rows], sum_C1[rows]
    grad_CV = logits_CV.mul_(scale_C1 / sum_C1).scatter_add_(1, target_C1, -scale_C1)
    if grad_CH is not None:
        grad_CH[slice(None) if rows is None else rows] = grad_CV.to(hidden_CH.dtype) @ weight_VH
    if grad_VH is not None:
        # A CPU cannot sum products of bfloat16 in float32, so that factor is widened. What stands in `grad_VH` before
        # the first chunk, NaN perhaps, beta = 0 leaves unread.
        grad_VH.addmm_(grad_CV.T, hidden_CH.to(exact), beta=0 if first else 1)
