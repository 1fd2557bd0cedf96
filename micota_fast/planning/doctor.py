"""`micota doctor`: is this machine fit for a recipe? A line a check, each with what to do; nothing is started or kept.

Every question to something that may not answer (a driver, an interpreter, the network) has a time limit.
"""

import importlib.metadata
import importlib.util
import math
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from micota_fast.errors import InputError
from micota_fast.graph import Stage, plan
from micota_fast.model.attention import choose_backend
from micota_fast.model.config import ModelConfig
from micota_fast.model.folder import tensor_files
from micota_fast.planning import machine
from micota_fast.planning.assumptions import GPUS
from micota_fast.planning.costs import Cost
from micota_fast.planning.plan import FITS
from micota_fast.planning.shapes import cached_on_disk
from micota_fast.planning.table import CPU, DEFAULT_GPU, Plan, make_plan, named_on_hub, size
from micota_fast.recipe import Recipe, ServeConfig
from micota_fast.serve import sglang

SLOW_FLOPS = 1e15  # hours on a CPU: a stage above that which asks for no device is meant for a GPU
PROCESS_BYTES = 0.6e9  # resident of an interpreter with torch: 0.61 GB in the metrics.jsonl of a micro training
LEAST_CAPABILITY = 8.0  # bfloat16 products, and FlashAttention 2, begin with Ampere
SHM_BYTES = 1e9  # NCCL's and SGLang's segments; Docker's default of 64 MB is too small
OTHER_FILES = 200  # open in the client beside its connections


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


def check(recipe: Recipe, path: Path, folder: Path) -> int:
    """Print a line a check; returns 1 where one is an error, else 0.

    Raises:
        InputError: the recipe itself is wrong.
    """
    counts = {"ok": 0, "warning": 0, "error": 0}
    for finding in Doctor(recipe, path, folder).findings():
        counts[finding.level] += 1
        print(finding, flush=True)
    words = [f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n and level != "ok"]
    print(f"{recipe.name}: {', '.join(reversed(words)) or 'this machine will do'}")
    return int(counts["error"] > 0)


