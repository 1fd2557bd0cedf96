"""What the tests run, each in a process of its own: `python -m fake_cuda.scenes NAME JSON`, which prints JSON last."""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_cuda.session import Session, compile_nothing


def controls() -> dict[str, list[str]]:
    """Do one thing after the other and return, by name, which waits were seen."""
    session = Session(world=1)
    from fake_cuda.controls import NO_WAIT, WAITS
    from fake_cuda.watch import provoke

    found = {}
    with session.running():
        for name, operation in (WAITS | NO_WAIT).items():
            session.waits.found.clear()
            provoke(operation)
            found[name] = [wait.what for wait in session.waits.found]
    return found


ON_GPU: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "pack_tokens": 256}

LOW_BITS = "8-bit moments"

# What a step may be made of besides documents that every rank has; see `steps`.
FEATURES: dict[str, dict[str, Any]] = {
    "row filter": {"row_filter": 0.1},
    "hybrid sharding": {"mesh": {"replicate": 2}},
    "dummy batch": {"packs_per_step": 9},  # of eight ranks one has a second pack
    "freeze": {"freeze": ["model.embed_tokens.*", "*.layers.0.*"]},
    "two micro-steps": {"packs_per_step": 16},
    LOW_BITS: {"optimizer_states": "8bit", "mesh": {"replicate": 8}},  # thinner shards are not quantised here
    "offload": {"offload": True},
    "offload, two micro-steps": {"offload": True, "packs_per_step": 16},
}


def steps(checkpoint: str, folder: str, attention: str, cells: list[list[str]]) -> dict[str, Any]:
    """Train two steps in each cell and return the waits, and what else tells that the cell was what it says.

    Args:
        checkpoint: to start from.
        folder: for files.
        attention: the option, or one of `flash.VERSIONS`.
        cells: pairs of activation checkpointing and one of `FEATURES`.
    """
    flash = attention.startswith("flash")
    session = Session(world=8, attention=attention if flash else None)
    from helpers.training_runs import train_config, write_corpus
    from micota_fast.config.train import MeshConfig

    batches = _note_batches()
    compile_nothing()  # of torchao's step
    found = {}
    write_corpus(Path(folder) / "corpus.jsonl", rows=160)
    for mode, feature in cells:
        options = dict(FEATURES[feature])
        if "mesh" in options:
            options["mesh"] = MeshConfig(**options["mesh"])
        config = train_config(
            Path(checkpoint),
            Path(folder),
            **{
                "out": f"{folder}/{mode}-{feature}",
                **ON_GPU,
                "attention": "auto" if flash else attention,
                "activation_checkpointing": mode,
                "packs_per_step": 8,
                "max_steps": 2,
                "log_every": 2,
                "checkpoint_every": 100,
                **options,
            },
        )
        batches.clear()
        session.launches.counts.clear()
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert session.train(config)
        found[f"{mode}, {feature}"] = {
            "waits": session.seen(),
            "micro_steps": len(batches) / 2,
            "dummies": batches.count("dummy"),
            "launches": dict(session.launches.counts),
            "frozen": said.getvalue().count("frozen: "),
            "replicas": _replicas(said.getvalue()),
            "attention": _attention(said.getvalue()),
        }
    return found


def _attention(said: str) -> str:
    """Return which attention the log names: a backend, or one of `flash.VERSIONS`."""
    line = next(line for line in said.splitlines() if line.startswith("attention: "))
    version = re.search(r"flash \(FlashAttention (\d)", line)
    return f"flash {version[1]}" if version else line.split()[1]


def _replicas(said: str) -> int:
    """Return of how many copies of the model the log speaks."""
    copies = re.search(r"(\d+) copies of the model", said)
    return int(copies[1]) if copies else 1


