"""LoRA adapters and names of models from elsewhere: what cannot be one is refused by name."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.adapters import write_adapter
from micota_fast.errors import InputError
from micota_fast.model.adapter import Adapter, temporarily_merged
from micota_fast.model.folder import resolve_model

SHAPES = {"norm.weight": torch.Size([4]), "up.weight": torch.Size([6, 4])}
UP = {"up.lora_A.weight": torch.ones(2, 4), "up.lora_B.weight": torch.ones(6, 2)}
NORM = {"norm.lora_A.weight": torch.ones(2, 4), "norm.lora_B.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, NORM, r"adapter_model\.safetensors: norm has an adapter, but norm\.weight is not a matrix"),
        ({"lora_alpha": 1e308}, UP, r"adapter_config\.json: `lora_alpha` and `r` scale by 5e\+307, beyond float32"),
        ({}, {name: half.to(torch.int8) for name, half in UP.items()}, r"up\.lora_A\.weight is I8, and an adapter's"),
        ({}, {name: half.to(torch.bool) for name, half in UP.items()}, r"up\.lora_A\.weight is BOOL"),
    ],
)
def test_an_adapter_that_no_training_writes_is_refused(
    config: dict[str, Any], tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    save_file(
        {f"base_model.model.{name}": half for name, half in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(InputError, match=message):
        Adapter(tmp_path, SHAPES)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "an empty text names no checkpoint"),
        ("+", "lacks the model"),
        ("+adapter", r"'\+adapter' lacks the model; MODEL\+ADAPTER names both"),
        ("base+", r"'base\+' lacks the adapter"),
        ("base+" + "x" * 5000, "x: no such folder"),
        ("x" * 5000 + "+base", "x: no such folder"),
        ("a\0+base", "no such folder"),
    ],
)
def test_what_names_no_model_is_never_the_working_directory(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    for folder in (tmp_path, tmp_path / "adapter"):
        (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        resolve_model(name)


MERGES = """
import sys
from micota_fast.model.adapter import temporarily_merged
with temporarily_merged(sys.argv[1]):
    print("merged", flush=True)
    sys.stdin.read()
"""


def test_a_merged_model_that_a_killed_process_has_left_goes_when_the_next_is_made(
    tmp_path: Path, qwen2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = f"{qwen2_checkpoint}+{write_adapter(tmp_path / 'adapter')}"
    made = tmp_path / "made"
    made.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(made))
    command, environment = [sys.executable, "-c", MERGES, both], os.environ | {"TMPDIR": str(made)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"merged\n"
    (its,) = made.iterdir()
    with temporarily_merged(both) as model:
        assert set(made.iterdir()) == {its, model.parent}, "a living process keeps its own"
    process.kill()
    process.communicate()
    assert list(made.iterdir()) == [its], "nothing could remove it"
    with temporarily_merged(both) as model:
        assert list(made.iterdir()) == [model.parent]
    assert not list(made.iterdir())
