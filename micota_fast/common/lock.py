"""One process at a time in a place: a lock that the kernel drops with its holder, however that ends."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from micota_fast.common.files import require_folder, writing
from micota_fast.errors import InputError

RUN_ENDS_S = 30.0  # what a killed run has started has up to 3 * processes.GUARD_GRACE_S to end
POLL_S = 0.05


@contextlib.contextmanager
def locked(
    path: Path, who: str, wait_s: float = 0.0, say: Callable[[str], None] = lambda text: None
) -> Iterator[IO[bytes]]:
    """Hold `path`, a file that is made with its folder if missing, by flock(2).

    The lock is free when the last process that has the file open is gone. Guards of processes (`processes.spawn`) that
    inherit the yielded file end last, so a run holds its lock until all that it has started has ended. The holder may
    remove the file; whoever waits for it makes it anew.

    Args:
        path: of the lock file.
        who: holds it, such as "trainer", for the message to another one.
        wait_s: seconds to wait for another holder.
        say: called with a message when a wait begins.

    Raises:
        InputError: another one holds it for `wait_s` seconds, or the file cannot be made.
    """
    started = time.monotonic()
    told = False
    while True:
        with open(_open(path), "r+b", buffering=0) as file:
            free = _take(file, path)
            if free and _is_at(path, file):
                yield file
                return
        if free:
            continue  # a former holder removed the file between our opening and locking it
        if time.monotonic() - started >= wait_s:
            raise InputError(f"another {who} holds {path}; wait for it to end, or choose another place")
        if not told:
            say(f"waiting for another {who} to end, which holds {path}")
            told = True
        time.sleep(POLL_S)


def _open(path: Path) -> int:
    require_folder(path.parent)
    with writing(path):
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                if path.parent.is_dir():  # else a former holder has removed it in between
                    raise


def _take(file: IO[bytes], path: Path) -> bool:
    """Lock the file; False if another one holds it."""
    with writing(path):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _is_at(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
