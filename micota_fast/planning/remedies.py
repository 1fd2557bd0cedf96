"""What makes stages fit, and what would use GPUs that idle: tried on paper, and named as `--set` arguments."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from micota_fast.config.recipe import Recipe
from micota_fast.errors import InputError
from micota_fast.pipeline.rounds import corpora_of_rounds
from micota_fast.pipeline.stage import Stage
from micota_fast.planning.levers import LEVERS, NPROC, Changes, Lever, Machine, answering_settings
from micota_fast.planning.planner import Cost, Planner
from micota_fast.serve import sglang


@dataclass(frozen=True)
class Idle:
    """GPUs that are held and not used.

    Attributes:
        gpu_hours: by stage, of those that are not done.
        arguments: KEY=VALUE with which stages would use them; empty: none can.
        hours: of all stages that are not done, with these arguments.
        stuck: the stages that idle with them all the same.
    """

    gpu_hours: dict[str, float]
    arguments: list[str]
    hours: float
    stuck: list[str]


def remedies(
    planner: Planner, recipe: Recipe, stages: Sequence[Stage], costs: Sequence[Cost], machine: Machine
) -> list[str]:
    """Write into the cost of each stage that does not fit what makes it fit.

    A lever is tried, alone and together with earlier ones, if these do not suffice; mild steps before strong ones.

    Args:
        planner: knows the models and corpora that the stages read, and the GPU that they must fit.
        recipe: whose options the arguments set.
        stages: of the run.
        costs: of the stages.
        machine: that they must fit.

    Returns:
        KEY=VALUE arguments that make all of these fit for which there is a remedy.
    """
    settled: dict[str, Changes] = {}  # what is chosen, by the key of the options: it holds for the next stage, too
    arguments: dict[str, Any] = {}
    known: dict[tuple[str, str], str] = {}  # arms and seeds need the same
    for stage, cost in zip(stages, costs, strict=True):
        if not cost.too_big or cost.done:
            continue
        owner = _owner(recipe, stage)
        if (owner, cost.too_big) not in known:
            earlier = _of_stage(stage, settled.get(owner, {}))
            chosen, changes, tried = _first_that_fits(*_changed(planner, stage, earlier), machine)
            if chosen is None:
                names = ", ".join(f"`{name}`" for name in tried)
                why = f"nothing makes it fit (tried: {names})" if tried else "every lever is on already"
                known[owner, cost.too_big] = f"{why}; take GPUs with more memory, or more of them"
            else:
                settled[owner] = settled.get(owner, {}) | changes
                wanted = {_key(recipe, stage, option): value for option, value in (earlier | changes).items()}
                arguments |= wanted
                effects = "".join(f" ({lever.effect})" for lever in chosen if lever.effect)
                known[owner, cost.too_big] = f"fits with {as_set(_texts(wanted))}{effects}"
        cost.remedy = known[owner, cost.too_big]
    return _texts(arguments)


def idle(
    planner: Planner, recipe: Recipe, stages: Sequence[Stage], costs: Sequence[Cost], machine: Machine
) -> Idle | None:
    """Return which GPUs idle, and what would use them; None if none does. See `remedies` for the arguments."""
    gpu_hours: dict[str, float] = {}
    arguments: dict[str, Any] = {}
    total, stuck = 0.0, []
    changing = {_owner(recipe, s) for s, c in zip(stages, costs, strict=True) if c.too_big}
    for stage, cost in zip(stages, costs, strict=True):
        if cost.done:
            continue
        hours = cost.hours or 0.0
        if hours and cost.gpus < machine.gpus:
            gpu_hours[stage.name] = hours * (machine.gpus - cost.gpus)
            changes = _more_gpus(planner, stage, machine)
            if changes and _owner(recipe, stage) in changing:
                total += hours  # a remedy, which comes first, may take more GPUs
                continue
            faster = _tried(planner, stage, changes) if changes else None
            if faster is not None and faster.hours is not None and faster.hours < hours:
                arguments |= {_key(recipe, stage, option): value for option, value in changes.items()}
                hours = faster.hours
            else:
                stuck.append(stage.name)
        total += hours
    return Idle(gpu_hours, _texts(arguments), total, stuck) if gpu_hours else None


def as_set(arguments: Sequence[str]) -> str:
    """Return arguments to paste."""
    return " ".join(f"--set {argument}" for argument in arguments)


def _texts(arguments: Mapping[str, Any]) -> list[str]:
    """Return KEY=VALUE; of options that hold others, those that are not at their defaults."""
    texts = []
    for key, value in arguments.items():
        if dataclasses.is_dataclass(value):
            kind: Any = type(value)
            own, usual = vars(value), vars(kind())
            texts += [f"{key}.{name}={json.dumps(own[name])}" for name in own if own[name] != usual[name]]
        else:
            texts.append(f"{key}={json.dumps(value) if isinstance(value, bool) else value}")
    return texts


def _first_that_fits(
    planner: Planner, stage: Stage, machine: Machine
) -> tuple[tuple[Lever, ...] | None, Changes, list[str]]:
    """Return the levers and changes that make a stage fit, none of either if it fits as it is, and what was tried."""
    levers = [(lever, steps) for lever in LEVERS if (steps := list(lever.steps(planner, stage, machine)))]
    for chosen, changes in _combinations(levers):
        cost = _tried(planner, stage, changes)
        if cost is not None and not cost.too_big and (machine.may_grow or cost.gpus <= machine.gpus):
            return chosen, changes, []
    return None, {}, [lever.name for lever, _ in levers]


def _combinations(levers: Sequence[tuple[Lever, list[Changes]]]) -> Iterator[tuple[tuple[Lever, ...], Changes]]:
    """Yield no lever, then the first, then the second alone and with the first, and so on; each with all its steps."""
    yield (), {}
    for last, lever in enumerate(levers):
        for together in range(last + 1):
            for earlier in itertools.combinations(levers[:last], together):
                some = (*earlier, lever)
                for steps in itertools.product(*(steps for _, steps in some)):
                    changes = {key: value for step in steps for key, value in step.items()}
                    yield tuple(lever for lever, _ in some), changes


def _tried(planner: Planner, stage: Stage, changes: Changes) -> Cost | None:
    """Return the cost of a stage with other options; None if they contradict each other or do not fit the model."""
    try:
        trial, other = _changed(planner, stage, changes)
        return trial.cost(other)
    except InputError:
        return None


def _changed(planner: Planner, stage: Stage, changes: Changes) -> tuple[Planner, Stage]:
    settings, trial = stage.settings, copy.copy(planner)
    for option, value in changes.items():
        if option == NPROC:
            trial.launch = dataclasses.replace(planner.launch, nproc=value)
        else:
            settings = _replaced(settings, option.split("."), value)
    return trial, dataclasses.replace(stage, settings=settings)


def _replaced(settings: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return dataclasses.replace(settings, **{name: _replaced(getattr(settings, name), rest, value) if rest else value})


def _of_stage(stage: Stage, changes: Changes) -> Changes:
    """Return those of the changes that a stage has the options for: only an evaluation has a judge."""
    return {key: value for key, value in changes.items() if key == NPROC or hasattr(stage.settings, key.split(".")[0])}


def _more_gpus(planner: Planner, stage: Stage, machine: Machine) -> Changes:
    """Return the changes with which a stage would use as many of the machine's GPUs as it can."""
    if stage.verb == "train":
        mesh, most = stage.settings.mesh, min(machine.gpus, stage.settings.packs_per_step)
        fits = mesh.shard is None and most % mesh.replicate == 0
        return {NPROC: most} if fits and most > planner.launch.nproc else {}
    prefix, settings = answering_settings(stage)
    served = {} if settings is None or settings.url is not None else {f"{prefix}serve": settings.serve}
    judge = getattr(stage.settings, "judge", None)
    if judge is not None and judge.url is None:
        served["judge.serve"] = judge.serve
    replicas = {f"{option}.replicas": machine.gpus // sglang.gpus_needed(serve) for option, serve in served.items()}
    return {key: n for (key, n), serve in zip(replicas.items(), served.values(), strict=True) if n > serve.replicas}


def _owner(recipe: Recipe, stage: Stage) -> str:
    """Return the key below which the options of a stage are set."""
    return _key(recipe, stage, "serve" if stage.verb in ("generate", "score", "evaluate") else "")


def _key(recipe: Recipe, stage: Stage, option: str) -> str:
    """Return the recipe's key of an option of a stage: of a server's, that of the model which is served."""
    kind, _, name = stage.name.partition("/")
    if option == NPROC:
        return option
    if (corpus := corpora_of_rounds(recipe).get(name)) is not None:
        name = name.rpartition("-round")[0]
    if stage.verb == "train" and kind == "student":
        arm = recipe.students.get(name.rpartition("-seed")[0])
        if arm is not None and option.partition(".")[0] in arm.overrides:  # which go before the recipe's `train`
            return f"arms.{name.rpartition('-seed')[0]}.overrides.{option}"
        return f"train.{option}"
    if stage.verb == "train":
        return f"models.{name}.train.overrides.{option}"
    if stage.verb == "align":
        return f"alignment.{option}"
    if stage.verb == "length-sweep":
        return f"models.{name}.merge.sweep.{option}"
    if stage.verb == "evaluate":
        return f"evaluate.{option}" if option.startswith("judge.") else f"models.{recipe.student}.{option}"
    if corpus is not None:
        rounds = recipe.corpora[corpus].on_policy
        assert rounds is not None
        if stage.verb == "score":
            return f"models.{rounds.by}.{option}"
        own = f"corpora.{corpus}.on_policy.overrides.{option}"
        return own if "serve" in rounds.overrides else f"models.{recipe.student}.{option}"
    if (scored := recipe.corpora[name].score) is not None:
        return f"models.{scored.by}.{option}"
    generated = recipe.corpora[name].generate
    assert generated is not None
    own = f"corpora.{name}.generate.overrides.{option}"
    return own if "serve" in generated.overrides else f"models.{generated.model}.{option}"
