"""What the report says of how a run was made is what the recipe says."""

import subprocess
from pathlib import Path

import pytest

from micota_fast.config.loader import load
from micota_fast.config.recipe import Recipe
from micota_fast.config.shipped import recipe_file
from micota_fast.pipeline import versions
from micota_fast.pipeline.provenance import provenance


def test_models_merge_and_learning_rate_are_named() -> None:
    lines = provenance(load(Recipe, recipe_file("micota-qwen2.5-3b")))
    assert lines["model teacher"] == "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"
    assert lines["model assistant-long"].startswith("assistant trained on long")
    assert lines["model assistant-mid"] == "dare_ties of assistant-long (weight 0.5, density 0.5) on assistant"
    assert lines["training"] == "learning rate 1e-05, 2 epochs, 8 × 16,384 tokens per step, seed 0"
    assert "torch" in lines


def test_the_commit_is_that_of_the_checkout_and_absent_outside_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "micota_fast" / "pipeline" / "versions.py"
    monkeypatch.setattr(versions, "__file__", str(module))
    assert versions.commit() == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert versions.commit() == head[:12]
    (tmp_path / "file").write_text("2")
    assert versions.commit() == f"{head[:12]}-dirty"
