"""The training loop, top to bottom; then what comes before and after it."""

import hashlib
import json
import math
import platform
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from micota_fast import __version__
from micota_fast import config as configuration
from micota_fast.chat import Chat
from micota_fast.data.batches import IGNORE_INDEX, PackedBatch, PackedSteps
from micota_fast.data.tokenise import Documents, load_documents
from micota_fast.errors import InputError
from micota_fast.model import safetensors_io
from micota_fast.model.attention import choose_backend
from micota_fast.model.config import ModelConfig
from micota_fast.recipe import TrainConfig
from micota_fast.train.checkpoint import Checkpoints, describe_differences
from micota_fast.train.export import export, model_card
from micota_fast.train.lock import only_trainer
from micota_fast.train.meters import Meters, require_trackers
from micota_fast.train.optim import clip_gradients, learning_rate, make_optimizer
from micota_fast.train.parallel import PackedLoss, World, distribute, world
from micota_fast.train.storage import sha256, write_json


def train(config: TrainConfig) -> bool:
    """Train as `config` says and leave in `config.out`: model/, metrics.jsonl and summary.json.

    A run that was interrupted goes on from its last checkpoint: on a CPU, with as many processes and threads as before,
    bit for bit as if it had never stopped. One that is finished is left as it is.

    Returns:
        Whether the run is finished: False where SIGINT or SIGTERM ended it early, with a checkpoint.

    Raises:
        InputError: bad input, `config.out` holds another run or has another trainer at work in it, or the loss or the
            norm of its gradient is not finite (the checkpoints before that step are kept).
    """
    require_trackers(config)
    with (
        world(config.device) as here,
        only_trainer(Path(config.out), here),
        StopSignals() as stop,
        ExitStack() as stack,
    ):
        return _train(config, here, stop, stack)


