"""A merge from checkpoint to checkpoint: inputs memory-mapped, output written as it is made, OUT whole or absent."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

import micota_fast
from micota_fast.errors import InputError
from micota_fast.merge.mergekit import MergePlan, read_mergekit
from micota_fast.merge.methods import Array, counter_mask, merge_tensors
from micota_fast.model.config import ModelConfig
from micota_fast.model.safetensors_io import COPIED_FILES, INDEX, SINGLE, publish, resolve_checkpoint, tensor_files
from micota_fast.recipe import MergeConfig

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_REPORT = "merge.json"


def merge(config: MergeConfig) -> None:
    """Merge as the mergekit file says and write a Hugging Face checkpoint.

    Config and tokenizer are the base's. OUT/merge.json names the plan, the seed, a fingerprint of each input's tensors
    and the versions. Equal inputs give equal bytes, however they are sharded. Memory: a few times the largest tensor.
    A former merge at OUT is replaced; anything else there is left alone and is an error.

    Raises:
        InputError: the file is wrong, a checkpoint is damaged, the checkpoints differ in their tensors or shapes, or
            a tensor holds NaN or infinity. Names file and tensor.
    """
    merge_plan(read_mergekit(config.config), Path(config.out), config.seed)


def merge_plan(plan: MergePlan, out: Path, seed: int, max_shard_bytes: int = 5_000_000_000) -> None:
    """`merge` of a plan that is read already; weights above `max_shard_bytes` are split into shards."""
    if out.exists() and not (out / _REPORT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not a former merge; remove it or choose another place")
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # of a merge that was killed
    try:
        aside.mkdir(parents=True)
        with ExitStack() as stack:
            base = stack.enter_context(_Checkpoint(plan.base))
            inputs = [base if i.model == plan.base else stack.enter_context(_Checkpoint(i.model)) for i in plan.inputs]
            for model in inputs:
                _check_same_tensors(base, model)
            _write(plan, base, inputs, aside, seed, max_shard_bytes)
        _replace(out, aside)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Checkpoint:
    """The tensors of a checkpoint folder, memory-mapped, and a running fingerprint of those that were read."""

    def __init__(self, name: str) -> None:
        self.folder = resolve_checkpoint(name)
        self.name = self.folder.name if Path(name).is_dir() else name  # a path would tell where, not what
        self.file_of = tensor_files(self.folder)
        self._digest = hashlib.blake2b(digest_size=16)
        self._stack = ExitStack()
        self._handles: dict[Path, Any] = {}

    def __enter__(self) -> "_Checkpoint":
        try:
            for path in sorted(set(self.file_of.values())):
                self._handles[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            self._stack.close()
            raise InputError(f"{path}: cannot be read: {error}") from None
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def where(self, tensor: str) -> str:
        return f"{self.file_of[tensor]}: tensor {tensor}"

    def shape_and_code(self, tensor: str) -> tuple[tuple[int, ...], str]:
        view = self._handles[self.file_of[tensor]].get_slice(tensor)
        return tuple(view.get_shape()), view.get_dtype()

    def read(self, tensor: str) -> Array:
        """The tensor in float32; also enters the fingerprint."""
        try:
            value = self._handles[self.file_of[tensor]].get_tensor(tensor).contiguous()
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.where(tensor)}: cannot be read: {error}") from None
        self._digest.update(f"{tensor} {tuple(value.shape)} {value.dtype}".encode())
        self._digest.update(_raw(value))
        array: Array = value.to(torch.float32).numpy()
        if not np.isfinite(array).all():
            kind = "NaN" if np.isnan(array).any() else "infinity"
            raise InputError(f"{self.where(tensor)} holds {kind}; this checkpoint is damaged")
        return array

    def fingerprint(self) -> str:
        """Of names, shapes, types and bytes of the tensors read so far; the sharding plays no part."""
        return self._digest.hexdigest()


def _check_same_tensors(base: _Checkpoint, model: _Checkpoint) -> None:
    for one, other in ((base, model), (model, base)):
        missing = sorted(one.file_of.keys() - other.file_of.keys())
        if missing:
            raise InputError(f"{other.folder}: tensor {missing[0]} is missing; {one.file_of[missing[0]]} has it")
    for tensor in sorted(base.file_of):
        (shape, code), (other_shape, other_code) = base.shape_and_code(tensor), model.shape_and_code(tensor)
        if shape != other_shape:
            raise InputError(
                f"{model.where(tensor)} has shape {list(other_shape)}, but {list(shape)} in {base.file_of[tensor]}; "
                "checkpoints of different shapes or vocabulary sizes cannot be merged yet"
            )
        for checkpoint, kind in ((base, code), (model, other_code)):
            if kind not in _FLOATS:
                raise InputError(f"{checkpoint.where(tensor)} is of type {kind}; known: {', '.join(_FLOATS)}")


def _write(
    plan: MergePlan, base: _Checkpoint, inputs: Sequence[_Checkpoint], folder: Path, seed: int, max_shard_bytes: int
) -> None:
    config = ModelConfig.from_checkpoint(base.folder)
    layout = {}  # tensor -> (shape, type of the result)
    for tensor in sorted(base.file_of):
        shape, code = base.shape_and_code(tensor)
        layout[tensor] = (shape, _CODES[plan.dtype] if plan.dtype else code)
    shards = _split(layout, max_shard_bytes)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, tensors in zip(files, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header({tensor: layout[tensor] for tensor in tensors}))
            for tensor in tensors:
                result = _merge_one(plan, base, inputs, tensor, seed).to(_FLOATS[layout[tensor][1]])
                if layout[tensor][1] == "F16" and not bool(torch.isfinite(result).all()):
                    raise InputError(f"{base.where(tensor)}: the result overflows float16; use out_dtype: bfloat16")
                file.write(_raw(result))
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in zip(files, shards, strict=True) for tensor in tensors}
        total = sum(_size(*layout[tensor]) for tensor in layout)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    kinds = {code for _, code in layout.values()}
    names = [name for name, code in _CODES.items() if kinds == {code}]  # several, each tensor its own: as the base says
    _write_json(folder / "config.json", config.to_dict(names[0] if names else config.dtype_name or "float32"))
    _copy_companions(base.folder, folder)
    report = {
        "plan": asdict(plan)
        | {
            "base": base.name,
            "inputs": [
                asdict(entry) | {"model": model.name, "fingerprint": model.fingerprint()}
                for entry, model in zip(plan.inputs, inputs, strict=True)
            ],
        },
        "base_fingerprint": base.fingerprint(),
        "seed": seed,
        "versions": {"micota_fast": micota_fast.__version__, "torch": torch.__version__, "numpy": np.__version__},
    }
    _write_json(folder / _REPORT, report)


def _merge_one(
    plan: MergePlan, base: _Checkpoint, inputs: Sequence[_Checkpoint], tensor: str, seed: int
) -> torch.Tensor:
    start = base.read(tensor)
    tensors = [start if model is base else model.read(tensor) for model in inputs]
    return torch.from_numpy(np.asarray(merge_tensors(plan, start, tensors, counter_mask(seed, tensor))))


def _split(layout: dict[str, tuple[tuple[int, ...], str]], max_shard_bytes: int) -> list[list[str]]:
    """Consecutive tensors of at most `max_shard_bytes` together; a larger one stands alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for tensor, (shape, code) in layout.items():
        size = _size(shape, code)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _size(shape: tuple[int, ...], code: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * _BYTES[code]


def _header(layout: dict[str, tuple[tuple[int, ...], str]]) -> bytes:
    """The start of a safetensors file: length (uint64, little-endian), then JSON padded so that data is 8-aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor, (shape, code) in layout.items():
        end = offset + _size(shape, code)
        entries[tensor] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template and generation_config."""
    for path in (source / name for name in COPIED_FILES):
        if path.is_file():
            try:
                content = path.read_bytes()
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
            (folder / path.name).write_bytes(content)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(out: Path, aside: Path) -> None:
    """Put the finished folder in its place, a former merge out of it."""
    former = out.with_name(f".{out.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if out.exists():
        out.rename(former)
    publish(aside, out)
    shutil.rmtree(former, ignore_errors=True)
