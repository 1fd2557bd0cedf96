"""A LoRA adapter for the tiny checkpoints."""

import shutil
from pathlib import Path

import torch

from micota_fast.config.train import LoraConfig
from micota_fast.model.adapter import save_adapter


def write_adapter(folder: Path, size: float = 1.0) -> Path:
    """Write, in place of what is there, an adapter of rank 1 on one matrix [96, 64] of the tiny Qwen2; returns it."""
    shutil.rmtree(folder, ignore_errors=True)
    name = "model.layers.0.mlp.up_proj.lora_{}.weight"
    halves = {name.format("A"): torch.ones(1, 64), name.format("B"): torch.full((96, 1), size)}
    save_adapter(halves, LoraConfig(rank=1, targets=["up_proj"]), "base", folder, {})
    return folder
