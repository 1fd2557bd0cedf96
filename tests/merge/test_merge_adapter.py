"""MODEL+ADAPTER as an input to a merge: the same bytes as of the checkpoint that the adapter was merged into before."""

import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from helpers.checkpoints import make_checkpoint
from micota_fast.config.merge import MergeConfig
from micota_fast.config.train import LoraConfig
from micota_fast.errors import InputError
from micota_fast.merge.merge import merge
from micota_fast.model.adapter import save_adapter, save_merged

LORA = LoraConfig(rank=2, alpha=3.0, targets=["up_proj"])
UP = "model.layers.{}.mlp.up_proj.lora_{}.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "base")
    torch.manual_seed(0)
    halves = {UP.format(n, half): torch.randn(size) for n in (0, 1) for half, size in (("A", (2, 64)), ("B", (96, 2)))}
    save_adapter(halves, LORA, "base", tmp_path / "adapter", {})
    return tmp_path


def merged(folder: Path, model: str, out: str) -> bytes:
    content = {"merge_method": "slerp", "base_model": "base", "models": [{"model": model}], "parameters": {"t": 0.4}}
    (folder / "merge.yaml").write_text(yaml.safe_dump(content))
    merge(MergeConfig(config=str(folder / "merge.yaml"), out=str(folder / out)))
    return (folder / out / "model.safetensors").read_bytes()


def test_an_adapter_is_merged_as_the_model_that_it_makes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_merged(folder / "base", folder / "adapter", folder / "whole")
    (folder / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    assert merged(folder, "base+adapter", "one") == merged(folder, "whole", "two")
    assert not list((folder / "tmp").iterdir()), "what was made for it is gone"
    assert str(folder) not in (folder / "one" / "README.md").read_text()
    assert "base+adapter" in (folder / "one" / "README.md").read_text()


def test_an_adapter_that_does_not_fit_is_refused(folder: Path) -> None:
    save_adapter({UP.format(0, "A"): torch.zeros(2, 60)}, LORA, "base", folder / "narrow", {})
    with pytest.raises(
        InputError, match=r"narrow.*model\.layers\.0\.mlp\.up_proj\.lora_A.*shape \[2, 60\], not \[2, 64\]"
    ):
        merged(folder, "base+narrow", "one")
    save_adapter({UP.format(7, "A"): torch.zeros(2, 64)}, LORA, "base", folder / "deep", {})
    with pytest.raises(InputError, match=r"layers\.7\.mlp\.up_proj has an adapter, but the model has no tensor"):
        merged(folder, "base+deep", "one")
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(InputError, match=r"adapter_config\.json: `use_dora: True` is not supported"):
        merged(folder, "base+adapter", "one")
