"""Cross entropy of a linear head without ever holding the logits: `hidden @ weight.T` chunk by chunk.

Where gradients are wanted, each chunk of logits is turned into its own gradient in place during the forward pass
(the idea of Liger-Kernel's fused loss, arXiv 2410.10989), so one pass costs 6 N H V operations. `chunks.py` has the
chunks, the memory they take and what happens in each.
"""

import inspect
import math
import os
import typing
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunks
from .reverse_targets import ReverseTargets, add_estimate, check_logprobs, reverse_rows
from .rows import LossInputs
from .soft_targets import SoftTargets, check_distributions

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | SoftTargets | ReverseTargets,
    *,
    ignore_index: int = -100,
    reduction: Literal["none", "sum", "mean"] = "mean",
    normalizer: float | Tensor | None = None,
    n_supervised: int | None = None,
    token_weights: Tensor | None = None,
    row_filter: float = 0.0,
) -> Tensor:
    """Compute the negative log-likelihood of `targets` under `softmax(hidden @ weight.T)`.

    Soft targets are distributions over the vocabulary, and the loss is the KL divergence from them; `SoftTargets` has
    its definition. Hard targets are those of one token of probability 1, and give the same bits. `ReverseTargets` are
    for a student's own samples: an estimate of the divergence from the student to the teacher, and its policy gradient.

    Logits are products of the inputs' type, summed in float32 and rounded to the inputs' type, as a dense head rounds
    them. Softmax, loss and the sum over rows of the weight's gradient are float32 (float64 for float64 inputs). The
    same bits come out twice (on a CPU: at one thread count; on CUDA: on one stream, as cuBLAS promises).

    Rows whose target is `ignore_index` cost nothing: they are left out of every product. On CUDA only where
    `n_supervised` says how many stay, as asking the device would stall it; without it they add nothing and cost as
    much as others.

    Args:
        hidden: [N, H], bfloat16, float32 or float64.
        weight: [V, H], same type.
        targets: [N] int64 in [0, V), or `ignore_index`; or the `SoftTargets` or `ReverseTargets` of N rows.
        ignore_index: the target that marks a row to ignore.
        reduction: "none": [N], 0 where ignored; "sum": over the rows; "mean": sum / normalizer.
        normalizer: divisor of "mean", a host number (not 0) or a 0-d tensor: the count of supervised tokens over all
            ranks and micro-steps, so that the loss does not depend on the split. None: the supervised rows of this
            call.
        n_supervised: how many targets are not `ignore_index`, a host integer, which packing knows. A wrong one is an
            error on a CPU and makes loss and gradients NaN on CUDA.
        token_weights: [N] float32 or float64, factor of each row's loss in "sum" and "mean"; no gradient flows to it.
        row_filter: leave out of the backward products each row in whose gradient, softmax - onehot, no entry exceeds
            this, which is to say whose target has a probability of at least 1 - row_filter. The loss is exact. A row
            left out takes an error of at most row_filter * (|weight[target]| + max |weight[j]|) * its factor to its
            gradient of `hidden`, and a matrix of rank one and of Frobenius norm at most
            sqrt(2) * row_filter * |hidden[row]| * its factor out of the gradient of `weight`. 0: exact. Refused
            with soft targets: of their loss Pinsker's inequality (no entry above sqrt(KL / 2)) is all that bounds a
            row's gradient, and the KL of 2e-6 that a row_filter of 1e-3 would ask for is hardly more than what float32
            rounds an entropy by. Refused with reverse targets, whose factor the teacher decides.

    Returns:
        Float32 (float64 for float64 inputs) scalar, or [N] for "none". No supervised row: 0, with zero gradients.

    Raises:
        ValueError: shapes, types or arguments that do not fit together; on a CPU, and on CUDA with MICOTA_DEBUG=1, a
            wrong `n_supervised`, and a row of soft targets that is no distribution: with a token twice, with
            NaN, or of probabilities that sum to more than 1 by more than rounding to float16 can do; or a
            log-probability of reverse targets that is infinite or above 0 by more than rounding.
        IndexError: a target outside [0, V). On CUDA the loss is NaN instead, of such a row as well, as checking would
            stall the device; MICOTA_DEBUG=1 in the environment makes it check, and raise, there too.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"hidden [N, H] and weight [V, H] expected, not {list(hidden.shape)}, {list(weight.shape)}")
    soft = targets if isinstance(targets, SoftTargets) else None
    if soft is not None:
        soft.check(hidden.shape[0])
        targets = soft.row_targets()
    reverse = targets if isinstance(targets, ReverseTargets) else None
    if reverse is not None:
        reverse.check(hidden.shape[0])
        targets = reverse.tokens
        if reverse.estimate is not None and reduction == "none":
            raise ValueError("an estimate goes with reduction 'sum' or 'mean'")
    assert isinstance(targets, Tensor)
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets: int64 [{hidden.shape[0]}] expected, not {targets.dtype} {list(targets.shape)}")
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(f"hidden is {hidden.dtype} and weight is {weight.dtype}; both must have one type of {DTYPES}")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction {reduction!r} is not one of none, sum, mean")
    if n_supervised is not None and not 0 <= n_supervised <= targets.shape[0]:
        raise ValueError(f"n_supervised {n_supervised} of {targets.shape[0]} targets")
    if normalizer is not None and reduction != "mean":
        raise ValueError(f"a normalizer goes with reduction='mean', not {reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.ndim > 0:
            raise ValueError(f"normalizer: a number or a 0-d tensor expected, not {list(normalizer.shape)}")
    elif normalizer == 0:
        raise ValueError("the normalizer is 0")
    if token_weights is not None and (reduction == "none" or token_weights.shape != targets.shape):
        raise ValueError("token_weights: [N] with reduction 'sum' or 'mean' expected; multiply what 'none' returns")
    if not 0 <= row_filter < 1:
        raise ValueError(f"row_filter {row_filter} is not in [0, 1)")
    if soft is not None and row_filter > 0:
        raise ValueError(f"row_filter {row_filter} with soft targets, whose loss does not bound their gradient: use 0")
    if reverse is not None and row_filter > 0:
        raise ValueError(
            f"row_filter {row_filter} with reverse targets, whose loss does not bound their gradient: use 0"
        )

    threshold = -math.log1p(-row_filter)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    scale = torch.ones((), dtype=exact, device=hidden.device) if token_weights is None else token_weights.to(exact)
    inputs = LossInputs(hidden, weight, targets, scale, ignore_index, n_supervised, threshold, False, False)
    if soft is not None:
        inputs = inputs._replace(
            ids=soft.ids,
            logprobs=soft.logprobs.detach(),
            tail_bucket=soft.tail == "bucket",
            temperature=soft.temperature,
            alpha=soft.alpha,
            mixed=soft.hard is not None,
        )
    if reverse is not None:
        inputs = inputs._replace(token_logprobs=reverse.logprobs.detach(), alpha=reverse.alpha)
    if reduction == "none":
        return _TokenLoss.apply(*inputs)
    if reduction == "mean":
        scale = scale / ((targets != ignore_index).sum().clamp(min=1) if normalizer is None else normalizer)
    scale = scale.detach().to(exact)  # a normalizer of another type must not change that of the loss
    recording = torch.is_grad_enabled()
    inputs = inputs._replace(
        scale=scale,
        want_hidden=recording and hidden.requires_grad,
        want_weight=recording and weight.requires_grad,
    )
    return _SummedLoss.apply(None if reverse is None else reverse.estimate, *inputs)


class _SummedLoss(torch.autograd.Function):
    """Sum over rows of scale * loss; the gradients are made in the forward pass and passed on in the backward pass."""

    @staticmethod
    def forward(ctx: Any, estimate: Tensor | None, *arguments: Any) -> Tensor:
        inputs = LossInputs(*arguments)
        nll_N, valid, grad_hidden, grad_weight = _by_chunks(*inputs)
        if (reverse := reverse_rows(inputs)) is not None:
            if estimate is not None:
                add_estimate(reverse, nll_N, estimate)
            nll_N = reverse.loss(nll_N)
        ctx.save_for_backward(valid, grad_hidden, grad_weight)
        ctx.wants = inputs.want_hidden, inputs.want_weight
        return (nll_N * inputs.scale).sum() * valid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        valid, *gradients = ctx.saved_tensors
        factor = grad_loss * valid
        passed = (_times(g, factor) if want else None for g, want in zip(gradients, ctx.wants, strict=True))
        return None, *passed, *_NO_MORE


def _times(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return gradient * factor; a factor of 1, as in training, costs no pass over the gradient and no wait.

    On CUDA a kernel looks at the factor, and works in place: only `retain_graph` has the gradient read again. A CPU
    looks itself, and returns the gradient as it is.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling and chunks.takes_triton(gradient.device.type, gradient.dtype):
        if not _graph_is_kept():
            from .in_place import multiply_in_place  # without a GPU there need be no Triton

            return multiply_in_place(gradient, factor)
    elif not compiling and factor.device.type == "cpu" and bool(factor == 1):
        return gradient
    # On CUDA a 0-d factor would be rounded to the gradient's type.
    factor = factor if factor.device.type == "cpu" else factor.reshape(1, 1)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient))


def _graph_is_kept() -> bool:
    """Return whether the running backward pass keeps its graph, so that saved gradients may be read again.

    The function asked is private to torch, whose AOTAutograd depends on it as well (donated buffers). A torch without
    it gets True: the gradients are then copied, which costs memory of their size and is right either way.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


