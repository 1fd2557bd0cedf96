"""Runs what a checkpoint brings, its chat template and its tokenizer, in one process under limits (see `worker`)."""

import atexit
import contextlib
import itertools
import marshal
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from micota_fast.chat.worker import LENGTH
from micota_fast.errors import InputError

REMEDY = "do not use this checkpoint, or correct the file if it is yours"


class OverLimitError(InputError):
    """A template or a tokenizer takes more time or memory than any honest one does."""


class Allowance(NamedTuple):
    """What one command may take: seconds of CPU time over all threads, and bytes beyond what is held before it."""

    cpu_s: float
    memory_bytes: int


class LimitedProcess:
    """One process, started when it is first needed and again after a command has ended it. For any thread."""

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._dropped: deque[int] = deque()  # keys of handles that are gone
        self._forget()

    def _forget(self) -> None:
        """Have no process; after a fork, the parent keeps the one that there was."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._open: set[int] = set()

    def new_key(self) -> int:
        """Return a key that no other handle has."""
        return next(self._keys)

    def drop(self, key: int) -> None:
        """Have what this key names closed by a later command: this may be called in the middle of one."""
        self._dropped.append(key)

    def run(self, where: str, command: str, allowance: Allowance, *arguments: Any) -> Any:
        """Run a command of `worker`.

        Args:
            where: the file that is tried, for messages.
            command: its name.
            allowance: what it may take.
            arguments: its arguments, of types that can be marshalled.

        Raises:
            OverLimitError: it takes more than it may, or crashes the process.
            InputError: it refuses; the message is its own.
        """
        with self._exclusive():
            return self._ask(where, command, allowance, arguments)

    def run_on(
        self, handle: "Handle", command: str | None, allowance: Allowance, *arguments: Any, meanwhile: Callable[[], Any]
    ) -> Any:
        """Run a command on what a handle stands for; see `Handle`."""
        with self._exclusive():
            while self._dropped:
                key = self._dropped.popleft()
                if key in self._open:
                    self._open.remove(key)
                    self._ask(handle.where, "close", Allowance(1.0, 1 << 28), (key,))
            if handle.key not in self._open:
                self._ask(handle.where, *handle.opening, (handle.key, *handle.arguments), meanwhile)
                self._open.add(handle.key)
            return None if command is None else self._ask(handle.where, command, allowance, (handle.key, *arguments))

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._kill()  # something ended it between commands: no command is to blame
            try:
                yield
            except InputError:
                raise
            except BaseException:
                self._kill()  # an interrupted command must not answer for a later one
                raise

    def close(self) -> None:
        """End the process, if there is one; the next command starts another."""
        with self._lock:
            self._kill()

    def _ask(
        self,
        where: str,
        command: str,
        allowance: Allowance,
        arguments: tuple[Any, ...],
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> Any:
        process = self._process or self._start()
        assert process.stdin is not None
        message = marshal.dumps((command, *allowance, arguments))
        with contextlib.suppress(BrokenPipeError):  # it died; its closed stdout says so next
            process.stdin.write(LENGTH.pack(len(message)) + message)
            process.stdin.flush()
        try:
            meanwhile()
        except BaseException:
            self._kill()
            raise
        reply = _message(process)
        if reply is None:
            code = process.wait()
            self._kill()
            raise OverLimitError(f"{where}: {_why_ended(code, allowance)}; {REMEDY}")
        outcome, value = reply
        if outcome == "memory":
            raise OverLimitError(f"{where}: {_too_much(allowance)}; {REMEDY}")
        if outcome == "depth":
            raise OverLimitError(f"{where}: calls itself, or is nested, too deeply; {REMEDY}")
        if outcome == "refused":
            raise InputError(value)
        return value

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        process = subprocess.Popen(
            # -P: a module lying in the current directory must not stand in for one of ours
            [sys.executable, "-P", "-m", "micota_fast.chat.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "RUST_BACKTRACE": "0"},
            process_group=0,  # a Ctrl-C at the terminal reaches us alone; we decide what ends
        )
        self._process = process
        self._open.clear()
        if _message(process) is None:
            code = process.wait()
            self._kill()
            raise RuntimeError(f"the process for templates and tokenizers did not start (exit status {code})")
        return process

    def _kill(self) -> None:
        process, self._process = self._process, None
        self._open.clear()
        if process is None:
            return
        process.kill()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # what it had not read is of no use to it
            process.stdin.close()


def _message(process: subprocess.Popen[bytes]) -> tuple[str, Any] | None:
    """The next message of the process, or None if it ended without one."""
    assert process.stdout is not None
    header = process.stdout.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(header)
    content = process.stdout.read(size)
    if len(content) < size:
        return None
    message: tuple[str, Any] = marshal.loads(content)
    return message


def _why_ended(code: int, allowance: Allowance) -> str:
    if code == -signal.SIGPROF:
        return f"takes more than {allowance.cpu_s:.1f} s of CPU time"
    return f"{_too_much(allowance)}, or crashes the library that reads it (exit status {code})"


def _too_much(allowance: Allowance) -> str:
    return f"takes more than {allowance.memory_bytes >> 20} MiB of memory, or writes too long a text"


PROCESS = LimitedProcess()  # one for all checkpoints: starting it takes longer than most of what it does
atexit.register(PROCESS.close)
os.register_at_fork(after_in_child=PROCESS._forget)


class Handle:
    """A template or tokenizer that is open in the limited process; opened again if the process had to end.

    Args:
        where: its file, for messages.
        command: of `worker`, which opens it.
        allowance: of that command.
        arguments: of that command, after the key.
    """

    def __init__(self, where: str, command: str, allowance: Allowance, *arguments: Any) -> None:
        self.where, self.opening, self.arguments = where, (command, allowance), arguments
        self.key = PROCESS.new_key()

    def open(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        """Open it, and call `meanwhile` while that lasts. Raises as `LimitedProcess.run`."""
        PROCESS.run_on(self, None, Allowance(0, 0), meanwhile=meanwhile)

    def run(self, command: str, allowance: Allowance, *arguments: Any) -> Any:
        """Run a command of `worker` on it, with the key before the arguments. Raises as `LimitedProcess.run`."""
        return PROCESS.run_on(self, command, allowance, *arguments, meanwhile=lambda: None)

    def __del__(self) -> None:
        PROCESS.drop(self.key)
