"""`micota plan`: the costs of a recipe's stages as a table that says what is assumed."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from micota_fast.common.figures import size, two
from micota_fast.common.gpu_specs import GPUS
from micota_fast.common.json_io import write_json
from micota_fast.config import loader
from micota_fast.config.recipe import LaunchConfig, Recipe
from micota_fast.errors import InputError
from micota_fast.pipeline.graph import BASE, build_stages
from micota_fast.pipeline.record import read_done
from micota_fast.pipeline.rounds import corpora_of_rounds
from micota_fast.pipeline.run import Run
from micota_fast.pipeline.stage import Artefact, Stage
from micota_fast.planning.assumptions import Assumptions
from micota_fast.planning.levers import Machine
from micota_fast.planning.overlaps import APART, shared_gpus
from micota_fast.planning.planner import Cost, Model, Planner
from micota_fast.planning.remedies import Idle, as_set, idle, remedies
from micota_fast.planning.shapes import parameters, shapes_of, weights_cached
from micota_fast.sources.hub import is_hub

CPU = "cpu"
DEFAULT_GPU = "h100"


def print_plan(
    recipe: Recipe,
    path: Path,
    folder: Path,
    gpu: str | None,
    gpus: int | None,
    dollars_per_gpu_hour: float | None,
    answer_tokens: Sequence[str],
    assume: Sequence[str],
    json_file: str | None,
) -> None:
    """Print the plan of a recipe.

    Args:
        recipe: loaded from `path`.
        path: of the recipe.
        folder: of the run.
        gpu: see `make_plan`, as the next three.
        gpus: in the machine.
        dollars_per_gpu_hour: price of one GPU.
        answer_tokens: NAME=N.
        assume: KEY=VALUE of `Assumptions`.
        json_file: where the plan goes, too, with all digits; None: nowhere.

    Raises:
        InputError: see `make_plan`; or the file cannot be written.
    """
    assumed = loader.load(Assumptions, None, assume, "--assume")
    made = make_plan(recipe, path, folder, gpu, gpus, assumed, answer_tokens, dollars_per_gpu_hour)
    if json_file:
        _write(Path(json_file), made, assumed)
    print(table(made, assumed))


@dataclass
class Plan:
    """A recipe's stages and what they cost.

    Attributes:
        costs: of each stage, in order.
        downloads: bytes of hub models that are not in the local cache, by name.
        gpu: of `gpu_specs.GPUS`, or "cpu".
        gpus: in the machine, held from the first stage to the last.
        jobs: stages that run at once.
        absent: files and folders that the recipe names and that are missing.
        planner: knows the models and corpora that the stages read.
        remedies: KEY=VALUE arguments that make stages fit which do not.
        idle: GPUs that are held and not used; None: there are none.
        dollars: price of one GPU per hour; None: not known.
    """

    stages: list[Stage]
    costs: list[Cost]
    downloads: dict[str, float]
    gpu: str
    gpus: int
    jobs: int
    absent: list[str]
    planner: Planner
    remedies: list[str]
    idle: Idle | None
    dollars: float | None = None

    @property
    def to_do(self) -> list[Cost]:
        """The costs of the stages that are not done."""
        return [cost for cost in self.costs if not cost.done]

    @property
    def disk(self) -> float:
        """Bytes at the worst moment of what is still to be written, without hub downloads."""
        passing = sorted((cost.passing for cost in self.to_do), reverse=True)
        return sum(cost.disk for cost in self.to_do) + sum(passing[: self.jobs])

    def gpu_hours(self, cost: Cost) -> float:
        """Return the GPU-hours that are paid for: the whole machine is held while the stage runs."""
        return self.gpus * (cost.hours or 0)


def make_plan(
    recipe: Recipe,
    path: Path,
    folder: Path,
    gpu: str | None = None,
    gpus: int | None = None,
    assumed: Assumptions | None = None,
    answer_tokens: Sequence[str] = (),
    dollars: float | None = None,
) -> Plan:
    """Work out what a recipe takes.

    Args:
        recipe: loaded from `path`.
        path: of the recipe.
        folder: of the run; stages done there are counted instead of assumed.
        gpu: a name of `gpu_specs.GPUS`, or "cpu"; None: "cpu" if the recipe trains on one, else an H100.
        gpus: in the machine; None: as many as the stage that takes most.
        assumed: what shapes do not say; None: the defaults.
        answer_tokens: NAME=N, mean tokens of the answers in a corpus, or of the student's own ("base").
        dollars: price of one GPU per hour.

    Raises:
        InputError: the recipe or an option is wrong, a stage takes more GPUs than `gpus`, or shapes or sizes are not
            known.
    """
    gpu = None if gpu is None else gpu.lower()  # the table has it in capitals
    if gpu not in (None, CPU, *GPUS):
        raise InputError(f"--gpu {gpu}: unknown; known are {', '.join((CPU, *GPUS))}")
    if gpus is not None and gpus < 1:
        raise InputError(f"--gpus must be at least 1, not {gpus}")
    if dollars is not None and not dollars > 0:
        raise InputError(f"--dollars-per-gpu-hour must be above 0, not {dollars}")
    absent: list[str] = []
    stages = build_stages(recipe, path, folder, absent)
    gpu = gpu or (CPU if recipe.train.device == "cpu" else DEFAULT_GPU)
    done: dict[str, float] = {}
    if folder.is_dir():
        statuses = Run(stages, recipe.launch, folder).statuses()
        for name, status in statuses.items():
            if status.state == "done" and (record := read_done(folder / name)) is not None:
                done[name] = record.seconds
    lengths = _lengths(answer_tokens, recipe)
    planner = Planner(recipe.launch, GPUS.get(gpu), assumed or Assumptions(), lengths, done)
    costs = planner.costs(stages)
    most = max((cost for cost in costs if not cost.done), key=lambda cost: cost.gpus, default=None)
    if gpus is not None and most is not None and most.gpus > gpus:
        which = "`launch.nproc`" if most.verb == "train" else "`serve.tp`, `serve.dp` and `serve.replicas`"
        raise InputError(f"--gpus {gpus}: {most.stage} takes {most.gpus} ({which}); change that, or give more GPUs")
    machine = Machine(gpus or max((cost.gpus for cost in costs), default=0), may_grow=gpus is None)
    arguments = remedies(planner, recipe, stages, costs, machine)
    unused = idle(planner, recipe, stages, costs, machine)
    absent = [what.removeprefix(f"{path}, ") for what in absent]
    return Plan(
        stages=stages,
        costs=costs,
        downloads=downloads(stages),
        gpu=gpu,
        gpus=machine.gpus,
        jobs=recipe.launch.jobs,
        absent=absent,
        planner=planner,
        remedies=arguments,
        idle=unused,
        dollars=dollars,
    )


def relative_costs(stages: Sequence[Stage], launch: LaunchConfig) -> dict[str, float]:
    """Return what each stage costs compared with the others, by name: hours on a GPU, or FLOPs without one.

    Raises:
        InputError: a model's shapes or a file's size cannot be known.
    """
    on_cpu = any(stage.verb == "train" and stage.settings.device == "cpu" for stage in stages)
    planner = Planner(launch, None if on_cpu else GPUS[DEFAULT_GPU], Assumptions(), {}, {})
    costs = planner.costs(stages)
    return {cost.stage: (cost.flops if on_cpu else cost.hours) or 0.0 for cost in costs}


def _lengths(given: Sequence[str], recipe: Recipe) -> dict[str, float]:
    answered = (name for name, of in recipe.corpora.items() if (of.generate or of.on_policy) is not None)
    known = [BASE, *answered]
    lengths: dict[str, float] = {}
    for item in given:
        name, _, number = item.partition("=")
        if name not in known or not number.isdecimal() or int(number) < 1:
            raise InputError(f"--answer-tokens {item}: expected NAME=TOKENS with a NAME of {', '.join(known)}")
        lengths[name] = int(number)
    in_rounds = {name: lengths[corpus] for name, corpus in corpora_of_rounds(recipe).items() if corpus in lengths}
    return lengths | in_rounds


def downloads(stages: Sequence[Stage]) -> dict[str, float]:
    """Return the bytes of the hub models that are not in the local cache yet, by name."""
    names = dict.fromkeys(a.location for stage in stages for a in stage.inputs if named_on_hub(a))
    models = {name: Model(shapes_of(name), 0, name) for name in names if not weights_cached(name)}
    return {name: float(parameters(model.config) * model.width) for name, model in models.items()}


def named_on_hub(artefact: Artefact) -> bool:
    """Return whether it is a model's hub name, neither a missing file nor a dataset."""
    return artefact.on_hub and not Path(artefact.location).is_absolute() and not is_hub(artefact.location)


