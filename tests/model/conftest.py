"""Fixtures that several tests of models share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(qwen2_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return Path(shutil.copytree(qwen2_checkpoint, tmp_path / "copy"))
