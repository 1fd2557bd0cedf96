"""`python -m micota_fast.train`, also under `torchrun -m`: `micota train`, which can end with whoever started it."""

import os
import signal
import sys
from pathlib import Path

from micota_fast import cli
from micota_fast.common.processes import die_with_parent


def _die_with_parent() -> None:
    """Die by SIGKILL with the process that started this one; under torchrun, with the agent.

    The agent starts its workers in sessions of their own, so what ends the agent's process group does not reach them.
    An agent that died before this call shows in its heir, which was not started with our environment.
    """
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform.startswith("linux"):
        try:
            environment = Path(f"/proc/{parent}/environ").read_bytes().split(b"\0")
        except OSError:  # it is gone by now, or belongs to someone else
            environment = []
        if b"MICOTA_DIE_WITH_PARENT=1" not in environment:
            sys.exit("the process that started this one is gone")
    die_with_parent(parent, signal.SIGKILL)


if __name__ == "__main__":
    if os.environ.get("MICOTA_DIE_WITH_PARENT") == "1":
        _die_with_parent()
    sys.exit(cli.main(["train", *sys.argv[1:]]))
