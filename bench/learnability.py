r"""Does a score that is known before training rank corpora as training on them does?

    .venv/bin/python bench/learnability.py [--work DIR] [--worlds 0 1 2] [--seeds 1 2] [--quick] [--json FILE]

Worlds of `micota_fast/micro`, each with problems of its own and models pre-trained from other weights on other texts
(world 0: teacher and assistant as they ship). In each, three students that differ in the style of the last 300 of their
32,300 documents of pre-training: terse (short), thorough (long), and even (the mixture). Each student is trained, by
the micro recipe's own settings, on nine corpora: long, three merges between assistant and fine-tuned assistant (weights
0.6, 0.55, 0.5), short, long:short 1:4, mid:short 1:1, its own right answers, and the bare final answers. A run of
`micota run` a student, in one folder per world, makes all of it: interrupted, the same command resumes.

What is compared, each under the untrained student: nats per answer (the score of
`micota_fast/alignment/learnability.py`, chosen before any of these worlds was run), perplexity, tokens, departures an
answer, rank-surprisal ratio. For each student Spearman's correlation between the measure, less being better, and
accuracy (mean over five benchmarks and the seeds) over the corpora; +1: it ranks them as training does. Bare answers
hold no reasoning and are in no pipeline, so they are left out of the figure that counts and shown in a second one.
Also: the accuracy that is lost where the best corpus by the measure is taken instead of the best by accuracy. Means
are over worlds, intervals Student's t over these: students of one world share problems and corpora. Three worlds make
them wide."""

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from machine import ROOT, append_rows, provenance

from micota_fast.alignment.results import Alignment
from micota_fast.common.records import write_rows
from micota_fast.common.schema import load
from micota_fast.micro import build
from micota_fast.sources.problems import read_problems
from micota_fast.statistics.intervals import mean_and_sd, student_t95
from micota_fast.statistics.ranks import spearman

MICRO = ROOT / "micota_fast" / "micro"
STUDENTS = {"terse": "mostly-short", "thorough": "long", "even": "broad"}
SCORE = "nats_per_answer"
MEASURES = (SCORE, "perplexity", "tokens", "departures_per_answer", "rank_surprisal_ratio")
WEIGHTS = (0.6, 0.55, 0.5)
BARE = "bare"


def students(world: int, work: Path) -> dict[str, Path]:
    """The untrained students of a world, by style."""
    size = build.SIZES["student"]
    tokenizer = build.make_tokenizer()
    return {
        name: build.build_model(
            "student",
            dataclasses.replace(size, phases=(*size.phases[:-1], dataclasses.replace(size.phases[-1], kind=kind))),
            tokenizer,
            work,
            world,
        )
        for name, kind in STUDENTS.items()
    }


def elders(world: int, work: Path) -> dict[str, Path]:
    """Teacher and assistant of a world."""
    names = ("teacher", "assistant")
    if world == 0:
        return {name: MICRO / "checkpoints" / name for name in names}
    tokenizer = build.make_tokenizer()
    return {name: build.build_model(name, build.SIZES[name], tokenizer, work, world) for name in names}


