"""Children that never outlive us: process groups that end with their parent, however the parent ends.

Two means, each for what it can do:

- `die_with_parent()` is called *by a child of ours* at its start: the kernel then signals it when its parent dies.
- `spawn()` starts *any* command, which knows nothing of us, behind a small guard process (this file, run as a script).
  The guard starts the command in a process group, takes the whole group down when we stop it or die, also by SIGKILL,
  and ends last. Engines that start workers of their own (tensor parallel ranks, schedulers) go with it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
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

    Returns the guard's Popen: its return code is the command's (128 + n if signal n ended it, 127 if it could not
    be started), and it ends only after everything that the command has started has ended. The guard, not the command,
    inherits `pass_fds`: a lock among them is held until then. End it with `stop()`.
    """
    guard = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(os.getpid()), *command]
    return subprocess.Popen(
        guard,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        process_group=0,  # a Ctrl-C at the terminal reaches us alone; we decide what ends
        pass_fds=pass_fds,
    )


def stop(process: subprocess.Popen[bytes], grace_s: float = 2 * GUARD_GRACE_S + 5) -> int:
    """End a process started by `spawn` and all it has started: SIGTERM, and SIGKILL after GUARD_GRACE_S seconds.

    Returns the return code. Does no harm to a process that has already ended.
    """
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


class _Guard:
    """Body of the guard process: runs the command, and outlives all that comes of it.

    The command leads a group of its own. Descendants that leave it (a nested guard, torchrun's workers) become children
    of this process when their parent dies (PR_SET_CHILD_SUBREAPER) and are waited for too.
    """

    def __init__(self, parent_pid: int, command: list[str]) -> None:
        self.parent_pid, self.command = parent_pid, command
        self.group: int | None = None
        self.stopping = False
        self.alarms = 0

    def run(self) -> int:
        """Run the command and return its exit status."""
        # The handlers come before the death signal, which may be due at once.
        signal.signal(signal.SIGALRM, self._on_alarm)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._take_down)
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        die_with_parent(self.parent_pid, signal.SIGTERM)
        try:
            # The death signal is for the case that this guard itself is killed. One thread only: preexec_fn is safe.
            process = subprocess.Popen(self.command, process_group=0, preexec_fn=die_with_parent)
        except OSError as error:
            print(f"cannot start {self.command[0]}: {error}", file=sys.stderr)
            return 127
        self.group = process.pid
        if self.stopping:  # the signal came while the command was being started
            self._signal_group(signal.SIGTERM)
        status = process.wait()
        self._take_down(signal.SIGTERM, None)  # what the command has left behind
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
        return status if status >= 0 else 128 - status

    def _take_down(self, _number: int, _frame: FrameType | None) -> None:
        if not self.stopping:
            self.stopping = True
            signal.setitimer(signal.ITIMER_REAL, GUARD_GRACE_S, GUARD_GRACE_S)
        self._signal_group(signal.SIGTERM)

    def _on_alarm(self, _number: int, _frame: FrameType | None) -> None:
        self.alarms += 1
        self._signal_group(signal.SIGKILL)
        if self.alarms > 2:  # descendants outside the group had their time, too
            os._exit(128 + signal.SIGKILL)

    def _signal_group(self, number: int) -> None:
        if self.group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.group, number)


if __name__ == "__main__":
    sys.exit(_Guard(int(sys.argv[1]), sys.argv[2:]).run())
