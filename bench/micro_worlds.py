r"""Does mid-length reasoning teach a small student more, in worlds that have the method's preconditions?

    .venv/bin/python bench/micro_worlds.py [--work DIR] [--worlds 0 1 2]             # preconditions and merge weights
    .venv/bin/python bench/micro_worlds.py [--work DIR] [--worlds 0 1 2] --arms [--json FILE]
    .venv/bin/python bench/micro_worlds.py [--work DIR] [--worlds 0 1 2] --equal-cost [--json FILE] # design 2

The rules are in micota_fast/micro/RULES.md, which is older than the first trained student. Without `--arms` no student
is trained: worlds are built (world 0 ships), P1 to P5 are measured on untrained models and the merged assistant, and
the merge's weight is chosen by the length of its answers. With `--arms` each world's recipe is run, all arms with all
seeds. With `--equal-cost` (after `--arms`) answers count within a number of tokens, and students are trained for equal
numbers of steps. Interrupted, the same command resumes."""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from machine import ROOT, append_rows, provenance

from micota_fast.common.json_io import read_json, write_json
from micota_fast.common.schema import load
from micota_fast.config import loader
from micota_fast.config.report import ReportConfig
from micota_fast.length_sweep.results import Sweep
from micota_fast.micro import build, world
from micota_fast.micro.skills import LEAST, skills
from micota_fast.report.budget import within
from micota_fast.report.inputs import load_inputs
from micota_fast.report.summary import summarise
from micota_fast.sources.completions import iter_completions
from micota_fast.statistics.intervals import mean_and_sd, student_t95

MICRO = ROOT / "micota_fast" / "micro"
RECIPE = MICRO.parent / "recipes" / "micro.yaml"
WEIGHTS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
SWEEP_PROBLEMS = 120
LEAST_RIGHT = 0.9
SEEDS = [1, 2, 3, 4, 5]
MODELS = ("teacher", "assistant", "student")
STEPS = (8, 16, 32, 64)  # of design 2
LIMITS = (32, 48, 64, 96, 128, 192, 256, 384, 512)
FEW_SEEDS = [1, 2]
ARMS = ("short", "long", "mix", "mid")


def micota(*arguments: str | Path) -> None:
    """Run `micota ARGUMENTS`; raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", "micota_fast", *map(str, arguments)], check=True)


def home(number: int, work: Path) -> Path:
    """Return the folder with problems/ and checkpoints/ of a world, which is built if need be."""
    if number == 0:
        return MICRO
    out = work / f"world-{number}" / "home"
    if not all((out / "checkpoints" / name / "model.safetensors").exists() for name in MODELS):
        build_work = work / f"world-{number}" / "build"
        arguments = ["--world", str(number), "--out", str(out), "--work", str(build_work)]
        subprocess.run([sys.executable, "-m", "micota_fast.micro.build", *arguments], check=True)
    return out


def write_recipe(folder: Path, source: Path, weight: float, arms: bool) -> Path:
    """Write the micro recipe for a world, without its arms if no student is to be trained; returns the file."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe |= {"name": folder.name, "title": f"MiCoTA in micro {folder.name}", "seeds": SEEDS}
    recipe["problems"]["train"]["path"] = str(source / "problems" / "train.jsonl")
    for name in MODELS:
        recipe["models"][name]["checkpoint"] = str(source / "checkpoints" / name)
    for benchmark in recipe["evaluate"]["benchmarks"]:
        benchmark["path"] = str(source / "problems" / f"{benchmark['name']}.jsonl")
    recipe["models"]["assistant-mid"]["merge"]["mergekit"]["models"][0]["parameters"]["weight"] = weight
    if not arms:
        recipe["arms"] = {}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def choose_weight(sweep: Sweep, wanted: float) -> float:
    """Return the weight whose mean answer length is nearest to ``wanted`` in logarithm, if enough answers are right."""
    points = [point for point in sweep.points if point.accuracy >= LEAST_RIGHT]
    if not points:
        raise SystemExit("no weight gives right answers often enough: P4 does not hold")
    return min(points, key=lambda point: abs(math.log(point.tokens.mean / wanted))).weight


def answer_tokens(run: Path, corpus: str) -> float:
    """Return the mean length of a corpus's answers in tokens, right or wrong."""
    return statistics.mean(
        row.completion_tokens for row in iter_completions(run / "answers" / corpus / "completions.jsonl")
    )


