"""Completions of a finished file, in any form that `read_rows` reads."""

from array import array
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

from micota_fast.common.json_io import parse_json
from micota_fast.common.records import Completion, parse_row, repeats
from micota_fast.errors import InputError
from micota_fast.sources.columns import quoted
from micota_fast.sources.rows import SourceRow, read_rows

_REQUIRED = tuple(field.name for field in fields(Completion) if field.default is MISSING)


def iter_completions(source: str | Path) -> Iterator[Completion]:
    """Yield a finished file's completions in file order.

    Holds 8 bytes per row, a hash of its key; whether a key occurs twice is known, and raised, after the last row.

    Raises:
        InputError: unreadable file, bad row or duplicate (id, sample), with file:line.
    """
    keys = array("q")

    def check_keys() -> None:
        for pair in repeats(keys):
            (where, row), (where_again, again) = (
                (of.where, _completion(of)) for number, of in enumerate(read_rows(source)) if number in pair
            )
            if (row.id, row.sample) == (again.id, again.sample):
                raise InputError(f"{where_again}: ({row.id!r}, sample {row.sample}) occurs already at {where}")

    for found in read_rows(source):
        try:
            row = _completion(found)
        except InputError:
            check_keys()  # of two errors, the first in the file
            raise
        keys.append(hash((row.id, row.sample)))
        yield row
    check_keys()


def read_completions(source: str | Path) -> list[Completion]:
    """Read a finished file of completions in file order.

    Raises:
        InputError: see `iter_completions`.
    """
    return list(iter_completions(source))


def _completion(found: SourceRow) -> Completion:
    row = parse_json(found.line, found.where)
    missing = [key for key in _REQUIRED if key not in row]
    if len(missing) > 1:
        raise InputError(
            f"{found.where}: keys {quoted(missing)} are missing; the row has {quoted(row)}, so it is not a completion "
            f"as `micota generate` writes it. `micota train` also reads rows of other forms"
        )
    return parse_row(Completion, row, found.where)
