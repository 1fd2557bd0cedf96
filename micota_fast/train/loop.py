"""The training loop, top to bottom."""

import math
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from micota_fast.chat.encoding import Chat
from micota_fast.chat.end_tokens import end_token_file
from micota_fast.chat.template import template_file
from micota_fast.common.json_io import write_json
from micota_fast.config.train import TrainConfig
from micota_fast.errors import InputError
from micota_fast.model.folder import resolve_checkpoint
from micota_fast.model.hub_upload import require_upload, upload
from micota_fast.train import prepare
from micota_fast.train.checkpoint import Checkpoints
from micota_fast.train.export import export, export_adapter, export_merged, license_of, model_card
from micota_fast.train.lora import flops_per_token
from micota_fast.train.meters import Meters
from micota_fast.train.optim import clip_gradients, learning_rate, make_optimizer, step_if_finite
from micota_fast.train.packed_loss import DUMMY_BATCH, on_device
from micota_fast.train.parallel import last_micro_step, parallelize
from micota_fast.train.preflight import require_torchao, require_trackers
from micota_fast.train.signals import StopSignals
from micota_fast.train.stopwatch import Stopwatch, profiler
from micota_fast.train.validation import Validation
from micota_fast.train.world import World, join_world


def train(config: TrainConfig, profile: bool = False) -> bool:
    """Train as `config` says and leave in `config.out`: model/, metrics.jsonl and summary.json.

    An interrupted run resumes from its last checkpoint: on a CPU, with the same numbers of processes and threads, the
    result has the same bits as if it had never stopped. A finished run is left as it is.

    Args:
        config: of the run.
        profile: whether to write OUT/profile, a trace of two steps.

    Returns:
        Whether the run is finished: False if SIGTERM or SIGUSR1 ended it early, with a checkpoint.

    Raises:
        InputError: bad input, `config.out` contains another run or another trainer is using it, or
            `config.max_skipped_steps` steps in a row had a loss or gradient that is not finite (a checkpoint is left).
        KeyboardInterrupt: SIGINT ended it early, with a checkpoint.
    """
    require_trackers(config)
    require_torchao(config)
    out = Path(config.out)
    with StopSignals() as stop, join_world(config.device, config.mesh, config.offload) as world, ExitStack() as lock:
        world.on_main(lambda: require_upload(config.push_to_hub))
        world.on_main(lambda: prepare.lock(out, lock))
        with ExitStack() as stack:
            finished = _train(config, out, world, stop, profile, stack)
        if not finished and stop.by_hand:
            raise KeyboardInterrupt
        repository = config.push_to_hub
        if finished and repository is not None:
            stop.release()  # there is no step to finish any more: a signal ends the upload, which a rerun repeats
            made = out / ("adapter" if config.lora is not None and not config.lora.merged else "model")
            world.on_main(lambda: upload(made, repository))
        return finished