class _TokenLoss(torch.autograd.Function):
    """Loss of each row; the backward pass computes the logits again, as rows are weighted by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs = LossInputs(*arguments)
        kept = inputs.hidden, inputs.weight, inputs.targets, inputs.ids, inputs.logprobs, inputs.token_logprobs
        ctx.save_for_backward(*kept)
        names = ("ignore_index", "n_supervised", "threshold", "tail_bucket", "temperature", "alpha", "mixed")
        ctx.options = {name: getattr(inputs, name) for name in names}
        nll_N, valid, _, _ = _by_chunks(*inputs)
        reverse = reverse_rows(inputs)
        return (nll_N if reverse is None else reverse.loss(nll_N)) * valid

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, ids, logprobs, token_logprobs = ctx.saved_tensors
        want_hidden, want_weight = wants = ctx.needs_input_grad[:2]
        inputs = LossInputs(
            hidden,
            weight,
            targets,
            grad_nll_N,
            want_hidden=want_hidden,
            want_weight=want_weight,
            ids=ids,
            logprobs=logprobs,
            token_logprobs=token_logprobs,
            **ctx.options,
        )
        _, valid, *gradients = _by_chunks(*inputs)
        return *(_times(g, valid) if want else None for g, want in zip(gradients, wants, strict=True)), *_NO_MORE


_NO_MORE = [None] * (len(LossInputs._fields) - 2)  # gradients of all inputs but `hidden` and `weight`


def _operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss of each row [N] and the gradients of sum(scale * loss), as one operator for compilers.

    With `token_logprobs` the first result is the -log p(target) of each row, of which `ReverseRows.loss` is the loss.

    Args:
        arguments: the fields of `LossInputs`.

    Returns:
        nll_N (0 where ignored); 1, or NaN if the targets contradict `n_supervised` (0-d, of the type of `scale`); the
        gradients of `hidden` and of `weight`, of their types and contiguous, and empty if not wanted.
    """
    inputs = LossInputs(*arguments)
    on_cpu = inputs.targets.device.type == "cpu"
    if on_cpu or os.environ.get("MICOTA_DEBUG") == "1":
        check_distributions(inputs)
        check_logprobs(inputs)
        count = _checked(inputs.targets, inputs.weight.shape[0], inputs.ignore_index, inputs.n_supervised)
        inputs = inputs._replace(n_supervised=count) if on_cpu else inputs
    # Triton launches on the current device, which need not be that of the inputs; autocast would change some products.
    with torch.cuda.device_of(inputs.hidden), torch.autocast(inputs.hidden.device.type, enabled=False):
        return chunks.run(inputs)


