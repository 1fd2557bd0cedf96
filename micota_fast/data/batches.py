"""Packs of documents as training batches, and which rank sees which pack in which step.

Each epoch shuffles the documents by (seed, epoch) and packs them again: documents of equal length trade places, and the
order of the packs is shuffled as well. The number of packs depends only on the lengths (see `packing.pack`), so every
epoch has the same number of steps, and any step can be made from its number: resuming needs nothing else. A step has
the same documents for any number of ranks; that number decides only who runs which pack (see `load_balancing`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from micota_fast.data.load_balancing import assign_packs, idle_share, pack_costs
from micota_fast.data.packing import efficiency, pack
from micota_fast.data.tokenise import Documents
from micota_fast.errors import InputError

IGNORE_INDEX = -100  # target of a position without loss; the default of linear_cross_entropy and of torch


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B documents, end to end, T tokens in all; tokens of different documents must not see each other.

    All tensors are on the CPU and the rest are Python integers, so reading a batch never waits for a device.
    """

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], from 0 in each document
    cu_seqlens: torch.Tensor  # int32 [B+1], where each document begins, and T
    lengths: tuple[int, ...]  # tokens of each document, [B]
    targets: torch.Tensor  # int64 [T]: the next token if it is supervised and of the same document, else -100
    token_weights: torch.Tensor | None  # float32 [T], factor of each target's loss; None: Documents has no weights
    n_supervised: int  # targets that are not -100
    # The teacher's K likeliest tokens at each target, -100 where absent; None: training does not read them.
    top_ids: torch.Tensor | None  # int32 [T, K]
    top_logprobs: torch.Tensor | None  # float16 [T, K]
    # Of each target under the teacher, NaN where it has none; None: training does not read them.
    token_logprobs: torch.Tensor | None  # float32 [T]
    doc_ids: tuple[int, ...]  # index in Documents of each, [B]


def packed_batch(documents: Documents, doc_ids: NDArray[np.int64]) -> PackedBatch:
    """Lay documents end to end, in the order given."""
    lengths_B = documents.lengths[doc_ids]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths_B)])
    position_T = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths_B)
    source_T = position_T + np.repeat(documents.offsets[doc_ids], lengths_B)
    input_ids_T = documents.input_ids[source_T].astype(np.int64)
    targets_T = np.full_like(input_ids_T, IGNORE_INDEX)
    targets_T[:-1] = np.where(documents.supervised[source_T[1:]], input_ids_T[1:], IGNORE_INDEX)
    targets_T[cu_seqlens[1:] - 1] = IGNORE_INDEX  # a document's last token has nothing to predict
    weights_D = documents.weights
    top_ids_TK, top_logprobs_TK, token_logprobs_T = _scores(documents, doc_ids, cu_seqlens)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids_T),
        position_ids=torch.from_numpy(position_T),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        lengths=tuple(lengths_B.tolist()),
        targets=torch.from_numpy(targets_T),
        token_weights=None if weights_D is None else torch.from_numpy(np.repeat(weights_D[doc_ids], lengths_B)),
        n_supervised=int(documents.n_targets[doc_ids].sum()),
        top_ids=top_ids_TK,
        top_logprobs=top_logprobs_TK,
        token_logprobs=token_logprobs_T,
        doc_ids=tuple(doc_ids.tolist()),
    )


def _scores(
    documents: Documents, doc_ids: NDArray[np.int64], cu_seqlens: NDArray[np.int64]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What training reads of the teacher's rows of these documents, at the positions of the targets, from the map."""
    scores = documents.scores
    if scores is None:
        return None, None, None
    if scores.own_tokens:
        own_T = np.full(int(cu_seqlens[-1]), np.nan, np.float32)
        for d, begin in zip(doc_ids.tolist(), cu_seqlens.tolist(), strict=False):
            at, rows = scores.rows_of(d, int(documents.lengths[d]))
            own_T[begin + at.start : begin + at.stop] = rows.token_logprobs_T
        return None, None, torch.from_numpy(own_T)
    shape = int(cu_seqlens[-1]), scores.top_k
    ids_TK, logprobs_TK = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float16)
    for d, begin in zip(doc_ids.tolist(), cu_seqlens.tolist(), strict=False):
        at, rows = scores.rows_of(d, int(documents.lengths[d]))
        ids_TK[begin + at.start : begin + at.stop] = rows.top_ids_TK
        logprobs_TK[begin + at.start : begin + at.stop] = rows.top_logprobs_TK
    ids_TK[(ids_TK < 0) | (ids_TK >= scores.vocab_size)] = IGNORE_INDEX  # absent, or unknown to the student
    return torch.from_numpy(ids_TK), torch.from_numpy(logprobs_TK), None


class Step(NamedTuple):
    """What one rank needs for an optimizer step; all but `batches` is the same on every rank."""

    batches: list[PackedBatch]  # this rank's, one a micro-step; it may have none in the last micro-step
    normalizer: int | float  # of the summed loss, over all ranks: targets times their weights; int if there are none
    n_supervised: int  # targets of the step, over all ranks
    n_tokens: int  # tokens of the step, over all ranks