def _train(config: TrainConfig, out: Path, world: World, stop: StopSignals, profile: bool, stack: ExitStack) -> bool:
    torch.manual_seed(config.seed)
    source = resolve_checkpoint(config.model)
    prepare.check_trained_parameters(config, source)
    template = template_file(config.chat)  # as it is now: the file may change while the training runs
    documents, held_out = prepare.load_documents(config, source, out, world)
    identity = prepare.run_identity(config, source, documents, held_out, world)
    if prepare.is_finished(out, identity, world):
        return True
    checkpoints = stack.enter_context(Checkpoints(out, identity, world, config.keep_checkpoints))
    end_tokens = world.on_main(lambda: end_token_file(source, Chat.from_checkpoint(source, config.chat).eos_ids))
    model = prepare.build_model(config, source, world)
    steps = prepare.plan_steps(config, documents, model, world)
    total = min(steps.total_steps(config.epochs), config.max_steps or sys.maxsize)
    checkpoint_every = config.checkpoint_every or math.ceil(total / 10)
    validate_every = config.validate_every or math.ceil(total / 10)
    facts = prepare.run_facts(model, documents, steps, total, world)
    prepare.introduce(config, facts, model.decoder.config, documents, world)
    flops = flops_per_token(model.decoder, prepare.mean_context(documents))
    parallelize(model, config, world)
    prepare.load_initial_weights(model, config, source, world)
    optimizer = make_optimizer(model, config)
    validation = Validation(held_out, config.pack_tokens, world, config.early_stop)
    progress = checkpoints.restore(model, optimizer) or {"step": 0, "skipped": {"in_a_row": 0, "in_all": 0}}
    start = progress["step"]
    validation.state = progress.get("validation", validation.state)
    if start < total and stop.agreed(world):
        world.say(f"stopped before step {start + 1}; run the same command to resume")
        return False
    watch = Stopwatch(world.device)
    meters = Meters(config, out, world, progress, total, steps, flops, watch)
    reverse = config.soft is not None and config.soft.divergence == "reverse"
    trace = stack.enter_context(profiler(out, world)) if profile else None

    for step in range(start, total):
        if validation.enough:
            break
        watch.lap("data")
        batches, normalizer, n_supervised, n_tokens = steps.step(step)
        batches += [DUMMY_BATCH] * (steps.micro_steps(step) - len(batches))  # every rank must join the collectives
        loss = torch.zeros((), device=world.device)
        estimate = torch.zeros(2, device=world.device) if reverse else None  # of the reverse KL: sum, tokens
        for number, batch in enumerate(batches, start=1):
            last_micro_step(model, number == len(batches))
            watch.lap("forward")
            batch_loss = model(**on_device(batch, world), normalizer=normalizer, reverse_estimate=estimate)
            watch.lap("backward")
            batch_loss.backward()
            loss += batch_loss.detach()
        watch.lap("optimizer")
        dist.all_reduce(loss)
        if estimate is not None:
            dist.all_reduce(estimate)
        grad_norm = clip_gradients(model, config.max_grad_norm)
        lr = learning_rate(step, total, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_if_finite(optimizer, loss, grad_norm)
        optimizer.zero_grad()

        done = step + 1
        watch.lap("report")
        meters.record(loss, grad_norm, done, done / steps.steps_per_epoch, lr, n_supervised, n_tokens, estimate)
        validation_loss = None
        if held_out is not None and (done % validate_every == 0 or done == total):
            watch.lap("validation")
            validation_loss = validation.measure(model, done)
            watch.lap("report")
        stopping = stop.agreed(world) and done < total
        save = stopping or validation_loss is not None or done % checkpoint_every == 0 or done == total
        report = save or done % config.log_every == 0
        if report:
            meters.report(validation_loss)  # waits for the device
        too_many_skipped = report and meters.skipped["in_a_row"] >= config.max_skipped_steps
        if save or too_many_skipped:
            watch.lap("checkpoint")
            meters.sync()
            progress = {"step": done, "skipped": meters.skipped, "validation": validation.state}
            folder = checkpoints.save(progress, model, optimizer, validation_loss)
        if trace is not None:
            trace.step()
        if stopping or too_many_skipped:
            meters.close()
            checkpoints.wait()
            if too_many_skipped:
                raise InputError(meters.describe_skipped(done, folder))
            world.say(f"stopped after step {done}, which {folder} contains; run the same command to resume")
            return False

    checkpoints.wait()
    metrics, chosen = meters.last, f"The weights are those after the last step, {progress['step']:,}."
    best = checkpoints.load_best(model) if config.early_stop is not None else None
    if best is not None:
        metrics = dict(zip(("step", "validation_loss"), best, strict=True))
        chosen = (
            f"The weights are those after step {metrics['step']:,} of {progress['step']:,}, the best on held-out rows."
        )
    world.say(chosen)
    card = partial(model_card, config.model, config.data, identity, facts, metrics, chosen, license_of(source))
    files = {"README.md": card()} | end_tokens | template
    if config.lora is None:
        export(model.decoder, source, out / "model", world, files, config.save_dtype)
    else:
        alone = {"README.md": card(adapter=True)}
        export_adapter(model.decoder, config.lora, config.model, out / "adapter", world, alone)
        if config.lora.merged:
            export_merged(source, out / "adapter", out / "model", world, files, config.save_dtype)
    speed = {"steps": progress["step"] - start, **meters.close()}
    results = {"final": meters.last, "validation": validation.state, "skipped_steps": meters.skipped["in_all"]}
    summary = {"identity": identity, **facts, **results, "timing": speed}
    world.on_main(lambda: write_json(out / "summary.json", summary, 2, finite=False))
    checkpoints.discard()
    return True
