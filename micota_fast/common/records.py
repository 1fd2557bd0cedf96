"""The rows that flow between stages, and a file of them that survives being killed while it is written.

JSON Lines, UTF-8, one object a line, keys = field names. Rows hold nothing that differs between two equal runs (no
times, no host names), so equal inputs give equal bytes.
"""

import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from micota_fast.common.files import reading, write_atomic
from micota_fast.common.json_io import MAX_BYTES, encode_json
from micota_fast.errors import InputError


@dataclass(frozen=True)
class Problem:
    """One problem with its gold answer."""

    id: str
    problem: str
    answer: str
    solution: str | None = None
    level: int | None = None
    subject: str | None = None


@dataclass(frozen=True)
class Completion:
    """One sampled answer to one problem; (id, sample) is its key."""

    id: str  # of the problem
    sample: int  # 0 .. samples-1
    problem: str
    answer: str  # gold
    completion: str
    # "stop": an end token or stop string; "length": the token limit; "abort": the server gave up; "content_filter": an
    # API withheld the answer.
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seed: int | None  # sampling seed sent to the server; None where decoding was greedy
    correct: bool | None = None  # None: not graded
    model: str = ""
    opened: str = ""  # what the generation prompt opened, such as "<think>\n"; left out of the row if nothing


_KINDS: dict[Any, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    str | None: (str, type(None)),
    int | None: (int, type(None)),
    bool | None: (bool, type(None)),
}
# Of each row, its fields' names, the types that JSON may give them, and whether they must be there.
_FIELDS: dict[type, list[tuple[str, tuple[type, ...], bool]]] = {
    kind: [(field.name, _KINDS[field.type], field.default is MISSING) for field in fields(kind)]
    for kind in (Problem, Completion)
}
Row = TypeVar("Row", Problem, Completion)
_MOST = 2**63  # numbers are counted and kept in 64 bits


def parse_row(kind: type[Row], value: Mapping[str, Any], where: str) -> Row:
    """Build a Problem or Completion from a decoded JSON object; unknown keys are left aside.

    Raises:
        InputError: keys are missing, or one is of the wrong type; `where` (file:line) opens the message.
    """
    missing = [name for name, _, required in _FIELDS[kind] if required and name not in value]
    if missing:
        named = ", ".join(map(repr, missing))
        raise InputError(f"{where}: {f'key {named} is' if len(missing) == 1 else f'keys {named} are'} missing")
    known: dict[str, Any] = {}
    for name, kinds, _ in _FIELDS[kind]:
        if name not in value:
            continue
        item = value[name]
        if type(item) not in kinds:  # JSON gives no subclasses but bool, which is no int here
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise InputError(f"{where}: key {name!r} must be {names}, got {type(item).__name__} {item!r:.60}")
        if type(item) is int and not -_MOST <= item < _MOST:
            raise InputError(f"{where}: key {name!r} must fit 64 bits, got {item!r:.60}")
        known[name] = item
    return kind(**known)


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ("path:line", bytes) of every line that is not blank.

    Raises:
        InputError: the file cannot be read, or a line has more than MAX_BYTES.
    """
    with reading(path), path.open("rb") as file:
        for number, line in bounded_lines(file, path):
            if line.strip():
                yield f"{path}:{number}", line


def bounded_lines(file: BinaryIO, path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of every line.

    Raises:
        InputError: a line has more than MAX_BYTES; names `path` and the line.
    """
    for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), 1):
        if len(line) > MAX_BYTES:
            raise InputError(f"{path}:{number}: a line of more than {MAX_BYTES:,} bytes, which is too much for a row")
        yield number, line


def repeats(hashes: "array[int]") -> Iterator[tuple[int, int]]:
    """Yield the pairs of places (first, second) at which the same 64-bit hash stands, in order of the second."""
    values = np.frombuffer(hashes, np.int64)
    in_order = np.sort(values)
    if not (in_order[1:] == in_order[:-1]).any():
        return
    order = np.argsort(values, kind="stable")
    again = np.flatnonzero(in_order[1:] == in_order[:-1]) + 1
    for place in again[np.argsort(order[again])]:
        for before in range(np.searchsorted(in_order, in_order[place]), place):
            yield int(order[before]), int(order[place])


def benchmark_file(name: str) -> str:
    """Name of a benchmark's file of rows: its own, with what a file name should not hold replaced."""
    return re.sub(r"[^\w.-]", "_", name) + ".jsonl"


def score_file(name: str) -> str:
    """Name of the file that holds a benchmark's score and what it was made of."""
    return benchmark_file(name).removesuffix("l")


def store_file(completions: str | Path) -> str:
    """Name of the store of log-probabilities next to a file of completions."""
    return f"{completions}.top_logprobs"


def encode_row(row: Problem | Completion | Mapping[str, Any]) -> bytes:
    """Encode a row as one JSON line with its newline, fields in declaration order.

    Raises:
        InputError: a text of the row is not Unicode.
    """
    value = row if isinstance(row, Mapping) else vars(row)
    if value.get("opened") == "":
        value = {key: item for key, item in value.items() if key != "opened"}
    return encode_json(value) + b"\n"


def model_name(model: str | Path) -> str:
    """Return what a model is called in rows and results: a hub name as it is; of a folder its last component.

    Trained and merged models lie in NAME/model and adapters in NAME/adapter, so when the last component is one of these
    it is the one before it. MODEL+ADAPTER is called by both.
    """
    if not os.path.isdir(model):
        base, plus, adapter = str(model).rpartition("+")
        return f"{model_name(base)}+{model_name(adapter)}" if plus else str(model)
    folder = Path(os.path.abspath(model))
    return folder.parent.name if folder.name in ("model", "adapter") else folder.name


def write_rows(path: str | Path, rows: Iterable[Problem | Completion | Mapping[str, Any]]) -> None:
    """Write a JSONL file atomically."""
    write_atomic(Path(path), (encode_row(row) for row in rows))
