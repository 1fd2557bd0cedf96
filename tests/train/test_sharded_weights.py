"""Weights are set shard by shard: the same ones as in a whole model, and never more than its shards on a rank."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from helpers.checkpoints import make_checkpoint
from helpers.ranks import run_ranks
from micota_fast.config.train import MeshConfig, TrainConfig
from micota_fast.errors import InputError
from micota_fast.model.safetensors_io import init_random, load_model
from micota_fast.train.parallel import parallelize
from micota_fast.train.prepare import build_model, load_initial_weights
from micota_fast.train.world import World


def config(checkpoint: Path, **options: object) -> TrainConfig:
    values = {"model": str(checkpoint), "data": "", "out": "", "dtype": "bfloat16", "device": "cpu", **options}
    return TrainConfig(**values)  # type: ignore[arg-type]


def compare(world: World, checkpoint: Path, replicas: int, options: dict[str, object]) -> None:
    """All ranks: the shards, put together, are the whole model's weights, bit for bit."""
    world = replace(world, replicas=replicas)
    settings = config(checkpoint, mesh=MeshConfig(replicate=replicas), **options)
    model = build_model(settings, checkpoint, world)
    assert all(parameter.is_meta for parameter in model.parameters())
    parallelize(model, settings, world)
    load_initial_weights(model, settings, checkpoint, world)
    random = settings.init == "random"
    whole = init_random(model.decoder.config, settings.seed) if random else load_model(checkpoint, torch.float32)
    expected = dict(whole.named_parameters())
    assert expected.keys() == {name for name, _ in model.decoder.named_parameters()}
    for name, parameter in model.decoder.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), expected[name]), name
        assert parameter.requires_grad == (name not in settings.freeze)


OPTIONS: list[dict[str, object]] = [  # read, drawn, and frozen in part
    {},
    {"init": "random", "seed": 7},
    {"freeze": ["model.embed_tokens.weight"], "activation_checkpointing": "full"},
]


def compare_all(world: World, checkpoint: Path, replicas: int) -> None:
    for options in OPTIONS:
        compare(world, checkpoint, replicas, options)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_shards_are_pieces_of_the_whole(ranks: int, replicas: int, tmp_path: Path) -> None:
    # Rows that four do not divide, and fewer rows (of the key's and value's biases) than ranks.
    odd = {"vocab_size": 322, "hidden_size": 6, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2}
    checkpoint = make_checkpoint(tmp_path / "model", **odd)
    run_ranks(ranks, compare_all, tmp_path / "log", checkpoint, replicas)


def refused(world: World, checkpoint: Path) -> None:
    """Rank 1 finds no weights; all are told."""
    settings = config(checkpoint)
    model = build_model(settings, checkpoint, world)
    parallelize(model, settings, world)
    with pytest.raises(InputError, match=r"rank 1: .*model\.safetensors"):
        load_initial_weights(model, settings, checkpoint if world.rank == 0 else checkpoint / "no", world)


def test_what_one_rank_cannot_read_ends_all(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(2, refused, tmp_path / "log", qwen2_checkpoint)


def peak_of_a_rank(world: World, checkpoint: Path) -> None:
    """Print by how much this process's memory grew at its highest while the model came to be."""
    settings = config(checkpoint)
    warm = torch.ones(10) @ torch.ones(10)  # what torch sets up once
    assert warm == 10
    Path("/proc/self/clear_refs").write_text("5")  # the highest from now on
    before = _kb("VmRSS")
    model = build_model(settings, checkpoint, world)
    parallelize(model, settings, world)
    load_initial_weights(model, settings, checkpoint, world)
    line = json.dumps({"grown": 1024 * (_kb("VmHWM") - before)}) + "\n"
    os.write(1, line.encode())  # one write: the ranks share the file, and print() may write the line's end by itself


def _kb(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.slow
def test_no_rank_holds_the_whole_model(tmp_path: Path) -> None:
    wide = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4}
    checkpoint = make_checkpoint(tmp_path / "model", "llama", **wide)
    whole = sum(p.numel() * 4 for p in load_model(checkpoint, torch.float32).parameters())
    assert whole > 200_000_000
    log = tmp_path / "log"
    run_ranks(4, peak_of_a_rank, log, checkpoint)
    grown = [json.loads(line)["grown"] for line in log.read_text().splitlines() if line.startswith('{"grown"')]
    assert len(grown) == 4
    # A quarter of it, a quarter of the mapped file, and what FSDP itself takes. Read whole it was twice the model.
    assert max(grown) < whole, [g / whole for g in grown]
    shutil.rmtree(checkpoint)