def table(made: Plan, assumed: Assumptions) -> str:
    """Return the plan as text, with two significant digits."""
    head = ["stage", "tokens", "FLOPs", "hours", "GPU-hours", "memory", "disk", *(["cost"] if made.dollars else []), ""]
    rows = [head, *(_row(cost, made) for cost in made.costs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    lines = [f"Missing: {what}" for what in made.absent] + [""] * bool(made.absent)
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)), row[-1]]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", *_totals(made), "", *_legend(made, assumed)])


def _row(cost: Cost, made: Plan) -> list[str]:
    hours = made.gpu_hours(cost)
    money = [f"${two(hours * made.dollars)}" if hours and made.dollars else "–"] if made.dollars else []
    how = f"DOES NOT FIT: {cost.too_big}; {cost.remedy}" if cost.too_big else cost.how
    how = f"done: {how}" if cost.done else how
    if not cost.done and cost.gpus and cost.gpus != made.gpus:
        how += f"; {cost.gpus} of {made.gpus} GPUs"
    passing = f" + {size(cost.passing)}" if cost.passing else ""
    return [
        cost.stage,
        size(cost.tokens, ""),
        f"{cost.flops:.1e}".replace("e+", "e") if cost.flops else "–",
        _hours(cost.hours or 0),
        _hours(hours),
        size(cost.memory),
        size(cost.disk) + passing,
        *money,
        how,
    ]


