"""scripts/train*: real torchruns and trainers; a signal is a checkpoint, a lost machine joins, Slurm puts back."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.executables import executable
from helpers.paths import ROOT
from helpers.ports import free_port
from helpers.training_runs import checkpoint_steps, finish, metrics, result, start_training, train_config
from micota_fast.config.loader import dump
from micota_fast.config.train import TrainConfig

SCRIPTS = ROOT / "scripts"
STEPS = 60
WAIT_S = 240

# A path with a space, which a first line `#!` does not bear.
START = f"""#!/bin/sh
''':'
exec "{sys.executable}" "$0" "$@"
'''"""


@pytest.fixture(scope="module")
def uninterrupted(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """By two ranks; long enough for what is done in its midst, with the only checkpoint at its end."""
    folder = tmp_path_factory.mktemp("whole")
    config = train_config(qwen2_checkpoint, folder, max_steps=STEPS, epochs=99.0, checkpoint_every=STEPS)
    finish(start_training(config, world=2), config)
    return config


class Launcher:
    """Starts scripts and, in the end, kills what is left of them."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str | Path, **env: object) -> subprocess.Popen[bytes]:
        """In a process group of its own, as a shell would. Its output goes to `log`."""
        settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | {key: str(value) for key, value in env.items()}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*map(str, command)], env=os.environ | settings, stdout=log, stderr=log, process_group=0
            )
        self._started.append(process)
        return process

    def wait_until(self, condition: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            assert all(process.poll() is None for process in processes), self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.005)

    def status(self, process: subprocess.Popen[bytes]) -> int:
        return process.wait(WAIT_S)

    def close(self) -> None:
        for process in self._started:
            for child in _family(process.pid):
                child.kill()
            process.wait()


def _family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def trainers_of(pid: int) -> list[psutil.Process]:
    """torchrun, and the trainers that it has started."""
    found = []
    for process in _family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "micota_fast.train" in process.cmdline():
                found.append(process)
    return found


def torchrun_of(pid: int) -> psutil.Process:
    agents = [process for process in trainers_of(pid) if "torch.distributed.run" in process.cmdline()]
    return min(agents, key=lambda process: process.create_time())  # a child that it has just forked looks like it


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)  # whose parent, killed too, does not bury it
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path)
    yield made
    made.close()


def written(config: TrainConfig, folder: Path) -> Path:
    (folder / "config.yaml").write_text(dump(config))
    return folder / "config.yaml"


@pytest.mark.slow
def test_one_machine(uninterrupted: TrainConfig, tmp_path: Path, launcher: Launcher) -> None:
    config = replace(uninterrupted, out=str(tmp_path / "out"), lr=0.5)
    command: list[Any] = ["bash", SCRIPTS / "train.sh", written(config, tmp_path), "--set", f"lr={uninterrupted.lr}"]
    process = launcher.start(*command, NPROC=2)
    launcher.wait_until(lambda: len(trainers_of(process.pid)) == 3, process)
    trainers = trainers_of(process.pid)
    launcher.wait_until(lambda: len(metrics(config)) >= 2, process)
    process.terminate()
    assert launcher.status(process) == 0
    assert not any(map(_runs, trainers))
    text = launcher.log.read_text()
    assert f"$ {sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 -m micota_fast.train" in text
    assert "run the same command to resume" in text
    assert checkpoint_steps(config) == [len(metrics(config))]
    assert len(metrics(config)) < STEPS
    config = replace(config, lr=uninterrupted.lr)
    finish(start_training(config, world=2), config)
    assert result(config) == result(uninterrupted)


