"""The process of one stage."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from micota_fast.common import processes
from micota_fast.config.recipe import LaunchConfig
from micota_fast.pipeline.graph import Stage

SAY_EVERY_S = 5.0
TAIL_LINES = 25


class StageProcess:
    """A stage that runs; its output goes to log.txt, the last line of which is reported now and then.

    Args:
        stage: the stage.
        folder: its folder, which exists.
        command: starts it (`stages.Verb.command`).
        launch: how many threads it may use.
        lock: file descriptor of the run's lock, which the process holds until all that it has started has ended.
    """

    def __init__(self, stage: Stage, folder: Path, command: list[str], launch: LaunchConfig, lock: int) -> None:
        self.stage, self.folder, self.command = stage, folder, command
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
            self._process = processes.spawn(
                self.command, env=env, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock,)
            )

    def seconds(self) -> float:
        """Return how long it has run."""
        return time.monotonic() - self._started

    def poll(self, say: Callable[[str], None]) -> int | None:
        """Return its exit status, None while it runs; `say` is given the log's last line every few seconds."""
        if time.monotonic() - self._said_at >= SAY_EVERY_S:
            self._said_at = time.monotonic()
            line = next(iter(self._tail(1)), "")
            if line and line != self._said and not line.startswith("$ "):
                self._said = line
                say(f"    {self.stage.name} | {line}")
        return self._process.poll()

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

    def _tail(self, lines: int) -> list[str]:
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - 16384))
            text = log.read().decode("utf-8", "replace")
        # A progress bar rewrites its line with carriage returns: what counts is its last state.
        rows = [row.split("\r")[-1].rstrip() for row in text.split("\n")]
        return [row for row in rows if row][-lines:]