def whole_run(checkpoint: str, folder: str) -> dict[str, Any]:
    """Train five steps on eight ranks with everything that a run has, and return what it left.

    Args:
        checkpoint: to start from.
        folder: for files.
    """
    session = Session(world=8)
    from helpers.training_runs import train_config, write_corpus

    held_out = write_corpus(Path(folder) / "held_out.jsonl", rows=30, seed=1)
    write_corpus(Path(folder) / "corpus.jsonl", rows=160)
    options = ON_GPU | {"packs_per_step": 8, "max_steps": 5, "log_every": 2, "checkpoint_every": 2}
    config = train_config(
        Path(checkpoint),
        Path(folder),
        **options,
        validation_data=str(held_out),
        validate_every=3,
        activation_checkpointing="selective",
        compile=False,
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        finished = session.train(config)
    return {"finished": finished, "waits": session.seen(), "said": said.getvalue(), "peak": session.ledger.peak}


def resumed_run(checkpoint: str, folder: str, **further: Any) -> dict[str, Any]:
    """Stop a run of one rank by SIGTERM in its third step, finish it, and return both runs.

    With one rank, torch's planner has all shards: checkpoints are written, checked and read by what really does it.

    Args:
        checkpoint: to start from.
        folder: for files.
        further: options of training.
    """
    session = Session(world=1)
    import signal

    from helpers.training_runs import checkpoint_steps, train_config, write_corpus
    from micota_fast.train import loop

    held_out = write_corpus(Path(folder) / "held_out.jsonl", rows=5, seed=1)
    options = ON_GPU | {"packs_per_step": 2, "log_every": 2, "early_stop": 3, "validate_every": 2} | further
    config = train_config(Path(checkpoint), Path(folder), **options, validation_data=str(held_out), epochs=3)
    steps_begun = 0
    learning_rate = loop.learning_rate

    def counted(*args: Any) -> float:
        nonlocal steps_begun
        steps_begun += 1
        if steps_begun == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(*args)

    loop.learning_rate = counted
    with contextlib.redirect_stdout(io.StringIO()) as said:
        stopped, first = session.train(config), session.seen()
        left = checkpoint_steps(config)
        finished, second = session.train(config), session.seen()
    return {
        "finished": [stopped, finished],
        "waits": first + second,
        "checkpoints": left,
        "steps": steps_begun,
        "said": said.getvalue(),
    }


def peaks(world: int, tokenizer: str, folder: str, cells: list[list[Any]]) -> list[dict[str, Any]]:
    """Return for each cell, by phase of a step, the bytes that rank 0 holds at most, and in which function of ours.

    Args:
        world: processes that share a model.
        tokenizer: a checkpoint that has one.
        folder: for files.
        cells: lists of a model's name, tokens of a pack, activation checkpointing, layers (None: all), and what else
            is to be set: nothing, "offload", "lora", "lora, dropout", "lora, offload" or "8bit".
    """
    session = Session(world)
    import gc

    from fake_cuda.full_width import train_step
    from micota_fast.config.train import LoraConfig

    found = []
    for model, pack_tokens, mode, layers, *rest in cells:
        levers = ", ".join(rest)
        lora = LoraConfig(dropout=0.1 if "dropout" in levers else 0.0) if "lora" in levers else None
        options: dict[str, Any] = {"activation_checkpointing": mode, "offload": "offload" in levers}
        options["optimizer_states"] = "8bit" if "8bit" in levers else "float32"
        run = train_step(session, model, tokenizer, folder, pack_tokens, layers, lora, **options)
        found.append(run)
        gc.collect()
        session.require_empty()
    return found


def launches(tokenizer: str, folder: str, chips: list[int], models: list[str]) -> dict[str, Any]:
    """Run a step of each model, in full width, and return its Triton launches and what they compile to.

    Args:
        tokenizer: a checkpoint that has one.
        folder: for files.
        chips: compute capabilities to compile for.
        models: names on the hub.
    """
    session = Session(8, chips=tuple(chips))
    from fake_cuda.full_width import train_step
    from helpers.cubins import inspect_cubin

    for model in models:
        # A pack of odd length; the row filter has kernels of its own.
        for options in ({}, {"row_filter": 0.1}, {"dtype": "float32", "attention": "sdpa"}):
            train_step(session, model, tokenizer, folder, 4099, 2, None, **options)
    compiled = [
        {"name": each.name, "chip": each.chip, **inspect_cubin(each.kernel, Path(folder))}
        for each in session.launches.compiled.values()
    ]
    return {"counts": dict(session.launches.counts), "compiled": compiled}


def graphs(checkpoint: str, attention: str, modes: list[str], offload: bool) -> dict[str, Any]:
    """Compile the blocks as `parallelize` does, and return what dynamo counted over packs of three lengths, by mode.

    torch compiles nothing under a dispatch mode of others, so a block's `forward` is called outside of it, and what
    FSDP does around it inside. Its graphs are made for both passes and run operation by operation (`aot_eager`); what
    inductor makes of them is not seen.

    Args:
        checkpoint: whose shapes the model has.
        attention: the option, or one of `flash.VERSIONS`.
        modes: of activation checkpointing.
        offload: whether FSDP shards the model, in the host's memory.
    """
    session = Session(world=1, attention=attention if attention.startswith("flash") else None)
    import torch
    from torch._dynamo.utils import counters
    from torch.utils._python_dispatch import _disable_current_modes

    from micota_fast.config.train import TrainConfig
    from micota_fast.model.attention import choose_backend
    from micota_fast.model.config import ModelConfig
    from micota_fast.train import prepare
    from micota_fast.train.parallel import parallelize
    from micota_fast.train.world import join_world

    def compile_outside(module: torch.nn.Module, **options: Any) -> None:
        compiled = torch.compile(module.forward, backend="aot_eager", **options)

        def call(*args: Any) -> Any:
            with _disable_current_modes():
                return compiled(*args)

        module.forward = call  # type: ignore[method-assign]

    torch.nn.Module.compile = compile_outside  # type: ignore[method-assign]
    head_dim = ModelConfig.from_checkpoint(checkpoint).head_dim
    found: dict[str, Any] = {}
    for mode in modes:
        torch._dynamo.reset()
        counters.clear()
        config = TrainConfig(model=checkpoint, data="", out="", compile=True, offload=offload, **ON_GPU)
        config.activation_checkpointing = mode  # type: ignore[assignment]
        made = []
        with session.running(), join_world("cuda", offload=offload) as world:
            found["attention"] = ", ".join(choose_backend("auto", world.device, torch.bfloat16, head_dim))
            model = prepare.build_model(config, Path(checkpoint), world)
            parallelize(model, config, world)
            prepare.load_initial_weights(model, config, Path(checkpoint), world)
            for lengths in ((100, 28), (64, 30, 7), (201,)):
                total = sum(lengths)
                ids_T = torch.zeros(total, dtype=torch.int64, device=world.device)
                cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=world.device)
                model(ids_T, ids_T, ids_T, None, cu_seqlens, lengths, total, float(total)).backward()
                made.append(counters["stats"]["unique_graphs"])
        found[mode] = {
            "graphs": made,
            "breaks": list(counters["graph_break"]),
            "backward": counters["aot_autograd"]["ok"],
            "gradients": sorted({str(p.grad.device) if p.grad is not None else "none" for p in model.parameters()}),
        }
    return found


def _note_batches() -> list[str]:
    """Return a list that grows with each batch that goes to the device: "pack" or "dummy"."""
    from micota_fast.train import loop
    from micota_fast.train.packed_loss import DUMMY_BATCH

    seen: list[str] = []
    on_device = loop.on_device

    def noted(batch: Any, world: Any) -> Any:
        seen.append("dummy" if batch is DUMMY_BATCH else "pack")
        return on_device(batch, world)

    loop.on_device = noted
    return seen


SCENES: dict[str, Callable[..., Any]] = {
    scene.__name__: scene for scene in (controls, steps, whole_run, resumed_run, peaks, launches, graphs)
}

if __name__ == "__main__":
    print(json.dumps(SCENES[sys.argv[1]](**json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # the interpreter's own end sometimes meets a thread of autograd, one for each device, and aborts
