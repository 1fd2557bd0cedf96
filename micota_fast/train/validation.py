"""The loss on held-out rows, and when to stop because of it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from micota_fast.data.batches import PackedBatch, packed_batch
from micota_fast.data.packing import pack
from micota_fast.data.tokenise import Documents
from micota_fast.train.packed_loss import DUMMY_BATCH, PackedLoss, on_device
from micota_fast.train.world import World


class Validation:
    """Measures the loss on held-out documents and remembers the lowest one.

    Args:
        documents: held out; equal on all ranks. None: there is nothing to measure.
        pack_tokens: most tokens in a pack.
        world: the processes, each of which takes its share of the packs.
        early_stop: number of measurements in a row without a new lowest loss after which to stop; None: never.
    """

    def __init__(self, documents: Documents | None, pack_tokens: int, world: World, early_stop: int | None) -> None:
        self._batches: list[PackedBatch] = []
        if documents is not None:
            order, offsets = pack(documents.lengths, pack_tokens)
            packs = np.split(order, offsets[1:-1])
            mine = [packed_batch(documents, ids) for ids in packs[world.rank :: world.size]]
            # Documents' weights are for training. Every rank must join the collectives.
            self._batches = [replace(batch, token_weights=None) for batch in mine]
            self._batches += [DUMMY_BATCH] * (math.ceil(len(packs) / world.size) - len(mine))
            self._n_targets = int(documents.n_targets.sum())
        self._world, self._early_stop = world, early_stop
        self.state: dict[str, Any] = {"lowest": None, "step": None, "since": 0}  # plain values, kept in checkpoints

    @torch.no_grad()
    def measure(self, model: PackedLoss, step: int) -> float:
        """Return the mean loss over the held-out supervised tokens after `step` steps. Waits for the device."""
        total = torch.zeros((), device=self._world.device)
        for batch in self._batches:
            total += model(**on_device(batch, self._world), normalizer=self._n_targets)
        if isinstance(model, FSDPModule):
            model.reshard()  # no backward pass does it
        dist.all_reduce(total)
        loss = total.item()
        lowest = self.state["lowest"]
        if math.isfinite(loss) and (lowest is None or loss < lowest):
            self.state = {"lowest": loss, "step": step, "since": 0}
        else:
            self.state["since"] += 1
        return loss

    @property
    def enough(self) -> bool:
        """Whether the run should stop now."""
        return self._early_stop is not None and self.state["since"] >= self._early_stop
