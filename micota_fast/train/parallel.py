"""Processes and the model spread over them. FSDP2 does the work: one process is the same code with one shard."""

import functools
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from micota_fast.errors import InputError
from micota_fast.kernels import linear_cross_entropy
from micota_fast.model.attention import Backend, PackedAttention
from micota_fast.model.decoder import Decoder
from micota_fast.recipe import TrainSettings


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes what is not sharded."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print, once for all processes."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started (alone without it) and leave them cleanly.

    Args:
        device: "auto", "cpu" or "cuda"; each process takes the CUDA device of its local rank.

    Raises:
        InputError: CUDA is asked for and absent, or there are more local processes than devices.
    """
    rank, size, local_rank = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda is asked for and torch sees no CUDA device; choose auto or cpu")
    if device != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"local rank {local_rank} has no device of its own: {torch.cuda.device_count()} are here")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
        if int(os.environ.get("LOCAL_WORLD_SIZE", size)) == size:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one node: gloo otherwise looks the host's name up
    backend, own_device = ("nccl", chosen) if chosen.type == "cuda" else ("gloo", None)
    if size > 1:
        dist.init_process_group(backend, rank=rank, world_size=size, device_id=own_device)
    else:  # FSDP wants a group, of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=own_device)
    try:
        yield World(rank, size, chosen)
        # Without these two, gloo's threads now and then outlive what they use and the process aborts at its exit.
        dist.barrier()
        gc.collect()
    finally:
        dist.destroy_process_group()


class PackedLoss(nn.Module):
    """The decoder and its loss as one module: under FSDP the output projection is gathered once for both."""

    def __init__(self, decoder: Decoder, backend: Backend, row_filter: float = 0.0) -> None:
        super().__init__()
        self.decoder, self.backend, self.row_filter = decoder, backend, row_filter

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        targets_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        n_supervised: int,
        normalizer: int,
    ) -> Tensor:
        """Sum of the losses of these tokens, of which `n_supervised` have one, over `normalizer`; a float32 scalar."""
        attend = PackedAttention(cu_seqlens, max_seqlen, self.backend, input_ids_T.device)
        hidden_TH = self.decoder(input_ids_T, position_ids_T, attend)
        return linear_cross_entropy(
            hidden_TH,
            self.decoder.lm_head_weight,
            targets_T,
            normalizer=normalizer,
            n_supervised=n_supervised,
            row_filter=self.row_filter,
        )


def distribute(model: PackedLoss, config: TrainSettings, world: World) -> None:
    """Checkpoint, compile and shard `model` in place, as the configuration says.

    Parameters stay float32 and sharded over all ranks. Each block is gathered in the compute type for its forward and
    backward pass; gradients are summed over the ranks in float32. One process computing in float32 needs none of it.
    """
    for block in model.decoder.model.layers:
        if config.activation_checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        if config.compile:
            block.compile()
    if world.size == 1 and config.dtype == "float32":
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32)
    for module in (*model.decoder.model.layers, model):
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        # The loss is divided by the count over all ranks already, so gradients are summed, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def local_part(tensor: Tensor) -> Tensor:
    """The shard of `tensor` that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
