"""`micota export`: completions as a Parquet file, for tools that do not read JSONL."""

from collections.abc import Iterator
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from micota_fast.common.files import open_atomic, refuse_to_overwrite
from micota_fast.common.records import Completion
from micota_fast.errors import InputError
from micota_fast.sources.completions import iter_completions

if TYPE_CHECKING:
    import pyarrow

# A row group is as many rows as first reach one of these.
GROUP_ROWS = 1 << 14
GROUP_CHARACTERS = 16 << 20  # of problem and completion


def schema(opened: bool = False) -> "pyarrow.Schema":
    """Return the columns: Completion's fields, by their names; nullable where None may stand. Counts are int64.

    `opened` is a column only if the prompt of some row has opened something, as it is a key of such rows alone.
    """
    import pyarrow as pa

    types = {
        str: pa.string(),
        int: pa.int64(),
        str | None: pa.string(),
        int | None: pa.int64(),
        bool | None: pa.bool_(),
    }
    return pa.schema(
        [
            pa.field(f.name, types[f.type], nullable=f.type not in (str, int))  # type: ignore[index]
            for f in fields(Completion)
            if opened or f.name != "opened"
        ]
    )


def run(completions: str, out: str) -> None:
    """Write a file of completions as Parquet, and print how many there were.

    Raises:
        InputError: see `export`.
    """
    print(f"{out}: {export(completions, out)} completions")


def export(completions: str | Path, out: str | Path) -> int:
    """Write a file of completions as Parquet (zstd), in the same order, atomically. Returns how many there were.

    Holds one row group, at most GROUP_ROWS rows, and 8 bytes per row of the file.

    Raises:
        InputError: pyarrow is missing; a row is unreadable or twice there (with file:line); or `out` cannot be written.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError("export needs pyarrow: pip install 'micota-fast[parquet]'") from None
    refuse_to_overwrite(out, completions)
    columns, count = schema(any(row.opened for row in iter_completions(completions))), 0
    rows = iter_completions(completions)
    with open_atomic(Path(out)) as file, pq.ParquetWriter(file, columns, compression="zstd") as writer:
        while group := list(_group(rows)):
            writer.write_table(pa.Table.from_pylist([vars(row) for row in group], schema=columns))
            count += len(group)
    return count


def _group(rows: Iterator[Completion]) -> Iterator[Completion]:
    left = GROUP_CHARACTERS
    for row in islice(rows, GROUP_ROWS):
        yield row
        left -= len(row.problem) + len(row.completion)
        if left <= 0:
            return
