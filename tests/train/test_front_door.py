"""`micota train` and `python -m micota_fast.train` are one command: the same options, and the same exit status."""

import dataclasses
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest

from helpers.training_runs import checkpoint_steps, fork, metrics, train_config
from micota_fast.config.loader import dump
from micota_fast.errors import InputError
from micota_fast.train import preflight

DOORS = (["micota_fast", "train"], ["micota_fast.train"])


def run_module(door: list[str], arguments: list[str], log: Path) -> None:
    """As `python -m` does, in this process."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    module, *words = door
    sys.argv[1:] = [*words, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.mark.parametrize("door", DOORS, ids=" ".join)
def test_a_run_that_a_signal_ends_exits_with_0_and_with_130_after_ctrl_c(
    door: list[str], qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    """Batch schedulers send SIGTERM and SIGUSR1: a run that ends with a checkpoint then has not failed."""
    config = train_config(qwen2_checkpoint, tmp_path, epochs=1e6, checkpoint_every=10**6)
    (tmp_path / "config.yaml").write_text(dump(config))
    log = tmp_path / "log"
    for number, status in ((signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)):
        before = len(metrics(config))
        process = fork(run_module, door, [str(tmp_path / "config.yaml")], log)
        while len(metrics(config)) <= before:
            assert process.is_alive(), log.read_text()
            time.sleep(0.02)
        os.kill(process.pid or 0, number)
        process.join(240)
        assert process.exitcode == status, number.name
        assert checkpoint_steps(config)[-1] == len(metrics(config))
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("door", DOORS, ids=" ".join)
def test_help_lists_every_option_and_profile(door: list[str], tmp_path: Path) -> None:
    process = fork(run_module, door, ["--help"], tmp_path / "log")
    process.join(240)
    told = (tmp_path / "log").read_text()
    assert told.startswith("usage: micota train ")
    assert "--profile" in told
    assert "pack_tokens = 16384" in told


def test_the_process_that_uploads_alone_needs_a_token(
    qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(train_config(qwen2_checkpoint, tmp_path), push_to_hub="org/name")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setenv("RANK", "1")
    preflight.check(config)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="`push_to_hub` needs a token"):
        preflight.check(config)