def write_recipe(folder: Path, models: dict[str, Path], student: Path, seeds: list[int], quick: bool) -> Path:
    """The micro recipe with this world's problems and models and the corpora to be ranked; returns its file."""
    recipe = yaml.safe_load((MICRO.parent / "recipes" / "micro.yaml").read_text(encoding="utf-8"))
    bare = folder / "bare.jsonl"
    problems = folder / "problems"
    rows = read_problems(problems / "train.jsonl")
    write_rows(bare, [{"id": r.id, "problem": r.problem, "completion": f"\\boxed{{{r.answer}}}"} for r in rows])
    merges = {f"mid-{weight}": _merge(recipe, weight) for weight in WEIGHTS}
    made = {
        "long": recipe["corpora"]["long"],
        **{name: {"generate": {"model": f"assistant-{name}"}} for name in merges},
        "short": recipe["corpora"]["short"],
        "long-1-short-4": {"mix": {"long": 1, "short": 4}},
        "mid-1-short-1": {"mix": {"mid-0.55": 1, "short": 1}},
        "own": recipe["corpora"]["own"],
        BARE: {"file": str(bare)},
    }
    corpora = {name: made[name] for name in ("long", "short", BARE)} if quick else made
    recipe |= {
        "name": "learnability",
        "title": f"Learnability, {folder.name}",
        "seeds": seeds,
        "problems": {"train": {"path": str(problems / "train.jsonl")}},
        "models": {
            **{name: {"checkpoint": str(path)} for name, path in {**models, "student": student}.items()},
            "assistant-long": recipe["models"]["assistant-long"],
            **{f"assistant-{name}": merge for name, merge in merges.items()},
        },
        "corpora": corpora,
        "arms": {name: name for name in corpora},
        "align": list(corpora),
        "student_answers": None,
        "notes": [],
    }
    for benchmark in recipe["evaluate"]["benchmarks"]:
        benchmark["path"] = str(problems / f"{benchmark['name']}.jsonl")
        if quick:
            benchmark["limit"] = 5
    if quick:
        recipe["problems"]["train"]["limit"] = 20
        recipe["train"]["epochs"] = 1
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _merge(recipe: dict[str, Any], weight: float) -> dict[str, Any]:
    merge: dict[str, Any] = copy.deepcopy(recipe["models"]["assistant-mid"])
    merge["merge"]["mergekit"]["models"][0]["parameters"]["weight"] = weight
    return merge


def run(folder: Path, recipe: Path) -> list[dict[str, Any]]:
    """Runs the recipe; a row a corpus: its measures, and the accuracy that training on it brings, in %."""
    subprocess.run([sys.executable, "-m", "micota_fast", "run", str(recipe), "--out", str(folder / "run")], check=True)
    report = json.loads((folder / "run" / "report" / "report.json").read_text(encoding="utf-8"))
    rows = []
    for name, arm in report["arms"].items():
        if name == "base":
            continue
        aligned = load(Alignment, folder / "run" / "align" / f"{name}.json")
        learnability = aligned.learnability
        assert learnability is not None  # only earlier versions wrote none
        rows.append(
            {
                "corpus": name,
                "documents": aligned.documents,
                "nats_per_answer": learnability.nats_per_answer.mean,
                "perplexity": aligned.perplexity,
                "tokens": aligned.tokens.mean,
                "departures_per_answer": learnability.departures_per_answer.mean,
                "rank_surprisal_ratio": learnability.rank_surprisal_ratio,
                "accuracy": 100 * arm["average"]["mean"],
                "base": 100 * report["arms"]["base"]["average"]["mean"],
            }
        )
    return rows


def judged(rows: list[dict[str, Any]], measure: str) -> tuple[float, float]:
    """How a measure ranks one student's corpora: Spearman's correlation, and the points lost by its first choice.

    A measure, or an accuracy, that is the same for all ranks none: correlation 0. Of equally good first choices the
    mean counts.
    """
    value, accuracy = (np.array([row[key] for row in rows], float) for key in (measure, "accuracy"))
    first = accuracy[value == value.min()]
    return spearman((-value).tolist(), accuracy.tolist()) or 0.0, float(accuracy.max() - first.mean())


def over_worlds(of_students: dict[tuple[int, str], float]) -> tuple[float, list[float] | None]:
    """Mean over worlds of the means over their students, and Student's t interval (95%); None for one world."""
    worlds: dict[int, list[float]] = {}
    for (world, _), value in of_students.items():
        worlds.setdefault(world, []).append(value)
    mean, sd = mean_and_sd([float(np.mean(values)) for values in worlds.values()])
    if sd is None:
        return mean, None
    half = student_t95(len(worlds) - 1) * sd / len(worlds) ** 0.5
    return mean, [mean - half, mean + half]


