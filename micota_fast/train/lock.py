"""One trainer at a time in an output folder."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from micota_fast.errors import InputError
from micota_fast.train.world import World

WAIT_S = 10.0  # a trainer that was killed a moment ago may still be going


@contextmanager
def only_trainer(out: Path, world: World) -> Iterator[None]:
    """Make `out` and hold OUT/.lock (flock(2), by rank 0, until the block or the process ends) on behalf of all ranks.

    Raises:
        InputError: on every rank: another trainer holds it for `WAIT_S` seconds, or `out` cannot be written.
    """
    held: list[str | None] = [None]
    fd = None
    if world.is_main:
        try:
            out.mkdir(parents=True, exist_ok=True)
            fd = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
            if not _locked(fd):
                held = [
                    f"another trainer is at work in {out} (it holds {out / '.lock'}); choose another `out` or end it"
                ]
        except OSError as error:
            held = [f"cannot write {out}: {error.strerror or error}"]
    try:
        dist.broadcast_object_list(held)
        if held[0] is not None:
            raise InputError(held[0])
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _locked(fd: int) -> bool:
    end = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)
