"""A training run killed at any moment, with damaged checkpoints or on a full disk, ends as the one that never was."""

import json
import random
import re
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from helpers import moments
from helpers.disks import small_file_system
from helpers.training_runs import (
    checkpoint_steps,
    finish,
    flip,
    kill,
    metrics,
    result,
    start_training,
    train_config,
    wait_until,
    write_corpus,
)
from micota_fast.config.train import TrainConfig
from micota_fast.errors import InputError
from micota_fast.train import prepare
from micota_fast.train.loop import train

STEPS = 40
SURVIVORS_END_S = 240  # alone it takes less than a second
STEP = "micota_fast.train.loop:clip_gradients"  # once in each


def run_config(checkpoint: Path, folder: Path, **options: Any) -> TrainConfig:
    """Forty steps with a checkpoint every second one; the weights kept are those of the lowest validation loss.

    The model soon learns sums, and soon unlearns the words that some of the held-out rows consist of.
    """
    held_out = write_corpus(folder / "held_out.jsonl", rows=4, seed=1)
    words = json.dumps({"problem": "a b c", "completion": "the quick fox answered with words " * 2})
    with held_out.open("a") as file:
        file.write(f"{words}\n{words}\n")
    settings = {"max_steps": STEPS, "epochs": 10, "checkpoint_every": 2, "validate_every": 4, "early_stop": STEPS}
    settings |= {"lr": 0.01, "validation_data": str(held_out)}
    return train_config(checkpoint, folder, **{**settings, **options})


