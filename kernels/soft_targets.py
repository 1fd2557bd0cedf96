"""Distributions as targets: what the caller gives, its checks, and the same made ready for the chunks."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .rows import LossInputs

# By how much the K probabilities of a row may sum to more than 1: those of log-probabilities that were rounded to
# float16 are off by a factor of up to 1 + 2**-11 * |log p|, in the mean over a distribution by its entropy * 2**-11.
SUM_TOLERANCE = 0.01


@dataclass(frozen=True)
class SoftTargets:
    """The targets of N rows as K tokens each with their log-probabilities under a teacher; no gradient flows to them.

    A row's target distribution q has these tokens and, with the tail "bucket", one event more. With p the softmax of
    all V logits over `temperature`, the loss of a row is

        alpha * temperature**2 * KL(q || p) + (1 - alpha) * -log softmax(logits)[hard]

    KL and not cross entropy, which is KL plus the entropy of q: gradients are the same, and 0 is the least. T**2 keeps
    the gradient's size as T grows, and the hard part has a temperature of 1 (Hinton et al., arXiv 1503.02531, section
    2).

    Args:
        ids: int64 [N, K], token ids in [0, V), distinct within a row. An entry that is `ignore_index` is absent, so
            that rows of fewer than K tokens fit in.
        logprobs: floating point [N, K], natural logarithms, -inf for a probability of 0. Taken as they are: a teacher
            is asked at the same temperature. Those of absent entries are not read.
        hard: int64 [N], hard targets for the second term. Where given, they alone say which rows are ignored, and a row
            whose entries are all absent has the hard term alone, with alpha 0. None: a row whose first id is
            `ignore_index` is ignored.
        tail: what the K tokens leave of the teacher's probability. "ignore": q is renormalised over the K tokens, and
            p is not, so all other tokens are to have a probability of 0. "bucket": one event "any other token", whose
            probabilities are 1 - sum(q) and 1 - sum(p over the K tokens): how p is spread over the others is free.
        temperature: T, of the student's logits, above 0.
        alpha: share of the soft term, in (0, 1]. Below 1 `hard` is needed.
    """

    ids: Tensor
    logprobs: Tensor
    hard: Tensor | None = None
    tail: Literal["ignore", "bucket"] = "ignore"
    temperature: float = 1.0
    alpha: float = 1.0

    def check(self, n_rows: int) -> None:
        """Raise ValueError for shapes, types or options that do not fit together or with `n_rows` rows."""
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64 or len(self.ids) != n_rows or self.ids.shape[1] == 0:
            raise ValueError(f"ids: int64 [{n_rows}, K] expected, not {self.ids.dtype} {list(self.ids.shape)}")
        if self.logprobs.shape != self.ids.shape or not self.logprobs.is_floating_point():
            expected = f"floating point {list(self.ids.shape)}, as ids are,"
            raise ValueError(f"logprobs: {expected} expected, not {self.logprobs.dtype} {list(self.logprobs.shape)}")
        if self.hard is not None and (self.hard.shape != (n_rows,) or self.hard.dtype != torch.int64):
            raise ValueError(f"hard: int64 [{n_rows}] expected, not {self.hard.dtype} {list(self.hard.shape)}")
        if self.tail not in ("ignore", "bucket"):
            raise ValueError(f"tail {self.tail!r} is not one of ignore, bucket")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} is not a positive number")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} is not in (0, 1]; for hard targets alone give them as targets")
        if self.alpha < 1 and self.hard is None:
            raise ValueError(f"alpha {self.alpha} mixes in hard targets, and there are none: give `hard`")

    def row_targets(self) -> Tensor:
        """Return [N], `ignore_index` in the rows to ignore; with `hard` its targets."""
        return self.ids[:, 0] if self.hard is None else self.hard


class SoftRows(NamedTuple):
    """The distributions of a chunk's C rows, made ready; float32 (float64 for float64 inputs)."""

    ids: Tensor  # int64 [C, K], -1 where absent
    probs: Tensor  # [C, K], q; 0 where absent; NaN in a row that holds no distribution, and then in all of it
    tail: Tensor  # [C], q of all other tokens; 0: there is no such event
    entropy: Tensor  # [C], of q with the tail
    alpha: Tensor  # [C], share of the soft term
    temperature: float
    mixed: bool  # whether there is a hard term

    def at(self, part: slice) -> "SoftRows":
        """Return those of these rows."""
        return self._replace(
            ids=self.ids[part],
            probs=self.probs[part],
            tail=self.tail[part],
            entropy=self.entropy[part],
            alpha=self.alpha[part],
        )


