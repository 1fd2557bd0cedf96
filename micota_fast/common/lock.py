"""One run at a time in a folder, counting the processes that an earlier one has left."""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from micota_fast.errors import InputError

WAIT_S = 30.0  # what a killed run has started has up to 3 * processes.GUARD_GRACE_S to end
POLL_S = 0.05


@contextlib.contextmanager
def only_run(folder: Path, say: Callable[[str], None]) -> Iterator[IO[bytes]]:
    """Hold FOLDER/.lock (flock(2)); the folder is there.

    Yields the locked file. Guards of processes (`processes.spawn`) that inherit it end last, so it is free only when
    the last process of a run is gone.

    Raises:
        InputError: another run holds it for `WAIT_S` seconds.
    """
    with (folder / ".lock").open("ab") as file:
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - started > WAIT_S:
                    raise InputError(
                        f"{folder} is in use by another run; wait for it, or choose another place"
                    ) from None
                if time.monotonic() - started < POLL_S:
                    say("waiting for the processes of an earlier run to end")
                time.sleep(POLL_S)
        yield file
