"""`python -m micota_fast.train CONFIG.yaml [--set key=value ...]`, or the same under `torchrun -m`."""

import argparse
import os
import signal
import sys
from pathlib import Path

from micota_fast.common.processes import die_with_parent
from micota_fast.config.loader import describe, load
from micota_fast.config.train import TrainConfig
from micota_fast.errors import InputError


def main() -> int:
    """Train as the configuration says.

    Returns 0, also where SIGTERM or SIGUSR1 ended it early with a checkpoint (OUT/summary.json is there only once it is
    finished); 2 for what the user can mend; 130 where Ctrl-C ended it early, with a checkpoint, too. torchrun has a
    status of its own: 1 where it was signalled itself (scripts/train.sh sees to that) or a trainer did not return 0.
    """
    if os.environ.get("MICOTA_DIE_WITH_PARENT") == "1":
        _die_with_parent()
    options = "\n".join(f"  {key} ({default}): {doc}" for key, default, doc in describe(TrainConfig))
    parser = argparse.ArgumentParser(
        prog="python -m micota_fast.train",
        description=__doc__,
        epilog=f"options of the configuration:\n{options}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override an option, nested ones as a.b=value; repeat it for more",
    )
    parser.add_argument("--profile", action="store_true", help="also trace two steps, into OUT/profile")
    args = parser.parse_args()
    try:
        config = load(TrainConfig, args.config, args.set)
        from micota_fast.train.loop import train  # torch takes seconds to import: errors above come at once

        train(config, args.profile)
        return 0
    except KeyboardInterrupt:
        return 130
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _die_with_parent() -> None:
    """Die by SIGKILL with the process that started this one; under torchrun, with the agent.

    The agent starts its workers in sessions of their own, so what ends the agent's process group does not reach them.
    An agent that died before this call is told by its heir, which was not started with our environment.
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
    sys.exit(main())
