"""Two gloo ranks train as one process does."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training_runs import finish, kill, metrics, start_training, train_config, wait_until

from micota_fast.config import dump
from micota_fast.recipe import TrainConfig
from micota_fast.train.loop import train


def weights_of(config: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.out) / "model" / "model.safetensors")


@pytest.fixture(scope="module", params=["qwen2", "llama"])  # tied embeddings, and not
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainConfig]:
    """The same run on one process and on two; the last step of an epoch has one pack for two ranks."""
    checkpoint = request.getfixturevalue(f"{request.param}_checkpoint")
    folder = tmp_path_factory.mktemp("pair")
    one, two = (train_config(checkpoint, folder, out=str(folder / name)) for name in ("one", "two"))
    train(one)
    if request.param == "qwen2":
        under_torchrun(two, folder / "two.yaml")
    else:
        finish(start_training(two, world=2), two)
    return one, two


def under_torchrun(config: TrainConfig, path: Path) -> None:
    path.write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "micota_fast.train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attention: sdpa") == 1, "rank 0 alone speaks"


def test_loss_curve_equals_that_of_one_process(pair: tuple[TrainConfig, TrainConfig]) -> None:
    one, two = (metrics(config) for config in pair)
    assert len(one) == len(two) > 5
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert all(a[key] == b[key] for key in ("step", "epoch", "lr", "supervised", "tokens"))


def test_weights_equal_those_of_one_process(pair: tuple[TrainConfig, TrainConfig]) -> None:
    one, two = (weights_of(config) for config in pair)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_ranks_resume_bitwise(dtype: str, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    whole = train_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / "whole"), dtype=dtype)
    finish(start_training(whole, world=2), whole)
    config = train_config(qwen2_checkpoint, tmp_path, dtype=dtype, checkpoint_every=2)
    processes = start_training(config, world=2)
    wait_until(lambda: len(metrics(config)) >= 5, processes)
    kill(processes[::-1])
    finish(start_training(config, world=2), config)
    assert "going on after step" in Path(f"{config.out}.log").read_text()
    assert metrics(config) == metrics(whole)
    expected = weights_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(config).items())


@pytest.mark.parametrize("ranks", [1, 4])
def test_two_killed_ranks_go_on_as_another_number(
    ranks: int, pair: tuple[TrainConfig, TrainConfig], tmp_path: Path
) -> None:
    whole = pair[1]
    config = replace(whole, out=str(tmp_path / "out"), checkpoint_every=2)
    processes = start_training(config, world=2)
    wait_until(lambda: any((tmp_path / "out" / "checkpoints").glob("step-*")), processes)
    kill(processes)
    done = len(metrics(config))
    assert done < len(metrics(whole))
    finish(start_training(config, world=ranks), config)
    log = Path(f"{config.out}.log").read_text()
    assert f"going on with {ranks} processes where 2 processes wrote" in log
    assert "equal up to rounding" in log
    for a, b in zip(metrics(config), metrics(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    expected = weights_of(whole)
    for name, tensor in weights_of(config).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)


def test_two_ranks_in_bfloat16_equal_one(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    one, two = (
        train_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / name), dtype="bfloat16") for name in ("one", "two")
    )
    train(one)
    finish(start_training(two, world=2), two)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.02)


def test_workers_die_with_a_killed_agent(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, epochs=1e6)
    agent = start_agent(config, tmp_path / "config.yaml")
    try:
        while len(metrics(config)) < 3:
            assert agent.poll() is None
            time.sleep(0.05)
        workers = psutil.Process(agent.pid).children(recursive=True)
        assert len(workers) == 2
        agent.kill()
        _, alive = psutil.wait_procs(workers, timeout=5)
        assert not alive
    finally:
        end_family(agent)


def test_a_worker_whose_agent_died_before_it_started_ends(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=1)
    (tmp_path / "config.yaml").write_text(dump(config))
    env = os.environ | {"MICOTA_DIE_WITH_PARENT": "1", "TORCHELASTIC_RUN_ID": "none"}
    command = [sys.executable, "-m", "micota_fast.train", str(tmp_path / "config.yaml")]
    # This process was not started with that variable, like whoever inherits an orphan.
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "the process that started this one is gone" in done.stderr
    assert not Path(config.out).exists()


def start_agent(config: TrainConfig, path: Path) -> subprocess.Popen[bytes]:
    """torchrun with two workers, as the pipeline starts it."""
    path.write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "micota_fast.train", str(path)]
    return subprocess.Popen(command, env=os.environ | {"MICOTA_DIE_WITH_PARENT": "1"}, stderr=subprocess.DEVNULL)


def end_family(agent: subprocess.Popen[bytes]) -> None:
    """Kill what is left of it, whatever the test came to."""
    if agent.poll() is None:
        for process in psutil.Process(agent.pid).children(recursive=True):
            process.kill()
        agent.kill()
    agent.wait()
