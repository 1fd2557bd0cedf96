"""Something done to a training process at an exact moment: before an operation on a file, or before a call.

Each function is for `start_training(before=functools.partial(...))`, so it runs in the child, before training.
"""

import importlib
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Action = Callable[[], None]


def at_file(rank: int | None, pattern: str, action: Action, my_rank: int, nth: int = 1, later: int = 0) -> None:
    """Act before the `nth` operation on files that matches, or `later` operations after it, on `rank` (None: on all).

    Args:
        rank: where.
        pattern: regular expression for "EVENT ARGUMENT ..." as of Python's audit events: "os.mkdir .*\\.partial ".
        action: what to do; it is done once.
        my_rank: of this process.
        nth: which of the operations that match.
        later: operations of any kind between that and the action.
    """
    left = [nth, later]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if left[1] < 0 or not (event == "open" or event.startswith(("os.", "shutil."))):
            return
        if left[0] > 0:
            text = " ".join([event, *(str(argument) for argument in arguments), ""])
            if not re.match(pattern, text):
                return
            left[0] -= 1
        if left[0] == 0:
            left[1] -= 1
            if left[1] < 0:
                action()

    if rank in (None, my_rank):
        sys.addaudithook(hook)


def at_call(rank: int | None, place: str, action: Action, my_rank: int, nth: int = 1) -> None:
    """Act before the `nth` call of `place` ("module:function" or "module:Class.method") on `rank` (None: on all)."""
    if rank not in (None, my_rank):
        return
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, name)
    calls = 0

    def wrapper(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            action()
        return original(*args, **options)

    setattr(owner, name, wrapper)


def in_turn(all_of: tuple[Callable[..., None], ...], my_rank: int) -> None:
    """Several of these."""
    for one in all_of:
        one(my_rank=my_rank)


def wait_for(path: Path) -> None:
    """Wait until `path` is there."""
    while not path.exists():
        time.sleep(0.01)


def die() -> None:
    """SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(seconds: float) -> None:
    """SIGKILL after so many seconds, whatever is done meanwhile."""
    threading.Timer(seconds, die).start()


def interrupt() -> None:
    """SIGINT."""
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    """SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)


def warn() -> None:
    """SIGUSR1."""
    os.kill(os.getpid(), signal.SIGUSR1)


def insist() -> None:
    """SIGTERM and SIGUSR1, five times."""
    for _ in range(5):
        terminate()
        warn()


def fill(ballast: Path) -> None:
    """Fill the disk to the last byte with one file."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def limit(size: int) -> None:
    """Let no file of this process grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