def summaries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a measure, with and without bare answers."""
    found = []
    of_student: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        of_student.setdefault((row["world"], row["student"]), []).append(row)
    for with_bare in (False, True):
        judgements = {
            measure: {
                key: judged([r for r in own if with_bare or r["corpus"] != BARE], measure)
                for key, own in of_student.items()
            }
            for measure in MEASURES
        }
        for measure, of_measure in judgements.items():
            correlations = {key: rho for key, (rho, _) in of_measure.items()}
            mean, interval = over_worlds(correlations)
            ahead, ahead_interval = over_worlds(
                {key: judgements[SCORE][key][0] - correlations[key] for key in of_student}
            )
            found.append(
                {
                    "benchmark": "learnability",
                    "summary": measure,
                    "with_bare_answers": with_bare,
                    "students": len(of_student),
                    "spearman": mean,
                    "spearman_95": interval,
                    "spearman_min": min(correlations.values()),
                    "spearman_max": max(correlations.values()),
                    "score_ahead": ahead,
                    "score_ahead_95": ahead_interval,
                    "points_lost": over_worlds({key: lost for key, (_, lost) in of_measure.items()})[0],
                }
            )
    return found


def main() -> int:
    """Makes the worlds, trains, prints a table and, with --json, appends rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "learnability", help="worlds and runs; kept")
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="each training is done once a seed")
    parser.add_argument("--quick", action="store_true", help="the shipped student on three corpora: only that it runs")
    parser.add_argument("--json", type=Path, help="rows are appended to this file")
    args = parser.parse_args()
    origin = provenance("micota-fast", "torch", "numpy")
    rows: list[dict[str, Any]] = []
    for world in [0] if args.quick else args.worlds:
        folder = args.work / f"world-{world}"
        build.write_problems(folder / "problems", world)
        models = elders(world, folder / "work")
        untrained = {"shipped": MICRO / "checkpoints" / "student"} if args.quick else students(world, folder / "work")
        for name, student in untrained.items():
            seeds = args.seeds[:1] if args.quick else args.seeds
            measured = run(folder, write_recipe(folder, models, student, seeds, args.quick))
            of = {"benchmark": "learnability", "world": world, "student": name, "seeds": seeds}
            rows += [of | row | origin for row in measured]
            _print_student(world, name, measured)
    total = [row | origin for row in summaries(rows)]
    _print_summaries(total)
    if args.json is not None:
        append_rows(args.json, rows + total)
    return 0


def _print_student(world: int, name: str, rows: list[dict[str, Any]]) -> None:
    print(f"\nworld {world}, student {name}, untrained {rows[0]['base']:.1f}%")
    print(f"{'corpus':15} {'accuracy':>8} {'nats':>7} {'ppl':>7} {'tokens':>7} {'depart.':>7} {'rsr':>7}")
    for row in sorted(rows, key=lambda row: row["nats_per_answer"]):
        figures = " ".join(f"{row[measure]:7.2f}" for measure in MEASURES)
        print(f"{row['corpus']:15} {row['accuracy']:8.1f} {figures}")


def _print_summaries(rows: list[dict[str, Any]]) -> None:
    for with_bare in (False, True):
        print(f"\nrank correlation with accuracy, {'with' if with_bare else 'without'} bare answers")
        for row in rows:
            if row["with_bare_answers"] == with_bare:
                print(
                    f"{row['summary']:22} {row['spearman']:+.2f}{_interval(row['spearman_95'])}, from "
                    f"{row['spearman_min']:+.2f} to {row['spearman_max']:+.2f}; the score is ahead by "
                    f"{row['score_ahead']:+.2f}{_interval(row['score_ahead_95'])}; first choice loses "
                    f"{row['points_lost']:.1f} points ({row['students']} students)"
                )


def _interval(bounds: list[float] | None) -> str:
    return f" [{bounds[0]:+.2f}, {bounds[1]:+.2f}]" if bounds else ""


if __name__ == "__main__":
    sys.exit(main())
