"""A training run killed at any moment ends as the one that never was."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from training_runs import finish, kill, metrics, start_training, train_config, wait_until

from micota_fast.errors import InputError
from micota_fast.recipe import TrainConfig
from micota_fast.train import lock
from micota_fast.train.loop import train


def result(config: TrainConfig) -> tuple[bytes, list[dict[str, object]], dict[str, object]]:
    """Weights, metrics and summary, without what depends on the clock."""
    out = Path(config.out)
    summary = json.loads((out / "summary.json").read_text())
    del summary["timing"]
    assert not (out / "checkpoints").exists()
    return (out / "model" / "model.safetensors").read_bytes(), metrics(config), summary


def newest_step(config: TrainConfig) -> int:
    """Of the checkpoints; 0 without one."""
    steps = [int(p.name.removeprefix("step-")) for p in (Path(config.out) / "checkpoints").glob("step-*")]
    return max(steps, default=0)


@pytest.fixture(scope="module")
def uninterrupted(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = train_config(qwen2_checkpoint, tmp_path_factory.mktemp("whole"), max_steps=12, epochs=4)
    finish(start_training(config), config)
    assert [row["step"] for row in metrics(config)] == list(range(1, 13))
    return config


def test_sigkill_at_random_moments(uninterrupted: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4, checkpoint_every=2)
    rng = random.Random(7)
    resumed_from = set()
    for until in (1, 4, 7, 11):
        processes = start_training(config)
        wait_until(lambda until=until: len(metrics(config)) >= until, processes)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.02))
        kill(processes)
        resumed_from.add(newest_step(config))
    finish(start_training(config), config)
    assert len(resumed_from) > 2, f"the kills fell where they prove little: {resumed_from}"
    assert result(config) == result(uninterrupted)


def test_metrics_ahead_of_the_checkpoint_are_cut(
    uninterrupted: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4, checkpoint_every=5)
    processes = start_training(config)
    wait_until(lambda: len(metrics(config)) >= 8, processes)
    kill(processes)
    with (Path(config.out) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    finish(start_training(config), config)
    assert result(config) == result(uninterrupted)


def test_a_damaged_checkpoint_is_passed_over(
    uninterrupted: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4, checkpoint_every=3)
    processes = start_training(config)
    wait_until(lambda: newest_step(config) >= 6, processes)
    kill(processes)
    newest = sorted((Path(config.out) / "checkpoints").glob("step-*"))[-1]
    weights = newest / "rank-00000.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    weights.write_bytes(flipped)
    finish(start_training(config), config)
    log = Path(f"{config.out}.log").read_text()
    assert f"WARNING: {weights} is not what was written" in log
    assert "trying the checkpoint before it" in log
    assert result(config) == result(uninterrupted)


def test_killed_in_the_export(uninterrupted: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4)
    out = Path(config.out)
    out.mkdir()
    os.mkfifo(out / ".summary.json.part")  # nobody reads it: whoever goes on to write the summary waits here
    processes = start_training(config)
    wait_until((out / "model").exists, processes)
    time.sleep(0.2)
    assert processes[0].is_alive()
    kill(processes)
    (out / ".summary.json.part").unlink()
    assert not (out / "summary.json").exists()
    assert newest_step(config) == 12
    finish(start_training(config), config)
    assert result(config) == result(uninterrupted)


def test_killed_with_the_export_half_written(
    uninterrupted: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4)
    partial = Path(config.out) / ".model.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"torn")
    finish(start_training(config), config)
    assert not partial.exists()
    assert result(config) == result(uninterrupted)


def test_one_trainer_at_a_time(
    uninterrupted: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4)
    out = Path(config.out)
    out.mkdir()
    os.mkfifo(out / ".summary.json.part")
    first = start_training(config)
    wait_until((out / "model").exists, first)  # and it stays there
    monkeypatch.setattr(lock, "WAIT_S", 0.3)
    before = time.monotonic()
    with pytest.raises(InputError, match=r"another trainer is at work in .*\.lock"):
        train(config)
    assert time.monotonic() - before > 0.3
    # One that ends within the wait is waited for.
    monkeypatch.undo()
    second = start_training(config)
    time.sleep(1)
    (out / ".summary.json.part").unlink()
    kill(first)
    finish(second, config)
    assert result(config) == result(uninterrupted)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
def test_a_signal_leaves_a_checkpoint(
    number: signal.Signals, status: int, uninterrupted: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4, checkpoint_every=12)
    (process,) = start_training(config)
    wait_until(lambda: len(metrics(config)) >= 2, [process])
    process._popen._send_signal(number)  # type: ignore[attr-defined]
    process.join(60)
    log = Path(f"{config.out}.log").read_text()
    assert process.exitcode == status, log
    assert "the same command goes on from there" in log
    assert newest_step(config) == len(metrics(config)) >= 2
    finish(start_training(config), config)
    assert result(config) == result(uninterrupted)


def test_two_checkpoints_are_kept(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4, checkpoint_every=1)
    processes = start_training(config)
    wait_until(lambda: newest_step(config) >= 5, processes)
    kill(processes)
    assert len(list((Path(config.out) / "checkpoints").glob("step-*"))) in (2, 3)  # 3: killed before the removal


def test_an_unfinished_run_of_other_making_is_refused(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4, checkpoint_every=1)
    processes = start_training(config)
    wait_until(lambda: newest_step(config) >= 1, processes)
    kill(processes)
    with pytest.raises(InputError, match=r"options\.lr: 0\.001 there, 0\.002 here.*delete .* to start over"):
        train(train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4, lr=2e-3))
    (tmp_path / "corpus.jsonl").open("a").write('{"problem": "1 + 1", "completion": "2"}\n')
    with pytest.raises(InputError, match=r"unfinished run of other making \(documents: "):
        train(train_config(qwen2_checkpoint, tmp_path, max_steps=12, epochs=4))
