"""The doctor's checks of what a recipe names: files, packages, interpreters, servers, models of the hub."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from micota_fast.common.api_key import read_key
from micota_fast.common.urls import api_base, basic_authorization, hide_credentials
from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.model.folder import tensor_files
from micota_fast.planning import machine
from micota_fast.planning.needs import Finding, Needs, asked_by, urls_of
from micota_fast.planning.plan import named_on_hub
from micota_fast.planning.shapes import weights_cached
from micota_fast.serve import sglang
from micota_fast.train.preflight import is_installed


def files(needs: Needs) -> Iterator[Finding]:
    """Check that the recipe's files and checkpoints exist and are complete."""
    for what in needs.absent:
        yield Finding("error", "files", what)
    artefacts = {a.location: a for stage in needs.stages for a in stage.inputs if a.stage is None}
    there = [Path(location) for location in artefacts if Path(location).exists()]
    for folder in (path for path in there if path.is_dir()):
        try:
            ModelConfig.from_checkpoint(folder)
            tensor_files(folder)
        except InputError as error:
            yield Finding("error", "checkpoint", str(error), "download or copy it again")
    if there and not needs.absent:
        folders = sum(path.is_dir() for path in there)
        yield Finding("ok", "files", f"{len(there) - folders} data files and {folders} checkpoints exist")


def packages(needs: Needs) -> Iterator[Finding]:
    """Check Python packages and the compiler."""
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
    trains = [stage.settings for stage in needs.pending if stage.verb == "train"]
    for module, extra, asked in (
        ("tensorboard", "tensorboard", any(settings.tensorboard for settings in trains)),
        ("wandb", "wandb", any(settings.wandb for settings in trains)),
        ("torchao", "lowbit", any(settings.optimizer_states != "float32" for settings in trains)),
    ):
        if asked and not is_installed(module):
            remedy = f"pip install 'micota-fast[{extra}]'"
            yield Finding("error", module, "the recipe uses it, but it is not installed", remedy)
    if needs.on_gpus:
        if torch.version.cuda is None:
            todo = "install torch's CUDA build: https://pytorch.org/get-started/locally"
            yield Finding("error", "torch", "built without CUDA, but stages run on GPUs", todo)
        for module, package, loss in (
            ("flash_attn", "flash-attn", "torch's own varlen attention is used"),
            ("liger_kernel", "liger-kernel", "norms, rotation and SwiGLU are torch's: slower, and more memory"),
        ):
            if importlib.util.find_spec(module) is None:
                yield Finding("warning", package, f"not installed: {loss}", f"pip install {package}")
    if any(settings.compile for settings in trains) or needs.on_gpus:
        compiler = next(filter(None, (shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++"))), None)
        if compiler is None:
            why = "torch.compile and Triton need one, and none is on the PATH"
            yield Finding("error", "C++ compiler", why, "install g++ (apt install build-essential), or set $CXX")
        else:
            yield Finding("ok", "C++ compiler", compiler)


def engines(needs: Needs) -> Iterator[Finding]:
    """Check SGLang's interpreter, and servers that the recipe expects to run already."""
    configs = {c.python: c for _, c in needs.started if c.engine == "sglang"}
    for serve in configs.values():
        named = serve.python or os.environ.get("SGLANG_PYTHON") or sys.executable  # as `sglang.find_python` looks
        python = shutil.which(named)
        if python is None:
            where = "`serve.python`" if serve.python else "$SGLANG_PYTHON"
            found = f"{where} names {named}, which is not an executable program"
            yield Finding("error", "SGLang", found, sglang.INSTALL_HINT)
            continue
        probe = "import importlib.metadata as m; print(m.version('sglang'), 'with torch', m.version('torch'))"
        try:
            yield Finding("ok", "SGLang", f"{machine.output([python, '-c', probe]).strip()}, by {python}")
        except InputError as error:
            absent = "PackageNotFoundError" in str(error)
            found = f"not installed for {python}" if absent else str(error)
            yield Finding("error", "SGLang", found, sglang.INSTALL_HINT)
    asked = {(url, asks.api): asks for stage in needs.pending for asks in asked_by(stage) for url in urls_of(asks)}
    for (url, api), asks in asked.items():
        shown, authorization = hide_credentials(url), basic_authorization(url)
        page = f"{shown.rstrip('/')}/health"
        if api == "openai":
            try:
                key = read_key(asks.openai.key_env)
            except InputError as error:
                yield Finding("error", "key", str(error))
                continue
            page = f"{api_base(shown.rstrip('/'))}/models"
            authorization = authorization if key is None else f"Bearer {key}"
        try:
            status = machine.http_status(page, "GET", authorization, proxies=False)
            todo = "see that the key is right" if status in (401, 403) else ""
            yield Finding("ok" if status == 200 else "warning", "server", f"{shown} answers {status}", todo)
        except OSError as error:
            yield Finding("warning", "server", f"{shown} does not answer ({error})", "start it before the run")


def hub(needs: Needs) -> Iterator[Finding]:
    """Check that models can be downloaded."""
    names = dict.fromkeys(a.location for stage in needs.stages for a in stage.inputs if named_on_hub(a))
    missing = [name for name in names if not weights_cached(name)]
    if names and not missing:
        yield Finding("ok", "hub", f"{len(names)} models are in the local cache")
    fetch = "download it elsewhere with `hf download NAME --local-dir DIR` and name that DIR as its `checkpoint`"
    for name in missing:
        if constants.HF_HUB_OFFLINE:
            yield Finding("error", "hub", f"{name} is not in the cache, and HF_HUB_OFFLINE is set", fetch)
            continue
        try:
            where, token = f"{constants.ENDPOINT}/{name}/resolve/main/config.json", get_token()
            status = machine.http_status(where, "HEAD", None if token is None else f"Bearer {token}")
        except OSError as error:
            why = f"{', '.join(missing)}: not in the cache, and the hub cannot be reached ({error})"
            yield Finding("error", "hub", why, f"repair the network or $HTTPS_PROXY, or {fetch}")
            return
        if status in (401, 403):
            todo = "accept its terms on its page, and log in: hf auth login"
            yield Finding("error", "hub", f"{name}: no access ({status})", todo)
        elif status >= 400:
            yield Finding("error", "hub", f"{name}: the hub answers {status}", "check the name")
        else:
            yield Finding("ok", "hub", f"{name} can be downloaded")
