"""Print the table of docs/memory.md: with which levers a model can be trained in a GPU's memory.

    .venv/bin/python scripts/memory_table.py

Packs of 16,384 tokens in bfloat16, nine tenths of the GPU's memory; what needs fewest levers, as `micota plan` tries
them. It is computed from shapes (`train.memory`) and measured on no GPU.
"""

from typing import Any

import torch

from micota_fast.config.train import LoraConfig
from micota_fast.planning.shapes import known_shapes
from micota_fast.train.memory import estimate, host_memory

MODELS = ("0.5B", "1.5B", "3B", "7B", "14B")
GIGABYTES, GPUS = (24, 40, 80), (1, 4, 8)
PACK_TOKENS, FILLED = 16384, 0.9


def cell(model: str, gigabytes: int, gpus: int) -> str:
    """Return the first lever with which a model fits, and LoRA where that saves the host's memory of offload."""
    config = known_shapes(f"Qwen/Qwen2.5-{model}")
    assert config is not None
    levers: dict[str, dict[str, Any]] = {
        "selective": {"mode": "selective"},
        "full": {"mode": "full"},
        "8-bit": {"mode": "full", "optimizer_states": "8bit"},
        "offload": {"mode": "full", "offload": True},
        "LoRA": {"mode": "full", "lora": LoraConfig()},
    }
    room = FILLED * gigabytes * 1e9
    fitting = [
        name
        for name, how in levers.items()
        if estimate(config, PACK_TOKENS, gpus, dtype=torch.bfloat16, device="cuda", **how).total <= room
    ]
    if fitting[:1] == ["offload"]:
        host = gpus * sum(host_memory(config, gpus, torch.bfloat16))
        return " or ".join([f"offload ({host / 1e9:.0f} GB)", *fitting[1:]])
    return fitting[0] if fitting else "–"


def table() -> str:
    """Return the table, in Markdown."""
    lines = [f"| Each GPU | GPUs | {' | '.join(MODELS)} |", f"| --: | --: |{' :-- |' * len(MODELS)}"]
    for gigabytes in GIGABYTES:
        for gpus in GPUS:
            cells = " | ".join(cell(model, gigabytes, gpus) for model in MODELS)
            lines.append(f"| {gigabytes} GB | {gpus} GPU{'s' * (gpus > 1)} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
