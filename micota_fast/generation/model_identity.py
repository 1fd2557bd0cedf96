"""What is known of the model that answers: the contents of its checkpoint."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from micota_fast.common.fingerprint import Fingerprints
from micota_fast.config import loader
from micota_fast.config.evaluation import EvaluateConfig
from micota_fast.config.generation import GenerateConfig
from micota_fast.errors import InputError
from micota_fast.model.folder import resolve_model


def model_identity(config: GenerateConfig | EvaluateConfig, hashes: Fingerprints) -> dict[str, Any]:
    """Return what is known of the model that answers: its contents and server; or the name by which an API knows it.

    Raises:
        InputError: there is no checkpoint.
    """
    if config.api == "openai":
        return {"model": config.model, "api": config.api}
    return {**model_fingerprints(config.model, hashes), "serve": loader.identity(config.serve)}


def model_fingerprints(name: str, hashes: Fingerprints) -> dict[str, str]:
    """Return the hash of a checkpoint as `model` and, of MODEL+ADAPTER, that of the adapter as `adapter`.

    Args:
        name: of a folder or of the hub.
        hashes: of files read before.

    Raises:
        InputError: there is no checkpoint, or no adapter.
    """
    base, adapter = resolve_model(name)
    model = {"model": model_fingerprint(base, hashes)}
    return model if adapter is None else model | {"adapter": model_fingerprint(adapter, hashes)}


def model_fingerprint(path: Path, hashes: Fingerprints) -> str:
    """Hash (SHA-256) names and contents of a checkpoint's files, weights included: frozen models differ in little.

    Several files are read at once, so a 60 GB checkpoint takes as long as its disk or page cache does.

    Args:
        path: the checkpoint's folder.
        hashes: of files read before; a file that is unchanged since is not read again.

    Raises:
        InputError: there is no checkpoint.
    """
    files = sorted(p for p in path.iterdir() if p.suffix in {".safetensors", ".json", ".jinja"} and p.is_file())
    files = [file for file in files if file.name != "trainer_state.json"]  # how it was made is not what it is
    if not files:
        raise InputError(f"{path}: no checkpoint here (no *.json, no *.safetensors)")
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(hashes.of, files))
    digest = hashlib.sha256()
    for file, content in zip(files, contents, strict=True):
        digest.update(os.fsencode(f"{file.name}\0{content}\n"))
    return digest.hexdigest()