class Doctor:
    """The checks of one recipe on this machine.

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
        self.stages = plan(recipe, path, folder, absent)
        self.absent = [what.removeprefix(f"{path}, ") for what in absent]
        self.plan: Plan | None = None
        self.unplanned = ""
        try:
            self.plan = make_plan(recipe, path, folder, CPU if recipe.train.device == "cpu" else DEFAULT_GPU)
        except InputError as error:
            self.unplanned = str(error)

    def findings(self) -> Iterator[Finding]:
        """All of them, in the report's order."""
        yield from self._files()
        if self.unplanned:
            yield Finding("warning", "needs", f"not known: {self.unplanned}", "mend that, and run this again")
        yield from self._packages()
        yield from self._gpus()
        yield from self._attention()
        yield from self._engines()
        yield from self._ports()
        yield from self._host()
        yield from self._disk()
        yield from self._hub()

    # --- what the recipe needs ---

    @cached_property
    def to_do(self) -> list[tuple[Stage, Cost]]:
        """Stages that are not done, with what they take."""
        if self.plan is None:
            return []
        pairs = zip(self.stages, self.plan.costs, strict=True)
        return [(stage, cost) for stage, cost in pairs if not cost.done]

    @cached_property
    def on_gpus(self) -> list[tuple[Stage, Cost]]:
        """Those that are to run on GPUs: told to, served by SGLang, or too much for a CPU."""

        def asks(stage: Stage, cost: Cost) -> bool:
            serve = _serve(stage)
            device = serve.device if serve else getattr(stage.settings, "device", "auto")
            return cost.flops > SLOW_FLOPS or device == "cuda" or (serve is not None and serve.engine == "sglang")

        return [(stage, cost) for stage, cost in self.to_do if cost.gpus and asks(stage, cost)]

    @cached_property
    def pending(self) -> list[Stage]:
        """Stages that are not done; all, where that is not known."""
        return self.stages if self.plan is None else [stage for stage, _ in self.to_do]

    @cached_property
    def started(self) -> list[tuple[Stage, ServeConfig]]:
        """The servers that the run starts itself."""
        served = [(stage, _serve(stage)) for stage in self.pending if _sampling(stage) is not None]
        return [(stage, serve) for stage, serve in served if serve is not None and _sampling(stage).url is None]

    @cached_property
    def cuda(self) -> bool:
        """Whether our torch can use a GPU."""
        try:
            return machine.within(machine.PROBE_S, torch.cuda.is_available)
        except (TimeoutError, RuntimeError):
            return False

    # --- the checks ---

    def _files(self) -> Iterator[Finding]:
        for what in self.absent:
            yield Finding("error", "files", what)
        artefacts = {a.location: a for stage in self.stages for a in stage.inputs if a.stage is None}
        there = [Path(location) for location in artefacts if Path(location).exists()]
        for folder in (path for path in there if path.is_dir()):
            try:
                ModelConfig.from_checkpoint(folder)
                tensor_files(folder)
            except InputError as error:
                yield Finding("error", "checkpoint", str(error), "fetch or copy it again")
        if there and not self.absent:
            folders = sum(path.is_dir() for path in there)
            yield Finding("ok", "files", f"{len(there) - folders} data files and {folders} checkpoints are there")

    def _packages(self) -> Iterator[Finding]:
        wanted = [Requirement(text) for text in importlib.metadata.requires("micota-fast") or []]
        wanted = [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate()]
        bad = []
        for requirement in wanted:
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                bad.append(f"{requirement} is not installed")
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                bad.append(f"{requirement.name} {version} is not {requirement.specifier}")
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        if bad:
            yield Finding("error", "packages", "; ".join(bad), "pip install 'micota-fast' again, in this environment")
        else:
            yield Finding("ok", "packages", f"Python {sys.version.split()[0]}, torch {torch.__version__}, {built}")
        trains = [stage.settings for stage in self.pending if stage.verb == "train"]
        for module, asked in (
            ("tensorboard", any(settings.tensorboard for settings in trains)),
            ("wandb", any(settings.wandb for settings in trains)),
        ):
            if asked and importlib.util.find_spec(module) is None:
                yield Finding(
                    "error", module, "the recipe asks for it, and it is not installed", f"pip install {module}"
                )
        if self.on_gpus:
            if torch.version.cuda is None:
                todo = "install torch's CUDA build: https://pytorch.org/get-started/locally"
                yield Finding("error", "torch", "built without CUDA, and stages are to run on GPUs", todo)
            for module, package, loss in (
                ("flash_attn", "flash-attn", "torch's own varlen attention is taken"),
                ("liger_kernel", "liger-kernel", "norms, rotation and SwiGLU are torch's: slower, and more memory"),
            ):
                if importlib.util.find_spec(module) is None:
                    yield Finding("warning", package, f"not installed: {loss}", f"pip install {package}")
        if any(settings.compile for settings in trains) or self.on_gpus:
            compiler = next(filter(None, (shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++"))), None)
            if compiler is None:
                why = "torch.compile and Triton build code with one, and none is on the PATH"
                yield Finding("error", "C++ compiler", why, "install g++ (apt install build-essential), or set $CXX")
            else:
                yield Finding("ok", "C++ compiler", compiler)

    def _gpus(self) -> Iterator[Finding]:
        if not self.on_gpus:
            if self.plan is not None:
                yield Finding("ok", "GPUs", "none is needed")
            return
        number = max(cost.gpus for _, cost in self.on_gpus)
        for_most = next(stage.name for stage, cost in self.on_gpus if cost.gpus == number)
        biggest, most = max(self.on_gpus, key=lambda pair: pair[1].memory)
        least = f"{math.ceil(most.memory / FITS / 1e9)} GB each ({biggest.name})"
        try:
            devices = machine.devices()
        except InputError as error:
            yield Finding("error", "GPUs", str(error), "mend the driver: `nvidia-smi` must list the GPUs")
            return
        if len(devices) < number:
            found = f"{len(devices) or 'none'} visible, {number} are needed ({for_most})"
            todo = f"run on a machine with {number} GPUs of {least}; fewer (`launch.nproc`) take more memory on each, "
            todo += "and answers can come from servers elsewhere (`models.NAME.url`)"
            yield Finding("error", "GPUs", found, todo)
        else:
            kinds = ", ".join(dict.fromkeys(device.name for device in devices))
            yield Finding("ok", "GPUs", f"{len(devices)} ({kinds}), {number} are needed")
        memory = min((device.memory for device in devices), default=GPUS[DEFAULT_GPU].memory)
        too_big: dict[str, list[Stage]] = {}  # arms and seeds need the same: one line for all
        for stage, cost in self.on_gpus:
            if cost.memory > FITS * memory:
                too_big.setdefault(f"needs {size(cost.memory)} on each GPU", []).append(stage)
        for needs, (stage, *others) in too_big.items():
            there = f"which have {size(memory)}" if devices else f"and an {DEFAULT_GPU.upper()} has {size(memory)}"
            found = f"{stage.name}{f' (and {len(others)} more)' if others else ''} {needs}, {there}"
            yield Finding("error" if devices else "warning", "GPU memory", found, _smaller(stage))
        if not devices:
            return
        if most.memory <= FITS * memory:
            yield Finding("ok", "GPU memory", f"{size(memory)} each, {least} are needed at most")
        if (weakest := min(device.capability for device in devices)) < LEAST_CAPABILITY:
            found = f"compute capability {weakest} is below {LEAST_CAPABILITY}"
            yield Finding("error", "GPU kind", found, "use GPUs with bfloat16 (A100, L4, H100 ...)")
        if torch.version.cuda is not None and not self.cuda:
            found = f"torch for CUDA {torch.version.cuda} cannot use them with driver {devices[0].driver}"
            yield Finding("error", "driver", found, "update the driver, or install a torch built for an older CUDA")

    def _attention(self) -> Iterator[Finding]:
        asked: dict[tuple[str, str, str], None] = {}
        for settings in (stage.settings for stage in self.pending if stage.verb in ("train", "align")):
            device = "cuda" if self.cuda and settings.device != "cpu" else "cpu"
            asked[settings.attention, device, settings.dtype] = None
        for attention, device, dtype in asked:
            try:
                backend, why = choose_backend(attention, device, getattr(torch, dtype))
            except InputError as error:
                yield Finding("error", "attention", str(error))
                continue
            if backend == "sdpa" and self.on_gpus:
                todo = "one call a document, which is slow"
                todo = "run this again where there is a GPU" if device == "cpu" else f"{todo}: install flash-attn"
                yield Finding("warning", "attention", f"{backend} ({why})", todo)
            else:
                yield Finding("ok", "attention", f"{backend} for {dtype} on {device} ({why})")

    def _engines(self) -> Iterator[Finding]:
        configs = {c.python: c for _, c in self.started if c.engine == "sglang"}
        for serve in configs.values():
            named = serve.python or os.environ.get("SGLANG_PYTHON") or sys.executable  # as `sglang.find_python` looks
            python = shutil.which(named)
            if python is None:
                where = "`serve.python`" if serve.python else "$SGLANG_PYTHON"
                found = f"{where} names {named}, which is no program that can be run"
                yield Finding("error", "SGLang", found, sglang.INSTALL_HINT)
                continue
            probe = "import importlib.metadata as m; print(m.version('sglang'), 'with torch', m.version('torch'))"
            try:
                yield Finding("ok", "SGLang", f"{machine.output([python, '-c', probe]).strip()}, by {python}")
            except InputError as error:
                absent = "PackageNotFoundError" in str(error)
                found = f"not installed for {python}" if absent else str(error)
                yield Finding("error", "SGLang", found, sglang.INSTALL_HINT)
        for url in dict.fromkeys(url for stage in self.pending for url in _urls(stage)):
            try:
                status = machine.http_status(f"{url.rstrip('/')}/health", proxies=False)
                yield Finding("ok" if status == 200 else "warning", "server", f"{url} answers {status}")
            except OSError as error:
                yield Finding("warning", "server", f"{url} does not answer ({error})", "start it before the run")

    def _ports(self) -> Iterator[Finding]:
        wanted = {(c.host, c.port + i): s for s, c in self.started if c.port for i in range(c.replicas)}
        for (host, port), stage in wanted.items():
            if (why := machine.port_obstacle(host, port)) is None:
                yield Finding("ok", "port", f"{host}:{port} is free")
            else:
                todo = "stop what listens there, or set `serve.port` to 0, which takes a free one"
                yield Finding("error", "port", f"{host}:{port} cannot be had for {stage.name} ({why})", todo)

    def _host(self) -> Iterator[Finding]:
        launch = self.recipe.launch
        cores = len(os.sched_getaffinity(0))
        processes = launch.nproc if any(stage.verb == "train" for stage in self.pending) else 1
        wanted = launch.jobs * processes * (launch.threads or 1)
        if wanted > cores:
            found = f"{cores} cores for {launch.jobs} x {processes} x {launch.threads or 1} jobs, processes and threads"
            yield Finding("warning", "CPU", found, "lower `launch.jobs`, `launch.nproc` or `launch.threads`")
        else:
            yield Finding("ok", "CPU", f"{cores} cores, {wanted} kept busy")

        needs = sorted(((self._ram(stage, cost), stage.name) for stage, cost in self.to_do), reverse=True)[
            : launch.jobs
        ]
        if needs:
            need, there = sum(n for n, _ in needs), machine.available_memory()
            found = f"{size(there)} available, {size(need)} are needed ({', '.join(name for _, name in needs)})"
            todo = "use a machine with more (a training's checkpoint passes through it), or fewer `launch.jobs`"
            yield Finding("ok", "memory", found) if need <= there else Finding("error", "memory", found, todo)

        several = launch.nproc > 1 or any(c.tp * c.dp > 1 for _, c in self.started)
        if several and Path("/dev/shm").is_dir():
            free = float(shutil.disk_usage("/dev/shm").free)
            todo = "start the container with --shm-size=16g (or --ipc=host)"
            good = free >= SHM_BYTES
            yield Finding("ok" if good else "warning", "/dev/shm", f"{size(free)} free", "" if good else todo)
        if launch.nproc > 1:
            interfaces = ", ".join(name for _, name in socket.if_nameindex())
            for variable, names in machine.unknown_interfaces().items():
                todo = f"unset it (one node needs none), or name one of {interfaces}"
                yield Finding("error", "network", f"{variable}={names} names no interface of this machine", todo)

        requests = max((_sampling(s).concurrency * c.replicas for s, c in self.started), default=0)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if requests and soft != resource.RLIM_INFINITY and soft < requests + OTHER_FILES:
            todo = f"ulimit -n {requests + OTHER_FILES}" if hard >= requests + OTHER_FILES else "lower `concurrency`"
            found = f"{soft} (ulimit -n) for up to {requests} requests in flight"
            yield Finding("warning", "open files", found, todo)
        elif requests:
            yield Finding("ok", "open files", f"{soft} for up to {requests} requests in flight")

    def _ram(self, stage: Stage, cost: Cost) -> float:
        """Bytes of the host's memory that a stage takes."""
        if stage.verb != "train":
            return PROCESS_BYTES + (0 if cost.gpus else cost.memory)
        if not cost.gpus:
            return self.recipe.launch.nproc * (PROCESS_BYTES + cost.memory)
        s = stage.settings  # a checkpoint is copied to the host before it is written
        copy = cost.passing / (s.keep_checkpoints + 1 + (s.validation_data is not None))
        return self.recipe.launch.nproc * PROCESS_BYTES + copy

    def _disk(self) -> Iterator[Finding]:
        place = next(parent for parent in (self.folder, *self.folder.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            found = f"{place} cannot be written ({error.strerror})"
            yield Finding("error", "run folder", found, "choose another: --out DIR")
            return
        yield Finding("ok", "run folder", f"{self.folder} can be written")
        if self.plan is None:
            return
        cache = Path(constants.HF_HUB_CACHE)
        cache = next(parent for parent in (cache, *cache.parents) if parent.exists())
        fetched = sum(self.plan.downloads.values())
        one_disk = cache.stat().st_dev == place.stat().st_dev
        wanted = [("disk", place, self.plan.disk + fetched * one_disk)]
        if fetched and not one_disk:
            wanted.append(("disk of the hub's cache", cache, fetched))
        for what, where, need in wanted:
            free = float(shutil.disk_usage(where).free)
            found = f"{size(free)} free at {where}, {size(need)} are needed"
            if what == "disk" and fetched and one_disk:
                found += f", {size(fetched)} of them for models from the hub"
            todo = "free some, or choose another --out (and $HF_HOME); a smaller `train.keep_checkpoints` needs less"
            yield Finding("ok", what, found) if need <= free else Finding("error", what, found, todo)

    def _hub(self) -> Iterator[Finding]:
        names = dict.fromkeys(a.location for stage in self.stages for a in stage.inputs if named_on_hub(a))
        missing = [name for name in names if cached_on_disk(name) is None]
        if names and not missing:
            yield Finding("ok", "hub", f"{len(names)} models are in the local cache")
        fetch = "fetch it elsewhere with `hf download NAME --local-dir DIR` and name that DIR as its `checkpoint`"
        for name in missing:
            if constants.HF_HUB_OFFLINE:
                yield Finding("error", "hub", f"{name} is not in the cache, and HF_HUB_OFFLINE is set", fetch)
                continue
            try:
                where = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
                status = machine.http_status(where, "HEAD", token=get_token())
            except OSError as error:
                why = f"{', '.join(missing)}: not in the cache, and the hub cannot be reached ({error})"
                yield Finding("error", "hub", why, f"mend the network or $HTTPS_PROXY, or {fetch}")
                return
            if status in (401, 403):
                todo = "accept its terms on its page, and log in: hf auth login"
                yield Finding("error", "hub", f"{name}: no access ({status})", todo)
            elif status >= 400:
                yield Finding("error", "hub", f"{name}: the hub answers {status}", "check the name")
            else:
                yield Finding("ok", "hub", f"{name} can be fetched")


def _sampling(stage: Stage) -> Any:
    """How the answers of a stage are sampled; None: it writes none."""
    settings = getattr(stage.settings, "generate", stage.settings)
    return settings if hasattr(settings, "serve") else None


def _serve(stage: Stage) -> ServeConfig | None:
    sampling = _sampling(stage)
    return None if sampling is None else sampling.serve


def _urls(stage: Stage) -> list[str]:
    url = getattr(_sampling(stage), "url", None)
    return [url] if isinstance(url, str) else url or []


def _smaller(stage: Stage) -> str:
    if stage.verb != "train":
        return "a larger `serve.tp` for this model, or GPUs with more memory"
    if stage.settings.activation_checkpointing != "full":
        return "`activation_checkpointing: full`, a smaller `pack_tokens`, or more processes (`launch.nproc`)"
    return "a smaller `pack_tokens`, more processes (`launch.nproc`), or GPUs with more memory"