def _train(config: TrainConfig, world: World, stop: "StopSignals", stack: ExitStack) -> bool:
    torch.manual_seed(config.seed)
    out, source = Path(config.out), safetensors_io.resolve_checkpoint(config.model)
    documents = _load_documents(config, source, out)
    identity = _identity(config, source, documents, world)
    if _is_finished(out, identity, world):
        return True
    checkpoints = stack.enter_context(Checkpoints(out, identity, world, config.keep_checkpoints))
    steps = PackedSteps(documents, config.pack_tokens, config.packs_per_step, world.rank, world.size, config.seed)
    total = min(steps.total_steps(config.epochs), config.max_steps or sys.maxsize)
    checkpoint_every = config.checkpoint_every or math.ceil(total / 10)

    model = _load_model(config, source, world)
    facts = _facts(model, documents, steps, total, world)
    _introduce(config, facts, world)
    _warn_of_positions(config.model, model.decoder.config.max_position_embeddings, documents, world)
    flops_per_token = model.decoder.flops_per_token(_mean_context(documents))
    distribute(model, config, world)
    optimizer = make_optimizer(model, config)
    progress = checkpoints.restore(model, optimizer) or {"step": 0}
    start = progress["step"]
    meters = Meters(config, out, world, start, total, steps, flops_per_token)

    for step in range(start, total):
        packs, n_supervised, n_tokens = steps.step(step)
        packs += [_IDLE] * (steps.micro_steps(step) - len(packs))  # every rank must join in the collectives
        loss = torch.zeros((), device=world.device)
        for pack in packs:
            pack_loss = model(*_on_device(pack, model, world), normalizer=n_supervised)
            pack_loss.backward()
            loss += pack_loss.detach()
        grad_norm = clip_gradients(model, config.max_grad_norm)
        lr = learning_rate(step, total, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        meters.record(loss, grad_norm, done, done / steps.steps_per_epoch, lr, n_supervised, n_tokens)
        save = done % checkpoint_every == 0 or done == total
        # Several ranks agree on stopping where they report; a lone one need not wait for that.
        report = save or done % config.log_every == 0 or (world.size == 1 and stop.requested > 0)
        stopping = report and meters.report(stop.requested)  # raises where a figure is not finite
        if save or stopping:
            meters.sync()
            folder = checkpoints.save({"step": done}, model, optimizer)
        if stopping and done < total:
            meters.close()
            checkpoints.wait()
            world.say(f"stopped after step {done}, which {folder} holds; the same command goes on from there")
            return False

    checkpoints.wait()
    chosen = f"The weights are those after the last step, {total:,}."
    card = model_card(config.model, config.data, identity, facts, meters.last, chosen)
    export(model.decoder, source, out / "model", world, card, config.save_dtype)
    if world.is_main:
        speed = {"steps": total - start, **meters.close()}
        write_json(out / "summary.json", {"identity": identity, **facts, "final": meters.last, "timing": speed})
    checkpoints.discard()
    return True


# A rank that has run out of packs trains on one token without a target: a loss and gradients of zero.
_IDLE = PackedBatch(
    input_ids=torch.zeros(1, dtype=torch.int64),
    position_ids=torch.zeros(1, dtype=torch.int64),
    cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
    max_seqlen=1,
    targets=torch.full((1,), IGNORE_INDEX),
    n_supervised=0,
    doc_ids=(),
)


def _on_device(pack: PackedBatch, model: PackedLoss, world: World) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """The arguments of `PackedLoss.forward`. SDPA groups documents on the host and wants their lengths there."""

    def copied(tensor: Tensor) -> Tensor:
        # Only from pinned memory does a copy not wait for the device.
        return tensor.pin_memory().to(world.device, non_blocking=True) if world.device.type == "cuda" else tensor

    cu_seqlens = pack.cu_seqlens if model.backend == "sdpa" else copied(pack.cu_seqlens)
    tokens = copied(pack.input_ids), copied(pack.position_ids), copied(pack.targets)
    return *tokens, cu_seqlens, pack.max_seqlen, pack.n_supervised


class StopSignals:
    """Notes SIGINT and SIGTERM, so that the step at hand ends and is kept; the third one ends the process at once."""

    def __enter__(self) -> "StopSignals":
        self.requested = 0
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested += 1
        if self.requested > 2:
            raise KeyboardInterrupt
        print(f"{signal.Signals(number).name}: stopping at the next progress line, with a checkpoint", flush=True)


def _load_documents(config: TrainConfig, source: Path, out: Path) -> Documents:
    chat = Chat.from_checkpoint(source, config.chat)
    limit = config.max_doc_tokens or config.pack_tokens
    return load_documents(config.data, chat, limit, config.over_length, config.skip_bad_rows, out / "bad_rows.jsonl")


def _identity(config: TrainConfig, source: Path, documents: Documents, world: World) -> dict[str, Any]:
    """All that the result depends on: the options, and the contents (not the places) of what they name."""
    held: list[Any] = [None]
    if world.is_main:
        files = {
            path.name: path
            for name in ("config.json", *safetensors_io.COPIED_FILES)
            if (path := source / name).exists()
        }
        if config.init == "pretrained":
            files |= {path.name: path for path in safetensors_io.tensor_files(source).values()}
        listing = "".join(f"{name} {sha256(path)}\n" for name, path in sorted(files.items()))
        options = {k: v for k, v in configuration.identity(config).items() if k not in ("model", "data", "out")}
        model = hashlib.sha256(listing.encode()).hexdigest()
        held = [{"model": model, "documents": documents.fingerprint, "options": options}]
    dist.broadcast_object_list(held)
    identity: dict[str, Any] = held[0]
    return identity


def _is_finished(out: Path, identity: dict[str, Any], world: World) -> bool:
    try:
        theirs = json.loads((out / "summary.json").read_text(encoding="utf-8"))["identity"]
    except FileNotFoundError:
        return False
    if differences := describe_differences(theirs, identity):
        raise InputError(
            f"{out} holds the result of another run ({differences}); "
            f"choose another `out`, or delete {out} to replace it"
        )
    if not (out / "model" / "config.json").is_file():
        return False
    world.say(f"{out} holds the finished result of this run already")
    world.barrier()
    if world.is_main:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # killed between writing summary.json and their removal
    return True


def _load_model(config: TrainConfig, source: Path, world: World) -> PackedLoss:
    """The decoder in float32 on this rank's device, with its loss."""
    if config.init == "random":
        decoder = safetensors_io.init_random(
            ModelConfig.from_checkpoint(source), config.seed, torch.float32, world.device
        )
    else:
        decoder = safetensors_io.load_model(source, torch.float32, world.device)
    backend, reason = choose_backend(config.attention, world.device, getattr(torch, config.dtype))
    world.say(f"attention: {backend} ({reason})")
    return PackedLoss(decoder, backend, config.row_filter)


def _mean_context(documents: Documents) -> float:
    """Length of the document that a token lies in, on average over tokens: attention's cost is linear in it."""
    lengths = documents.lengths.astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def _facts(model: PackedLoss, documents: Documents, steps: PackedSteps, total: int, world: World) -> dict[str, Any]:
    """What summary.json says besides results; equal in every run of one identity, except where versions differ."""
    return {
        "parameters": model.decoder.num_params(),
        "attention": model.backend,
        "processes": world.size,
        "steps": total,
        "data": {
            "rows": documents.rows,
            "documents": len(documents),
            "dropped": documents.dropped,
            "truncated": documents.truncated,
            "rejected": documents.rejected,
            "tokens": int(documents.lengths.sum()),
            "supervised": int(documents.n_targets.sum()),
            "packs": steps.n_packs,
            "steps_per_epoch": steps.steps_per_epoch,
            "efficiency": round(steps.efficiency, 6),
        },
        "versions": {"micota_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _introduce(config: TrainConfig, facts: dict[str, Any], world: World) -> None:
    data = facts["data"]
    start = "fresh weights" if config.init == "random" else "pre-trained"
    world.say(
        f"model: {config.model} ({facts['parameters']:,} parameters, {start}); compute {config.dtype} on "
        f"{world.size} x {world.device.type}, {torch.get_num_threads()} threads each\n"
        f"data: {config.data}: {data['documents']:,} documents of {data['rows']:,} rows ({data['dropped']} dropped and "
        f"{data['truncated']} truncated for length, {data['rejected']} bad), {data['tokens']:,} tokens, "
        f"{data['supervised']:,} supervised\n"
        f"packs: {data['packs']:,} of {config.pack_tokens:,} tokens, {data['efficiency']:.1%} filled; "
        f"{data['steps_per_epoch']:,} steps an epoch, {facts['steps']:,} in all"
    )


def _warn_of_positions(model: str, positions: int, documents: Documents, world: World) -> None:
    over = int((documents.lengths > positions).sum())
    if over:
        world.say(
            f"WARNING: {over:,} documents (longest: {int(documents.lengths.max()):,} tokens) go past the model's "
            f"max_position_embeddings of {positions:,}, which it was not made for and where a server ends an answer. "
            f"Raise that (and RoPE's scaling) in the config.json of {model}, or set max_doc_tokens"
        )