def _hours(hours: float) -> str:
    if not hours:
        return "–"
    return two(hours) if hours >= 0.01 else "<0.01"


def _totals(made: Plan) -> list[str]:
    done = len(made.costs) - len(made.to_do)
    hours = sum(cost.hours or 0 for cost in made.to_do)
    paid = sum(made.gpu_hours(cost) for cost in made.to_do)
    what = f"To do: {len(made.to_do)} of {len(made.costs)} stages" if done else f"In all: {len(made.costs)} stages"
    parts = [
        f"{size(sum(cost.tokens for cost in made.to_do), '')} tokens",
        f"{sum(cost.flops for cost in made.to_do):.1e} FLOPs".replace("e+", "e"),
    ]
    if made.gpus:
        each = f"{made.gpus} × {made.gpu.upper()}"
        parts += [f"{two(hours)} hours of {each}, one stage after another: {two(paid)} GPU-hours"]
        if made.dollars:
            parts += [f"${two(paid * made.dollars)} at ${made.dollars:g} per GPU-hour"]
    lines = [f"{what}: {'; '.join(parts)}."]
    lines += [*_left_out(made), *_idle(made, paid)]
    if big := [cost.stage for cost in made.to_do if cost.too_big]:
        lines.append(f"DOES NOT FIT on {made.gpu.upper()}: {', '.join(big)}.")
        if made.remedies:
            lines.append(f"To make them fit, except where nothing does: {as_set(made.remedies)}")
    lines.append(f"Disk: {size(made.disk)} at the worst moment")
    if made.downloads:
        total = sum(made.downloads.values())
        lines[-1] += f", and {size(total)} of {len(made.downloads)} models from the hub ({', '.join(made.downloads)})"
    lines[-1] += "."
    if (shared := shared_gpus(made.stages, {cost.stage: cost.gpus for cost in made.to_do}, made.jobs)) is not None:
        lines.append(f"WARNING: {shared}: {APART}.")
    return lines