def sweep_weights(folder: Path, source: Path, run: Path) -> Sweep:
    """Merge at every weight and measure the answers to the first train problems."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    mergekit, sampling = recipe["models"]["assistant-mid"]["merge"]["mergekit"], recipe["generate"]
    mergekit["base_model"] = str(source / "checkpoints" / "assistant")
    mergekit["models"][0]["model"] = str(run / "model" / "assistant-long" / "model")
    config = folder / "merge.yaml"
    config.write_text(yaml.safe_dump(mergekit, sort_keys=False), encoding="utf-8")
    options = {
        "config": config,
        "problems": source / "problems" / "train.jsonl",
        "limit": SWEEP_PROBLEMS,
        "out": folder / "sweep",
        "weights": list(WEIGHTS),
        "seed": 1,
        "generate.max_new_tokens": sampling["max_new_tokens"],
        "generate.serve.dtype": sampling["serve"]["dtype"],
    }
    micota("length-sweep", *(f"--set={key}={value}" for key, value in options.items()))
    return load(Sweep, folder / "sweep" / "sweep.json")


def prepare(number: int, work: Path) -> dict[str, Any]:
    """Choose a world's merge weight and measure its preconditions; no student is trained."""
    folder = work / f"world-{number}"
    done = folder / "preconditions.json"
    if done.exists():
        found: dict[str, Any] = read_json(done)
        return found
    source, run = home(number, work), folder / "run"
    micota("run", write_recipe(folder, source, WEIGHTS[0], arms=False), "--out", run)
    sweep = sweep_weights(folder, source, run)
    weight = choose_weight(sweep, math.sqrt(answer_tokens(run, "long") * answer_tokens(run, "short")))
    micota("run", write_recipe(folder, source, weight, arms=False), "--out", run)
    rates = skills(source / "checkpoints" / "student", world.dev(build.split_seed(number)))
    result = {
        "world": number,
        "weight": weight,
        "sweep": [[p.weight, p.tokens.mean, p.tokens.p10, p.tokens.p90, p.accuracy] for p in sweep.points],
        "preconditions": read_json(run / "report" / "report.json")["preconditions"],
        "skills": rates,
        "P5 held": all(rate >= LEAST[style] for style in LEAST for rate in rates[style].values()),
    }
    write_json(done, result, 1)
    return result


def train(number: int, work: Path) -> dict[str, float]:
    """Run all arms of a world with the weight that `prepare` chose; returns each arm's average accuracy in %."""
    folder = work / f"world-{number}"
    weight = read_json(folder / "preconditions.json")["weight"]
    micota("run", write_recipe(folder, home(number, work), weight, arms=True), "--out", folder / "run")
    report = read_json(folder / "run" / "report" / "report.json")
    return {name: 100 * arm["average"]["mean"] for name, arm in report["arms"].items()}


def equal_steps(number: int, work: Path) -> dict[str, dict[str, Any]]:
    """Train all arms for equal numbers of steps on the corpora of `train`; returns averages and winner by steps."""
    folder, source = work / f"world-{number}", home(number, work)
    found = {}
    for steps in STEPS:
        place = folder / f"steps-{steps}"
        path = write_recipe(place, source, WEIGHTS[0], arms=True)
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = {arm: folder / "run" / "corpus" / arm / "corpus.jsonl" for arm in ARMS}
        recipe["corpora"] = {arm: {"file": str(file.absolute())} for arm, file in files.items()}
        recipe["models"] = {"student": recipe["models"]["student"]}
        recipe |= {"seeds": FEW_SEEDS, "align": [], "student_answers": None}
        recipe["train"] |= {"max_steps": steps, "epochs": 1000}
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        micota("run", path, "--out", place / "run")
        report = read_json(place / "run" / "report" / "report.json")
        averages = {name: 100 * arm["average"]["mean"] for name, arm in report["arms"].items()}
        found[str(steps)] = {"accuracy": averages, "winner": report["winner"]}
    return found


def equal_tokens(number: int, work: Path) -> dict[str, dict[str, Any]]:
    """Count the answers of `train`'s students that end within each limit; returns averages and winner by limit."""
    inputs = load_inputs(loader.load(ReportConfig, work / f"world-{number}" / "run" / "report" / "config.yaml"))
    found = {}
    for limit in LIMITS:
        cut = within(inputs, limit)
        assert cut is not None
        summary = summarise(cut)
        averages = {arm.name: 100 * arm.average.mean for arm in summary.arms}
        found[str(limit)] = {"accuracy": averages, "winner": summary.winner.name if summary.winner else None}
    return found


def main() -> None:
    """Measure what the arguments ask for and print, or append to `--json`, one row per world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/micro-worlds"), help="kept; a second call resumes")
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", action="store_true", help="train the students; else only measure preconditions")
    parser.add_argument("--equal-cost", action="store_true", help="design 2: equal tokens per answer, equal steps")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    args = parser.parse_args()
    rows = []
    for number in args.worlds:
        row = prepare(number, args.work)
        if args.arms:
            row["accuracy"] = train(number, args.work)
        if args.equal_cost:
            row |= {"tokens": equal_tokens(number, args.work), "steps": equal_steps(number, args.work)}
        rows.append(row | provenance("micota-fast", "torch", "numpy"))
        print(json.dumps(row, indent=1), flush=True)
    if args.arms and len(rows) > 1:
        for arm in rows[0]["accuracy"]:
            values = [row["accuracy"][arm] for row in rows]
            mean, sd = mean_and_sd(values)
            half = student_t95(len(values) - 1) * (sd or 0.0) / math.sqrt(len(values))
            print(f"{arm}: {mean:.1f} ± {half:.1f} (95%, Student's t) over {len(values)} worlds")
    if args.json is not None:
        append_rows(args.json, rows)


if __name__ == "__main__":
    main()
