"""The merged checkpoint's weights, written wherever a piece is ready, in shards that close as they fill."""

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from micota_fast.common.json_io import write_json
from micota_fast.errors import InputError
from micota_fast.model.folder import INDEX, SINGLE

BYTES = {"F32": 4, "F16": 2, "BF16": 2}
Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""tensor -> (shape, type by safetensors' name)"""


class ShardWriter:
    """safetensors files of known content in a folder; pieces come in any order and from any thread.

    Args:
        folder: where; exists.
        layout: all tensors, in their order in the files.
        max_shard_bytes: largest size of a file, unless one tensor alone is larger; beyond it, shards with an index.
    """

    def __init__(self, folder: Path, layout: Layout, max_shard_bytes: int) -> None:
        self._lock = threading.Lock()
        self._shards: list[_Shard] = []
        self._place: dict[str, tuple[_Shard, int]] = {}  # tensor -> its shard, its first byte there
        groups = _split(layout, max_shard_bytes)
        for number, group in enumerate(groups, start=1):
            name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            shard = _Shard(folder / name, {tensor: layout[tensor] for tensor in group})
            self._shards.append(shard)
            self._place |= {tensor: (shard, start) for tensor, start in shard.starts.items()}
        if len(groups) > 1:
            index = {
                "metadata": {"total_size": sum(_size(*layout[tensor]) for tensor in layout)},
                "weight_map": {tensor: shard.path.name for tensor, (shard, _) in self._place.items()},
            }
            write_json(folder / INDEX, index, 2)

    def write(self, tensor: str, offset: int, piece: memoryview) -> None:
        """Bytes of a tensor from byte `offset` of it on. The piece that fills a shard also syncs and closes it."""
        shard, start = self._place[tensor]
        with self._lock:
            fd = shard.open()
        at = start + offset
        while piece:
            written = os.pwrite(fd, piece, at)
            at, piece = at + written, piece[written:]
        with self._lock:
            shard.missing -= at - start - offset
            full = shard.missing == 0
        if full:
            os.fsync(fd)
            shard.close()

    def close(self) -> None:
        """Close what a merge that failed has left open."""
        for shard in self._shards:
            shard.close()


class _Shard:
    """One file: its header is written and its space reserved when the first piece comes."""

    def __init__(self, path: Path, layout: Layout) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, (shape, code) in layout.items():
            start, end = end, end + _size(shape, code)
            entries[tensor] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data is aligned
        self._header = len(text).to_bytes(8, "little") + text
        self.path = path
        self.starts = {tensor: len(self._header) + entries[tensor]["data_offsets"][0] for tensor in layout}
        self.missing = end
        self._fd: int | None = None

    def open(self) -> int:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.posix_fallocate(self._fd, 0, len(self._header) + self.missing)  # a full disk is known at once
            os.pwrite(self._fd, self._header, 0)
        return self._fd

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def result_code(codes: set[str], dtype: str | None) -> str:
    """safetensors' name of a result's type: as asked, else the one of the inputs, else the one that holds them all."""
    if dtype is not None:
        return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    return next(iter(codes)) if len(codes) == 1 else "F32"


def overflow(where: str, code: str) -> InputError:
    """What to say where a result does not fit its type."""
    name = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[code]
    advice = "use out_dtype: bfloat16 or float32" if code == "F16" else "the weights are too large"
    return InputError(f"{where}: the result overflows {name}; {advice}")


def _split(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
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
    return math.prod(shape) * BYTES[code]
