"""Reverse KL as a policy gradient on a student's own samples: what the caller gives, its checks, and factors of rows.

With p the student, q the teacher and y ~ p, the divergence at one place is KL(p || q) = E[log p(y) - log q(y)]. As
E[grad log p(y)] = 0, its gradient is

    grad KL(p || q) = E[(log p(y) - log q(y)) grad log p(y)],

the score function's with the advantage A = log q(y) - log p(y), through which no gradient flows. One sample y gives the
estimate log p(y) - log q(y) of the divergence and, as the gradient of log p(y) by the logits is onehot(y) - p, that of
their gradient (log p(y) - log q(y)) * (onehot(y) - p) = A * (p - onehot(y)): cross entropy's times A. So a row costs
what a hard target does. (arXiv 2306.08543, section 2.2, has the policy gradient of the reverse KL over whole answers,
where A also has the sum over later places; arXiv 2306.13649 trains on the student's own samples place by place.)
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import LossInputs

LOGPROB_TOLERANCE = 0.01  # by how much a log-probability may exceed 0, by rounding


@dataclass(frozen=True)
class ReverseTargets:
    """The tokens of a student's own samples, with their log-probabilities under a teacher; no gradient flows to them.

    With p = softmax(logits), not softened, and q the teacher's distribution, the loss of a row is

        alpha * (log p(token) - log q(token)) + (1 - alpha) * -log p(token)

    and its gradient that of

        alpha * (the same difference as a constant) * log p(token) + (1 - alpha) * -log p(token),

    which is not the gradient of that number; the head of this file derives it. It is the divergence's on samples of
    this student alone: on another's text the rows have no such meaning.

    Args:
        tokens: int64 [N], in [0, V); `ignore_index` marks a row to ignore.
        logprobs: floating point [N], natural logarithms of temperature 1, finite. NaN: the teacher has not scored this
            token, whose loss is the cross entropy alone.
        alpha: share of the divergence, in (0, 1].
        estimate: float32 or float64 [2], or None. To it are added the sum of log p(token) - log q(token) over the
            scored rows that are not ignored, unweighted, and the number of these rows; not with reduction "none".
    """

    tokens: Tensor
    logprobs: Tensor
    alpha: float = 1.0
    estimate: Tensor | None = None

    def check(self, n_rows: int) -> None:
        """Raise ValueError for shapes, types or options that do not fit together or with `n_rows` rows."""
        if self.tokens.shape != (n_rows,) or self.tokens.dtype != torch.int64:
            raise ValueError(f"tokens: int64 [{n_rows}] expected, not {self.tokens.dtype} {list(self.tokens.shape)}")
        if self.logprobs.shape != (n_rows,) or not self.logprobs.is_floating_point():
            found = f"{self.logprobs.dtype} {list(self.logprobs.shape)}"
            raise ValueError(f"logprobs: floating point [{n_rows}] expected, not {found}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} is not in (0, 1]; for hard targets alone give them as targets")
        if self.estimate is not None and self.estimate.shape != (2,):
            raise ValueError(f"estimate: [2] expected, not {list(self.estimate.shape)}")


class ReverseRows(NamedTuple):
    """The teacher's part of some rows; float32 (float64 for float64 inputs)."""

    logprobs: Tensor  # [C], of the rows' tokens; NaN where the teacher cannot have said it
    alpha: Tensor  # [C], share of the divergence; 0 in rows that are not scored or are ignored

    def loss(self, nll_C: Tensor) -> Tensor:
        """Return the loss of each row [C] with this -log p(token)."""
        mixed_C = self.alpha * (-nll_C - self.logprobs) + (1 - self.alpha) * nll_C
        return mixed_C.where(self.alpha != 0, nll_C)

    def gradient_factor(self, nll_C: Tensor) -> Tensor:
        """Return what each row's gradient is of that of -log p(token), [C]."""
        factor_C = self.alpha * (nll_C + self.logprobs) + (1 - self.alpha)
        return factor_C.where(self.alpha != 0, 1)


def reverse_rows(inputs: LossInputs, at: slice | Tensor = slice(None)) -> ReverseRows | None:
    """Make the teacher's part of these rows ready without waiting for the device; None if the loss is another."""
    if inputs.token_logprobs is None:
        return None
    exact = inputs.scale.dtype
    logprobs_C = inputs.token_logprobs[at].to(exact)
    scored_C = ~logprobs_C.isnan() & (inputs.targets[at] != inputs.ignore_index)
    alpha_C = torch.full_like(logprobs_C, inputs.alpha).masked_fill(~scored_C, 0)
    return ReverseRows(logprobs_C.masked_fill(_impossible(logprobs_C), torch.nan).contiguous(), alpha_C)


def add_estimate(rows: ReverseRows, nll_N: Tensor, estimate: Tensor) -> None:
    """Add the sum of log p(token) - log q(token) over scored rows and their number to `estimate` [2], in place."""
    scored_N = rows.alpha != 0
    estimate += torch.stack([(-nll_N - rows.logprobs).where(scored_N, 0).sum(), scored_N.sum()])


def check_logprobs(inputs: LossInputs) -> None:
    """Raise ValueError for the first row whose log-probability cannot be one; waits for the device."""
    if inputs.token_logprobs is None:
        return
    wrong_N = _impossible(inputs.token_logprobs) & (inputs.targets != inputs.ignore_index)
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0])
        value = float(inputs.token_logprobs[row])
        raise ValueError(f"logprobs[{row}] is {value:.4g}; a finite number of at most 0 expected, or NaN for none")


def _impossible(logprobs: Tensor) -> Tensor:
    return (logprobs > LOGPROB_TOLERANCE) | (logprobs == -torch.inf)
