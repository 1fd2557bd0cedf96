"""The ways to make a stage fit into a GPU's memory: a table of which `remedies` tries one row after another.

A further lever is a function that yields its steps and a row of `LEVERS`; what it saves must be counted by
`train.memory.estimate`, or wherever `costs` takes the stage's memory from.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from micota_fast.config.generation import ServeConfig
from micota_fast.config.train import LoraConfig
from micota_fast.model.config import ModelConfig
from micota_fast.pipeline.stage import Stage
from micota_fast.planning.planner import Planner
from micota_fast.serve import sglang

LEAST_PACK = 1024  # tokens
MOST_TP = 8  # GPUs over which one server splits a model: those of one machine
CHECKPOINTING = ("none", "selective", "full")  # from much memory to little
NPROC = "launch.nproc"  # the one option that is not the stage's

Changes = dict[str, Any]  # option of a stage's settings (a.b: `b` of `a`), or NPROC -> its value


@dataclass(frozen=True)
class Machine:
    """Where a stage must fit.

    Attributes:
        gpus: how many there are.
        may_grow: whether there may be more, because nobody has said how many there are.
    """

    gpus: int
    may_grow: bool


@dataclass(frozen=True)
class Lever:
    """One way to take less memory on each GPU.

    Attributes:
        name: what it turns, for messages.
        steps: the changes that it can make, from the mildest to the strongest; none if it is on already or does nothing
            for such a stage.
        effect: what it changes in the result; empty: nothing.
    """

    name: str
    steps: Callable[[Planner, Stage, Machine], Iterator[Changes]]
    effect: str = ""


def _processes(planner: Planner, stage: Stage, machine: Machine) -> Iterator[Changes]:
    """Shard over all GPUs of the machine."""
    if stage.verb == "train" and machine.gpus > planner.launch.nproc:
        mesh = stage.settings.mesh
        if mesh.shard is None and machine.gpus % mesh.replicate == 0:
            yield {NPROC: machine.gpus}


def _checkpointing(planner: Planner, stage: Stage, machine: Machine) -> Iterator[Changes]:
    if stage.verb == "train":
        for how in CHECKPOINTING[CHECKPOINTING.index(stage.settings.activation_checkpointing) + 1 :]:
            yield {"activation_checkpointing": how}


def _shorter_packs(planner: Planner, stage: Stage, machine: Machine) -> Iterator[Changes]:
    """Take packs of half the length and less, and as many tokens in a step."""
    if stage.verb not in ("train", "align"):
        return
    s = stage.settings
    for parts in (2, 4, 8):
        tokens = s.pack_tokens // parts
        if tokens >= max(LEAST_PACK, s.max_doc_tokens or 0):
            steps = {"packs_per_step": s.packs_per_step * parts} if stage.verb == "train" else {}
            yield {"pack_tokens": tokens, **steps}


def _low_bit_moments(planner: Planner, stage: Stage, machine: Machine) -> Iterator[Changes]:
    """Keep AdamW's moments in 8 bits; 4 bits save little more and are not proposed."""
    if stage.verb == "train" and stage.settings.optimizer_states == "float32" and not stage.settings.offload:
        # A model's own training takes over the options of `train`, where another remedy may put what this excludes.
        own = {} if stage.name.startswith("student/") else {"offload": False}
        yield {"optimizer_states": "8bit", **own}


def _offload(planner: Planner, stage: Stage, machine: Machine) -> Iterator[Changes]:
    """Keep weights, gradients and moments on the host; `doctor` checks its memory."""
    if stage.verb == "train" and not stage.settings.offload and stage.settings.mesh.replicate == 1:
        own = {} if stage.name.startswith("student/") else {"optimizer_states": "float32"}
        yield {"offload": True, **own}


def _adapters(planner: Planner, stage: Stage, machine: Machine) -> Iterator[Changes]:
    """Train low-rank adapters of a frozen model, merged into it, since the stages that follow serve whole models."""
    if stage.verb == "train" and stage.settings.lora is None:
        yield {"lora": LoraConfig(merged=True)}


def _split_model(planner: Planner, stage: Stage, machine: Machine) -> Iterator[Changes]:
    option, settings = answering_settings(stage)
    if settings is not None and settings.url is None and settings.api == "sglang":
        config = planner.model(settings.model if stage.verb != "length-sweep" else stage.inputs[0].location).config
        yield from _splits(f"{option}serve", settings.serve, config, machine)


def _split_judge(planner: Planner, stage: Stage, machine: Machine) -> Iterator[Changes]:
    judge = getattr(stage.settings, "judge", None)
    if judge is not None and judge.url is None:
        yield from _splits("judge.serve", judge.serve, planner.model(judge.model).config, machine)


def _splits(option: str, serve: ServeConfig, config: ModelConfig, machine: Machine) -> Iterator[Changes]:
    """Split a served model over more GPUs, of which there must be a divisor of its heads; fewer replicas if need be."""
    if serve.engine != "sglang":
        return
    tp = serve.tp
    while (tp := 2 * tp) <= MOST_TP:
        each = sglang.gpus_needed(dataclasses.replace(serve, tp=tp))
        if config.num_attention_heads % tp == 0 and (machine.may_grow or each <= machine.gpus):
            replicas = min(serve.replicas, max(1, machine.gpus // each))
            fewer = {f"{option}.replicas": replicas} if replicas < serve.replicas else {}
            yield {f"{option}.tp": tp, **fewer}


def answering_settings(stage: Stage) -> tuple[str, Any]:
    """Return the settings with which a stage asks servers, and the option they stand in ("a."); else "" and None."""
    if stage.verb == "length-sweep":
        return "generate.", stage.settings.generate
    return "", stage.settings if stage.verb in ("generate", "score", "evaluate") else None


# What costs least comes first; one is only tried if those before it, alone or together, do not suffice.
LEVERS = (
    Lever("launch.nproc", _processes),
    Lever("activation_checkpointing", _checkpointing),
    Lever("pack_tokens", _shorter_packs, "documents longer than a pack are left out or cut"),
    Lever("optimizer_states", _low_bit_moments, "AdamW's moments are rounded to 8 bits; needs the extra `lowbit`"),
    Lever("offload", _offload, "slower: weights and gradients cross PCIe in every pass, and AdamW runs on the host"),
    Lever("lora", _adapters, "adapters are trained, not all weights"),
    Lever("serve.tp", _split_model),
    Lever("judge.serve.tp", _split_judge),
)