# torch takes an operator's schema from the annotations of its function: those of LossInputs.
_signature = inspect.signature(LossInputs).replace(return_annotation=typing.get_type_hints(_operator)["return"])
_operator.__signature__ = _signature  # type: ignore[attr-defined]
_by_chunks = torch.library.custom_op("micota::linear_cross_entropy", _operator, mutates_args=())


@_by_chunks.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = LossInputs(*arguments)
    return (
        inputs.scale.new_empty(inputs.targets.shape),
        inputs.scale.new_empty(()),
        inputs.hidden.new_empty(inputs.hidden.shape if inputs.want_hidden else 0),
        inputs.weight.new_empty(inputs.weight.shape if inputs.want_weight else 0),
    )


def _checked(targets: Tensor, vocabulary: int, ignore_index: int, n_supervised: int | None) -> int:
    """The number of supervised targets, each of which lies in the vocabulary."""
    supervised = targets != ignore_index
    wrong = supervised & ((targets < 0) | (targets >= vocabulary))
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise IndexError(f"targets[{first}] = {int(targets[first])} lies outside the vocabulary [0, {vocabulary})")
    count = int(supervised.sum())
    if n_supervised not in (None, count):
        raise ValueError(f"n_supervised is {n_supervised}, and {count} targets differ from ignore_index {ignore_index}")
    return count
