"""Packs of documents as training batches, and which rank sees which pack at which step.

Each epoch shuffles the documents by (seed, epoch) and packs them again: documents of equal length trade places, and the
order of the packs is shuffled as well. The number of packs depends on the lengths alone (see `packing.pack`), so every
epoch has the same number of steps, and any step can be made from its number: resuming needs nothing else.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from micota_fast.data.packing import efficiency, pack
from micota_fast.data.tokenise import Documents
from micota_fast.errors import InputError

IGNORE_INDEX = -100  # target of a position without loss; the default of linear_cross_entropy and of torch


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """B documents, end to end, T tokens in all; tokens of different documents must not see each other.

    All tensors are on the CPU; the rest are host integers, so nothing here makes a device wait.
    """

    input_ids: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], from 0 in each document
    cu_seqlens: torch.Tensor  # int32 [B+1], where each document begins, and T
    max_seqlen: int  # longest document, tokens
    targets: torch.Tensor  # int64 [T]: the next token where it is supervised and of the same document, else -100
    n_supervised: int  # targets that are not -100
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
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids_T),
        position_ids=torch.from_numpy(position_T),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths_B.max()),
        targets=torch.from_numpy(targets_T),
        n_supervised=int(documents.n_targets[doc_ids].sum()),
        doc_ids=tuple(doc_ids.tolist()),
    )


class PackedSteps:
    """Optimizer steps over packed documents, by step number.

    A step takes the next `packs_per_step` packs of its epoch and deals them to the ranks in turn: rank r has packs r,
    r + world, ... of the step. The last step of an epoch has what is left, so every document is seen once an epoch;
    in it (or where packs_per_step is no multiple of world) some ranks have fewer packs than others, or none.

    Args:
        documents: what to train on; equal on all ranks.
        pack_tokens: tokens a pack holds at most.
        packs_per_step: packs in a step, over all ranks.
        rank, world: this process among how many.
        seed: of the shuffles.

    Raises:
        InputError: a document is longer than a pack, or packs_per_step is less than 1.
    """

    def __init__(
        self, documents: Documents, pack_tokens: int, packs_per_step: int, rank: int = 0, world: int = 1, seed: int = 0
    ) -> None:
        if packs_per_step < 1:
            raise InputError(f"packs_per_step must be at least 1, not {packs_per_step}")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world}")
        self._documents = documents
        self._pack_tokens = pack_tokens
        self._packs_per_step = packs_per_step
        self._rank, self._world, self._seed = rank, world, seed
        self._epoch = -1  # whose order `_plan` returns without making it
        self._planned = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
        self.n_packs = len(self._plan(0)[2])  # in an epoch
        self.steps_per_epoch = math.ceil(self.n_packs / packs_per_step)
        self.efficiency = efficiency(documents.lengths, self.n_packs, pack_tokens)  # share of pack_tokens filled

    def total_steps(self, epochs: float) -> int:
        """Steps in a number of epochs; of 2.5, the third takes the first half of its packs, up to a whole step."""
        if not epochs > 0:
            raise InputError(f"epochs must be more than 0, not {epochs}")
        whole = math.floor(epochs)
        rest = math.ceil(round((epochs - whole) * self.n_packs, 6))  # 2.1 - 2 is a little more than 0.1
        return whole * self.steps_per_epoch + math.ceil(rest / self._packs_per_step)

    def step(self, index: int) -> tuple[list[PackedBatch], int, int]:
        """The step with a number, counted over all epochs from 0.

        Returns:
            this rank's batches (maybe none), and over all ranks the number of targets and of tokens in the step, which
            every rank works out alike.
        """
        packs, documents = self._packs_of_step(index), self.documents(index)
        return (
            [packed_batch(self._documents, doc_ids) for doc_ids in packs[self._rank :: self._world]],
            int(self._documents.n_targets[documents].sum()),
            int(self._documents.lengths[documents].sum()),
        )

    def documents(self, index: int) -> NDArray[np.int64]:
        """Indices in Documents of all that a step trains on, over all ranks, in the order of its packs."""
        return np.concatenate(self._packs_of_step(index))

    def micro_steps(self, index: int) -> int:
        """The most batches that any rank has in this step: how often every rank must join in collectives."""
        return math.ceil(len(self._packs_of_step(index)) / self._world)

    def _packs_of_step(self, index: int) -> list[NDArray[np.int64]]:
        if index < 0:
            raise IndexError(f"step {index}")
        epoch, in_epoch = divmod(index, self.steps_per_epoch)
        first = in_epoch * self._packs_per_step
        doc_ids, pack_offsets, turn = self._plan(epoch)
        return [doc_ids[pack_offsets[p] : pack_offsets[p + 1]] for p in turn[first : first + self._packs_per_step]]

    def _plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of an epoch: document ids by pack [D], where each pack begins in them [P+1], packs in order of use [P]."""
        if epoch != self._epoch:
            bits = np.random.PCG64([self._seed, epoch])
            shuffled = _permutation(bits, len(self._documents))
            order, pack_offsets = pack(self._documents.lengths[shuffled], self._pack_tokens)
            self._planned = shuffled[order], pack_offsets, _permutation(bits, len(pack_offsets) - 1)
            self._epoch = epoch
        return self._planned


def _permutation(bits: np.random.PCG64, n: int) -> NDArray[np.int64]:
    """A random order. Raw bits are the one stream that numpy promises to keep in every version (NEP 19)."""
    return np.argsort(bits.random_raw(n), kind="stable")
