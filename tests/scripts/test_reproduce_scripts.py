"""The scripts of the tables: what they would run can be planned, and --help says what it takes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.executables import executable
from helpers.paths import ROOT

SCRIPTS = ROOT / "scripts"
TABLES = ("table1", "ablation_length", "ablation_merge", "alignment")


def dry_run(root: Path, table: str, *arguments: str) -> str:
    """Scripts in a folder of their own, so that its .venv is the test's."""
    shutil.copytree(SCRIPTS, root / "scripts")
    command = ["bash", f"scripts/reproduce_{table}.sh", *arguments, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name in ("math_train", "aime2024", "amc23", "olympiadbench", "math500", "gsm8k_test"):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"id": "1", "problem": "1 + 1?", "answer": "2"}\n')
    return tmp_path


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_the_paper_has_a_recipe_without_mistakes(root: Path, table: str) -> None:
    (root / ".venv" / "bin").mkdir(parents=True)
    executable(root / ".venv" / "bin" / "micota", f'#!/bin/sh\nexec "{sys.executable}" -m micota_fast "$@"\n')
    told = dry_run(root, table, "--model-size", "3b", "--data-dir", "data", "--gpus", "8")
    assert "micota run micota-qwen2.5-3b --out" in told
    assert "models.teacher.serve.replicas=4" in told
    assert "evaluate/base" in told
    assert "stages done; folder:" in told


def test_a_dry_run_makes_no_environment(root: Path) -> None:
    told = dry_run(root, "table1", "--micro")
    assert "micota run micro --out" in told
    assert not (root / ".venv").exists()


@pytest.mark.parametrize("table", TABLES)
def test_help_says_hardware_time_and_disk(table: str) -> None:
    told = subprocess.check_output(["bash", str(SCRIPTS / f"reproduce_{table}.sh"), "--help"], text=True)
    for what in ("8 H100", "3b", "7b", "micro", "hours", "GB of disk", "not", "measured", "minutes", "--dry-run"):
        assert what in told
