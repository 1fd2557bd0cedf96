"""safetensors files: a strict reader of headers, and files of known content written piece by piece; no torch."""

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from micota_fast.common.dtypes import DTYPES
from micota_fast.common.files import reading
from micota_fast.common.json_io import MAX_BYTES, parse_json
from micota_fast.errors import InputError

_MOST_NAME, _MOST_DIMENSIONS = 1000, 64  # of a tensor: characters, and sizes, whose product has to be worked out
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


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file: type by the format's name ("BF16"), shape, first byte, and the first after it."""

    code: str
    shape: tuple[int, ...]
    start: int
    end: int


def tensor_bytes(shape: tuple[int, ...], code: str) -> int:
    """Return the size of a tensor by its shape and safetensors' code of its type."""
    return math.prod(shape) * DTYPES[code].bytes


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the tensors of a safetensors file, in the header's order.

    A file starts with the header's length (u64, little-endian) and the header (JSON); the tensors fill the rest.

    Raises:
        InputError: the file cannot be read, is cut short, or its header does not describe its bytes.
    """
    try:
        with reading(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = 8 + int.from_bytes(file.read(8), "little")
            if data > size:
                raise ValueError(f"it ends within its header ({size} bytes)")
            text = file.read(min(data - 8, MAX_BYTES + 1))
        header = parse_json(text, f"{path}: damaged or not a safetensors file: its header")
        header.pop("__metadata__", None)
        tensors = {name: _stored(name, entry, data) for name, entry in header.items()}
        _check_header(tensors, data, size)
    except ValueError as error:
        raise InputError(f"{path}: damaged or not a safetensors file: {error}") from None
    return tensors


def _stored(name: str, entry: Any, data: int) -> StoredTensor:
    if not name.isprintable() or len(name) > _MOST_NAME:
        raise ValueError(f"{name!r:.80} is not the name of a tensor")
    try:
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, start, end)
        good = type(code) is str and len(shape) <= _MOST_DIMENSIONS
        good = good and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"tensor {name}: its header has no dtype, shape and data_offsets as the format requires")
    return StoredTensor(code, tuple(shape), data + start, data + end)


def _check_header(tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    at = data
    for name, (code, shape, start, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if start != at or end < start:
            raise ValueError(f"tensor {name} does not begin where the one before it ends")
        if code in DTYPES and end - start != math.prod(shape) * DTYPES[code].bytes:
            raise ValueError(f"tensor {name} has {end - start} bytes, which is not {list(shape)} of {code}")
        if end > size:
            whole = max(tensor.end for tensor in tensors.values())
            raise ValueError(f"it ends at byte {size}, within tensor {name}, and should have {whole}")
        at = end
    if at != size:
        raise ValueError(f"{size - at} bytes follow its last tensor")
