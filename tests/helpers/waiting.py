"""Waiting for what other processes do, and bounds for what must not take forever."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    """Return when `condition` holds; fail when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s"
        time.sleep(0.005)


@contextlib.contextmanager
def soon(seconds: float = 60.0) -> Iterator[None]:
    """Fail when the block takes longer.

    For what takes a second or two, and hours or all memory where its bound is missing: no slow machine comes near.
    """
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert took < seconds, f"it took {took:.1f} s"


async def standstill(work: Awaitable[T]) -> tuple[T, float]:
    """Await `work`; return its result, and the longest time for which the event loop stood still meanwhile.

    That is a share of the whole time, as a busy machine lengthens both: 1 where the work blocks the loop.
    """
    task = asyncio.ensure_future(work)
    started = before = time.monotonic()
    longest = 0.0
    while not task.done():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        longest, before = max(longest, now - before), now
    return await task, longest / (before - started)


def rows_in(parts: Path) -> int:
    """Rows that the journal of a run has so far."""
    return sum(segment.read_bytes().count(b"\n") for segment in parts.glob("0*.jsonl"))


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except FileNotFoundError:
        return False
    return state != "Z"
