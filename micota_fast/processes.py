"""Children that never outlive us: process groups that end with their parent, however the parent ends.

Two means, each for what it can do:

- `die_with_parent()` is called *by a child of ours* at its start: the kernel then signals it when its parent dies.
- `spawn()` starts *any* command, which knows nothing of us, behind a small guard process (this file, run as a script).
  The guard leads a process group, starts the command inside it, and takes the whole group down when we stop it or die,
  also by SIGKILL. Engines that start workers of their own (tensor parallel ranks, schedulers) go with it.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

PR_SET_PDEATHSIG = 1  # linux/prctl.h
GUARD_GRACE_S = 5.0  # between the guard's SIGTERM and its SIGKILL to the group


def die_with_parent(parent_pid: int | None = None, signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send `signal_number` to this process when its parent dies (Linux; elsewhere it does nothing).

    The kernel watches the *thread* that started us (prctl(2), PR_SET_PDEATHSIG): start such children from a thread that
    lives as long as they should, the main thread if in doubt. The setting survives `exec` and is cleared by `fork`.

    Args:
        parent_pid: the parent's process id as the parent knew it. When given, a parent that died before this call is
            noticed too, and this process ends at once.
        signal_number: the signal to receive.

    Raises:
        OSError: the kernel refused.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent_pid is not None and os.getppid() != parent_pid:
        sys.exit(128 + signal_number)


def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start `command` in a process group of its own that ends with this process.

    Returns the guard's Popen: its pid is the group's id, its return code the command's (128 + n where signal n ended
    it, 127 where it could not be started). End it with `stop()`. The guard, not the command, inherits `pass_fds`: a
    lock among them is held until the last of the group is gone.
    """
    guard = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *command]
    return subprocess.Popen(
        guard,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        process_group=0,
        pass_fds=pass_fds,
    )


def stop(process: subprocess.Popen[bytes], grace_s: float = 10.0) -> int:
    """End a process started by `spawn` and its whole group: SIGTERM, then SIGKILL after `grace_s` seconds.

    Returns the return code. Does no harm to a process that has already ended.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode


def _guard(parent_pid: int, command: list[str]) -> int:
    """Body of the guard process: run `command` in our group, take the group down with us. Returns the exit status."""
    stopping = False

    def take_down(_signal_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            signal.setitimer(signal.ITIMER_REAL, GUARD_GRACE_S)
            os.killpg(0, signal.SIGTERM)  # reaches this process too: `stopping` ends the echo

    def kill_group(_signal_number: int, _frame: FrameType | None) -> None:
        os.killpg(0, signal.SIGKILL)

    # The handlers come before the death signal, which may be due at once.
    signal.signal(signal.SIGALRM, kill_group)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, take_down)
    die_with_parent(parent_pid, signal.SIGTERM)
    try:
        status = subprocess.Popen(command).wait()
    except OSError as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr)
        return 127
    stopping = True
    os.killpg(0, signal.SIGTERM)  # what the command has left behind
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), sys.argv[2:]))
