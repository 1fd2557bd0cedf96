"""Keeps account of where the host waits for the device: what waited, in which phase of a step, and from which line.

`torch.cuda.set_sync_debug_mode` does this on a GPU, for the operations that tell it. Here every operation passes by
(`watch.py`), and every call of streams, events and object collectives (`device.py`, `world.py`).
"""

import sys
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
OURS = (str(ROOT / "micota_fast") + "/", str(ROOT / "kernels") + "/")


class Wait(NamedTuple):
    """One kind of wait; a process may have seen it many times."""

    phase: str
    what: str
    at: str  # the innermost function of ours, as "train/meters.py:report"; "" if none is on the stack


class Waits:
    """Collects waits. `phase` is set by whoever knows it; a thread of its own has its name for a phase."""

    def __init__(self) -> None:
        self.phase = "start"
        self.found: Counter[Wait] = Counter()
        self._main = threading.get_ident()

    def record(self, what: str) -> None:
        """Count a wait of the caller."""
        thread = threading.current_thread()
        # The threads of autograd, which torch names "Dummy-N" to Python, work for the main one.
        own = thread.ident != self._main and not thread.name.startswith("Dummy")
        self.found[Wait(thread.name if own else self.phase, what, _innermost())] += 1

    def place(self) -> str:
        """Return the phase and the innermost function of ours."""
        return f"{self.phase}, {_innermost()}"


def _innermost() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return f"{Path(name).relative_to(ROOT).as_posix().removeprefix('micota_fast/')}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