class _Plan(NamedTuple):
    """Of an epoch with P packs of D documents."""

    doc_ids: NDArray[np.int64]  # [D], pack after pack
    pack_offsets: NDArray[np.int64]  # [P+1], where each pack begins in them
    turn: NDArray[np.int64]  # [P], packs in order of use
    costs: NDArray[np.float64]  # [P], of each pack, in that order


class PackedSteps:
    """Optimizer steps over packed documents, by step number.

    A step takes the next `packs_per_step` packs of its epoch and assigns them to the ranks so that they wait for one
    another as little as possible. The last step of an epoch has what is left, so every document is seen once per epoch.
    In that step (or if packs_per_step is not a multiple of world) some ranks have no pack in the last micro-step.
    With one pack per rank there is nothing to choose; the more packs a rank has in a step, the less it waits.

    Args:
        documents: what to train on; equal on all ranks.
        pack_tokens: tokens a pack holds at most.
        packs_per_step: packs in a step, over all ranks.
        rank, world: this process among how many.
        seed: of the shuffles.
        parity_tokens: length of the document whose attention costs the model what its matrix products do
            (`load_balancing.attention_parity`); infinite: work is counted in tokens alone.

    Attributes:
        pack_tokens: tokens a pack holds at most, no more than there are.
        n_packs, steps_per_epoch: in each epoch.
        efficiency: share of the packs' tokens that documents fill, 0 to 1.
        idle_share: share of the ranks' time spent waiting for the slowest in the first epoch, 0 to 1, by the model's
            FLOPs; other epochs differ from it only as their shuffles do.

    Raises:
        InputError: a document is longer than a pack, or packs_per_step is less than 1.
    """

    def __init__(
        self,
        documents: Documents,
        pack_tokens: int,
        packs_per_step: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        parity_tokens: float = math.inf,
    ) -> None:
        if packs_per_step < 1:
            raise InputError(f"packs_per_step must be at least 1, not {packs_per_step}")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world}")
        self._documents = documents
        self.pack_tokens = min(pack_tokens, int(documents.lengths.sum()))
        self._packs_per_step = packs_per_step
        self._rank, self._world, self._seed, self._parity_tokens = rank, world, seed, parity_tokens
        self._planned, self._epoch = self._plan(0), 0
        self.n_packs = len(self._planned.turn)
        self.steps_per_epoch = math.ceil(self.n_packs / packs_per_step)
        self.efficiency = efficiency(documents.lengths, self.n_packs, self.pack_tokens)
        self.idle_share = idle_share(self._planned.costs, packs_per_step, world)

    def total_steps(self, epochs: float) -> int:
        """Count the steps of some epochs; of 2.5, the third takes the first half of its packs, up to a whole step."""
        if not epochs > 0:
            raise InputError(f"epochs must be more than 0, not {epochs}")
        whole = math.floor(epochs)
        rest = math.ceil(round((epochs - whole) * self.n_packs, 6))  # 2.1 - 2 is a little more than 0.1
        return whole * self.steps_per_epoch + math.ceil(rest / self._packs_per_step)

    def step(self, index: int) -> Step:
        """Return the step with a number, counted over all epochs from 0."""
        packs, costs = self._packs_of_step(index)
        assigned_M = assign_packs(costs, self._world)[:, self._rank]
        documents = np.concatenate(packs)
        return Step(
            [packed_batch(self._documents, packs[p]) for p in assigned_M[assigned_M >= 0]],
            self._documents.weighted_targets[documents].sum().item(),
            int(self._documents.n_targets[documents].sum()),
            int(self._documents.lengths[documents].sum()),
        )

    def documents(self, index: int) -> NDArray[np.int64]:
        """Return the indices in Documents of all a step trains on over all ranks, in one order for every world size."""
        return np.concatenate(self._packs_of_step(index)[0])

    def micro_steps(self, index: int) -> int:
        """Return the most batches that any rank has in this step: how often every rank must join in collectives."""
        return math.ceil(len(self._packs_of_step(index)[0]) / self._world)

    def _packs_of_step(self, index: int) -> tuple[list[NDArray[np.int64]], NDArray[np.float64]]:
        """Document ids of each pack over all ranks, and the packs' costs, in order of use."""
        if index < 0:
            raise IndexError(f"step {index}")
        epoch, in_epoch = divmod(index, self.steps_per_epoch)
        if epoch != self._epoch:
            self._planned, self._epoch = self._plan(epoch), epoch
        doc_ids, pack_offsets, turn, costs = self._planned
        step = slice(in_epoch * self._packs_per_step, (in_epoch + 1) * self._packs_per_step)
        return [doc_ids[pack_offsets[p] : pack_offsets[p + 1]] for p in turn[step]], costs[step]

    def _plan(self, epoch: int) -> _Plan:
        bits = np.random.PCG64([self._seed, epoch])
        shuffled = _permutation(bits, len(self._documents))
        order, pack_offsets = pack(self._documents.lengths[shuffled], self.pack_tokens)
        doc_ids = shuffled[order]
        costs = pack_costs(self._documents.lengths[doc_ids], pack_offsets, self._parity_tokens)
        turn = _permutation(bits, len(costs))
        return _Plan(doc_ids, pack_offsets, turn, costs[turn])


def _permutation(bits: np.random.PCG64, n: int) -> NDArray[np.int64]:
    """A random order. Raw bits are the one stream that numpy promises to keep in every version (NEP 19)."""
    return np.argsort(bits.random_raw(n), kind="stable")