@pytest.mark.slow
def test_a_lost_machine_joins_again(uninterrupted: TrainConfig, tmp_path: Path, launcher: Launcher) -> None:
    config = replace(uninterrupted, out=str(tmp_path / "out"), checkpoint_every=3)
    config_file, port = written(config, tmp_path), free_port()

    def machine(rank: int) -> subprocess.Popen[bytes]:
        meeting = {"NNODES": 2, "NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC": 1}
        here = {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        return launcher.start("bash", SCRIPTS / "train_multinode.sh", config_file, **meeting, **here)

    first = machine(0)
    # torchrun's number 0 is that of the lower process id on one machine: the one that stays.
    launcher.wait_until(lambda: len(trainers_of(first.pid)) > 0, first)
    second = machine(1)
    launcher.wait_until(lambda: len(trainers_of(second.pid)) == 2, first, second)
    lost, agent = trainers_of(second.pid), torchrun_of(second.pid)
    launcher.wait_until(lambda: len(checkpoint_steps(config)) > 0, first, second)
    agent.kill()  # the trainer goes with it
    second.kill()
    launcher.wait_until(lambda: not any(map(_runs, lost)))
    again = machine(1)
    assert [launcher.status(process) for process in (first, again)] == [0, 0], launcher.log.read_text()
    assert "resuming after step" in launcher.log.read_text()
    assert result(config) == result(uninterrupted)


# A stand-in for the interpreter, which is asked whether it has the trainer and then to be torchrun: one worker, which
# notes the signals that it gets.
STUB = """#!/usr/bin/env python3
import os, signal, subprocess, sys, time
if sys.argv[1] == "-c":
    sys.exit(0)
if sys.argv[1] == "worker":
    def note(number, frame):
        print("worker:", signal.Signals(number).name, flush=True)
        if os.environ["STUBBORN"] == "no":
            sys.exit(0)
    signal.signal(signal.SIGUSR1, note)
    print("worker is ready", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.02)
    sys.exit(1)
sys.exit(subprocess.call([sys.argv[0], "worker"], start_new_session=True))
"""


def stub(folder: Path) -> Path:
    return executable(folder / "python", STUB)


@pytest.mark.slow
@pytest.mark.parametrize("stubborn", ["no", "yes"])
def test_ctrl_c(stubborn: str, tmp_path: Path, launcher: Launcher) -> None:
    """Asks for a checkpoint and ends with 130; a second one does not wait for it."""
    process = launcher.start("bash", SCRIPTS / "train.sh", "x.yaml", PYTHON=stub(tmp_path), NPROC=1, STUBBORN=stubborn)
    launcher.wait_until(lambda: "worker is ready" in launcher.log.read_text(), process)
    agent = torchrun_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    if stubborn == "yes":
        launcher.wait_until(lambda: launcher.log.read_text().count("worker: SIGUSR1") > 1, process)
        os.killpg(process.pid, signal.SIGINT)
    assert launcher.status(process) == 130
    assert "worker: SIGUSR1" in launcher.log.read_text()
    launcher.wait_until(lambda: not _runs(agent))  # and the trainer would end with it


@pytest.mark.parametrize("script", ["train.sh", "train_multinode.sh"])
def test_what_is_missing_is_said(script: str, tmp_path: Path) -> None:
    def error(*arguments: str, **env: str) -> str:
        command = ["bash", str(SCRIPTS / script), *arguments]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        return done.stderr

    assert f"bash scripts/{script} CONFIG.yaml" in error()
    here = {"NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "localhost"}
    assert "/bin/false cannot import torch and micota_fast" in error("x.yaml", PYTHON="/bin/false", **here)
    if script == "train_multinode.sh":
        assert "NODE_RANK is not set" in error("x.yaml", NNODES="2")


# What is used of Slurm. A step's signals go to each of its processes, torchrun among them.
SLURM = {
    "sbatch": """#!/usr/bin/env python3
import os, re, shutil, signal, subprocess, sys
here = os.environ["SLURM_HERE"]
options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", open(sys.argv[1]).read(), re.M))
assert options["signal"].startswith("B:USR1@") and "requeue" in options, options
shutil.copy(sys.argv[1], here + "/slurm_script")
starts = 0
while True:
    os.environ |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": os.getcwd(), "SLURM_RESTART_COUNT": str(starts)}
    os.environ |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node[1]"}
    job = subprocess.Popen(["bash", here + "/slurm_script", *sys.argv[2:]], process_group=0)
    open(here + "/batch.pid", "w").write(str(job.pid))
    status = job.wait()
    starts += 1
    if not os.path.exists(here + "/requeue"):
        sys.exit(status)
    os.remove(here + "/requeue")
""",
    "scontrol": """#!/usr/bin/env bash
case "$1 $2" in
    "show hostnames") [ "$3" = "node[1]" ] && echo 127.0.0.1 ;;
    "requeue 7") touch "$SLURM_HERE/requeue" ;;
    *) exit 1 ;;
esac
""",
    "srun": """#!/usr/bin/env python3
import os, signal, subprocess, sys
assert sys.argv[1] == "--kill-on-bad-exit=1"
task = subprocess.Popen(sys.argv[2:], env=os.environ | {"SLURM_NODEID": "0"}, start_new_session=True)
def pass_on(number, frame):
    import psutil
    for process in psutil.Process(task.pid).children(recursive=True) + [psutil.Process(task.pid)]:
        process.send_signal(number)
signal.signal(signal.SIGUSR1, pass_on)
signal.signal(signal.SIGTERM, pass_on)
sys.exit(task.wait())
""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, object]:
    """What a job's environment has beside the usual."""
    for name, text in SLURM.items():
        executable(tmp_path / "bin" / name, text.replace("#!/usr/bin/env python3", START))
    here = {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NPROC": 1, "MAX_RESTARTS": 0}
    return here | {"SLURM_HERE": tmp_path, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_slurm_puts_back_a_job_whose_time_is_over(
    uninterrupted: TrainConfig, tmp_path: Path, launcher: Launcher, slurm: dict[str, object]
) -> None:
    config = replace(uninterrupted, out=str(tmp_path / "out"))
    job = launcher.start("sbatch", SCRIPTS / "train.slurm", written(config, tmp_path), **slurm)
    launcher.wait_until(lambda: len(metrics(config)) >= 2, job)
    os.kill(int((tmp_path / "batch.pid").read_text()), signal.SIGUSR1)
    assert launcher.status(job) == 0, launcher.log.read_text()
    text = launcher.log.read_text()
    assert text.count("back into the queue") == 1, "a run that is finished is not put back"
    assert "job 7, start 2, 1 machines: node[1]" in text
    assert "resuming after step" in text
    assert (Path(config.out) / "summary.json").exists()
    assert [row["step"] for row in metrics(config)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("stubborn", "number", "status"), [("no", signal.SIGTERM, 0), ("yes", signal.SIGKILL, 137)])
def test_slurm_puts_nothing_else_back(
    stubborn: str, number: int, status: int, tmp_path: Path, launcher: Launcher, slurm: dict[str, object]
) -> None:
    """Neither what was cancelled nor what failed, whose status the job has."""
    job = launcher.start(
        "sbatch", SCRIPTS / "train.slurm", "x.yaml", **slurm | {"PYTHON": stub(tmp_path), "STUBBORN": stubborn}
    )
    launcher.wait_until(lambda: "worker is ready" in launcher.log.read_text(), job)
    if number == signal.SIGTERM:
        os.kill(int((tmp_path / "batch.pid").read_text()), number)
    else:  # the machine's torchrun
        torchrun_of(job.pid).kill()
    assert launcher.status(job) == status, launcher.log.read_text()
    assert "back into the queue" not in launcher.log.read_text()
