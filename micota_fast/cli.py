"""`micota <verb>`: one verb a stage, no logic of its own."""

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from micota_fast import __version__
from micota_fast.config import loader
from micota_fast.config.corpus import FilterConfig, MixConfig
from micota_fast.config.evaluation import AlignConfig, ContaminationConfig, EvaluateConfig
from micota_fast.config.generation import GenerateConfig, ServeConfig
from micota_fast.config.merge import LengthSweepConfig, MergeConfig
from micota_fast.config.recipe import Recipe
from micota_fast.config.report import ReportConfig
from micota_fast.config.train import TrainConfig
from micota_fast.errors import InputError

RECIPES = Path(__file__).parent / "recipes"
# verb -> (its options, "module:function" that takes them); modules are imported when their verb is called
STAGES: dict[str, tuple[type, str]] = {
    "generate": (GenerateConfig, "micota_fast.generation.generate:run"),
    "filter": (FilterConfig, "micota_fast.corpus.filter:run"),
    "mix": (MixConfig, "micota_fast.corpus.mix:run"),
    "train": (TrainConfig, "micota_fast.train.loop:train"),
    "evaluate": (EvaluateConfig, "micota_fast.evaluation.evaluate:run"),
    "length-sweep": (LengthSweepConfig, "micota_fast.length_sweep.length_sweep:run"),
    "align": (AlignConfig, "micota_fast.alignment.align:run"),
    "contamination": (ContaminationConfig, "micota_fast.corpus.contamination:run"),
    "report": (ReportConfig, "micota_fast.report.report:run"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status.

    0: done; 1: `doctor` found errors; 2: something to mend; 130: interrupted; 141: the reader of its output went away.
    """
    parsed = _parser().parse_args(arguments)
    try:
        status: int | None = parsed.call(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except InputError as error:
        print(f"micota {parsed.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        went_on = "" if parsed.verb == "serve" else "; the same command goes on from here"
        print(f"micota {parsed.verb}: interrupted{went_on}", file=sys.stderr)
        return 130
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="micota", description=sys.modules["micota_fast"].__doc__)
    parser.add_argument("--version", action="version", version=f"micota-fast {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    shipped = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))

    of_recipe = f"YAML file, or a recipe that is shipped: {shipped}"
    run = _verb(verbs, "run", Recipe, _run, "RECIPE", of_recipe)
    run.add_argument(
        "--dry-run", action="store_true", help="only show what is done, stale or to do, and by which commands"
    )
    run.add_argument("--out", metavar="DIR", help="the run's folder; default: runs/NAME")

    planned = verbs.add_parser(
        "plan",
        help="tokens, FLOPs, GPU-hours, memory, disk and money of a recipe, on paper",
        description="What each stage of a recipe will take, from the models' shapes and from what is assumed.",
    )
    planned.add_argument("--gpu", metavar="NAME", help="h100 (default), h200, a100 ...; cpu: none")
    planned.add_argument("--gpus", type=int, metavar="N", help="GPUs of the machine; default: as many as are used")
    planned.add_argument("--dollars-per-gpu-hour", type=float, metavar="X", help="what a GPU costs")
    planned.add_argument(
        "--answer-tokens",
        metavar="NAME=TOKENS",
        action="append",
        default=[],
        help="mean length of the answers in a corpus, or of the student's own (base); can be repeated",
    )
    planned.add_argument(
        "--assume", metavar="KEY=VALUE", action="append", default=[], help="change what the table says is assumed"
    )
    planned.add_argument("--json", metavar="FILE", help="write it there, too, with all digits")
    planned.set_defaults(call=_plan)

    doctor = verbs.add_parser(
        "doctor",
        help="check this machine for a recipe, and say what to do",
        description="Check this machine for a recipe, a line a check, with what to do. Status 1: there are errors.",
    )
    doctor.set_defaults(call=_doctor)
    for verb in (planned, doctor):
        verb.add_argument("config", metavar="RECIPE", help=of_recipe)
        verb.add_argument("--out", metavar="DIR", help="the run's folder; default: runs/NAME")
        _add_set(verb)

    for name, (cls, _) in STAGES.items():
        _verb(verbs, name, cls, _stage, "CONFIG", "YAML file of the options below; every one can be --set instead", "?")

    merge = verbs.add_parser("merge", help=_summary(MergeConfig), description=MergeConfig.__doc__)
    merge.add_argument("config", metavar="CONFIG", help="mergekit YAML file")
    merge.add_argument("out", metavar="OUT", help="folder of the merged checkpoint")
    merge.add_argument("--seed", type=int, default=0, help="seed of DARE's mask (default 0)")
    merge.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=[],
        metavar="W",
        help="merge once for each of these weights (slerp: t) of the one model, in one reading, into OUT/weight-W",
    )
    merge.set_defaults(call=_merge)

    export = verbs.add_parser(
        "export",
        help="completions as a Parquet file",
        description="Write completions as a Parquet file, in their order.",
    )
    export.add_argument("completions", metavar="COMPLETIONS", help="JSONL, as `generate` and `filter` write it")
    export.add_argument(
        "out", metavar="OUT", help="the Parquet file; pyarrow is needed (pip install 'micota-fast[parquet]')"
    )
    export.set_defaults(call=_export)

    serve = verbs.add_parser(
        "serve",
        help="answer SGLang's HTTP API for a checkpoint",
        description="Serve a checkpoint in the foreground, with our own decoder or real SGLang servers.",
        epilog=_options(ServeConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("model", metavar="MODEL", help="checkpoint folder or hub name")
    serve.add_argument("--log", metavar="FILE", help="the servers' output: FILE, FILE.1 ...; default: the terminal")
    _add_set(serve)
    serve.set_defaults(call=_serve)
    benchmarks = verbs.add_parser(
        "benchmarks",
        help="fetch the benchmarks' problems from the Hugging Face Hub",
        description="Write the files of the shipped benchmark definitions to a folder; those that are there stay.",
    )
    benchmarks.add_argument("folder", metavar="DIR", help="where the files go: the `data_dir` of a recipe")
    benchmarks.set_defaults(call=_benchmarks)
    return parser


def _verb(
    verbs: Any, name: str, cls: type, call: Any, metavar: str, help_text: str, nargs: str | None = None
) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=_summary(cls),
        description=cls.__doc__,
        epilog=_options(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("config", metavar=metavar, nargs=nargs, help=help_text)
    _add_set(verb)
    verb.set_defaults(call=call)
    return verb


def _add_set(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set an option, nested ones as a.b=value; wins over the file; can be repeated",
    )


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").split("\n")[0].rpartition("`: ")[2].rstrip(".")


def _options(cls: type) -> str:
    lines = ["options, with their defaults and, in brackets, where the default comes from:"]
    for key, default, doc in loader.describe(cls):
        lines += [f"  {key} = {default}", f"      {doc}"]
    return "\n".join(lines)


def _recipe(parsed: argparse.Namespace) -> tuple[Recipe, Path, Path]:
    """The recipe, its file, and the run's folder."""
    path = Path(parsed.config)
    if not path.is_file() and (RECIPES / f"{parsed.config}.yaml").exists():
        path = RECIPES / f"{parsed.config}.yaml"
    loaded = loader.load(Recipe, path, parsed.overrides)
    return loaded, path.resolve(), Path(parsed.out or f"runs/{loaded.name}").resolve()


def _plan(parsed: argparse.Namespace) -> None:
    from micota_fast.planning import plan
    from micota_fast.planning.assumptions import Assumptions

    loaded, path, folder = _recipe(parsed)
    assumed = loader.load(Assumptions, None, parsed.assume)
    made = plan.make_plan(
        loaded, path, folder, parsed.gpu, parsed.gpus, assumed, parsed.answer_tokens, parsed.dollars_per_gpu_hour
    )
    if parsed.json:
        plan.write_json(parsed.json, made, assumed)
    print(plan.table(made, assumed))


def _doctor(parsed: argparse.Namespace) -> int:
    from micota_fast.planning.doctor import check

    return check(*_recipe(parsed))


def _run(parsed: argparse.Namespace) -> None:
    from micota_fast.pipeline.graph import plan
    from micota_fast.pipeline.run import Run

    loaded, path, folder = _recipe(parsed)
    absent: list[str] | None = [] if parsed.dry_run else None  # a dry run shows the stages all the same
    run = Run(plan(loaded, path, folder, absent), loaded.launch, folder)
    statuses = run.statuses()
    width = max(len(name) for name in statuses)
    open_stages = [name for name, status in statuses.items() if status.state != "done"]
    if parsed.dry_run:
        for stage in run.stages:
            status = statuses[stage.name]
            print(f"{stage.name:{width}}  {status.state:8}  {status.why}".rstrip())
            if status.state != "done":
                print(f"    {shlex.join(run.command(stage))}")
        for what in absent or ():
            print(f"absent: {what}")
        print(f"{len(statuses) - len(open_stages)} of {len(statuses)} stages done; folder: {folder}")
        return
    if open_stages:
        print(f"{len(open_stages)} of {len(statuses)} stages to do in {folder}")
        run.run(lambda line: print(line, flush=True))
    print((folder / "report" / "table.md").read_text(encoding="utf-8"))
    print(f"All {len(statuses)} stages done. Report: {folder / 'report' / 'report.html'}")


def _stage(parsed: argparse.Namespace) -> None:
    cls, place = STAGES[parsed.verb]
    options: Any = loader.load(cls, parsed.config, parsed.overrides)
    module, _, function = place.partition(":")
    if getattr(importlib.import_module(module), function)(options) is False:
        raise KeyboardInterrupt  # stopped by a signal, with its work kept


def _merge(parsed: argparse.Namespace) -> None:
    from micota_fast.merge.merge import merge

    merge(MergeConfig(config=parsed.config, out=parsed.out, seed=parsed.seed, weights=parsed.weights))


def _export(parsed: argparse.Namespace) -> None:
    from micota_fast.corpus.export import export

    print(f"{parsed.out}: {export(parsed.completions, parsed.out)} completions")


def _benchmarks(parsed: argparse.Namespace) -> None:
    from micota_fast.evaluation.benchmarks import fetch

    fetch(parsed.folder)


def _serve(parsed: argparse.Namespace) -> None:
    from micota_fast.serve.serve import serve_in_foreground

    serve_in_foreground(parsed.model, loader.load(ServeConfig, None, parsed.overrides), parsed.log)
