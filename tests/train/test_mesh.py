"""Several copies of the model, each sharded (HSDP): four gloo ranks as 2 x 2 train as one process does."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.ranks import run_ranks
from helpers.training_runs import (
    checkpoint_steps,
    finish,
    kill,
    metrics,
    start_training,
    train_config,
    wait_until,
    weights_of,
)
from micota_fast.config.train import MeshConfig, TrainConfig
from micota_fast.errors import InputError
from micota_fast.model.safetensors_io import load_model
from micota_fast.train.loop import train
from micota_fast.train.packed_loss import DUMMY_BATCH, PackedLoss, on_device
from micota_fast.train.parallel import last_micro_step, parallelize
from micota_fast.train.world import World, join_world

TWO_BY_TWO = MeshConfig(replicate=2)


def run(checkpoint: Path, folder: Path, name: str, **options: Any) -> TrainConfig:
    """Nine packs of the corpus in a step, and one left: three micro-steps of four ranks, the last with idle ranks."""
    return train_config(checkpoint, folder, out=str(folder / name), pack_tokens=128, packs_per_step=9, **options)


@pytest.fixture(scope="module", params=["qwen2", pytest.param("llama", marks=pytest.mark.slow)])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Trained as 2 x 2; embeddings tied and, in the slow tier, not."""
    checkpoint = request.getfixturevalue(f"{request.param}_checkpoint")
    config = run(checkpoint, tmp_path_factory.mktemp("mesh"), "two-by-two", epochs=6, mesh=TWO_BY_TWO)
    finish(start_training(config, world=4), config)
    return config


def near(one: TrainConfig, other: TrainConfig) -> None:
    assert len(metrics(one)) == len(metrics(other)) > 5
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    expected = weights_of(other)
    for name, tensor in weights_of(one).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)


def test_two_copies_of_two_shards_equal_one_process(whole: TrainConfig) -> None:
    log = Path(f"{whole.out}.log").read_text()
    assert "4 x cpu, 2 copies of the model" in log
    one = replace(whole, out=f"{whole.out}-one", mesh=MeshConfig())
    train(one)
    near(whole, one)


def test_killed_and_resumed_on_the_same_mesh_bitwise(whole: TrainConfig, tmp_path: Path) -> None:
    config = replace(whole, out=str(tmp_path / "out"), checkpoint_every=2)
    processes = start_training(config, world=4)
    wait_until(lambda: bool(checkpoint_steps(config)), processes)
    kill(processes)
    finish(start_training(config, world=4), config)
    log = Path(f"{config.out}.log").read_text()
    assert "resuming after step" in log
    assert "rounding" not in log
    assert metrics(config) == metrics(whole)
    expected = weights_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(config).items())


def test_copies_that_are_not_sharded_equal_one_process(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    one, two = (run(qwen2_checkpoint, tmp_path, str(n), epochs=3, mesh=MeshConfig(replicate=n)) for n in (1, 2))
    train(one)
    finish(start_training(two, world=2), two)
    near(two, one)


@pytest.mark.slow
def test_resumed_without_copies_up_to_rounding(whole: TrainConfig, tmp_path: Path) -> None:
    config = replace(whole, out=str(tmp_path / "out"), checkpoint_every=2)
    processes = start_training(config, world=4)
    wait_until(lambda: bool(checkpoint_steps(config)), processes)
    kill(processes)
    assert len(metrics(config)) < len(metrics(whole))
    config = replace(config, mesh=MeshConfig())
    finish(start_training(config, world=4), config)
    log = Path(f"{config.out}.log").read_text()
    assert "resuming with 4 processes, but 4 processes and 2 copies of the model wrote" in log
    assert "equal up to rounding" in log
    near(config, whole)


@pytest.mark.parametrize(
    ("mesh", "size", "said"),
    [
        (MeshConfig(replicate=2), 1, r"2 x 1 processes \(replicate x shard\), but 1 were started"),
        (MeshConfig(replicate=2, shard=2), 1, r"2 x 2 processes \(replicate x shard\), but 1 were started"),
        (MeshConfig(shard=8), 4, r"1 x 8 processes \(replicate x shard\), but 4 were started"),
        (MeshConfig(replicate=3), 8, r"3 x 2 processes \(replicate x shard\), but 8 were started"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_refused(
    mesh: MeshConfig, size: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(InputError, match=said), join_world("cpu", mesh):
        pass


class Collectives(TorchDispatchMode):
    """Counts the collectives that sum."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "reduce" in (name := func._schema.name):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def test_copies_exchange_gradients_once_a_step(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(4, _count, tmp_path / "log", qwen2_checkpoint, tmp_path / "counts.json")
    groups = 3  # two blocks, and what is around them
    within = {"c10d::_reduce_scatter_base_": groups}
    assert json.loads((tmp_path / "counts.json").read_text()) == [
        within,
        within,
        within | {"c10d::allreduce_": groups},
    ]


def _count(world: World, checkpoint: Path, path: Path) -> None:
    """Write what each of a step's three micro-steps takes."""
    model = PackedLoss(load_model(checkpoint, torch.float32), "sdpa")
    parallelize(model, TrainConfig(model="", data="", out="", dtype="float32"), replace(world, replicas=2))
    counts = []
    for number in range(3):
        last_micro_step(model, number == 2)
        with Collectives() as collectives:
            model(**on_device(DUMMY_BATCH, world), normalizer=1.0).backward()
        counts.append(collectives.count)
    if world.is_main:
        path.write_text(json.dumps(counts))
