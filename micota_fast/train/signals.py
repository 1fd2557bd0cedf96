"""Ending early on request: the step at hand is finished and kept, and all processes decide alike."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

from micota_fast.train.parallel import World

# SIGTERM from torchrun, Slurm or whoever pre-empts; SIGUSR1 as Slurm's `--signal=USR1@SECONDS` warns; SIGINT by hand.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes the signals that ask for an end; the third one ends the process at once."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> "StopSignals":
        self._received: list[int] = []
        self._before = {n: signal.signal(n, self._note) for n in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        if len(self._received) > 2:
            raise KeyboardInterrupt
        print(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint", flush=True)

    def agreed(self) -> bool:
        """Whether any process was asked to end, the same answer on all. Takes the hosts' time, never the device's."""
        if self._world.hosts is None:
            return bool(self._received)
        asked = torch.tensor(float(len(self._received)))
        dist.all_reduce(asked, group=self._world.hosts)
        return bool(asked > 0)

    @property
    def by_hand(self) -> bool:
        """Whether Ctrl-C was among them: then whatever started this process is to stop, too."""
        return signal.SIGINT in self._received
