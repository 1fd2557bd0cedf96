"""What do moments of 8 or 4 bits cost in loss, next to float32?

    .venv/bin/python bench/optimizer_states.py --model DIR --data ROWS --held-out ROWS [--states float32 8bit 4bit]
        [--seeds 0 1] [--pack-tokens N] [--max-steps N] [--lr X] [--dir DIR] [--json FILE]

One epoch of one pack per step on a CPU in bfloat16, with `compile: true` for all, one process and one thread; every run
is a `train()` in a process of its own. The seed gives the order of the documents. The held-out loss is the mean over
supervised tokens after the last step. With DIR and ROWS of
scripts/smollm_checkpoint.py and `scripts/smollm_gsm8k.py rows`, and without --max-steps, the training is that of the
recipe smollm-gsm8k. Seconds per step leave out the first two, in which torch compiles.
"""

import argparse
import json
import resource
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from machine import append_rows, provenance

from micota_fast.config.generation import ChatConfig
from micota_fast.config.train import TrainConfig

STATES = ("float32", "8bit", "4bit")


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, and return the losses and what it took."""
    import torch

    from micota_fast.train.loop import train

    torch.set_num_threads(1)
    train(config)
    phases = ("data", "forward", "backward", "optimizer")
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "held_out_loss": rows[-1]["validation_loss"],
        "last_losses": [round(row["loss"], 5) for row in rows[-5:]],
        "seconds_per_step": {
            phase: round(statistics.median(row["timing"]["phase_s"][phase] for row in rows[2:]), 2) for phase in phases
        },
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--states", nargs="+", choices=STATES, default=STATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--pack-tokens", type=int, default=2048)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--dir", type=Path, help="for the runs, which are removed; default: the system's")
    parser.add_argument("--json", type=Path, help="append a row per run")
    options = parser.parse_args()
    for seed in options.seeds:
        for states in options.states:
            with tempfile.TemporaryDirectory(dir=options.dir) as folder:
                config = TrainConfig(
                    model=options.model,
                    data=options.data,
                    validation_data=options.held_out,
                    validate_every=100_000,  # after the last step alone
                    checkpoint_every=100_000,
                    out=f"{folder}/out",
                    seed=seed,
                    optimizer_states=states,
                    epochs=1,
                    max_steps=options.max_steps,
                    lr=options.lr,
                    pack_tokens=options.pack_tokens,
                    packs_per_step=1,
                    device="cpu",
                    compile=True,
                    log_every=1,
                    chat=ChatConfig(system=None),
                )
                with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                    found = alone.submit(run, config).result()
            settings = {"model": Path(options.model).name, "lr": options.lr, "pack_tokens": options.pack_tokens}
            row = {"states": states, "seed": seed, **settings, **found}
            print(json.dumps(row), flush=True)
            if options.json is not None:
                append_rows(options.json, [{"bench": "optimizer states", **row, **provenance("torch", "torchao")}])


if __name__ == "__main__":
    main()
