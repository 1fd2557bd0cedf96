"""Ending early on request: the current step is finished and saved, and all processes make the same decision."""

import contextlib
import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

from micota_fast.train.world import World

# SIGTERM from torchrun, Slurm or whoever pre-empts; SIGUSR1 as Slurm's `--signal=USR1@SECONDS` warns; SIGINT by hand.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Records the signals that ask the run to end; a third Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self.by_hand = False  # after `agreed`: whether Ctrl-C was among them, so the caller should stop as well

    def __enter__(self) -> "StopSignals":
        self._before = {n: signal.signal(n, self._note) for n in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the signals back to those who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number not in self._received:
            # Not by print: the signal may have come in the middle of one, which cannot be entered twice.
            text = f"{signal.Signals(number).name}: stopping after this step, with a checkpoint\n"
            with contextlib.suppress(OSError):  # whoever reads it may be gone
                os.write(2, text.encode())
        self._received.append(number)
        if self._received.count(signal.SIGINT) > 2:
            raise KeyboardInterrupt

    def agreed(self, world: World) -> bool:
        """Return whether any process was asked to end, the same on all. Never waits for the device."""
        asked = torch.tensor([bool(self._received), signal.SIGINT in self._received], dtype=torch.int32)
        if world.hosts is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=world.hosts)
        stop, self.by_hand = map(bool, asked.tolist())
        return stop
