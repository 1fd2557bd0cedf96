"""A checkpoint's folder in Hugging Face layout: which file holds what, found here or on the hub, published whole.

Imports no torch, so that what only reads or copies files starts at once.
"""

import os
import re
from pathlib import Path

from micota_fast.common.json_io import read_json
from micota_fast.common.safetensors_file import StoredTensor, read_header
from micota_fast.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"  # of a LoRA adapter in peft's layout
# What a folder needs besides weights and config.json to tokenise, to render a chat and to know where to stop.
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
# Buffers that old checkpoints carry and that the configuration alone determines.
DERIVED_BUFFERS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


def resolve_checkpoint(name_or_path: str | Path) -> Path:
    """Return a local folder as it is; a name like "Qwen/Qwen2.5-3B-Instruct" from the Hugging Face hub or its cache.

    Raises InputError if there is neither.
    """
    require_checkpoint(name_or_path)
    path = Path(name_or_path)
    if os.path.isdir(path):
        return path
    name = str(name_or_path)
    import huggingface_hub

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "tokenizer.model"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (OSError, ValueError, RuntimeError) as error:  # what the hub raises derives from one of these
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: no such folder here, and the Hugging Face hub did not give it ({type(error).__name__}: {why}). "
            f"With a network, check the name and your access; without one, fetch it elsewhere with "
            f"`hf download {name} --local-dir DIR` and name that DIR"
        ) from None


def names_adapter(name: str) -> bool:
    """Return whether this is MODEL+ADAPTER, as mergekit spells it, and no folder's name."""
    return "+" in name and not os.path.isdir(name)  # unlike is_dir(), false also for names too long


def resolve_model(name: str) -> tuple[Path, Path | None]:
    """Return the folder of a checkpoint and, of MODEL+ADAPTER, that of the adapter: see `resolve_checkpoint`.

    Raises:
        InputError: there is no such checkpoint or adapter.
    """
    if not names_adapter(name):
        return resolve_checkpoint(name), None
    base, _, adapter = name.rpartition("+")
    if not base or not adapter:
        raise InputError(f"{name!r} lacks the {'adapter' if base else 'model'}; MODEL+ADAPTER names both")
    folders = resolve_checkpoint(base), resolve_checkpoint(adapter)
    if not (folders[1] / ADAPTER).is_file():
        raise InputError(f"{adapter}: no {ADAPTER} is there, so it is not a LoRA adapter; MODEL+ADAPTER names one")
    return folders


def require_checkpoint(name_or_path: str | Path) -> None:
    """Raise InputError if this is neither a folder here nor the form of a name on the hub, which is not asked."""
    name = str(name_or_path)
    if not name:  # which Path takes for the working directory
        raise InputError("an empty text names no checkpoint; name a folder, or a model of the hub as organisation/name")
    why = ""
    try:
        there = Path(name).is_dir()
    except OSError as error:  # the name is too long, say
        there, why = False, f" ({error.strerror})"
    if not there and (not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(".")):
        raise InputError(
            f"{name}: no such folder{why}; name a checkpoint's folder, or a model of the hub as organisation/name"
        )


def tensor_files(directory: Path | str) -> dict[str, Path]:
    """Find the file of each tensor of a checkpoint. Raises InputError naming a file that is missing or damaged."""
    directory = Path(directory)
    index_path, path = directory / INDEX, directory / SINGLE
    if path.is_file():  # as in transformers, it goes before an index
        return dict.fromkeys(read_header(path), path)
    if not index_path.is_file():
        raise InputError(f"{directory}: neither {SINGLE} nor {INDEX} is there{what_else(directory)}")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index_path}: key 'weight_map' must be an object that names each tensor's file")
    files = {name: directory / file for name, file in weight_map.items()}
    for path in sorted(set(files.values())):
        listed = {name for name, file in files.items() if file == path}
        if path.parent != directory or not os.path.isfile(path):  # unlike is_file(), false also for names too long
            raise InputError(f"{index_path}: {min(listed)} should be in {path.name}, which is not in the folder")
        held = set(read_header(path))
        for name in sorted(listed - held):
            raise InputError(f"{path}: tensor {name} is missing, though {INDEX} places it there")
        for name in sorted(held - listed):
            raise InputError(f"{path}: tensor {name} is not listed in {INDEX}")
    return files


def what_else(directory: Path) -> str:
    """Return what a folder without a checkpoint's files holds instead and what to do about it, to end an error with."""
    if (directory / ADAPTER).is_file():
        return (
            f". It is a LoRA adapter (adapter_config.json): `merge`, `serve`, `generate`, `evaluate` and `score` take "
            f"it with its base (BASE+{directory}); other verbs need the two merged"
        )
    pickles = sorted(path.name for kind in ("bin", "pt", "pth", "ckpt") for path in directory.glob(f"*.{kind}"))
    if pickles:
        return (
            f", only {pickles[0]}: pickled weights are not read, since they can run any code. Convert what you trust "
            "with transformers: `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)`"
        )
    return ""


def stored_tensors(directory: Path | str) -> dict[str, tuple[Path, StoredTensor]]:
    """Return the file and place of each tensor of a checkpoint, without the buffers that its configuration determines.

    Raises:
        InputError: naming a file that is missing or damaged.
    """
    paths = sorted(set(tensor_files(directory).values()))
    stored = {name: (path, tensor) for path in paths for name, tensor in read_header(path).items()}
    return {name: place for name, place in stored.items() if not DERIVED_BUFFERS.search(name)}