@pytest.fixture(scope="module")
def uninterrupted(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """By two ranks."""
    config = run_config(qwen2_checkpoint, tmp_path_factory.mktemp("whole"))
    finish(start_training(config, world=2), config)
    assert [row["step"] for row in metrics(config)] == list(range(1, STEPS + 1))
    assert best_step(config) < STEPS - 8
    return config


@pytest.fixture(scope="module")
def one_rank(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The same by one."""
    config = run_config(qwen2_checkpoint, tmp_path_factory.mktemp("one"))
    finish(start_training(config), config)
    return config


def best_step(config: TrainConfig) -> int:
    """By the validation loss."""
    rows = [row for row in metrics(config) if "validation_loss" in row]
    return int(min(rows, key=lambda row: float(row["validation_loss"]))["step"])


def same(config: TrainConfig, expected: TrainConfig) -> None:
    """Bit for bit, and nothing lies about that the other run did not leave."""
    assert result(config) == result(expected)


@dataclass(frozen=True)
class Kill:
    """Who is killed, and when: before an operation on files that `at` matches (or `later` ones after it), or at random.

    `rank` is killed, and with `everyone` the others as soon as it is dead; otherwise they are left to themselves.
    """

    rank: int
    everyone: bool = False
    at: str | None = None
    nth: int = 1
    later: int = 0


SAVE = r"open .*\.step-\d+\.\w+\.partial/rank-0000"
MANIFEST = r"open .*\.step-\d+\.\w+\.partial/\.manifest\.json\.\w+\.tmp "
PUBLISH = r"os\.rename .*\.step-\d+\.\w+\.partial .*/step-\d+ "
REMOVE = r"os\.rename .*/step-\d+ .*\.partial "
EXPORT = r"os\.mkdir .*\.model\.\w+\.partial "
MODEL = r"os\.rename .*\.model\.\w+\.partial "
SUMMARY = r"os\.rename .*\.summary\.json\.\w+\.tmp "
KILLS = [
    Kill(0),
    Kill(1, at=SAVE),
    Kill(0, at=SAVE, everyone=True, nth=2),
    Kill(1, everyone=True),
    Kill(0, at=PUBLISH),
    Kill(0, at=PUBLISH, later=1),
    Kill(1),
    Kill(0, at=PUBLISH, later=1, nth=2, everyone=True),
    Kill(0, at=MANIFEST, nth=2),
    Kill(0, everyone=True),
    Kill(0, at=REMOVE, later=2),
    Kill(1, at=SAVE, nth=3),
    Kill(0, at=REMOVE, later=1, everyone=True),
    Kill(0, at=EXPORT, later=1),
    Kill(0, at=EXPORT, later=6, everyone=True),
    Kill(1, at=r"open .*step-.*/rank-00001\.safetensors", later=2),  # as it checks its part of the last checkpoint
    Kill(0, at=MODEL),
    Kill(0, at=MODEL, later=1),
    Kill(0, at=SUMMARY),
    Kill(0, at=SUMMARY, later=6, everyone=True),  # in the middle of deleting the checkpoints
]


def strike(kill_: Kill, config: TrainConfig, rng: random.Random) -> None:
    """Start, kill as said, and see the others end by themselves.

    A connection that is lost before the moment comes, which happened once in a sandbox's network, is one interruption
    more; the kill is tried once more.
    """
    log = Path(f"{config.out}.log")
    if kill_.at is None:
        # Later than it meets the others: torchrun, who watches over that, is not here.
        die = partial(moments.die_in, rng.uniform(0, 0.05))
        before = partial(moments.at_call, kill_.rank, STEP, die, nth=rng.randrange(2, 7))
    else:
        before = partial(moments.at_file, kill_.rank, kill_.at, moments.die, nth=kill_.nth, later=kill_.later)
    for _ in range(2):
        begin = log.stat().st_size if log.exists() else 0
        processes = start_training(config, world=2, before=before)
        victim = processes[kill_.rank]
        victim.join(240)
        if victim.exitcode == -signal.SIGKILL and kill_.everyone:
            kill(processes)
        survive(processes)
        said = log.read_bytes()[begin:].decode()
        if victim.exitcode == -signal.SIGKILL:
            return
        errors = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", said, re.MULTILINE)
        raised = all(process.exitcode == 1 for process in processes)  # nobody was killed, or died without a word
        if not raised or not all("gloo" in error for error in errors):
            break
        warnings.warn(f"a lost connection was faster than {kill_}: {said[-2000:]}", stacklevel=1)
    pytest.fail(f"{kill_} ended with {victim.exitcode}: {said[-6000:]}")


def survive(processes: list[BaseProcess]) -> None:
    """Those that are not killed notice it, and end by themselves and not as if all were well."""
    for process in processes:
        process.join(SURVIVORS_END_S)
    hanging = [process for process in processes if process.exitcode is None]
    kill(hanging)
    assert not hanging
    assert all(process.exitcode for process in processes)


@pytest.mark.slow
def test_twenty_kills(uninterrupted: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """Rank 0, the other, both; at random, in saves, right after renames, in the export. One checkpoint is damaged."""
    config = run_config(qwen2_checkpoint, tmp_path)
    rng = random.Random(7)
    assert len(KILLS) == 20
    damaged = False
    for number, kill_ in enumerate(KILLS):
        strike(kill_, config, rng)
        steps = checkpoint_steps(config)
        if number > 5 and len(steps) > 1 and not damaged:
            newest = Path(config.out) / "checkpoints" / f"step-{steps[-1]:08d}"
            flip(newest / "rank-00001.safetensors")
            damaged = True
    assert damaged
    finish(start_training(config, world=2), config)
    log = Path(f"{config.out}.log").read_text()
    assert "trying the checkpoint before it" in log
    resumed = {line for line in log.splitlines() if line.startswith("resuming after step")}
    assert len(resumed) >= 5, "the kills fell where they prove little"
    same(config, uninterrupted)


def test_of_four_ranks_three_survive_and_end(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(qwen2_checkpoint, tmp_path)
    processes = start_training(config, world=4, before=partial(moments.at_call, 2, STEP, moments.die, nth=7))
    survive(processes)
    assert checkpoint_steps(config), "what was saved is still there"


def test_metrics_ahead_of_the_checkpoint_are_cut(one_rank: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(qwen2_checkpoint, tmp_path, checkpoint_every=3)
    (process,) = start_training(config, before=partial(moments.at_call, 0, STEP, moments.die, nth=9))
    process.join(240)
    assert len(metrics(config)) == 8
    with (Path(config.out) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    finish(start_training(config), config)
    same(config, one_rank)


@pytest.mark.slow
def test_one_trainer_at_a_time(
    one_rank: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(qwen2_checkpoint, tmp_path)
    go = tmp_path / "go"
    first = start_training(config, before=partial(moments.at_file, 0, SUMMARY, partial(moments.wait_for, go)))
    wait_until((Path(config.out) / "model").exists, first)  # and it stays there
    monkeypatch.setattr(prepare, "TRAINER_ENDS_S", 0.3)
    before = time.monotonic()
    with pytest.raises(InputError, match=r"another trainer holds .*out/\.lock"):
        train(config)
    assert time.monotonic() - before > 0.3
    # One that ends within the wait is waited for.
    monkeypatch.undo()
    second = start_training(config)
    time.sleep(1)
    go.touch()
    kill(first)
    finish(second, config)
    same(config, one_rank)


def test_the_newest_two_and_the_best_are_kept_and_the_best_is_exported(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(qwen2_checkpoint, tmp_path)
    (process,) = start_training(config, before=partial(moments.at_file, 0, EXPORT, moments.die))
    process.join(240)
    best, last = best_step(config), STEPS
    assert checkpoint_steps(config) == [best, last - 2, last]
    assert {path.name[:5] for path in (Path(config.out) / "checkpoints").iterdir()} == {"run.j", "step-"}
    # The best one damaged: that is said, and the best of the others taken.
    flip(Path(config.out) / "checkpoints" / f"step-{best:08d}" / "rank-00000.safetensors")
    finish(start_training(config), config)
    assert f"step-{best:08d} was the best; trying the best of the others" in Path(f"{config.out}.log").read_text()
    loss = metrics(config)[-1]["validation_loss"]
    card = (Path(config.out) / "model" / "README.md").read_text()
    assert f"| step | {last} |\n| validation_loss | {loss} |" in card


def test_an_unfinished_run_of_other_making_is_refused(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(qwen2_checkpoint, tmp_path)
    survive(start_training(config, world=2, before=partial(moments.at_call, 1, STEP, moments.die, nth=5)))
    assert checkpoint_steps(config)
    other = replace(config, lr=2e-3)
    refused = start_training(other, world=2)
    for process in refused:
        process.join(240)
        assert process.exitcode == 2, "every rank says so"
    log = Path(f"{config.out}.log").read_text()
    assert "options.lr: 0.01 there, 0.002 here" in log
    assert f"choose another `out`, or delete {config.out} to start over" in log
    (tmp_path / "corpus.jsonl").open("a").write('{"problem": "1 + 1", "completion": "2"}\n')
    with pytest.raises(InputError, match=r"unfinished run with different settings.*\(documents: "):
        train(config)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB: room for three checkpoints of 1 MB and the model of 0.3 MB."""
    with small_file_system(tmp_path / "disk", "8m") as disk:
        yield disk


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(
    uninterrupted: TrainConfig, qwen2_checkpoint: Path, tmp_path: Path, small_disk: Path
) -> None:
    (small_disk / "out").mkdir()
    (tmp_path / "out").symlink_to(small_disk / "out")  # the log stays out here
    config = run_config(qwen2_checkpoint, tmp_path)
    ballast = small_disk / "ballast"
    fill = partial(moments.fill, ballast)
    moment_and_message = [
        (
            partial(moments.at_call, 0, "micota_fast.train.meters:Meters.report", fill),
            r"cannot write .*metrics.jsonl: No space left on device \([\d,]+ bytes to write, 0 free\)",
        ),
        (
            partial(moments.at_call, 0, "micota_fast.train.checkpoint:Checkpoints.save", fill, nth=4),
            r"step-0000000\d could not be saved: it needs [\d,]+ bytes and 0 are free on the disk of .*checkpoints",
        ),
        (
            partial(moments.at_file, 1, SAVE, partial(moments.limit, 50_000), nth=2),  # in the middle of a file
            r"step-000000\d\d could not be saved: cannot write .*rank-00001.safetensors: File too large "
            r"\([\d,]+ bytes to write, [\d,]+ free\)",
        ),
        (
            partial(moments.at_call, 0, "micota_fast.train.loop:export", fill),
            r"out/model \(\d+,\d+ bytes of weights\) could not be written: it needs \d+,\d+ bytes and 0 are free",
        ),
        (
            partial(moments.at_file, 0, EXPORT, fill, later=1),
            r"out/model \(\d+,\d+ bytes of weights\) could not be written: .*No space left on device",
        ),
        (
            partial(moments.at_file, 0, r"open .*/\.summary\.json\.\w+\.tmp ", fill),
            r"cannot write .*summary.json: No space left on device \(0 free\)",
        ),
    ]
    log = Path(f"{config.out}.log")
    for before, message in moment_and_message:
        there = checkpoint_steps(config)
        processes = start_training(config, world=2, before=before)
        for process in processes:
            process.join(240)
        text = log.read_text()
        assert [process.exitcode for process in processes] == [2, 2], text
        assert re.search(message, text), (message, text)
        assert "the same command" in text
        assert len(checkpoint_steps(config)) >= min(len(there), 2)
        ballast.unlink(missing_ok=True)
        log.unlink()
    finish(start_training(config, world=2), config)
    same(config, uninterrupted)
