"""Where the time goes: phases that add up to the clock's time, memory, and traces."""

import gzip
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.training_runs import metrics, train_config, write_corpus
from micota_fast.config.loader import dump
from micota_fast.config.train import TrainConfig
from micota_fast.train.loop import train
from micota_fast.train.stopwatch import Stopwatch


def test_phases_add_up_and_the_one_at_hand_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    assert watch.read() == {}
    for phase in ("data", "forward", "data", "report"):
        watch.lap(phase)
    assert watch.read() == {"data": 2.0 + 4.0, "forward": 3.0, "report": 5.0}
    assert watch.read() == {"report": 6.0}


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 0.01 s whenever it is read: what lies between two readings is as long on any machine."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) * 0.01)


def timings(config: TrainConfig) -> list[dict[str, Any]]:
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["timing"] for line in lines]


@pytest.mark.usefixtures("ticking")
def test_a_runs_phases_add_up_to_its_time(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    held_out = write_corpus(tmp_path / "held-out.jsonl", rows=3, seed=1)
    options = {"checkpoint_every": 3, "validation_data": str(held_out), "validate_every": 5}
    config = train_config(qwen2_checkpoint, tmp_path, epochs=3, **options)
    train(config)
    rows = timings(config)
    phases = [set(row["phase_s"]) for row in rows]
    always = {"data", "forward", "backward", "optimizer", "report"}
    # A step's row is written before its checkpoint, whose time is in the next one.
    for step, names in enumerate(phases, start=1):
        saved = step > 1 and ((step - 1) % 3 == 0 or (step - 1) % 5 == 0)
        measured = step % 5 == 0 or step == len(rows)
        assert names == always | ({"checkpoint"} if saved else set()) | ({"validation"} if measured else set())
    assert all(seconds >= 0 for row in rows for seconds in row["phase_s"].values())
    whole = sum(seconds for row in rows for seconds in row["phase_s"].values())
    assert whole == pytest.approx(rows[-1]["seconds"], abs=0.1)
    assert all(0.05 < row["memory_gb"]["peak"] < 100 for row in rows)
    assert rows[-1]["memory_gb"]["peak"] >= rows[0]["memory_gb"]["peak"]


@pytest.mark.usefixtures("ticking")
def test_rows_that_are_reported_together_share_their_timing(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, epochs=3, log_every=4, checkpoint_every=100)
    train(config)
    rows = timings(config)
    assert len(rows) == 12
    groups = [rows[first : first + 4] for first in range(0, 12, 4)]
    assert all(group[0] == row for group in groups for row in group)
    whole = sum(seconds for group in groups for seconds in group[0]["phase_s"].values())
    assert whole == pytest.approx(rows[-1]["seconds"], abs=0.1)


@pytest.mark.slow
def test_profile_writes_a_trace_a_rank(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=5)
    (tmp_path / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "micota_fast.train", str(tmp_path / "config.yaml"), "--profile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = Path(config.out) / "profile"
    assert f"profile: {folder}" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["rank-00000.json.gz", "rank-00001.json.gz"]
    for path in folder.iterdir():
        names = [event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
        assert names.count("micota::linear_cross_entropy") == 2, "two steps of one pack"
        assert names.count("micota::cpu_attention_backward") == 2 * 2
        assert sum(name.startswith("ProfilerStep#") for name in names) >= 2


def test_a_profile_changes_nothing_and_says_where_it_is_missing(
    qwen2_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=3)
    earlier = Path(config.out) / "profile" / "rank-00000.json.gz"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"of an earlier start")
    train(config, profile=True)
    assert "WARNING: the run had too few steps left for a profile: four are needed" in capsys.readouterr().out
    assert earlier.read_bytes() == b"of an earlier start"
    plain = train_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / "plain"), max_steps=3)
    train(plain)
    assert "perfetto" not in capsys.readouterr().out
    assert not (tmp_path / "plain" / "profile").exists()
    assert metrics(config) == metrics(plain)