def _left_out(made: Plan) -> list[str]:
    """Name what the hours in the totals leave out."""
    if not made.gpus:
        return ["Hours are left out: those on a CPU are not estimated."]
    reasons: dict[str, list[str]] = {}
    for cost in made.to_do:
        for why in cost.left_out:
            reasons.setdefault(why, []).append(cost.stage)
    parts = [f"{why}: {', '.join(stages)}" for why, stages in reasons.items()]
    parts += ["downloads from the hub"] if made.downloads else []
    return [f"Left out of hours and GPU-hours: {'; '.join(parts)}."] if parts else []


def _idle(made: Plan, paid: float) -> list[str]:
    """Say how many GPU-hours idle, if that is more than a tenth of those that are paid for, and what would use them."""
    if made.idle is None or sum(made.idle.gpu_hours.values()) <= 0.1 * paid:
        return []
    lines = [f"Idle: {two(sum(made.idle.gpu_hours.values()))} of these {two(paid)} GPU-hours."]
    if made.idle.arguments:
        lines[0] += f" With more GPUs at work it takes {two(made.idle.hours)} hours: {as_set(made.idle.arguments)}"
    if made.idle.stuck:
        hours = sum(made.idle.gpu_hours[stage] for stage in made.idle.stuck)
        lines.append(f"Idle with any options: {two(hours)} GPU-hours, in {', '.join(made.idle.stuck)}.")
    return lines


def _legend(made: Plan, assumed: Assumptions) -> list[str]:
    lines = [
        "This is a plan, not a measurement. Shapes are exact. Lengths and efficiencies, and so hours, are assumed,",
        "except those of stages that are done. Tokens: read and written, in training over all epochs. GPU-hours: of",
        "the whole machine while a stage runs. Memory: the least that each GPU (or process) needs, without the",
        "allocator's gaps; for a server, weights and one longest answer. Disk: what stays + what exists only while the",
        "stage runs. –: none, or not estimated, like time on a CPU. Each set of answers is assumed to end with one",
        "that runs alone to `max_new_tokens`, as greedy answers that repeat themselves do. The mean length of a merged",
        "model's answers is assumed to be the geometric mean of its parents', and no mean length to exceed a quarter",
        "of the longest `max_new_tokens`.",
        "Assumptions (to change them: --assume KEY=VALUE; lengths of answers by corpus: --answer-tokens NAME=TOKENS):",
    ]
    for field in dataclasses.fields(assumed):
        value, source = getattr(assumed, field.name), field.metadata["source"]
        source = source if value == field.default else "as given"
        lines.append(f"  {field.name} = {value:g}: {field.metadata['doc']} [{source}]")
    return lines


def _write(file: Path, made: Plan, assumed: Assumptions) -> None:
    """Write all of it with all digits: hours, bytes, FLOPs."""
    content: Mapping[str, Any] = {
        "stages": [dataclasses.asdict(cost) | {"gpu_hours": made.gpu_hours(cost)} for cost in made.costs],
        "downloads": made.downloads,
        "disk": made.disk,
        "gpu": made.gpu,
        "gpus": made.gpus,
        "jobs": made.jobs,
        "dollars_per_gpu_hour": made.dollars,
        "assumed": dataclasses.asdict(assumed),
        "absent": made.absent,
        "remedies": made.remedies,
        "idle": None if made.idle is None else dataclasses.asdict(made.idle),
    }
    write_json(file, content)
