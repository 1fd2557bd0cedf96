"""The training loop, top to bottom."""

import math
import platform
import shutil
import signal
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import micota_fast
from micota_fast import config as configuration
from micota_fast.chat import Chat
from micota_fast.data.batches import IGNORE_INDEX, PackedBatch, PackedSteps
from micota_fast.data.tokenise import Documents, load_documents
from micota_fast.errors import InputError
from micota_fast.model.attention import choose_backend
from micota_fast.model.config import ModelConfig
from micota_fast.model.safetensors_io import (
    COPIED_FILES,
    init_random,
    load_model,
    resolve_checkpoint,
    save_checkpoint,
    tensor_files,
)
from micota_fast.recipe import TrainConfig
from micota_fast.train.checkpoint import Checkpoints, describe_differences, sha256, write_json
from micota_fast.train.meters import Meters
from micota_fast.train.optim import clip_gradients, learning_rate, make_optimizer
from micota_fast.train.parallel import PackedLoss, World, distribute, gathered_weights, world


def train(config: TrainConfig) -> bool:
    """Train as `config` says and leave in `config.out`: model/, metrics.jsonl and summary.json.

    A run that was interrupted goes on from its last checkpoint, on the same number of processes bit for bit as if it
    had never stopped (on a CPU, and with the same number of threads); one that is finished is left as it is.

    Returns:
        Whether the run is finished: False where SIGINT or SIGTERM ended it early, with a checkpoint.

    Raises:
        InputError: bad input, or `config.out` holds another run.
    """
    with world(config.device) as here:
        return _train(config, here)


def _train(config: TrainConfig, world: World) -> bool:
    out, source = Path(config.out), resolve_checkpoint(config.model)
    documents = _load_documents(config, source)
    identity = _identity(config, source, documents)
    if _is_finished(out, identity):
        if world.is_main:
            print(f"{out} already holds the finished result of this run")
        return True
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(out, identity, world)

    steps = PackedSteps(documents, config.pack_tokens, config.packs_per_step, world.rank, world.size, config.seed)
    total = min(steps.total_steps(config.epochs), config.max_steps or math.inf)
    checkpoint_every = config.checkpoint_every or math.ceil(total / 10)
    model = _load_model(config, source, world)
    if world.is_main:
        _introduce(config, model, documents, steps, total, world)
    flops_per_token = model.decoder.flops_per_token(_mean_context(documents))
    distribute(model, config, world)
    optimizer = make_optimizer(model, config)
    start = checkpoints.restore(model, optimizer)
    meters = Meters(config, out, world, start, total, flops_per_token)
    if start and world.is_main:
        print(f"going on after step {start}", flush=True)

    with StopSignals() as signals:
        for step in range(start, total):
            packs, n_supervised, n_tokens = steps.step(step)
            packs += [_IDLE] * (steps.micro_steps(step) - len(packs))  # every rank must join in the collectives
            loss = torch.zeros((), device=world.device)
            for pack in packs:
                pack_loss = model(*_on_device(pack, world), normalizer=n_supervised)
                pack_loss.backward()
                loss += pack_loss.detach()
            grad_norm = clip_gradients(model, config.max_grad_norm)
            lr = learning_rate(step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            done = step + 1
            meters.record(
                loss, grad_norm, step=done, epoch=done / steps.steps_per_epoch, lr=lr, supervised=n_supervised,
                tokens=n_tokens, efficiency=steps.efficiency,
            )
            stop = meters.report(signals.received) if meters.due() else False
            if done < total and (stop or done % checkpoint_every == 0):
                if meters.recorded: meters.report(False)
                meters.sync()
                checkpoints.save(done, model, optimizer)
            if stop and done < total:
                return False
    return True
