"""The doctor's checks of the machine: GPUs, attention, ports, cores, memory, disk."""

import copy
import dataclasses
import math
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import constants

from micota_fast.common.figures import size
from micota_fast.common.gpu_specs import GPUS
from micota_fast.errors import InputError
from micota_fast.model.attention import choose_backend
from micota_fast.pipeline.stage import Stage
from micota_fast.planning import machine
from micota_fast.planning.assumptions import FITS, KEPT_BY_SERVERS, KEPT_FREE, Assumptions, shortfall
from micota_fast.planning.levers import Machine
from micota_fast.planning.needs import Finding, Needs, sampling_of, serve_of
from micota_fast.planning.overlaps import APART, shared_gpus
from micota_fast.planning.plan import DEFAULT_GPU
from micota_fast.planning.planner import Cost
from micota_fast.planning.remedies import remedies

PROCESS_BYTES = 0.6e9  # resident of an interpreter with torch: 0.61 GB in the metrics.jsonl of a micro training
LEAST_CAPABILITY = 8.0  # bfloat16 products, and FlashAttention 2, begin with Ampere
SHM_BYTES = 1e9  # NCCL's and SGLang's segments; Docker's default of 64 MB is too small
TYPICAL_HEAD_DIM = 128  # of most models; a training or server checks its own model's
OTHER_FILES = 200  # open in the client besides its connections


def gpus(needs: Needs) -> Iterator[Finding]:
    """Check how many there are, with how much memory, and whether our torch can use them."""
    if not needs.on_gpus:
        if needs.plan is not None:
            yield Finding("ok", "GPUs", "none needed")
        return
    number = max(cost.gpus for _, cost in needs.on_gpus)
    for_most = next(stage.name for stage, cost in needs.on_gpus if cost.gpus == number)
    whole = {stage.name: cost.memory / _usable(stage) for stage, cost in needs.on_gpus}  # bytes a GPU must have
    biggest = max(whole, key=lambda name: whole[name])
    least = f"{math.ceil(whole[biggest] / 1e9)} GB each ({biggest})"
    try:
        devices = machine.devices()
    except InputError as error:
        yield Finding("error", "GPUs", str(error), "repair the driver: `nvidia-smi` must list the GPUs")
        return
    if len(devices) < number:
        found = f"{len(devices) or 'none'} visible, {number} needed ({for_most})"
        todo = f"run on a machine with {number} GPUs of {least}; fewer (`launch.nproc`) take more memory on each, "
        todo += "and answers can come from servers elsewhere (`models.NAME.url`)"
        yield Finding("error", "GPUs", found, todo)
    else:
        kinds = ", ".join(dict.fromkeys(device.name for device in devices))
        yield Finding("ok", "GPUs", f"{len(devices)} ({kinds}), {number} needed")
    at_once = {stage.name: cost.gpus for stage, cost in needs.on_gpus}
    if (shared := shared_gpus(needs.stages, at_once, needs.recipe.launch.jobs)) is not None:
        yield Finding("warning", "GPUs at once", shared, APART)
    memory = min((device.memory for device in devices), default=GPUS[DEFAULT_GPU].memory)
    too_big: dict[str, list[tuple[Stage, Cost]]] = {}  # arms and seeds need the same: one line for all
    for stage, cost in needs.on_gpus:
        if whole[stage.name] > memory:
            kept = KEPT_FREE if serve_of(stage) is None else KEPT_BY_SERVERS
            too_big.setdefault(shortfall(cost.memory, memory, _usable(stage), kept), []).append((stage, cost))
    stages = [of_need[0][0] for of_need in too_big.values()]
    costs = [dataclasses.replace(of_need[0][1], too_big=need) for need, of_need in too_big.items()]
    if too_big and needs.plan is not None:
        planner = copy.copy(needs.plan.planner)
        planner.gpu = GPUS[DEFAULT_GPU]._replace(memory=memory)
        there_are = Machine(max(number, len(devices)), may_grow=not devices)
        remedies(planner, needs.recipe, stages, costs, there_are)
    for cost in costs:
        others = len(too_big[cost.too_big]) - 1
        there = "" if devices else f", if it is an {DEFAULT_GPU.upper()}"
        found = f"{cost.stage}{f' (and {others} more)' if others else ''} needs {cost.too_big}{there}"
        yield Finding("error" if devices else "warning", "GPU memory", found, cost.remedy)
    if not devices:
        return
    if not too_big:
        yield Finding("ok", "GPU memory", f"{size(memory)} each, at most {least} needed")
    if (weakest := min(device.capability for device in devices)) < LEAST_CAPABILITY:
        found = f"compute capability {weakest} is below {LEAST_CAPABILITY}"
        yield Finding("error", "GPU kind", found, "use GPUs with bfloat16 (A100, L4, H100 ...)")
    if torch.version.cuda is not None and not needs.cuda:
        found = f"torch for CUDA {torch.version.cuda} cannot use them with driver {devices[0].driver}"
        yield Finding("error", "driver", found, "update the driver, or install a torch built for an older CUDA")


def attention(needs: Needs) -> Iterator[Finding]:
    """Check which implementation of attention would be used."""
    asked: dict[tuple[str, str, str], None] = {}
    for settings in (stage.settings for stage in needs.pending if stage.verb in ("train", "align")):
        device = "cuda" if needs.cuda and settings.device != "cpu" else "cpu"
        asked[settings.attention, device, settings.dtype] = None
    for attention, device, dtype in asked:
        try:
            backend, why = choose_backend(attention, device, getattr(torch, dtype), TYPICAL_HEAD_DIM)
        except InputError as error:
            yield Finding("error", "attention", str(error))
            continue
        if backend == "sdpa" and needs.on_gpus:
            todo = "one call per document, which is slow"
            todo = "run this again on a machine with a GPU" if device == "cpu" else f"{todo}: install flash-attn"
            yield Finding("warning", "attention", f"{backend} ({why})", todo)
        else:
            yield Finding("ok", "attention", f"{backend} for {dtype} on {device} ({why})")


