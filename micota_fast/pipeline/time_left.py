"""How long the rest of a run takes: the plan's relative costs, scaled by the time that finished stages took.

The plan is made in a process of its own, since it needs torch, which the run itself does without.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

from micota_fast.common.importing import imported
from micota_fast.config.recipe import LaunchConfig
from micota_fast.errors import InputError
from micota_fast.pipeline.stage import Stage

COSTS = "micota_fast.planning.plan:relative_costs"
# Token by token, or whole documents at once: the FLOP/s of the two differ tenfold, those within a kind much less.
ANSWERING, READING = "answering", "reading"
KINDS = {
    "generate": ANSWERING,
    "evaluate": ANSWERING,
    "length-sweep": ANSWERING,
    "score": READING,
    "train": READING,
    "align": READING,
}


class TimeLeft:
    """Estimates the time to the end of a run.

    Args:
        stages: of the run, each after those it needs.
        launch: how many of them run at once.
    """

    def __init__(self, stages: Sequence[Stage], launch: LaunchConfig) -> None:
        self._stages, self._jobs = stages, launch.jobs
        self._costs: dict[str, float] | None = None
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        start = multiprocessing.get_context("spawn").Process
        self._process = start(target=_send_costs, args=(sender, list(stages), launch), daemon=True)
        self._process.start()
        sender.close()

    def words(self, took: Mapping[str, float], running: Mapping[str, float]) -> str:
        """Return "; about 12 min left", or "" as long as there is no basis for an estimate.

        Args:
            took: seconds that each finished stage took, by name.
            running: seconds that each running stage has run so far.
        """
        if self._costs is None and self._receiver.poll():
            with contextlib.suppress(EOFError):  # it failed, and said so on stderr
                self._costs = self._receiver.recv()
        seconds = seconds_left(self._stages, self._jobs, self._costs or {}, took, running)
        return "" if seconds is None else f"; about {duration(seconds)} left"

    def close(self) -> None:
        """End the process that makes the plan."""
        self._process.kill()
        self._process.join()
        self._receiver.close()


def _send_costs(sender: Connection, stages: list[Stage], launch: LaunchConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the run's to answer
    try:
        costs = imported(COSTS)(stages, launch)
    except InputError:  # shapes of a model, say, that is not here yet: then nothing is said
        costs = {}
    with contextlib.suppress(BrokenPipeError):  # the run has ended
        sender.send(costs)


def seconds_left(
    stages: Sequence[Stage],
    jobs: int,
    costs: Mapping[str, float],
    took: Mapping[str, float],
    running: Mapping[str, float],
) -> float | None:
    """Estimate the seconds to the end of a run.

    A stage takes its planned cost times the seconds per cost of finished stages: of its verb, or else of its kind. A
    stage whose cost the plan does not count takes the mean of its verb, or no time. The run takes as long as its
    longest chain of stages, and no less than the sum of all divided by `jobs`.

    Args:
        stages: of the run, each after those it needs.
        jobs: how many run at once.
        costs: what the plan expects of each stage, by name, in any unit; 0: too little to count.
        took: seconds that each finished stage took.
        running: seconds that each running stage has run so far.

    Returns:
        None if a stage is left that costs something and none of its kind has finished.
    """
    finished: dict[str, list[str]] = {}
    for stage in stages:
        if stage.name in took:
            finished.setdefault(stage.verb, []).append(stage.name)
            if stage.verb in KINDS:
                finished.setdefault(KINDS[stage.verb], []).append(stage.name)
    chains: dict[str, float] = {}
    total = 0.0
    for stage in stages:
        left = 0.0
        if stage.name not in took:
            alike = finished.get(stage.verb) or finished.get(KINDS.get(stage.verb, ""), [])
            expected = _expected(costs.get(stage.name, 0.0), alike, costs, took)
            if expected is None:
                return None
            left = max(0.0, expected - running.get(stage.name, 0.0))
        total += left
        chains[stage.name] = left + max((chains[name] for name in stage.needs), default=0.0)
    return max(total / jobs, max(chains.values(), default=0.0)) if costs else None


def _expected(cost: float, alike: Sequence[str], costs: Mapping[str, float], took: Mapping[str, float]) -> float | None:
    seconds = [took[name] for name in alike]
    if not cost:
        return sum(seconds) / len(seconds) if seconds else 0.0
    known = sum(costs.get(name, 0.0) for name in alike)
    return cost * sum(seconds) / known if known else None


def duration(seconds: float) -> str:
    """Format a duration as roughly as an estimate is known: 40 s, 7 min, 3.5 h, 2.1 days."""
    if seconds < 55:
        return f"{max(10, 10 * round(seconds / 10))} s"
    if seconds < 90 * 60:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
