"""AdamW with moments of 8 or 4 bits: torchao's, stepping on the shard that each rank holds.

Moments are quantised in blocks of 256 (8-bit, Dettmers et al. 2022, arXiv 2110.02861) or 128 values (4-bit, Li et al.
2023, arXiv 2309.01507), each block with a scale of its own. The step itself computes in float32.

torchao could be given FSDP's DTensors. It compiles its step for each shape, and torch 2.13 keeps what it has compiled
for a DTensor under the shape of the whole: of ranks with shards of unequal size one then runs what another compiled.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from micota_fast.config.train import TrainSettings
from micota_fast.train.compiled_graphs import counted_as_the_optimizers
from micota_fast.train.parallel import local_part


class LowBitAdamW(torch.optim.Optimizer):
    """AdamW on parameters that may be sharded along their first dimension, with quantised moments.

    Shards of fewer than 4096 values, or not of whole blocks, keep float32 moments, as in torchao.

    Args:
        groups: of parameters, each with its `weight_decay`.
        settings: `optimizer_states`, which is not float32, and what AdamW takes.
        compiled: whether torch.compile makes one kernel of the step; without it the step holds several temporary
            tensors of the size of the largest shard and takes much longer.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: TrainSettings, compiled: bool) -> None:
        super().__init__(groups, {"lr": settings.lr})
        logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of kernels of its own, which AdamW is without
        from torchao.optim import AdamW4bit, AdamW8bit

        self._stance = "default" if compiled else "force_eager"
        self._shards = {p: nn.Parameter(_shard(p)) for group in self.param_groups for p in group["params"]}
        kind = {"8bit": AdamW8bit, "4bit": AdamW4bit}[settings.optimizer_states]
        shards = [group | {"params": [self._shards[p] for p in group["params"]]} for group in self.param_groups]
        self._adamw = kind(shards, lr=settings.lr, betas=settings.betas, eps=settings.eps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step from the parameters' gradients."""
        for mine, theirs in zip(self.param_groups, self._adamw.param_groups, strict=True):
            theirs["lr"].fill_(mine["lr"])
        for p, shard in self._shards.items():
            shard.data = _shard(p)  # FSDP moves it in the first pass
            shard.grad = None if p.grad is None or not shard.numel() else local_part(p.grad).reshape(-1)
        with torch.compiler.set_stance(self._stance), counted_as_the_optimizers():
            self._adamw.step()
        for shard in self._shards.values():
            shard.grad = None  # else `zero_grad` would free nothing

    def states(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor, sharing memory, of what makes up this rank's state of a parameter."""
        for field, value in self._adamw.state.get(self._shards[parameter], {}).items():
            if field == "step":  # the same on all ranks
                yield field, value
                continue
            whose = _place(parameter)
            parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
            yield from ((f"{field}-{part}-{whose}", getattr(value, part)) for part in parts)
            if not parts:
                yield f"{field}-{whose}", value

    def make_states(self) -> None:
        """Make the states that the first step would make, of zeros, and change nothing else."""
        self._adamw.state.clear()
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 0.0
        for p in self._shards:  # one at a time: gradients of all of them may not fit
            p.grad = torch.zeros_like(p)
            self.step()
            p.grad = None
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


def _shard(parameter: Tensor) -> Tensor:
    """Return this rank's values of a parameter, flat, sharing their memory: one kernel serves all shapes of a size."""
    return local_part(parameter.detach()).view(-1)


def _place(parameter: Tensor) -> str:
    """Return which shard of how many this rank holds."""
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if placement.is_shard():
                return f"{parameter.device_mesh.get_local_rank(dim)}of{parameter.device_mesh.size(dim)}"
    return "0of1"
