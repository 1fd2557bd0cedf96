"""Where a step's time goes, by phase, without waiting for the device; and a trace of a few steps on request."""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from micota_fast.train.world import World


class Stopwatch:
    """Splits time into phases: on CUDA as the device's stream runs them, by events; elsewhere by the clock.

    Time in which a device waits for its host counts for the phase that kept it waiting.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._laps: list[tuple[str, torch.cuda.Event | float]] = []

    def lap(self, phase: str) -> None:
        """Start `phase`; it lasts until the next call."""
        self._laps.append((phase, self._now()))

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase since the last read, including the current one. Waits for the device."""
        if not self._laps:
            return {}
        self.lap(self._laps[-1][0])
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in itertools.pairwise(self._laps):
            if isinstance(start, torch.cuda.Event):
                assert isinstance(end, torch.cuda.Event)
                seconds[phase] += start.elapsed_time(end) / 1e3
            else:
                assert isinstance(end, float)
                seconds[phase] += end - start
        self._laps = self._laps[-1:]
        return dict(seconds)


@contextmanager
def profiler(out: Path, world: World) -> Iterator[torch.profiler.profile]:
    """Trace two steps, after two to warm up, into OUT/profile/rank-NNNNN.json.gz, which Perfetto and Chrome open.

    Call `step()` on the yielded object after each step. A run that ends before that has no trace, and says so.
    """
    path = out / "profile" / f"rank-{world.rank:05d}.json.gz"
    written = False  # one of an earlier start may be there

    def write(profile: torch.profiler.profile) -> None:
        nonlocal written
        if profile.step_num < 4:  # torch calls this at an early end, too
            return
        written = True
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        world.say(f"profile: {path.parent} (open it at https://ui.perfetto.dev)")

    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profile:
        yield profile
    if not written:
        world.say("WARNING: the run had too few steps left for a profile: four are needed")
