"""Ending early on request: the step at hand is finished and kept, and all processes decide alike."""

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
    """Notes the signals that ask for an end, however often each comes; a third Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self.by_hand = False  # after `agreed`: whether Ctrl-C was among them, so whatever started us is to stop, too

    def __enter__(self) -> "StopSignals":
        self._before = {n: signal.signal(n, self._note) for n in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
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
        """Whether any process was asked to end, the same answer on all. Takes the hosts' time, never the device's."""
        asked = torch.tensor([bool(self._received), signal.SIGINT in self._received], dtype=torch.int32)
        if world.hosts is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=world.hosts)
        stop, self.by_hand = map(bool, asked.tolist())
        return stop
