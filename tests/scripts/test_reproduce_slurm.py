"""scripts/reproduce.slurm with a stand-in for scontrol and a table that takes a while."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.waiting import wait_for

SCRIPTS = ROOT / "scripts"
# As `micota run` under its script: a child of bash that ends by SIGTERM.
TABLE = """#!/usr/bin/env bash
set -euo pipefail
echo "$@" >> said
[ -e finished ] && exit 0
[ "$1" = --broken ] && exit 3
sleep 600 || { echo stopped >> said; exit 1; }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / "reproduce.slurm", tmp_path / "scripts")
    (tmp_path / "scripts" / "reproduce_table1.sh").write_text(TABLE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(
        '#!/bin/sh\n[ "$*" = "requeue 7" ] && touch "$SLURM_SUBMIT_DIR/requeued"\n'
    )
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    return tmp_path


def has_begun(folder: Path) -> bool:
    return (folder / "said").exists() and (folder / "said").read_text().endswith("\n")


def submit(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(folder)}
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    command = ["bash", str(folder / "scripts" / "reproduce.slurm"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_job_whose_time_is_over_goes_back_into_the_queue(folder: Path) -> None:
    job = submit(folder, "table1", "--model-size", "7b")
    wait_for(lambda: has_begun(folder))
    job.send_signal(signal.SIGUSR1)
    told, _ = job.communicate(timeout=120)
    assert job.returncode == 0, told
    assert "back into the queue" in told
    assert (folder / "requeued").exists()
    (folder / "requeued").unlink()
    (folder / "finished").touch()
    again = submit(folder, "table1", "--model-size", "7b")
    told, _ = again.communicate(timeout=120)
    assert again.returncode == 0, told
    assert not (folder / "requeued").exists()
    assert (folder / "said").read_text().count("--model-size 7b") == 2


def test_what_is_cancelled_or_fails_is_not_requeued(folder: Path) -> None:
    job = submit(folder, "table1", "--slow")
    wait_for(lambda: has_begun(folder))
    job.send_signal(signal.SIGTERM)
    told, _ = job.communicate(timeout=120)
    assert job.returncode != 0, told
    broken = submit(folder, "table1", "--broken")
    broken.communicate(timeout=120)
    assert broken.returncode == 3
    unknown = submit(folder, "table9")
    assert "no scripts/reproduce_table9.sh" in unknown.communicate(timeout=120)[0]
    assert unknown.returncode == 1
    assert not (folder / "requeued").exists()
