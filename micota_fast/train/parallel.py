"""Processes and the model spread over them. FSDP2 does the work: one process is the same code with one shard."""

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from micota_fast.data.batches import IGNORE_INDEX, PackedBatch
from micota_fast.errors import InputError
from micota_fast.kernels import linear_cross_entropy
from micota_fast.model.attention import Backend, PackedAttention
from micota_fast.model.decoder import Decoder
from micota_fast.recipe import MeshConfig, TrainSettings
from micota_fast.train.recompute import recomputed

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    replicas: int = 1  # copies of the model; size / replicas processes share one
    hosts: dist.ProcessGroup | None = None  # of all, for what the host decides: never waits for a device

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

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank: what one rank saw, all go by. Waits for no device.

        Raises:
            InputError: on every rank, where `function` raised it.
        """
        held: list[Any] = [None, None]
        if self.is_main:
            try:
                held[0] = function()
            except InputError as error:
                held[1] = str(error)
        dist.broadcast_object_list(held, group=self.hosts)
        if held[1] is not None:
            raise InputError(held[1])
        result: T = held[0]
        return result


@contextmanager
def world(device: str, mesh: MeshConfig | None = None) -> Iterator[World]:
    """Join the processes that torchrun started (alone without it) and leave them cleanly.

    Args:
        device: "auto", "cpu" or "cuda"; each process takes the CUDA device of its local rank.
        mesh: how they share the model.

    Raises:
        InputError: the mesh does not fit their number, CUDA is asked for and absent, or there are more local processes
            than devices.
    """
    rank, size, local_rank = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    replicas = _replicas(mesh or MeshConfig(), size)
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
        yield World(rank, size, chosen, replicas, dist.new_group(backend="gloo") if size > 1 else None)
        # Without these two, gloo's threads now and then outlive what they use and the process aborts at its exit.
        dist.barrier()
        gc.collect()
    finally:
        dist.destroy_process_group()


def _replicas(mesh: MeshConfig, size: int) -> int:
    shard = mesh.shard or max(size // mesh.replicate, 1)
    if mesh.replicate * shard != size:
        raise InputError(
            f"`mesh` describes {mesh.replicate} x {shard} processes (replicate x shard) and {size} are started: change "
            f"it, or torchrun's --nnodes and --nproc-per-node"
        )
    return mesh.replicate


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
        token_weights_T: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        n_supervised: int,
        normalizer: float,
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
            token_weights=token_weights_T,
            row_filter=self.row_filter,
        )


# For a rank that has run out of packs, as all must join in the collectives: tokens without a target, so a loss and
# gradients of zero. Two, as every document has at least: of one, torch.compile makes a graph of its own.
IDLE = PackedBatch(
    input_ids=torch.zeros(2, dtype=torch.int64),
    position_ids=torch.arange(2),
    cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
    max_seqlen=2,
    targets=torch.full((2,), IGNORE_INDEX),
    token_weights=None,
    n_supervised=0,
    doc_ids=(),
)


def on_device(pack: PackedBatch, model: PackedLoss, world: World) -> dict[str, Any]:
    """The arguments of `PackedLoss.forward` but the normalizer, on their way to the device."""

    def copied(tensor: Tensor) -> Tensor:
        # Only from pinned memory does a copy not wait for the device.
        return tensor.pin_memory().to(world.device, non_blocking=True) if world.device.type == "cuda" else tensor

    return {
        "input_ids_T": copied(pack.input_ids),
        "position_ids_T": copied(pack.position_ids),
        "targets_T": copied(pack.targets),
        "token_weights_T": None if pack.token_weights is None else copied(pack.token_weights),
        # SDPA takes documents apart on the host and wants their lengths there.
        "cu_seqlens": pack.cu_seqlens if model.backend == "sdpa" else copied(pack.cu_seqlens),
        "max_seqlen": pack.max_seqlen,
        "n_supervised": pack.n_supervised,
    }


def distribute(model: PackedLoss, config: TrainSettings, world: World) -> None:
    """Checkpoint, compile and shard `model` in place, as the configuration says.

    Parameters stay float32 and sharded over the processes that share a copy. Each block is gathered in the compute type
    for its forward and backward pass, while the one before it computes; gradients are summed in float32, over the
    shards and, where there are several copies, over those. One process computing in float32 needs none of it.
    """
    blocks = model.decoder.model.layers
    for block in blocks:
        if config.activation_checkpointing != "none":
            block.forward = recomputed(block.forward, config.activation_checkpointing)
        if config.compile:
            block.compile(dynamic=True)  # packs differ in length: one graph for all, not one for each
    if world.size == 1 and config.dtype == "float32":
        return
    if world.replicas == 1:
        mesh = init_device_mesh(world.device.type, (world.size,))
    else:
        shape = (world.replicas, world.size // world.replicas)
        mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32)
    modules = [fully_shard(module, mesh=mesh, mp_policy=policy) for module in (*blocks, model)]
    for module in modules:
        # The loss is divided by the count over all ranks already, so gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for module, following in itertools.pairwise([modules[-1], *modules[:-1]]):  # the root runs first
        module.set_modules_to_forward_prefetch([following])


def compiled_graphs() -> str:
    """What torch.compile has made of the blocks so far: one graph without a break is as it should be."""
    from torch._dynamo.utils import counters  # takes a second to import, and has been where something was compiled

    made, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
    text = f"torch.compile: graphs {made}, breaks {sum(breaks.values())}"
    return text + "".join(f"\nWARNING: graph break: {reason.splitlines()[0]}" for reason in breaks)


def last_micro_step(model: PackedLoss, last: bool) -> None:
    """Say whether the next backward pass is a step's last: copies of the model exchange their gradients only then."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)


def local_part(tensor: Tensor) -> Tensor:
    """The shard of `tensor` that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
