"""Checks of a checkpoint that need no model: its config.json against the headers of its weights. Imports no torch.

They come before anything of the size that config.json states is built, so they take the time of reading the headers.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micota_fast.common.dtypes import DTYPES, FLOATS
from micota_fast.common.safetensors_file import StoredTensor
from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.model.folder import stored_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_CHUNK = 1 << 22  # elements compared at a time
# What tools put in front of the names of tensors, or into them.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "module.": "DistributedDataParallel or DeepSpeed",
}
Stored = Mapping[str, tuple[Path, StoredTensor]]


def checked_config(directory: Path | str) -> ModelConfig:
    """Read a checkpoint's config.json and compare it with the headers of its weights.

    A dtype of "auto" becomes the one that most elements are stored in.

    Raises:
        InputError: naming the file and the key or tensor: config.json or a header cannot be honoured, or the two do not
            fit each other.
    """
    directory = Path(directory)
    config = ModelConfig.from_checkpoint(directory)
    stored = stored_tensors(directory)
    check_shapes(config, stored, directory)
    if config.dtype_name is None and "auto" in (config.raw.get("dtype"), config.raw.get("torch_dtype")):
        elements: Counter[str] = Counter()
        for _, tensor in stored.values():
            elements[tensor.code] += math.prod(tensor.shape)
        code = max(elements, key=lambda code: (elements[code], code))
        if code in DTYPES and DTYPES[code].name in FLOATS:
            config = dataclasses.replace(config, raw={**config.raw, "dtype": DTYPES[code].name})
    return config


def check_shapes(config: ModelConfig, stored: Stored, directory: Path) -> None:
    """Check that the sizes in config.json are those of the stored tensors: of the embedding, one layer, their number.

    Args:
        stored: of `stored_tensors(directory)`.

    Raises:
        InputError: naming the file, the keys and the tensor that do not fit.
    """
    where = directory / "config.json"
    for name, sizes in _expected(config):
        if name not in stored:
            raise InputError(f"{directory}: tensor {name} is missing; {where} calls for it{_why_missing(name, stored)}")
        path, tensor = stored[name]
        if tensor.shape != tuple(sizes.values()):
            raise InputError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}; {where} calls for {list(sizes.values())} "
                f"({', '.join(sizes)})"
            )
    layers = {int(found[1]) for name in stored if (found := _LAYER.match(name))}
    if config.num_hidden_layers > len(layers):
        raise InputError(
            f"{where}: num_hidden_layers: {config.num_hidden_layers:,}, but {directory} holds {len(layers)}"
        )


def _expected(config: ModelConfig) -> Iterator[tuple[str, dict[str, int]]]:
    """Tensors that between them have every size of a configuration, and what each size is called."""
    layer, hidden = "model.layers.0.", {"hidden_size": config.hidden_size}
    queries = {"num_attention_heads x head_dim": config.num_attention_heads * config.head_dim}
    keys = {"num_key_value_heads x head_dim": config.num_key_value_heads * config.head_dim}
    yield EMBEDDING, {"vocab_size": config.vocab_size, **hidden}
    yield f"{layer}self_attn.q_proj.weight", queries | hidden
    yield f"{layer}self_attn.k_proj.weight", keys | hidden
    yield f"{layer}mlp.gate_proj.weight", {"intermediate_size": config.intermediate_size, **hidden}
    if not config.tie_word_embeddings:
        yield HEAD, {"vocab_size": config.vocab_size, **hidden}


def _why_missing(name: str, stored: Stored) -> str:
    for wrapper, tool in _WRAPPERS.items():
        wrapped = next((other for other in stored if wrapper in other and other.replace(wrapper, "") == name), None)
        if wrapped is not None:
            return (
                f". It is there as {wrapped}, as {tool} names it: save the weights of the module inside, or take "
                f"`{wrapper}` out of all names"
            )
    adapter = next((other for other in stored if ".lora_A." in other or other.startswith("base_model.model.")), None)
    if adapter is not None:
        return f". {adapter} belongs to a LoRA adapter: merge that into its base model first"
    return ""


def check_tied(config: ModelConfig, stored: Stored, directory: Path) -> None:
    """Check that a stored head holds the same numbers as the embedding that it is tied to.

    Some tools write the tied matrix twice, and not always in the same dtype.

    Raises:
        InputError: the two differ, so config.json or the weights are wrong.
    """
    if not config.tie_word_embeddings or HEAD not in stored:
        return
    (path, head), (embedding_path, embedding) = stored[HEAD], stored[EMBEDDING]
    if head.shape == embedding.shape:
        size = math.prod(head.shape)
        starts = range(0, size, _CHUNK)
        if all(
            np.array_equal(
                _numbers(path, head, start, min(_CHUNK, size - start)),
                _numbers(embedding_path, embedding, start, min(_CHUNK, size - start)),
                equal_nan=True,
            )
            for start in starts
        ):
            return
    raise InputError(
        f"{path}: tensor {HEAD} differs from {EMBEDDING}, though {directory / 'config.json'} says "
        "tie_word_embeddings: true; set it to false if the checkpoint has a head of its own"
    )


def _numbers(path: Path, tensor: StoredTensor, start: int, count: int) -> NDArray[Any]:
    """Elements [start, start + count) of a tensor, as floats that hold them exactly."""
    name = DTYPES[tensor.code].name if tensor.code in DTYPES else None
    if name not in FLOATS:
        raise InputError(f"{path}: tensor {HEAD} or {EMBEDDING} is stored as {tensor.code}, not as a plain float")
    dtype = np.dtype("uint16" if name == "bfloat16" else name)  # numpy has no bfloat16
    found = np.fromfile(path, dtype, count, offset=tensor.start + start * dtype.itemsize)
    return (found.astype(np.uint32) << 16).view(np.float32) if name == "bfloat16" else found
