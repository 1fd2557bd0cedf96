"""The one table of verbs: what each takes, what does it, how the pipeline starts it, and how planning estimates it.

The command line is made from it, a recipe's stages are started by it, and `micota plan` counts by it. A new verb is a
module, its options and a row here. Modules stand as "module:name" and are imported when they are needed, so reading the
table imports neither torch nor a verb.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from micota_fast.config.shipped import recipe_names

if TYPE_CHECKING:
    from micota_fast.config.recipe import LaunchConfig


class Argument(NamedTuple):
    """One argument of a verb on the command line: the names and the keywords of `ArgumentParser.add_argument`."""

    names: tuple[str, ...]
    keywords: Mapping[str, Any]


def _argument(*names: str, **keywords: Any) -> Argument:
    return Argument(names, keywords)


_CONFIG = _argument(
    "config", metavar="CONFIG", nargs="?", help="YAML file of the options below; each can also be set with --set"
)
SET = _argument(
    "--set",
    dest="overrides",
    metavar="KEY=VALUE",
    action="append",
    default=[],
    help="set an option (a nested one as a.b=value); overrides the file; can be repeated",
)
_RECIPE = _argument(
    "recipe", metavar="RECIPE", help=f"YAML file, or the name of a shipped recipe: {', '.join(recipe_names())}"
)
_SET_OF_RECIPE = _argument(*SET.names, **{**SET.keywords, "help": "set an option; `micota options run` lists them"})
_FOLDER = _argument("--out", metavar="DIR", help="the run's folder; default: runs/NAME")


def _config_command(verb: str, settings: Any, config: Path, launch: "LaunchConfig") -> list[str]:
    return [sys.executable, "-m", "micota_fast", verb, str(config)]


def _merge_command(verb: str, settings: Any, config: Path, launch: "LaunchConfig") -> list[str]:
    arguments = [settings.config, settings.out, "--seed", str(settings.seed)]
    return [sys.executable, "-m", "micota_fast", verb, *arguments]


def _train_command(verb: str, settings: Any, config: Path, launch: "LaunchConfig") -> list[str]:
    if launch.nproc == 1:
        return _config_command(verb, settings, config, launch)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={launch.nproc}"]
    return [*torchrun, "-m", "micota_fast.train", str(config)]


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A row of the table.

    Attributes:
        summary: one line of help.
        function: "module:function" that does it. It is called with the arguments by name. If the verb has `options`,
            they are made of `CONFIG` and `--set`, or else of all arguments, and are passed as `config`; a `RECIPE` is
            passed as `recipe` (loaded), `path` (of its file) and `folder` (of the run). A returned int is the exit
            status; anything else is 0, also the False of a stage that was asked to end and has kept its work.
        options: "module:Class" of a dataclass; None: the verb has none.
        arguments: of the command line.
        command: the command that starts a stage of this verb, from the verb, the stage's settings, the file that they
            are written to, and how stages are launched.
        results: pattern of the lines of a stage's log that `micota run` shows as soon as they are there; None: it only
            shows the last line now and then.
        preflight: "module:function" that is called with the `config` before `function`, and torch with it, is imported,
            and raises an InputError for what is missing on this machine; None: that shows at once anyway.
        cost: "module:function" that estimates a stage (see `planning.costs`); None: too little to count.
    """

    summary: str
    function: str
    options: str | None = None
    arguments: tuple[Argument, ...] = (_CONFIG, SET)
    command: Callable[[str, Any, Path, "LaunchConfig"], list[str]] = _config_command
    results: str | None = None
    preflight: str | None = None
    cost: str | None = None


