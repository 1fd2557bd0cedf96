"""Ranks wait for rank 0 as long as it takes, also where that is longer than the group of the training may wait.

NCCL ends a process whose collective is not met for ten minutes; here gloo does so after three seconds.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.ranks import run_ranks
from helpers.training_runs import train_config
from micota_fast.config.train import TrainConfig
from micota_fast.model import safetensors_io
from micota_fast.model.safetensors_io import load_model
from micota_fast.train import prepare
from micota_fast.train.export import export
from micota_fast.train.world import World

ALLOWED_S, TAKEN_S = 3, 5


def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose first call takes `TAKEN_S` longer."""
    pauses = [TAKEN_S]

    def slow(*args: Any, **options: Any) -> Any:
        if pauses:
            time.sleep(pauses.pop())
        return function(*args, **options)

    return slow


def impatient() -> None:
    """The group of the training waits for `ALLOWED_S` from now on."""
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=ALLOWED_S), dist.group.WORLD)


def _export(world: World, source: Path, out: Path) -> None:
    decoder = load_model(source, torch.float32)
    mesh = init_device_mesh("cpu", (world.size,))
    for module in (*decoder.model.layers, decoder):
        fully_shard(module, mesh=mesh)
    impatient()
    safetensors_io.save_file = slowly(save_file)
    export(decoder, source, out, world, {"README.md": "card\n"}, max_shard_bytes=150_000)


def _identity(world: World, config: TrainConfig, source: Path) -> None:
    documents, _ = prepare.load_documents(config, source, Path(config.out), world)
    impatient()
    prepare.of_file = slowly(prepare.of_file)
    prepare.run_identity(config, source, documents, None, world)


def _end(world: World) -> None:
    impatient()
    if world.is_main:
        time.sleep(TAKEN_S)  # it removes the checkpoints, say


def test_ranks_wait_for_the_export(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(2, _export, tmp_path / "log", qwen2_checkpoint, tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_model(qwen2_checkpoint, torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in written.items())


@pytest.mark.slow
def test_ranks_wait_for_the_model_to_be_hashed(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(2, _identity, tmp_path / "log", train_config(qwen2_checkpoint, tmp_path), qwen2_checkpoint)


def test_ranks_wait_for_the_last_one_at_the_end(tmp_path: Path) -> None:
    run_ranks(2, _end, tmp_path / "log")
