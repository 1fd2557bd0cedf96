"""safetensors files of known content, written piece by piece; the format is described at `folder.read_header`."""

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from micota_fast.common.json_io import write_json
from micota_fast.model.dtypes import DTYPES
from micota_fast.model.folder import INDEX, SINGLE

Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""tensor -> (shape, type by safetensors' code)"""


class SafetensorsFile:
    """One file; pieces of its tensors come in any order and from any thread.

    The file is made, and its space reserved, when the first piece comes; the piece that fills it syncs and closes it.

    Args:
        path: must not exist.
        layout: all tensors, in their order in the file.
        metadata: texts for the header, besides the `format` that transformers wants.

    Attributes:
        header: the file's first bytes.
        size: the file's bytes in all.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        end = 0
        for tensor, (shape, code) in layout.items():
            start, end = end, end + tensor_bytes(shape, code)
            entries[tensor] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data is aligned
        self.path = path
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + end
        self._starts = {tensor: len(self.header) + entries[tensor]["data_offsets"][0] for tensor in layout}
        self._missing = end
        self._fd: int | None = None
        self._lock = threading.Lock()

    def write(self, tensor: str, offset: int, piece: memoryview) -> None:
        """Write bytes of a tensor, from byte `offset` of it on.

        Raises:
            OSError: the disk is full or fails.
        """
        size, at = len(piece), self._starts[tensor] + offset
        if not size:
            return
        with self._lock:
            fd = self._open()
        while piece:  # the system writes at most 2 GiB at a time, and less where the disk is nearly full
            written = os.pwrite(fd, piece, at)
            at, piece = at + written, piece[written:]
        with self._lock:
            self._missing -= size
            full = self._missing == 0
        if full:
            os.fsync(fd)
            self.close()

    def close(self) -> None:
        """Close what a writer that failed has left open."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> int:
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            os.posix_fallocate(self._fd, 0, self.size)  # a full disk is known at once
            os.pwrite(self._fd, self.header, 0)
        return self._fd


class ShardWriter:
    """The weights of a checkpoint's folder: one file, or shards with an index; each has its tensors by name.

    Args:
        folder: where; exists.
        layout: all tensors with at least one element each; each shard takes consecutive ones.
        max_shard_bytes: largest size of a file's tensors, unless one alone is larger.
    """

    def __init__(self, folder: Path, layout: Layout, max_shard_bytes: int) -> None:
        self._files: list[SafetensorsFile] = []
        self._file_of: dict[str, SafetensorsFile] = {}
        shards = _split(layout, max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = SafetensorsFile(folder / name, {tensor: layout[tensor] for tensor in sorted(shard)})
            self._files.append(file)
            self._file_of |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor_bytes(*layout[tensor]) for tensor in layout)},
                "weight_map": {tensor: self._file_of[tensor].path.name for tensor in layout},
            }
            write_json(folder / INDEX, index, 2)

    def write(self, tensor: str, offset: int, piece: memoryview) -> None:
        """Write bytes of a tensor, from byte `offset` of it on: see `SafetensorsFile.write`."""
        self._file_of[tensor].write(tensor, offset, piece)

    def close(self) -> None:
        """Close what a writer that failed has left open."""
        for file in self._files:
            file.close()


def tensor_bytes(shape: tuple[int, ...], code: str) -> int:
    """Return the size of a tensor by its shape and safetensors' code of its type."""
    return math.prod(shape) * DTYPES[code].bytes


def _split(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
    """Consecutive tensors of at most `max_shard_bytes` together; a larger one stands alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for tensor, (shape, code) in layout.items():
        size = tensor_bytes(shape, code)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards
