"""Cross entropy of a linear head without ever holding the logits: `hidden @ weight.T` chunk by chunk.

Where gradients are wanted, each chunk of logits is turned into its own gradient in place during the forward pass
(the idea of Liger-Kernel's fused loss, arXiv 2410.10989), so one pass costs 6 N H V operations. Memory above the inputs
and the gradient of `hidden`, which has its type:

- one chunk of logits, float32, and its copy in the inputs' type where that is another (bfloat16: half as much again);
- the gradient of `weight`, [V, H] in float32, until the backward pass gives it in the weight's type, beside it for a
  moment (V = 151,936, H = 3,584: 2.2 GB and 1.1 GB);
- on a CPU, for inputs below float32, one more chunk: a product is rounded to the inputs' type before it is widened.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of the float32 logits held at a time. Large enough for a GEMM to run at full speed whatever the vocabulary
# (1,766 rows at V = 151,936 on a GPU, 110 on a CPU), small beside the activations of a pack. A chunk never depends on
# N, so neither does the peak.
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["none", "sum", "mean"] = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood of `targets` under `softmax(hidden @ weight.T)`.

    Logits are products of the inputs' type, summed in float32; CUDA keeps them so, a CPU rounds them to the inputs'
    type. Softmax, loss and the sum over rows of the weight's gradient are float32 (float64 for float64 inputs). Rows
    whose target is `ignore_index` add nothing; on a CPU they are left out of the work as well. Deterministic on a CPU
    at one thread count.

    Args:
        hidden: [N, H], float32, bfloat16, float16 or float64.
        weight: [V, H], same type.
        targets: [N] int64 in [0, V), or `ignore_index`.
        ignore_index: the target that marks a row to ignore.
        reduction: "none": [N], 0 where ignored; "sum": over the rows; "mean": sum / normalizer.
        normalizer: divisor of "mean", a host number or a 0-d tensor: the count of supervised tokens over all ranks
            and micro-steps, so that the loss does not depend on the split. None: the supervised rows of this call.

    Returns:
        Float32 (float64 for float64 inputs) scalar, or [N] for "none". No supervised row: 0, with zero gradients.

    Raises:
        ValueError: shapes, types or arguments that do not fit together.
        IndexError: a target outside [0, V) (on CUDA: a device-side assertion, as checking would stall the device).
        RuntimeError: a second backward pass through the same loss, as the first consumes the stored gradients.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [N, H] and weight [V, H] expected, not {list(hidden.shape)}, {list(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets: int64 [{hidden.shape[0]}] expected, not {targets.dtype} {list(targets.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}; both must have one type")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction {reduction!r} is not one of none, sum, mean")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"a normalizer goes with reduction='mean', not {reduction!r}")
    if reduction == "none":
        return _TokenLoss.apply(hidden, weight, targets, ignore_index)
    total = _SummedLoss.apply(hidden, weight, targets, ignore_index, torch.is_grad_enabled())
    if reduction == "sum":
        return total
    return total / ((targets != ignore_index).sum().clamp(min=1) if normalizer is None else normalizer)


class _SummedLoss(torch.autograd.Function):
    """Sum over rows; the gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, grad_enabled: bool
    ) -> Tensor:
        wants = [grad_enabled and wanted for wanted in ctx.needs_input_grad[:2]]
        nll, ctx.grad_hidden, ctx.grad_weight = _by_chunks(hidden, weight, targets, ignore_index, None, *wants)
        ctx.weight_dtype, ctx.spent = weight.dtype, False
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("linear_cross_entropy runs backward once: its gradients are scaled in place")
        grad_hidden, grad_weight = ctx.grad_hidden, ctx.grad_weight
        ctx.grad_hidden = ctx.grad_weight = None
        ctx.spent = True
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


class _TokenLoss(torch.autograd.Function):
    """Loss of each row; the backward pass computes the logits again, as rows are weighted by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.ignore_index = ignore_index
        return _by_chunks(hidden, weight, targets, ignore_index, None, False, False)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        wants = ctx.needs_input_grad[:2]
        _, grad_hidden, grad_weight = _by_chunks(hidden, weight, targets, ctx.ignore_index, grad_nll, *wants)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _by_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    row_scale: Tensor | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss of each row [N], and the gradients of their sum (of `row_scale`-weighted sum where given).

    The gradient of `hidden` has its type; that of `weight` is float32 (float64).
    """
    (n, h), v = hidden.shape, weight.shape[0]
    exact = torch.promote_types(hidden.dtype, torch.float32)
    supervised = targets != ignore_index
    rows = None  # indices of the rows to compute; None: all
    if hidden.device.type == "cpu":
        if not bool(supervised.all()):
            rows = supervised.nonzero().squeeze(1)
        wrong = supervised & ((targets < 0) | (targets >= v))
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise IndexError(f"targets[{first}] = {int(targets[first])} lies outside the vocabulary [0, {v})")
    n_rows = n if rows is None else len(rows)

    nll_N = torch.zeros(n, dtype=exact, device=hidden.device)
    # Ignored rows are never written where they are compacted out.
    grad_hidden = (torch.empty_like if rows is None else torch.zeros_like)(hidden) if want_hidden else None
    grad_weight = torch.empty(v, h, dtype=exact, device=weight.device) if want_weight else None
    if grad_weight is not None and n_rows == 0:
        grad_weight.zero_()

    chunk = max(1, LOGITS_BYTES.get(hidden.device.type, LOGITS_BYTES["cuda"]) // (v * exact.itemsize))
    buffer = torch.empty(min(chunk, n_rows), v, dtype=exact, device=hidden.device)
    for start in range(0, n_rows, chunk):
        stop = min(start + chunk, n_rows)
        at = slice(start, stop) if rows is None else rows[start:stop]
        h_CH, target_C1, kept_C1 = hidden[at], targets[at].unsqueeze(1), supervised[at].unsqueeze(1)
        if rows is None:
            target_C1 = target_C1.where(kept_C1, 0)  # an ignored row takes part, to no effect
        logits_CV = _logits(h_CH, weight, buffer[: stop - start])

        top_C1 = logits_CV.amax(1, keepdim=True)
        logits_CV.sub_(top_C1)
        target_logit_C1 = logits_CV.gather(1, target_C1)
        logits_CV.exp_()
        sum_C1 = logits_CV.sum(1, keepdim=True)
        nll_N[at] = (sum_C1.log() - target_logit_C1).where(kept_C1, 0).squeeze(1)
        if not (want_hidden or want_weight):
            continue

        scale_C1 = kept_C1.to(exact) if row_scale is None else kept_C1 * row_scale[at].unsqueeze(1)
        grad_CV = logits_CV.mul_(scale_C1 / sum_C1).scatter_add_(1, target_C1, -scale_C1)
        low_CV = grad_CV.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[at] = low_CV @ weight
        if grad_weight is not None:
            _accumulate(grad_weight, grad_CV, low_CV, h_CH, first=start == 0)
    return nll_N, grad_hidden, grad_weight


def _logits(hidden_CH: Tensor, weight_VH: Tensor, out_CV: Tensor) -> Tensor:
    """hidden @ weight.T in `out` (float32 or float64), the GEMM in the inputs' type."""
    if hidden_CH.dtype == out_CV.dtype:
        return torch.mm(hidden_CH, weight_VH.T, out=out_CV)
    if hidden_CH.is_cuda:
        return torch.mm(hidden_CH, weight_VH.T, out_dtype=out_CV.dtype, out=out_CV)
    return out_CV.copy_(hidden_CH @ weight_VH.T)


def _accumulate(total_VH: Tensor, grad_CV: Tensor, low_CV: Tensor, hidden_CH: Tensor, first: bool) -> None:
    """total (+)= grad.T @ hidden, summed in `total`'s type; the first chunk is written, as `total` is uninitialised."""
    beta = 0 if first else 1  # beta = 0 ignores what stands in `total`, NaN included
    if total_VH.dtype != hidden_CH.dtype and hidden_CH.is_cuda:
        torch.addmm(total_VH, low_CV.T, hidden_CH, out_dtype=total_VH.dtype, beta=beta, out=total_VH)
    else:  # a CPU GEMM cannot sum bfloat16 products into float32, so the factors are widened
        total_VH.addmm_(grad_CV.T, hidden_CH.to(total_VH.dtype), beta=beta)
