"""`python -m micota_fast.train CONFIG.yaml [--set key=value ...]`, or the same under `torchrun -m`."""

import argparse
import os
import sys

from micota_fast.config import describe, load
from micota_fast.errors import InputError
from micota_fast.recipe import TrainConfig


def main() -> int:
    """Train as the configuration says. Returns 0; 2 for what the user can mend; 130 where a signal ended it early."""
    if os.environ.get("MICOTA_DIE_WITH_PARENT") == "1":
        from micota_fast.processes import die_with_parent

        die_with_parent()
    options = "\n".join(f"  {key} ({default}): {doc}" for key, default, doc in describe(TrainConfig))
    parser = argparse.ArgumentParser(
        prog="python -m micota_fast.train",
        description=__doc__,
        epilog=f"options of the configuration:\n{options}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override an option")
    args = parser.parse_args()
    try:
        config = load(TrainConfig, args.config, args.set)
        from micota_fast.train.loop import train  # torch takes seconds to import: errors above come at once

        return 0 if train(config) else 130
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
