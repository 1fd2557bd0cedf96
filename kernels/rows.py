"""What the parts of the loss share: its inputs, and the selection of rows."""

from typing import NamedTuple

import torch
from torch import Tensor


class LossInputs(NamedTuple):
    """The arguments of one evaluation of the loss, listed here alone: operator, autograd and chunks pass them on.

    N rows, H channels, V columns; see `linear_cross_entropy` for the meaning of the public ones.
    """

    hidden: Tensor  # [N, H], bfloat16, float32 or float64
    weight: Tensor  # [V, H], same type
    targets: Tensor  # int64 [N]
    scale: Tensor  # factor of each row's loss [N], or of all (0-d); float32 (float64 for float64 inputs)
    ignore_index: int
    n_supervised: int | None  # how many targets are not `ignore_index`; None: unknown
    threshold: float  # rows of at most this loss stay out of the gradients; 0: every row counts
    want_hidden: bool  # whether to make the gradient of `hidden`
    want_weight: bool  # whether to make the gradient of `weight`
    # Of soft targets alone, see `SoftTargets`; `targets` then says which rows are ignored, and has the hard targets.
    ids: Tensor | None = None  # int64 [N, K]
    logprobs: Tensor | None = None  # floating point [N, K]
    tail_bucket: bool = False  # whether the tokens outside the K are one event
    temperature: float = 1.0
    alpha: float = 1.0  # share of the soft term
    mixed: bool = False  # whether `targets` are hard targets, those of rows without a token alone
    # Of the reverse KL alone, see `ReverseTargets`, with `alpha`.
    token_logprobs: Tensor | None = None  # floating point [N], of `targets` under the teacher; NaN: not scored


def kept_rows(kept_N: Tensor, size: int) -> Tensor:
    """Return the indices at which `kept_N` is true, in order, int64 [size], without waiting for the device.

    If there are more than `size`, the last are left out; if there are fewer, zeros follow.
    """
    # All others share one extra slot, which is then dropped.
    slot_N = (kept_N.cumsum(0) - 1).where(kept_N, size).clamp(max=size)
    rows = kept_N.new_zeros(size + 1, dtype=torch.int64)
    return rows.scatter_(0, slot_N, torch.arange(len(kept_N), device=kept_N.device))[:size]
