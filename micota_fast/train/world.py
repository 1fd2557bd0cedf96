"""The processes of a training: how they find each other, what each knows of itself, and how they leave."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from micota_fast.config.train import MeshConfig
from micota_fast.errors import InputError

T = TypeVar("T")

# Of groups in which ranks wait for rank 0 to hash or write a model. It need not be short: the connections of a process
# that dies are closed, and those who wait for it fail at once.
HOSTS_TIMEOUT = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process and its place among all of them."""

    rank: int
    size: int
    device: torch.device
    replicas: int = 1  # copies of the model; size / replicas processes share one
    offload: bool = False  # shards are in the memory of the host, not of the device
    hosts: dist.ProcessGroup | None = None  # of all, for what hosts decide: never waits for a device
    local_rank: int = 0  # among the processes of this machine

    @property
    def is_main(self) -> bool:
        """Whether this process prints, and writes what is not sharded."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print once for all processes."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        """Wait, on the host alone, until every process is here."""
        dist.barrier(group=self.hosts)

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result on every rank, so that all act on what one saw.

        The others wait for it on the host alone: not for a device, and longer than NCCL would.

        Raises:
            InputError: on every rank, if `function` raised it.
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

    def on_all(self, function: Callable[[], None]) -> None:
        """Call `function` on every rank; all of them return once it has returned everywhere.

        Raises:
            InputError: on every rank, if `function` raised it on one; of several, that of the lowest rank.
        """
        mistake = None
        try:
            function()
        except InputError as error:
            mistake = str(error)
        mistakes: list[str | None] = [mistake]
        if self.size > 1:
            mistakes = [None] * self.size
            dist.all_gather_object(mistakes, mistake, group=self.hosts)
        for rank, found in enumerate(mistakes):
            if found is not None:
                raise InputError(f"rank {rank}: {found}" if self.size > 1 else found)


@contextmanager
def join_world(device: str, mesh: MeshConfig | None = None, offload: bool = False) -> Iterator[World]:
    """Join the processes that torchrun started, or form a group of one without it, and leave cleanly.

    Args:
        device: "auto", "cpu" or "cuda"; each process takes the CUDA device of its local rank.
        mesh: how they share the model.
        offload: whether they keep their shards in the host's memory, where they must be summed, too; a CPU always does.

    Raises:
        InputError: the mesh does not fit the number of processes, CUDA is requested and absent, or there are more local
            processes than devices.
    """
    rank, size, local_rank = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    replicas = _replicas(mesh or MeshConfig(), size)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda is requested and torch sees no CUDA device; choose auto or cpu")
    if device != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(f"local rank {local_rank} has no device of its own: there are {torch.cuda.device_count()}")
        chosen = torch.device("cuda", local_rank)
        _let_segments_grow()
        torch.cuda.set_device(chosen)
    else:
        chosen = torch.device("cpu")
    offload = offload and chosen.type == "cuda"
    if (offload or chosen.type == "cpu") and int(os.environ.get("LOCAL_WORLD_SIZE", size)) == size:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one node: gloo otherwise looks the host's name up
    backend, own_device = ("nccl", chosen) if chosen.type == "cuda" else ("gloo", None)
    if offload:
        backend = "cpu:gloo,cuda:nccl"
    if size > 1:
        dist.init_process_group(backend, rank=rank, world_size=size, device_id=own_device)
    else:  # FSDP wants a group, of one
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=own_device)
    try:
        hosts = dist.new_group(backend="gloo", timeout=HOSTS_TIMEOUT) if size > 1 else None
        world = World(rank, size, chosen, replicas, offload, hosts, local_rank)
        yield world
        # Without these two, gloo's threads sometimes outlive what they use and the process aborts at its exit.
        world.barrier()
        gc.collect()
    finally:
        dist.destroy_process_group()


def _let_segments_grow() -> None:
    """Let CUDA's allocator extend its segments, unless the user has set it up: packs differ in length and leave gaps.

    It reads the variable when it is first used, so this must come before anything is on the device.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name before torch 2.9, which is still read
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _replicas(mesh: MeshConfig, size: int) -> int:
    shard = mesh.shard or max(size // mesh.replicate, 1)
    if mesh.replicate * shard != size:
        raise InputError(
            f"`mesh` describes {mesh.replicate} x {shard} processes (replicate x shard), but {size} were started: "
            f"change it, or torchrun's --nnodes and --nproc-per-node"
        )
    return mesh.replicate
