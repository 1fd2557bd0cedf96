"""Offload: what a CPU can show of it. The fake CUDA suite runs it (tests/fake_cuda); no GPU has."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.training_runs import metrics, train_config, weights_of
from micota_fast.config.loader import build, identity
from micota_fast.config.train import LoraConfig, TrainConfig
from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import parameter_shapes
from micota_fast.train.loop import train
from micota_fast.train.memory import host_memory


def test_on_a_cpu_it_does_nothing_and_says_so(
    qwen2_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train_config(qwen2_checkpoint, tmp_path, max_steps=3)
    away = replace(plain, out=str(tmp_path / "away"), offload=True)
    train(plain)
    assert "offload" not in capsys.readouterr().out
    train(away)
    assert "offload: nothing to do, as the model is trained on the CPU" in capsys.readouterr().out
    assert metrics(away) == metrics(plain)
    assert all(torch.equal(tensor, weights_of(plain)[name]) for name, tensor in weights_of(away).items())


def test_copies_of_a_model_are_refused_before_anything_is_read() -> None:
    with pytest.raises(InputError, match=r"`offload` shards one copy of the model, and `mesh.replicate` makes 2"):
        build(
            TrainConfig,
            {"model": "m", "data": "d", "out": "o", "offload": True, "mesh": {"replicate": 2}},
            "test",
        )


def test_a_run_may_resume_with_it_or_without() -> None:
    plain = TrainConfig(model="m", data="d", out="o")
    assert identity(replace(plain, offload=True)) == identity(plain)


def test_page_locked_memory_is_counted_in_powers_of_two(qwen2_checkpoint: Path) -> None:
    """Of three ranks: weights and gradients are page-locked, moments not; frozen weights have neither of the others."""
    model = ModelConfig.from_checkpoint(qwen2_checkpoint)
    shards = {name: math.ceil(shape.numel() / 3) for name, shape in parameter_shapes(model).items()}
    locked = sum(2 ** math.ceil(math.log2(4 * size)) for size in shards.values())
    assert host_memory(model, 3, torch.bfloat16) == (2 * locked, 8 * sum(shards.values()))
    frozen = sum(2 ** math.ceil(math.log2(2 * size)) for size in shards.values())
    half = math.ceil(2 * 64 / 3)  # of an adapter of rank 2; two layers have two halves each
    expected = frozen + 4 * 2 * 2 ** math.ceil(math.log2(4 * half)), 8 * 4 * half
    assert host_memory(model, 3, torch.bfloat16, LoraConfig(rank=2, targets=["q_proj"])) == expected
