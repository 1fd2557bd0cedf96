"""What a recipe needs of the machine that will run it, and what was found about the machine."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from micota_fast.config.evaluation import JudgeConfig
from micota_fast.config.generation import SamplingSettings, ServeConfig
from micota_fast.config.recipe import Recipe
from micota_fast.errors import InputError
from micota_fast.pipeline.graph import build_stages
from micota_fast.pipeline.stage import Stage
from micota_fast.planning import machine
from micota_fast.planning.plan import CPU, DEFAULT_GPU, Plan, make_plan
from micota_fast.planning.planner import Cost

SLOW_FLOPS = 1e15  # hours on a CPU: a stage that takes more and names no device is meant for a GPU


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warning", "error"]
    what: str
    found: str
    todo: str = ""

    def __str__(self) -> str:
        line = f"{self.level:8} {self.what}: {self.found}"
        return f"{line}\n{'':8} -> {self.todo}" if self.todo else line


class Needs:
    """The stages of a recipe that are not done, and what they take.

    Args:
        recipe: loaded from `path`.
        path: of the recipe.
        folder: of the run.

    Raises:
        InputError: the recipe is wrong.
    """

    def __init__(self, recipe: Recipe, path: Path, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        absent: list[str] = []
        self.stages = build_stages(recipe, path, folder, absent)
        self.absent = [what.removeprefix(f"{path}, ") for what in absent]
        self.plan: Plan | None = None
        self.unplanned = ""
        try:
            self.plan = make_plan(recipe, path, folder, CPU if recipe.train.device == "cpu" else DEFAULT_GPU)
        except InputError as error:
            self.unplanned = str(error)

    @cached_property
    def to_do(self) -> list[tuple[Stage, Cost]]:
        """Stages that are not done, with what they take."""
        if self.plan is None:
            return []
        pairs = zip(self.stages, self.plan.costs, strict=True)
        return [(stage, cost) for stage, cost in pairs if not cost.done]

    @cached_property
    def on_gpus(self) -> list[tuple[Stage, Cost]]:
        """Those that will run on GPUs: told to, served by SGLang, or too much for a CPU."""

        def asks(stage: Stage, cost: Cost) -> bool:
            serve = serve_of(stage)
            device = serve.device if serve else getattr(stage.settings, "device", "auto")
            return cost.flops > SLOW_FLOPS or device == "cuda" or (serve is not None and serve.engine == "sglang")

        return [(stage, cost) for stage, cost in self.to_do if cost.gpus and asks(stage, cost)]

    @cached_property
    def pending(self) -> list[Stage]:
        """Stages that are not done; all of them if that is not known."""
        return self.stages if self.plan is None else [stage for stage, _ in self.to_do]

    @cached_property
    def started(self) -> list[tuple[Stage, ServeConfig]]:
        """The servers that the run starts itself."""
        served = [(stage, serve_of(stage)) for stage in self.pending if sampling_of(stage) is not None]
        return [(stage, serve) for stage, serve in served if serve is not None and sampling_of(stage).url is None]

    @cached_property
    def cuda(self) -> bool:
        """Whether our torch can use a GPU."""
        import torch  # takes seconds, and a wrong recipe is refused before

        try:
            return machine.within(machine.PROBE_S, torch.cuda.is_available)
        except (TimeoutError, RuntimeError):
            return False


def sampling_of(stage: Stage) -> Any:
    """Return how the answers of a stage are sampled; None if it writes none."""
    settings = getattr(stage.settings, "generate", stage.settings)
    return settings if hasattr(settings, "serve") else None


def serve_of(stage: Stage) -> ServeConfig | None:
    """Return what serves the model of a stage; None if it writes no answers."""
    sampling = sampling_of(stage)
    return None if sampling is None else sampling.serve


def asked_by(stage: Stage) -> list[SamplingSettings | JudgeConfig]:
    """Return what asks servers in a stage: its sampling, and its judge's."""
    return [asks for asks in (sampling_of(stage), getattr(stage.settings, "judge", None)) if asks is not None]


def urls_of(asks: SamplingSettings | JudgeConfig) -> list[str]:
    """Return the servers that already run."""
    return [asks.url] if isinstance(asks.url, str) else asks.url or []
