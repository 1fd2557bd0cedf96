"""A signal ends training after the step at hand, with a checkpoint, on all ranks alike; then it goes on bit for bit."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from helpers import moments
from helpers.training_runs import (
    checkpoint_steps,
    finish,
    kill,
    metrics,
    result,
    start_training,
    train_config,
    write_corpus,
)
from micota_fast.config.loader import dump
from micota_fast.config.train import TrainConfig
from micota_fast.train.signals import STOPPING, StopSignals
from micota_fast.train.world import World

STEPS = 16
WITHIN_S = 120  # alone it takes less than a second


@pytest.fixture(scope="module")
def uninterrupted(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("whole")
    held_out = write_corpus(folder / "held_out.jsonl", rows=3, seed=1)
    config = train_config(
        qwen2_checkpoint,
        folder,
        max_steps=STEPS,
        epochs=4,
        validation_data=str(held_out),
        validate_every=5,
        checkpoint_every=STEPS,  # of its own accord it saves only with the validations
    )
    finish(start_training(config, world=2), config)
    return config


@dataclass(frozen=True)
class Stop:
    """A signal and where it comes: how all ranks end, and after which step."""

    before: Any
    status: int
    step: int


SAVE = r"os\.mkdir .*\.step-\d+\.\w+\.partial "
STEP = "micota_fast.train.loop:clip_gradients"  # once in each
MEASURE = "micota_fast.train.validation:Validation.measure"
STOPS = {
    "SIGTERM to one rank, in a step": Stop(partial(moments.at_call, 1, STEP, moments.terminate, nth=2), 0, 2),
    "SIGUSR1 to all, in a step": Stop(partial(moments.at_call, None, STEP, moments.warn, nth=2), 0, 4),
    "SIGUSR1 to one rank, as it starts": Stop(
        partial(moments.at_call, 1, "micota_fast.train.loop:join_world", moments.warn), 0, 4
    ),
    "SIGTERM to all, in a validation": Stop(partial(moments.at_call, None, MEASURE, moments.terminate), 0, 5),
    "SIGINT to one rank": Stop(partial(moments.at_call, 0, STEP, moments.interrupt, nth=2), 130, 7),
    "SIGTERM and SIGUSR1, again and again": Stop(partial(moments.at_call, None, STEP, moments.insist, nth=2), 0, 9),
    "SIGTERM in the save that one asked for": Stop(
        partial(
            moments.in_turn,
            (
                partial(moments.at_call, 1, STEP, moments.terminate),
                partial(moments.at_file, 0, SAVE, moments.terminate),
            ),
        ),
        0,
        10,
    ),
}


@pytest.mark.slow
def test_stopped_again_and_again(uninterrupted: TrainConfig, tmp_path: Path) -> None:
    config = replace(uninterrupted, out=str(tmp_path / "out"))
    log = Path(f"{config.out}.log")
    for name, stop in STOPS.items():
        log.write_text("")
        processes = start_training(config, world=2, before=stop.before)
        for process in processes:
            process.join(WITHIN_S)
        statuses = [process.exitcode for process in processes]
        kill(processes)
        assert statuses == [stop.status] * 2, (name, log.read_text())
        assert checkpoint_steps(config)[-1] == len(metrics(config)) == stop.step, (name, log.read_text())
        assert "run the same command to resume" in log.read_text()
    last = partial(
        moments.in_turn,
        (
            partial(moments.at_call, 1, STEP, moments.terminate, nth=STEPS - stop.step),
            partial(moments.at_call, 0, "micota_fast.train.loop:export", moments.warn),
        ),
    )
    # After the last step, all that is left to do is done.
    finish(start_training(config, world=2, before=last), config)
    assert result(config) == result(uninterrupted)


def test_only_ctrl_c_and_only_the_third_ends_at_once() -> None:
    world = World(0, 1, torch.device("cpu"))
    handlers = [signal.getsignal(number) for number in STOPPING]
    with StopSignals() as stop:
        assert not stop.agreed(world)
        moments.insist()
        assert stop.agreed(world)
        assert not stop.by_hand
        moments.interrupt()
        moments.interrupt()
        assert stop.agreed(world)
        assert stop.by_hand
        with pytest.raises(KeyboardInterrupt):
            moments.interrupt()
    assert [signal.getsignal(number) for number in STOPPING] == handlers


@pytest.mark.slow
def test_sigterm_to_torchrun(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """It passes the signal on and waits; its own status is 1, whatever its workers' are."""
    config = train_config(qwen2_checkpoint, tmp_path, epochs=1e6, checkpoint_every=10**6)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command += ["-m", "micota_fast.train", str(path)]
    with (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while len(metrics(config)) < 3:
            assert agent.poll() is None
            time.sleep(0.02)
        children = psutil.Process(agent.pid).children(recursive=True)
        assert sum("micota_fast.train" in child.cmdline() for child in children) == 1
        agent.terminate()
        assert agent.wait(WITHIN_S) == 1
        _, left = psutil.wait_procs(children, timeout=WITHIN_S)
        assert not left
    finally:
        for process in psutil.Process().children(recursive=True):
            if "micota_fast.train" in process.cmdline():
                process.kill()
    text = (tmp_path / "log").read_text()
    assert "run the same command to resume" in text
    assert "SIGTERM: stopping after this step" in text
    assert checkpoint_steps(config) == [len(metrics(config))]
