"""One chunk of rows in torch's own operations: for CPUs, and for float64 anywhere."""

import torch
from torch import Tensor

from .reverse_targets import ReverseRows
from .soft_targets import SoftRows

# Where soft targets have a temperature and hard ones, which have none, are mixed in, two softmaxes are held at a time:
# the second of this many parts of the chunk's rows, one after the other.
PARTS = 16


def torch_chunk(
    hidden_CH: Tensor,
    weight_VH: Tensor,
    target_C: Tensor,
    scale: Tensor,
    logits_CV: Tensor,
    *,
    soft: SoftRows | None,
    reverse: ReverseRows | None = None,
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
        soft: the rows' distributions, in place of `target_C` or mixed with it.
        reverse: the teacher's part of the reverse KL on `target_C`; then there is no threshold.
        ignore_index: target of rows that add nothing.
        threshold: rows of at most this loss stay out of the gradients if it is above 0.
        nll_C: out, the loss of each row, with `reverse` its -log p(target); 0 where ignored.
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

    want_gradient = grad_CH is not None or grad_VH is not None
    rows = None
    if soft is not None:
        scale_C1 = kept_C1 * scale.reshape(-1, 1)
        parts = PARTS if soft.temperature != 1 and soft.mixed else 1
        size = -(-len(nll_C) // parts)
        for start in range(0, len(nll_C), size):
            part = slice(start, start + size)
            given = logits_CV[part], target_C1[part], kept_C1[part], scale_C1[part], soft.at(part)
            nll_C[part] = _soft_rows(*given, want_gradient)
        if not want_gradient:
            return
        grad_CV = logits_CV
    else:
        logits_CV.sub_(logits_CV.amax(1, keepdim=True))
        target_logit_C1 = logits_CV.gather(1, target_C1)
        logits_CV.exp_()
        sum_C1 = logits_CV.sum(1, keepdim=True)
        nll_C.copy_((sum_C1.log() - target_logit_C1).where(kept_C1, 0).squeeze(1))
        if not want_gradient:
            return

        scale_C1 = kept_C1 * scale.reshape(-1, 1)
        if reverse is not None:
            scale_C1 = scale_C1 * reverse.gradient_factor(nll_C).unsqueeze(1)
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


def _soft_rows(
    logits_CV: Tensor,
    target_C1: Tensor,
    kept_C1: Tensor,
    scale_C1: Tensor,
    soft: SoftRows,
    want_gradient: bool,
) -> Tensor:
    """Return the loss of each row [C]; the logits become the gradient of sum(scale * loss) if it is wanted.

    The tail's softmax is computed without the K tokens, whose logits are made -inf for it: 1 - sum(p) would lose a
    small tail. A token of the tail has the gradient p - q_tail * (its share in the tail), which divides by no p_tail.
    Where a row has no tail, this computes what hard targets do, to the bit. "Cold" is the softmax of temperature 1
    where there is a hotter one.
    """
    t, alpha_C1 = soft.temperature, soft.alpha.unsqueeze(1)
    hot, mixed = t != 1, soft.mixed
    present_CK, has_tail_C1 = soft.ids >= 0, (soft.tail > 0).unsqueeze(1)
    # An absent entry, of probability 0, stands for one that is there.
    ids_CK = soft.ids.where(present_CK, soft.ids.amax(1, keepdim=True).clamp(min=0))
    q_CK, tail_C1 = soft.probs.where(kept_C1, 0), soft.tail.unsqueeze(1)
    scale_C1 = scale_C1.masked_fill(q_CK.isnan().any(1, keepdim=True), torch.nan)
    apart_CK = present_CK & has_tail_C1  # entries that are kept out of the rest

    logit_CK, hard_logit_C1 = logits_CV.gather(1, ids_CK), logits_CV.gather(1, target_C1)
    logits_CV.scatter_(1, ids_CK, logit_CK.masked_fill(has_tail_C1, -torch.inf))
    rest_C1 = logits_CV.amax(1, keepdim=True)
    top_C1 = torch.maximum(rest_C1, logit_CK.amax(1, keepdim=True))
    logits_CV.sub_(rest_C1.masked_fill(has_tail_C1 & (rest_C1 == -torch.inf), 0))
    below_C1, below_CK = rest_C1 - top_C1, logit_CK - top_C1

    cold_CV = logits_CV.exp() if hot and mixed else None  # of temperature 1
    if hot:
        logits_CV.div_(t)
        below_C1, below_CK = below_C1 / t, below_CK / t
    logits_CV.exp_()
    rest_sum_C1 = logits_CV.sum(1, keepdim=True)
    exp_CK, away_C1 = below_CK.exp(), below_C1.exp()
    sum_C1 = rest_sum_C1 * away_C1 + (exp_CK * apart_CK).sum(1, keepdim=True)
    log_sum_C1 = sum_C1.log()

    ce_C1 = (q_CK * (log_sum_C1 - below_CK)).masked_fill(q_CK == 0, 0).sum(1, keepdim=True)
    tail_ce_C1 = tail_C1 * (log_sum_C1 - below_C1 - rest_sum_C1.log())
    loss_C1 = ce_C1 + tail_ce_C1.where(has_tail_C1, 0) - soft.entropy.unsqueeze(1)
    cold_sum_C1, cold_exp_CK, cold_away_C1 = sum_C1, exp_CK, away_C1
    if cold_CV is not None:
        cold_exp_CK, cold_away_C1 = (logit_CK - top_C1).exp(), (rest_C1 - top_C1).exp()
        cold_sum_C1 = cold_CV.sum(1, keepdim=True) * cold_away_C1 + (cold_exp_CK * apart_CK).sum(1, keepdim=True)
    if hot or mixed:
        loss_C1 = loss_C1 * (alpha_C1 * t * t)
    if mixed:
        loss_C1 = loss_C1 + (1 - alpha_C1) * (cold_sum_C1.log() - (hard_logit_C1 - top_C1))
    nll_C = loss_C1.where(kept_C1, 0).squeeze(1)
    if not want_gradient:
        return nll_C

    # The softmax that both terms share has the factor alpha + (1 - alpha).
    q_scale_C1 = scale_C1 * (alpha_C1 * t)
    p_scale_C1 = q_scale_C1 if hot else scale_C1
    per_tail_C1 = (tail_C1 / rest_sum_C1).masked_fill(rest_sum_C1 == 0, 0)
    logits_CV.mul_(p_scale_C1 * away_C1 / sum_C1 - q_scale_C1 * per_tail_C1)
    grad_CK = p_scale_C1 * (exp_CK / sum_C1) * apart_CK - q_scale_C1 * q_CK
    if cold_CV is not None:
        cold_scale_C1 = scale_C1 * (1 - alpha_C1)
        logits_CV.add_(cold_CV.mul_(cold_scale_C1 * cold_away_C1 / cold_sum_C1))
        grad_CK += cold_scale_C1 * (cold_exp_CK / cold_sum_C1) * apart_CK
    logits_CV.scatter_add_(1, ids_CK, grad_CK)
    if mixed:
        logits_CV.scatter_add_(1, target_C1, scale_C1 * (alpha_C1 - 1))
    return nll_C
