"""What do moments of 8 or 4 bits cost in loss, next to float32?

    .venv/bin/python bench/optimizer_states.py [--part micro] [--states float32 8bit 4bit] [--seeds 0 1 2]
        [--max-steps N] [--dir DIR] [--json FILE]
    .venv/bin/python bench/optimizer_states.py --part smollm --model DIR --rows DIR [--pack-tokens N] ...

Every run is a `train()` of one pack per step in a process of its own, in float32, with one thread of a CPU.

micro: pre-training, where a poor optimizer shows. A model of 619 thousand parameters, the micro world's teacher, from
fresh weights on its worked solutions at its learning rate; held out are 200 other solutions. The seed gives the weights
and the order of the documents.

smollm: fine-tuning. SmolLM2-135M-Instruct (DIR of scripts/smollm_checkpoint.py) on GSM8K solutions (DIR of
`scripts/smollm_gsm8k.py rows`), as in the recipe smollm-gsm8k but for what a row says: the whole of it is one epoch
of packs of 2,048 tokens in bfloat16. The step is compiled, as it is slow otherwise. The seed gives the order of the
documents.

The held-out loss is the mean over supervised tokens after the last step. Seconds per step leave out the first two, in
which torch compiles; other programs may run beside it, so they are no measure of speed.
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

from micota_fast.common.records import write_rows
from micota_fast.config.generation import ChatConfig
from micota_fast.config.train import TrainConfig
from micota_fast.micro.build import HERE, SIZES, corpus

STATES = ("float32", "8bit", "4bit")
PHASES = ("data", "forward", "backward", "optimizer")


def run(config: TrainConfig) -> dict[str, Any]:
    """Train, and return the losses and what it took."""
    import torch

    from micota_fast.train.loop import train

    torch.set_num_threads(1)
    train(config)
    rows = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    phases = [row["timing"]["phase_s"] for row in rows[2:]]
    return {
        "steps": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "held_out_loss": rows[-1]["validation_loss"],
        "seconds_per_step": {phase: round(statistics.median(row[phase] for row in phases), 3) for phase in PHASES},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def settings(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the part's options of training; the micro world's rows are written to `folder`."""
    if options.part == "smollm":
        return {
            "model": options.model,
            "data": f"{options.rows}/train_solutions.jsonl",
            "validation_data": f"{options.rows}/heldout_solutions.jsonl",
            "lr": 1e-4,
            "pack_tokens": options.pack_tokens or 2048,
            "compile": True,
            "chat": ChatConfig(system=None),
        }
    for name, rows, seed in (("train", 4000, 300), ("held_out", 200, 301)):
        write_rows(folder / f"{name}.jsonl", corpus("long", rows, seed))
    return {
        "model": str(HERE / "checkpoints" / "teacher"),
        "init": "random",
        "data": str(folder / "train.jsonl"),
        "validation_data": str(folder / "held_out.jsonl"),
        "lr": SIZES["teacher"].phases[0].lr,
        "warmup_ratio": 0.03,
        "weight_decay": 0.1,
        "pack_tokens": options.pack_tokens or 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("micro", "smollm"), default="micro")
    parser.add_argument("--model", help="checkpoint of smollm")
    parser.add_argument("--rows", help="folder of smollm's rows")
    parser.add_argument("--states", nargs="+", choices=STATES, default=STATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pack-tokens", type=int)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--dir", type=Path, help="for the runs, which are removed; default: the system's")
    parser.add_argument("--json", type=Path, help="append a row per run")
    options = parser.parse_args()
    if options.part == "smollm" and not (options.model and options.rows):
        parser.error("--part smollm needs --model and --rows")
    for seed in options.seeds:
        for states in options.states:
            with tempfile.TemporaryDirectory(dir=options.dir) as name:
                part = settings(options, Path(name))
                config = TrainConfig(
                    **part,
                    out=f"{name}/out",
                    seed=seed,
                    optimizer_states=states,
                    epochs=1,
                    max_steps=options.max_steps,
                    packs_per_step=1,
                    dtype="float32",
                    device="cpu",
                    validate_every=1_000_000,  # after the last step alone
                    checkpoint_every=1_000_000,
                    log_every=1,
                )
                with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                    found = alone.submit(run, config).result()
            row = {"part": options.part, "states": states, "seed": seed, "lr": config.lr}
            row |= {"pack_tokens": config.pack_tokens, "compile": config.compile, **found}
            print(json.dumps(row), flush=True)
            if options.json is not None:
                append_rows(options.json, [{"bench": "optimizer states", **row, **provenance("torch", "torchao")}])


if __name__ == "__main__":
    main()
