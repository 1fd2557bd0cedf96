"""One rank of many, alone: torch's `fake` process group, whose collectives return at once with whatever was there.

This process is rank 0 of the world that it pretends to be in; the others are taken to do the same on other data. What
is proved of them is what does not depend on the rank. That collectives match between ranks, and what they compute, is
proved by the tests with gloo (tests/train).
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import default_planner
from torch.testing._internal.distributed.fake_pg import FakeStore

LOCAL_SIZE = 8  # processes on a node


def pretend(size: int, on_wait: Callable[[str], None]) -> None:
    """Make this process rank 0 of `size`, by the environment that torchrun gives, before it joins a world.

    Args:
        size: number of processes.
        on_wait: called where the host would wait for the device in a collective: objects and barriers over NCCL go
            through the device.
    """
    local = min(size, LOCAL_SIZE)
    os.environ.update(RANK="0", WORLD_SIZE=str(size), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(local))
    init, new_group = dist.init_process_group, dist.new_group
    over_hosts: set[Any] = set()

    def init_process_group(
        backend: str, rank: int, world_size: int, device_id: Any = None, store: Any = None, **_: Any
    ) -> None:
        backends = ("nccl", "cpu:gloo,cuda:nccl")  # the second for shards that are on the host
        assert backend in backends, f"the process group of CUDA ranks is {backend}"
        assert device_id is not None, "without a device of its own, NCCL guesses one from the rank"
        init("fake", rank=rank, world_size=world_size, store=FakeStore())

    def group(ranks: Any = None, timeout: timedelta | None = None, backend: str | None = None, **_: Any) -> Any:
        made = new_group(ranks, backend="fake")
        if backend == "gloo":
            over_hosts.add(made)
        return made

    def seen(name: str, group: Any) -> None:
        if group not in over_hosts and size > 1:
            on_wait(f"{name} over NCCL")

    def all_gather_object(object_list: list[Any], obj: Any, group: Any = None) -> None:
        seen("all_gather_object", group)
        object_list[:] = [obj] * len(object_list)

    def broadcast_object_list(object_list: list[Any], src: int | None = None, group: Any = None, **_: Any) -> None:
        seen("broadcast_object_list", group)

    def gather_object(obj: Any, object_gather_list: list[Any], dst: int | None = None, group: Any = None) -> None:
        seen("gather_object", group)
        object_gather_list[:] = [obj] * len(object_gather_list)

    def scatter_object_list(
        scatter_object_output_list: list[Any],
        scatter_object_input_list: list[Any],
        src: int | None = None,
        group: Any = None,
    ) -> None:
        seen("scatter_object_list", group)
        scatter_object_output_list[0] = scatter_object_input_list[0]

    def barrier(group: Any = None, **_: Any) -> None:
        seen("barrier", group)

    for function in (
        init_process_group,
        all_gather_object,
        broadcast_object_list,
        gather_object,
        scatter_object_list,
        barrier,
    ):
        setattr(dist, function.__name__, function)
    dist.new_group = group
    if size > 1:
        # The plan for a checkpoint has rank 0's shards alone, and torch would miss the others.
        default_planner._validate_global_plan = lambda *_: []  # type: ignore[assignment]
