"""Two gloo ranks train as one process does, and as other numbers of ranks that go on where they were killed."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.training_runs import (
    checkpoint_steps,
    finish,
    kill,
    metrics,
    result,
    start_training,
    train_config,
    wait_until,
    weights_of,
    write_corpus,
)
from micota_fast.config.loader import dump
from micota_fast.config.train import MeshConfig, TrainConfig
from micota_fast.errors import InputError
from micota_fast.model.folder import resolve_checkpoint
from micota_fast.train.loop import train
from micota_fast.train.prepare import load_documents, run_identity
from micota_fast.train.world import World


def near(one: TrainConfig, other: TrainConfig) -> None:
    """Equal up to rounding, from the first step to the last."""
    assert len(metrics(one)) == len(metrics(other)) > 5
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert all(a[key] == b[key] for key in ("step", "epoch", "lr", "supervised", "tokens"))
    expected = weights_of(other)
    assert weights_of(one).keys() == expected.keys()
    for name, tensor in weights_of(one).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def two(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Trained by two ranks; the last step of an epoch has one pack for both."""
    config = train_config(qwen2_checkpoint, tmp_path_factory.mktemp("two"))
    finish(start_training(config, world=2), config)
    return config


def test_two_ranks_equal_one_process(two: TrainConfig, tmp_path: Path) -> None:
    one = replace(two, out=str(tmp_path / "one"))
    train(one)
    near(one, two)
    assert Path(f"{two.out}.log").read_text().count("attention: sdpa") == 1, "rank 0 alone speaks"


def test_two_ranks_equal_one_process_without_tied_embeddings(llama_checkpoint: Path, tmp_path: Path) -> None:
    one, two = (train_config(llama_checkpoint, tmp_path, out=str(tmp_path / name)) for name in ("one", "two"))
    train(one)
    finish(start_training(two, world=2), two)
    near(one, two)


@pytest.mark.slow
def test_two_killed_ranks_go_on_as_any_number(two: TrainConfig, tmp_path: Path) -> None:
    config = replace(two, out=str(tmp_path / "killed"), checkpoint_every=2)
    processes = start_training(config, world=2)
    wait_until(lambda: len(checkpoint_steps(config)) > 0, processes)
    kill(processes)
    done = len(metrics(config))
    assert done < len(metrics(two))
    layouts = {"1 processes": (1, 1), "4 processes": (4, 1), "4 processes and 2 copies of the model": (4, 2)}
    for name, (ranks, copies) in layouts.items():
        other = replace(config, out=str(tmp_path / f"{ranks}-{copies}"), mesh=MeshConfig(replicate=copies))
        shutil.copytree(config.out, other.out)
        finish(start_training(other, world=ranks), other)
        log = Path(f"{other.out}.log").read_text()
        assert f"resuming with {name}, but 2 processes wrote" in log
        assert "equal up to rounding" in log
        near(other, two)
    finish(start_training(config, world=2), config)
    assert result(config) == result(two), "by as many as before: bit for bit"


@pytest.mark.slow
def test_two_ranks_in_bfloat16(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """As one process, up to that type's rounding; killed, bit for bit as if never."""
    one, two, killed = (
        train_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / name), dtype="bfloat16")
        for name in ("one", "two", "killed")
    )
    train(one)
    finish(start_training(two, world=2), two)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.02)
    killed = replace(killed, checkpoint_every=2)
    processes = start_training(killed, world=2)
    wait_until(lambda: len(metrics(killed)) >= 5, processes)
    kill(processes[::-1])
    finish(start_training(killed, world=2), killed)
    assert "resuming after step" in Path(f"{killed.out}.log").read_text()
    assert result(killed) == result(two)


def test_a_worker_whose_agent_died_before_it_started_ends(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=1)
    (tmp_path / "config.yaml").write_text(dump(config))
    env = os.environ | {"MICOTA_DIE_WITH_PARENT": "1", "TORCHELASTIC_RUN_ID": "none"}
    command = [sys.executable, "-m", "micota_fast.train", str(tmp_path / "config.yaml")]
    # This process was not started with that variable, like whoever inherits an orphan.
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 1
    assert "the process that started this one is gone" in done.stderr
    assert not Path(config.out).exists()


def _other_documents(world: World, config: TrainConfig, folder: Path) -> None:
    own = replace(config, data=str(write_corpus(folder / f"corpus-{world.rank}.jsonl", seed=world.rank)))
    source = resolve_checkpoint(config.model)
    documents, _ = load_documents(own, source, folder, world)
    with pytest.raises(InputError, match=r"rank 1 reads other documents than rank 0: .*corpus-\d"):
        run_identity(own, source, documents, None, world)


def test_ranks_that_read_different_documents_are_refused(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(2, _other_documents, tmp_path / "log", train_config(qwen2_checkpoint, tmp_path), tmp_path)
