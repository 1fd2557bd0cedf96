"""The process of one stage."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from micota_fast.common import processes
from micota_fast.config.recipe import LaunchConfig
from micota_fast.pipeline.stage import Stage

SAY_EVERY_S = 5.0
TAIL_LINES = 25


class StageProcess:
    """A stage that runs; its output goes to log.txt. Results in it are reported at once, its last line now and then.

    Args:
        stage: the stage.
        folder: its folder, which exists.
        command: starts it (`stages.Verb.command`).
        launch: how many threads it may use.
        lock: file descriptor of the run's lock, which the process holds until all that it has started has ended.
        results: pattern of the lines that are reported at once (`stages.Verb.results`).
    """

    def __init__(
        self,
        stage: Stage,
        folder: Path,
        command: list[str],
        launch: LaunchConfig,
        lock: int,
        results: str | None = None,
    ) -> None:
        self.stage, self.folder, self.command = stage, folder, command
        self._results = None if results is None else re.compile(results)
        self.log = folder / "log.txt"
        env = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        if "torch.distributed.run" in self.command:
            env["MICOTA_DIE_WITH_PARENT"] = "1"  # torchrun's workers leave our process group; they end with torchrun
        if launch.threads is not None:
            env |= {"OMP_NUM_THREADS": str(launch.threads), "NUMBA_NUM_THREADS": str(launch.threads)}
        self._started = self._said_at = time.monotonic()
        self._said = ""
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(self.command)}\n".encode())
            log.flush()
            self._read_to = log.tell()  # what an earlier process has written was reported then
            self._process = processes.spawn(
                self.command, env=env, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock,)
            )

    def seconds(self) -> float:
        """Return how long it has run."""
        return time.monotonic() - self._started

    def poll(self, say: Callable[[str], None]) -> int | None:
        """Return its exit status, None while it runs; `say` is given new results, and the last line now and then."""
        status = self._process.poll()  # first, so that the results of a process that has ended are all there
        for line in self._new_results():
            self._said, self._said_at = line, time.monotonic()
            say(f"    {self.stage.name} | {line}")
        if time.monotonic() - self._said_at >= SAY_EVERY_S:
            self._said_at = time.monotonic()
            line = next(iter(self._tail(1)), "")
            if line and line != self._said and not line.startswith("$ "):
                self._said = line
                say(f"    {self.stage.name} | {line}")
        return status

    def stop(self) -> None:
        """End it and all that it has started."""
        processes.stop(self._process)

    def failure(self) -> str:
        """Return what to tell about its failure: the end of the log, and the command."""
        tail = "\n".join(f"    {line}" for line in self._tail(TAIL_LINES))
        return (
            f"stage {self.stage.name} failed. The end of its log {self.log}:\n{tail}\n"
            f"Finished work is kept. To run this stage alone: {shlex.join(self.command)}"
        )

    def _new_results(self) -> list[str]:
        if self._results is None or self.log.stat().st_size == self._read_to:
            return []
        with self.log.open("rb") as log:
            log.seek(self._read_to)
            whole = log.read().rpartition(b"\n")[0]  # the last line may be half written
        self._read_to += len(whole) + 1 if whole else 0
        lines = (_last_state(line) for line in whole.decode("utf-8", "replace").split("\n"))
        return [line for line in lines if self._results.fullmatch(line)]

    def _tail(self, lines: int) -> list[str]:
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - 16384))
            text = log.read().decode("utf-8", "replace")
        rows = map(_last_state, text.split("\n"))
        return [row for row in rows if row][-lines:]


def _last_state(line: str) -> str:
    """Return what is seen of a line that a progress bar rewrites with carriage returns."""
    return line.split("\r")[-1].rstrip()
