"""The rows of a file, whatever it is: JSON Lines, a JSON list or Parquet, the first two also in gzip or zstd.

Each row comes as the text of one JSON object, so that `common.json_io.parse_json` and its limits are the only way in.
What a file is, its first bytes say; its name says nothing.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from micota_fast.common.files import reading
from micota_fast.common.records import bounded_lines
from micota_fast.errors import InputError
from micota_fast.sources import hub
from micota_fast.sources.json_array import array_items
from micota_fast.sources.parquet import parquet_rows

_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_OTHERS = {
    b"ARROW1": "an Arrow file; write it as Parquet: `datasets.load_from_disk(DIR).to_parquet(FILE)`",
    b"\xff\xff\xff\xff": "an Arrow stream; write it as Parquet: `datasets.load_from_disk(DIR).to_parquet(FILE)`",
    b"BZh": "compressed by bzip2; decompress it, or use gzip or zstd",
    b"\xfd7zXZ": "compressed by xz; decompress it, or use gzip or zstd",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}
_SPACE = b" \t\r\n"


class SourceRow(NamedTuple):
    """One row: `where` opens messages ("path:3", a line, or "path, row 3"), `number` counts from 1."""

    where: str
    number: int  # of the line, or the row; of several files, the later ones continue the count
    line: bytes  # one JSON value, with or without a newline; checked by nobody yet


def read_rows(source: str | Path) -> Iterator[SourceRow]:
    """Yield the rows of a file, or of a dataset on the Hub (`hf://datasets/...`, see `hub`); blank lines are none.

    Holds one row, or of Parquet the rows of one batch.

    Raises:
        InputError: the file cannot be read or is damaged, is of no known format, or a row has more than MAX_BYTES.
    """
    before = 0
    for name, path in hub.split(str(source)).files if hub.is_hub(source) else [(str(source), Path(source))]:
        number = 0
        with reading(name), path.open("rb") as file:
            for where, number, line in _rows(file, name, path):
                yield SourceRow(where, before + number, line)
        before += number


def require_readable(source: str | Path) -> None:
    """Check that a file is there and that what reads it is installed; a dataset on the Hub is not asked for.

    Raises:
        InputError: it cannot be read.
    """
    if hub.is_hub(source):
        return
    with reading(source), Path(source).open("rb") as file:
        start = file.read(len(_PARQUET))
    if start in (_ZSTD, _PARQUET) and find_spec("pyarrow") is None:
        raise InputError(f"{source} is Parquet or compressed by zstd: pip install 'micota-fast[parquet]'")


def is_plain(path: Path) -> bool:
    """Return whether a file is JSON Lines as they stand, neither compressed nor anything else.

    Raises:
        InputError: it cannot be read.
    """
    with reading(path), path.open("rb") as file:
        start = file.peek(64)
        other = start.startswith((_GZIP, _ZSTD, _PARQUET, *_OTHERS)) or _first(start) == b"[" or _is_spread(start)
    return not other


def _rows(file: io.BufferedReader, name: str, path: Path | None) -> Iterator[tuple[str, int, bytes]]:
    """(where, number, line) of each row; `path` is None within a compressed file."""
    start = file.peek(64)
    if path is not None and start.startswith(_GZIP):
        yield from _decompressed(cast(Any, gzip.GzipFile(fileobj=file)), name)
    elif path is not None and start.startswith(_ZSTD):
        try:
            import pyarrow as pa
        except ImportError:
            raise InputError(f"{name} is compressed by zstd: pip install 'micota-fast[parquet]'") from None
        stream = cast(Any, pa.CompressedInputStream(pa.PythonFile(file), "zstd"))
        yield from _decompressed(io.BufferedReader(stream), name)
    elif start.startswith(_PARQUET):
        if path is None:
            raise InputError(f"{name} is a compressed Parquet file; decompress it: Parquet compresses its own columns")
        for number, line in enumerate(parquet_rows(path, name), 1):
            yield f"{name}, row {number}", number, line
    elif found := next((what for magic, what in _OTHERS.items() if start.startswith(magic)), None):
        raise InputError(f"{name} is {found}. JSON Lines, JSON lists, both in gzip or zstd, and Parquet are read")
    elif _first(start) == b"[":
        for number, line in enumerate(array_items(file, name), 1):
            yield f"{name}, row {number}", number, line
    elif _is_spread(start):
        raise InputError(
            f"{name}:1: not JSON Lines but an object over several lines; write each row on a line of its own, or all "
            f"of them as a JSON list"
        )
    else:
        for number, line in bounded_lines(cast(BinaryIO, file), name):
            if line.strip():
                yield f"{name}:{number}", number, line


def _decompressed(file: io.BufferedReader, name: str) -> Iterator[tuple[str, int, bytes]]:
    try:
        yield from _rows(file, name, None)
    except (EOFError, zlib.error) as error:
        raise InputError(f"cannot read {name}: damaged gzip: {error}") from None


def _is_spread(start: bytes) -> bool:
    """Whether the first line is an opening brace alone."""
    line, newline, _ = start.lstrip(_SPACE).partition(b"\n")
    return line.strip() == b"{" and bool(newline)


def _first(start: bytes) -> bytes:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip(_SPACE)[:1]
