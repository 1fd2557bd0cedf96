"""Children that never outlive us: real processes, killed for real."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.waiting import alive, soon, wait_for
from micota_fast.common import processes


def pid_in(file: Path) -> int:
    wait_for(lambda: file.exists() and file.read_text().strip())
    return int(file.read_text())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the kernel's death signal is Linux's")


def test_return_codes() -> None:
    assert processes.spawn(["sh", "-c", "exit 7"]).wait() == 7
    assert processes.spawn(["sh", "-c", "kill -9 $$"]).wait() == 128 + 9
    assert processes.spawn(["/no/such/program"], stderr=subprocess.DEVNULL).wait() == 127


def test_stop_ends_the_group_and_what_ignores_sigterm(tmp_path: Path) -> None:
    stubborn = f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done"
    process = processes.spawn(["bash", "-c", f'bash -c "{stubborn}" & wait'])
    pid = pid_in(tmp_path / "pid")
    with soon():
        processes.stop(process)
    assert not alive(pid)


def test_stragglers_end_after_a_normal_end(tmp_path: Path) -> None:
    script = f"(trap '' TERM; while :; do sleep 0.1; done) & echo $! > {tmp_path}/pid; exit 0"
    process = processes.spawn(["bash", "-c", script])
    pid = pid_in(tmp_path / "pid")
    assert process.wait() == 0
    assert not alive(pid)


def test_a_killed_guard_takes_the_command_with_it(tmp_path: Path) -> None:
    guard = processes.spawn(["bash", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 600"])
    pid = pid_in(tmp_path / "pid")
    guard.kill()
    wait_for(lambda: not alive(pid))
    guard.wait()


NESTED = """
import sys, time
sys.path.insert(0, {root!r})
from micota_fast.common import processes
inner = ["bash", "-c", "trap '' TERM; echo $$ > {folder}/inner; while :; do sleep 0.1; done"]
processes.spawn(inner)
time.sleep(600)
"""
OUTER = """
import os, sys, time
sys.path.insert(0, {root!r})
from micota_fast.common import processes
lock = open({folder!r} + "/lock", "wb")
os.set_inheritable(lock.fileno(), True)
processes.spawn([sys.executable, {folder!r} + "/nested.py"], pass_fds=(lock.fileno(),))
time.sleep(600)
"""


def test_sigkill_of_the_parent_ends_nested_groups_before_the_lock_is_free(tmp_path: Path) -> None:
    (tmp_path / "nested.py").write_text(NESTED.format(root=str(ROOT), folder=tmp_path))
    (tmp_path / "outer.py").write_text(OUTER.format(root=str(ROOT), folder=str(tmp_path)))
    outer = subprocess.Popen([sys.executable, str(tmp_path / "outer.py")])
    pid = pid_in(tmp_path / "inner")
    os.kill(outer.pid, signal.SIGKILL)
    outer.wait()
    lock = str(tmp_path / "lock")

    def held() -> bool:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if any(os.readlink(fd) == lock for fd in (process / "fd").iterdir()):
                    return True
            except OSError:
                continue
        return False

    assert held()
    wait_for(lambda: not held())
    assert not alive(pid)


def test_a_session_of_its_own_is_waited_for(tmp_path: Path) -> None:
    """As torchrun's workers: they leave the group, so only waiting keeps the lock for them."""
    leaves = f"setsid bash -c 'echo $$ > {tmp_path}/pid; sleep 1.5; echo end > {tmp_path}/end'"
    script = f"{leaves} & while [ ! -s {tmp_path}/pid ]; do sleep 0.05; done; exit 0"
    assert processes.spawn(["bash", "-c", script]).wait() == 0
    assert (tmp_path / "end").exists()