VERBS: Mapping[str, Verb] = MappingProxyType(
    {
        "run": Verb(
            summary="run a recipe's stages that are missing or stale; resumes after being killed",
            function="micota_fast.pipeline.run:run_recipe",
            options="micota_fast.config.recipe:Recipe",
            arguments=(
                _RECIPE,
                SET,
                _FOLDER,
                _argument(
                    "--dry-run",
                    action="store_true",
                    help="only show what is missing (then the exit status is 2), each stage's state and its command",
                ),
            ),
        ),
        "plan": Verb(
            summary="estimate a recipe's tokens, FLOPs, GPU-hours, memory, disk and money",
            function="micota_fast.planning.plan:print_plan",
            options="micota_fast.config.recipe:Recipe",
            arguments=(
                _RECIPE,
                _SET_OF_RECIPE,
                _FOLDER,
                _argument("--gpu", metavar="NAME", help="h100 (default), h200, a100 ...; cpu: none"),
                _argument(
                    "--gpus",
                    type=int,
                    metavar="N",
                    help="GPUs in the machine; default: the number that the recipe uses",
                ),
                _argument("--dollars-per-gpu-hour", type=float, metavar="X", help="price of one GPU"),
                _argument(
                    "--answer-tokens",
                    metavar="NAME=TOKENS",
                    action="append",
                    default=[],
                    help="mean length, in tokens, of the answers in a corpus or of the untouched student (base); can "
                    "be repeated",
                ),
                _argument(
                    "--assume",
                    metavar="KEY=VALUE",
                    action="append",
                    default=[],
                    help="change an assumption that the table names; can be repeated",
                ),
                _argument(
                    "--json",
                    dest="json_file",
                    metavar="FILE",
                    help="also write the plan to FILE, with unrounded numbers",
                ),
            ),
        ),
        "doctor": Verb(
            summary="check this machine for a recipe: one line per check, with a fix; exits with 1 on errors",
            function="micota_fast.planning.doctor:check",
            options="micota_fast.config.recipe:Recipe",
            arguments=(_RECIPE, _SET_OF_RECIPE, _FOLDER),
        ),
        "prune": Verb(
            summary="list what a run has set aside (NAME~FINGERPRINT), and remove it once you agree",
            function="micota_fast.pipeline.prune:prune",
            arguments=(
                _argument("run", metavar="RUN", help="the run's folder"),
                _argument(
                    "--older-than",
                    type=float,
                    metavar="DAYS",
                    help="only results that were finished more than DAYS ago; default: all",
                ),
                _argument("--yes", action="store_true", help="remove without asking"),
            ),
        ),
        "compare": Verb(
            summary="show two runs side by side: the options that differ, the arms and the training losses",
            function="micota_fast.pipeline.compare:compare",
            arguments=(
                _argument("first", metavar="RUN", help="a run's folder"),
                _argument("second", metavar="RUN", help="another run's folder"),
                _argument("--out", metavar="FILE", help="also write an HTML page to FILE, with plots of the losses"),
            ),
        ),
        "generate": Verb(
            summary="sample a model's answers: problems in, completions out",
            function="micota_fast.generation.generate:run",
            options="micota_fast.config.generation:GenerateConfig",
            cost="micota_fast.planning.costs:generate",
        ),
        "score": Verb(
            summary="score answers with a model: completions in, the model's likeliest tokens at each position out",
            function="micota_fast.scoring.score:run",
            options="micota_fast.config.scoring:ScoreConfig",
            cost="micota_fast.planning.costs:score",
        ),
        "filter": Verb(
            summary="keep the completions that pass the rules, and count the others by reason",
            function="micota_fast.corpus.filter:run",
            options="micota_fast.config.corpus:FilterConfig",
            cost="micota_fast.planning.costs:filter_",
        ),
        "mix": Verb(
            summary="combine several corpora in a stated ratio, with at most one row per problem",
            function="micota_fast.corpus.mix:run",
            options="micota_fast.config.corpus:MixConfig",
            cost="micota_fast.planning.costs:mix",
        ),
        "train": Verb(
            summary="fine-tune a checkpoint on a corpus",
            function="micota_fast.train.loop:train",
            options="micota_fast.config.train:TrainConfig",
            arguments=(
                _CONFIG,
                SET,
                _argument(
                    "--profile", action="store_true", help="also profile two steps and write the traces to OUT/profile"
                ),
            ),
            command=_train_command,
            preflight="micota_fast.train.preflight:check",
            cost="micota_fast.planning.costs:train",
        ),
        "merge": Verb(
            summary="merge models: a mergekit configuration in, a checkpoint out",
            function="micota_fast.merge.merge:merge",
            options="micota_fast.config.merge:MergeConfig",
            arguments=(
                _argument(
                    "config",
                    metavar="CONFIG",
                    help="mergekit YAML file; it holds the method and its parameters, so this verb has no --set",
                ),
                _argument(
                    "out",
                    metavar="OUT",
                    help="folder of the merged checkpoint. Unlike train and evaluate, this verb resumes and skips "
                    "nothing: run again, it merges anew in place of the former merge. `micota run` skips a finished "
                    "merge",
                ),
                _argument("--seed", type=int, default=0, help="seed of DARE's mask (default 0)"),
                _argument(
                    "--weights",
                    type=float,
                    nargs="+",
                    default=[],
                    metavar="W",
                    help="merge once per weight (slerp: t) of the one merged model, into OUT/weight-W; the inputs "
                    "are read once",
                ),
                _argument(
                    "--push-to-hub",
                    metavar="ORG/NAME",
                    help="also upload the merged model to this hub repository, private if it is new",
                ),
            ),
            command=_merge_command,
            cost="micota_fast.planning.costs:merge",
        ),
        "length-sweep": Verb(
            summary="merge at several weights, and measure length and accuracy of the answers at each",
            function="micota_fast.length_sweep.length_sweep:run",
            options="micota_fast.config.merge:LengthSweepConfig",
            cost="micota_fast.planning.costs:length_sweep",
        ),
        "evaluate": Verb(
            summary="grade a checkpoint's answers on benchmarks",
            function="micota_fast.evaluation.evaluate:run",
            options="micota_fast.config.evaluation:EvaluateConfig",
            results=r".+: \d+\.\d\d% \[.+",
            cost="micota_fast.planning.costs:evaluate",
        ),
        "align": Verb(
            summary="measure the perplexity and length of corpora under a model",
            function="micota_fast.alignment.align:run",
            options="micota_fast.config.evaluation:AlignConfig",
            preflight="micota_fast.alignment.preflight:check",
            cost="micota_fast.planning.costs:align",
        ),
        "contamination": Verb(
            summary="find the benchmark problems that training corpora contain",
            function="micota_fast.corpus.contamination:run",
            options="micota_fast.config.evaluation:ContaminationConfig",
        ),
        "report": Verb(
            summary="make tables, plots and two self-contained pages of a comparison",
            function="micota_fast.report.report:run",
            options="micota_fast.config.report:ReportConfig",
        ),
        "export": Verb(
            summary="write completions as a Parquet file, in their order",
            function="micota_fast.corpus.export:run",
            arguments=(
                _argument(
                    "completions",
                    metavar="COMPLETIONS",
                    help="as `generate` and `filter` write them: JSONL, a JSON list (both also .gz or .zst), Parquet "
                    "or hf://datasets/ORG/NAME[:SPLIT]",
                ),
                _argument(
                    "out", metavar="OUT", help="the Parquet file; needs pyarrow (pip install 'micota-fast[parquet]')"
                ),
            ),
        ),
        "serve": Verb(
            summary="serve a checkpoint over SGLang's HTTP API, by our own decoder or real SGLang servers",
            function="micota_fast.serve.serve:serve_in_foreground",
            options="micota_fast.config.generation:ServeConfig",
            arguments=(
                _argument("model", metavar="MODEL", help="checkpoint folder or hub name"),
                SET,
                _argument(
                    "--log",
                    dest="log_path",
                    metavar="FILE",
                    help="the servers' output: FILE, FILE.1 ...; default: the terminal",
                ),
            ),
        ),
        "benchmarks": Verb(
            summary="download the shipped benchmarks' problems from the Hugging Face Hub; existing files are kept",
            function="micota_fast.evaluation.benchmarks:fetch",
            arguments=(_argument("folder", metavar="DIR", help="where the files go: the `data_dir` of a recipe"),),
        ),
        "options": Verb(
            summary="explain the options of one verb or section: `micota options serve`, `micota options train.chat`",
            function="micota_fast.pipeline.options:print_options",
            arguments=(_argument("name", metavar="NAME", nargs="?", help="verb or section; default: list them all"),),
        ),
    }
)