def soft_rows(inputs: LossInputs, at: slice | Tensor) -> SoftRows | None:
    """Make the distributions of these rows ready without waiting for the device; None if the targets are hard.

    That is K numbers a row, next to V logits. Sums are float64, so that 1 - sum(q) is as exact as its terms are.
    """
    if inputs.ids is None or inputs.logprobs is None:
        return None
    vocabulary, exact = inputs.weight.shape[0], inputs.scale.dtype
    ids_CK, target_C = inputs.ids[at], inputs.targets[at]
    present_CK = ids_CK != inputs.ignore_index
    probs_CK = inputs.logprobs[at].double().masked_fill(~present_CK, -torch.inf).exp()
    total_C = probs_CK.sum(1)
    wrong_C = ~_is_distribution(total_C, inputs.tail_bucket) | _misplaced(ids_CK, present_CK, vocabulary).any(1)
    hard_C = ~present_CK.any(1)  # in an ignored row, or where `hard` is all there is
    wrong_C &= ~hard_C
    if inputs.mixed:
        wrong_C |= (target_C < 0) | (target_C >= vocabulary)
    if inputs.tail_bucket:
        # A sum above 1 is one of rounded numbers. It leaves no tail, nor do K tokens that are the whole vocabulary.
        whole_C = (total_C >= 1) | (present_CK.sum(1) >= vocabulary) | hard_C
        tail_C = (1 - total_C).masked_fill(whole_C | wrong_C, 0)
        total_C = total_C.where(whole_C, 1)
    else:
        tail_C = torch.zeros_like(total_C)
    total_C = total_C.masked_fill(hard_C, 1)
    probs_CK = (probs_CK / total_C.unsqueeze(1)).masked_fill(wrong_C.unsqueeze(1), torch.nan)
    entropy_C = -torch.xlogy(probs_CK, probs_CK).sum(1) - torch.xlogy(tail_C, tail_C)
    return SoftRows(
        ids_CK.where(present_CK & (ids_CK >= 0) & (ids_CK < vocabulary), -1).contiguous(),
        probs_CK.to(exact).contiguous(),
        tail_C.to(exact),
        entropy_C.to(exact),
        torch.full_like(entropy_C, inputs.alpha).masked_fill(hard_C, 0).to(exact),
        inputs.temperature,
        inputs.mixed,
    )


def _is_distribution(total: Tensor, tail_bucket: bool) -> Tensor:
    """Whether K probabilities may have this sum. Without a tail it is above 0; a tail may have all of it."""
    return ((total >= 0) if tail_bucket else (total > 0)) & (total <= 1 + SUM_TOLERANCE)  # NaN may not


def _misplaced(ids: Tensor, present: Tensor, vocabulary: int) -> Tensor:
    """Whether an entry lies outside the vocabulary or repeats one of its row, bool [N, K]."""
    sorted_ids, order = ids.sort(stable=True, dim=1)
    again = torch.zeros_like(present)
    again[:, 1:] = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    again = torch.zeros_like(present).scatter_(1, order, again)
    return present & (again | (ids < 0) | (ids >= vocabulary))


def check_distributions(inputs: LossInputs) -> None:
    """Raise for the first supervised row that holds no distribution, IndexError or ValueError; waits for the device."""
    if inputs.ids is None or inputs.logprobs is None:
        return
    ids, vocabulary = inputs.ids, inputs.weight.shape[0]
    kept_N = inputs.targets != inputs.ignore_index
    present = ids != inputs.ignore_index
    misplaced = _misplaced(ids, present, vocabulary) & kept_N.unsqueeze(1)
    if bool(misplaced.any()):
        row, k = misplaced.nonzero()[0].tolist()
        token = int(ids[row, k])
        if not 0 <= token < vocabulary:
            raise IndexError(f"ids[{row}, {k}] = {token} lies outside the vocabulary [0, {vocabulary})")
        raise ValueError(f"ids[{row}, {k}] = {token} is in its row already; a token is given once")
    total_N = inputs.logprobs.double().masked_fill(~present, -torch.inf).exp().sum(1)
    wrong_N = kept_N & present.any(1) & ~_is_distribution(total_N, inputs.tail_bucket)
    if bool(wrong_N.any()):
        row = int(wrong_N.nonzero()[0])
        total = float(total_N[row])
        raise ValueError(f"logprobs[{row}] are of probabilities that sum to {total:.4g}, which is not a distribution")