def ports(needs: Needs) -> Iterator[Finding]:
    """Check the ports that servers will listen on."""
    wanted = {(c.host, c.port + i): s for s, c in needs.started if c.port for i in range(c.replicas)}
    for (host, port), stage in wanted.items():
        if (why := machine.port_obstacle(host, port)) is None:
            yield Finding("ok", "port", f"{host}:{port} is free")
        else:
            todo = "stop what listens there, or set `serve.port` to 0, which takes a free one"
            yield Finding("error", "port", f"{host}:{port} is not available to {stage.name} ({why})", todo)


def host(needs: Needs) -> Iterator[Finding]:
    """Check cores, memory, shared memory, network interfaces, open files."""
    launch = needs.recipe.launch
    cores = machine.cores()
    processes = launch.nproc if any(stage.verb == "train" for stage in needs.pending) else 1
    wanted = launch.jobs * processes * (launch.threads or 1)
    if wanted > cores:
        found = f"{cores} cores for {launch.jobs} x {processes} x {launch.threads or 1} jobs, processes and threads"
        yield Finding("warning", "CPU", found, "lower `launch.jobs`, `launch.nproc` or `launch.threads`")
    else:
        yield Finding("ok", "CPU", f"{cores} cores, {wanted} kept busy")

    biggest = sorted(((_ram(needs, stage, cost), stage.name) for stage, cost in needs.to_do), reverse=True)[
        : launch.jobs
    ]
    if biggest:
        need, there = sum(n for n, _ in biggest), machine.available_memory()
        found = f"{size(there)} available, {size(need)} needed ({', '.join(name for _, name in biggest)})"
        todo = "use a machine with more (a training's checkpoint passes through it), or fewer `launch.jobs`"
        yield Finding("ok", "memory", found) if need <= there else Finding("error", "memory", found, todo)

    several = launch.nproc > 1 or any(c.tp * c.dp > 1 for _, c in needs.started)
    if several and Path("/dev/shm").is_dir():
        free = float(shutil.disk_usage("/dev/shm").free)
        todo = "start the container with --shm-size=16g (or --ipc=host)"
        good = free >= SHM_BYTES
        yield Finding("ok" if good else "warning", "/dev/shm", f"{size(free)} free", "" if good else todo)
    if launch.nproc > 1:
        interfaces = ", ".join(name for _, name in socket.if_nameindex())
        for variable, names in machine.unknown_interfaces().items():
            todo = f"unset it (one node does not need it), or name one of {interfaces}"
            yield Finding("error", "network", f"{variable}={names} names no interface of this machine", todo)

    requests = max((sampling_of(s).concurrency * c.replicas for s, c in needs.started), default=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if requests and soft != resource.RLIM_INFINITY and soft < requests + OTHER_FILES:
        todo = f"ulimit -n {requests + OTHER_FILES}" if hard >= requests + OTHER_FILES else "lower `concurrency`"
        found = f"{soft} (ulimit -n) for up to {requests} requests in flight"
        yield Finding("warning", "open files", found, todo)
    elif requests:
        yield Finding("ok", "open files", f"{soft} for up to {requests} requests in flight")


def _ram(needs: Needs, stage: Stage, cost: Cost) -> float:
    """Return the bytes of the host's memory that a stage takes."""
    if stage.verb != "train":
        return PROCESS_BYTES + (0 if cost.gpus else cost.memory)
    if not cost.gpus:
        return needs.recipe.launch.nproc * (PROCESS_BYTES + cost.memory)
    s = stage.settings  # a checkpoint is copied to the host before it is written
    copy = cost.passing / (s.keep_checkpoints + 1 + (s.validation_data is not None))
    return needs.recipe.launch.nproc * PROCESS_BYTES + copy + cost.host


def disk(needs: Needs) -> Iterator[Finding]:
    """Check the room for what is written and downloaded."""
    place = next(parent for parent in (needs.folder, *needs.folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        found = f"{place} cannot be written ({error.strerror})"
        yield Finding("error", "run folder", found, "choose another: --out DIR")
        return
    yield Finding("ok", "run folder", f"{needs.folder} can be written")
    if needs.plan is None:
        return
    cache = Path(constants.HF_HUB_CACHE)
    cache = next(parent for parent in (cache, *cache.parents) if parent.exists())
    fetched = sum(needs.plan.downloads.values())
    one_disk = cache.stat().st_dev == place.stat().st_dev
    wanted = [("disk", place, needs.plan.disk + fetched * one_disk)]
    if fetched and not one_disk:
        wanted.append(("disk of the hub's cache", cache, fetched))
    for what, where, need in wanted:
        free = float(shutil.disk_usage(where).free)
        found = f"{size(free)} free at {where}, {size(need)} needed"
        if what == "disk" and fetched and one_disk:
            found += f", {size(fetched)} of them for models from the hub"
        todo = "free some, or choose another --out (and $HF_HOME); a smaller `train.keep_checkpoints` needs less"
        yield Finding("ok", what, found) if need <= free else Finding("error", what, found, todo)


def _usable(stage: Stage) -> float:
    """Return the share of a GPU's memory that a stage can use: a server leaves some for what it computes."""
    return FITS if serve_of(stage) is None else Assumptions().serve_memory
