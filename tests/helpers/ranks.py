"""A function run by several gloo ranks, each a process of its own, for tests of what ranks do together."""

import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from helpers.ports import free_port
from helpers.training_runs import fork
from micota_fast.train.world import join_world


def run_ranks(size: int, function: Callable[..., None], log: Path, *args: Any) -> None:
    """Run `function(world, *args)` in `size` processes; their output goes to `log`."""
    processes = start_ranks(size, function, log, *args)
    for process in processes:
        process.join(240)
    assert [p.exitcode for p in processes] == [0] * size, log.read_text()


def start_ranks(size: int, function: Callable[..., None], log: Path, *args: Any) -> list[BaseProcess]:
    """As `run_ranks`, without waiting for them."""
    port = free_port()
    return [fork(_rank, rank, size, port, function, log, args) for rank in range(size)]


def _rank(rank: int, size: int, port: int, function: Callable[..., None], log: Path, args: tuple[Any, ...]) -> None:
    env = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({key: str(value) for key, value in env.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.environ["MASTER_PORT"] = str(port)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    with join_world("cpu") as world:
        function(world, *args)
