r"""What does LoRA give up against full fine-tuning on a real model, and what does it save?

    .venv/bin/python bench/lora_arm.py --checkpoint DIR --rows DIR [--steps N] [--work DIR] [--json FILE]

Runs the trainings of both arms of the recipe `smollm-gsm8k`, in turn, each in a process of its own with one thread, on
the recipe's rows, and measures the loss on its held-out rows as they train. DIRs are those that
`scripts/reproduce_smollm_gsm8k.sh` makes. Seconds are the trainings' own: of whole reports of steps (median), so that
start, validation and saving are left out; CPU seconds are those of the whole process. Memory is its peak.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import ROOT, append_rows, provenance

from micota_fast.common.json_io import read_json
from micota_fast.config import loader
from micota_fast.config.recipe import Recipe
from micota_fast.config.train import TrainConfig
from micota_fast.pipeline.graph import build_stages

RECIPE = ROOT / "micota_fast/recipes/smollm-gsm8k.yaml"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def trainings(checkpoint: Path, rows: Path, work: Path, steps: int) -> dict[str, TrainConfig]:
    """Return the settings of the recipe's trainings by arm, with `steps` steps and the held-out rows."""
    changes = [f"data_dir={rows.resolve()}", f"models.smollm2.checkpoint={checkpoint.resolve()}"]
    changes += [f"train.{change}" for change in (f"max_steps={steps}", "log_every=1", "warmup_ratio=0.1")]
    changes += [
        f"train.validation_data={rows.resolve() / 'heldout_solutions.jsonl'}",
        f"train.checkpoint_every={steps}",
    ]
    changes += [f"train.validate_every={-(-steps // 2)}"]
    stages = build_stages(loader.load(Recipe, RECIPE, changes), RECIPE, work.resolve())
    return {stage.name.split("/")[1]: stage.settings for stage in stages if stage.name.startswith("student/")}


def measure(arm: str, config: TrainConfig, work: Path) -> dict[str, Any]:
    """Train one arm and return its figures."""
    file = work / f"{arm}.yaml"
    file.write_text(loader.dump(config), encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "micota_fast", "train", str(file)], env=os.environ | ENVIRONMENT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = Path(config.out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = read_json(out / "summary.json")
    timings = [row["timing"] for row in rows]
    return {
        "arm": arm,
        "lr": config.lr,
        "lora": loader.plain(config.lora),
        "steps": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "validation_loss": {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row},
        "tokens_per_s": statistics.median(timing["tokens_per_s"] for timing in timings[1:]),
        "step_s": {
            phase: statistics.median(t["phase_s"][phase] for t in timings[1:]) for phase in timings[1]["phase_s"]
        },
        "train_s": summary["timing"]["seconds"],
        "process_cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_gb": max(timing["memory_gb"]["peak"] for timing in timings),
        "trained_parameters": summary.get("adapter_parameters", summary["parameters"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=Path, required=True, help="folder of train_ and heldout_solutions.jsonl")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of each arm (the recipe: an epoch)")
    parser.add_argument("--work", type=Path, help="folder for the runs; without it they are not kept")
    parser.add_argument("--json", type=Path, help="file to append rows to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work: Path = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        configs = trainings(arguments.checkpoint, arguments.rows, work, arguments.steps)
        rows = [measure(arm, config, work) for arm, config in configs.items()]
    for row in rows:
        losses = ", ".join(f"{loss:.4f} after step {step}" for step, loss in row["validation_loss"].items())
        print(
            f"{row['arm']}: held-out loss {losses}; {row['tokens_per_s']:,.0f} tokens/s, {row['train_s']:.0f} s "
            f"({row['process_cpu_s']:.0f} s of CPU in the process), peak {row['peak_gb']:.2f} GB"
        )
    if arguments.json is not None:
        made = provenance("micota-fast", "torch")
        append_rows(arguments.json, [row | made for row in rows])


if __name__ == "__main__":
    main()
