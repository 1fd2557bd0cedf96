"""The rows of a Parquet file as JSON, one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from micota_fast.common.json_io import MAX_DEPTH
from micota_fast.errors import InputError

_BATCH_BYTES = 16 << 20  # of values as they lie in the file, decompressed
_MOST_ROWS = 1024  # in a batch


def parquet_rows(path: Path, name: str) -> Iterator[bytes]:
    """Yield each row as the text of a JSON object with all columns; what JSON has no type for says so in its place.

    Holds a batch. Texts stay in the file's dictionaries until their row comes, so a long one that many rows share is
    held once; a page, which the format lets have 2 GiB, is held whole.

    Raises:
        InputError: pyarrow is missing, the file is damaged, or two columns have one name.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{name} is a Parquet file: pip install 'micota-fast[parquet]'") from None
    try:
        with pq.ParquetFile(path) as opened:
            leaves = [opened.schema.column(i) for i in range(len(opened.schema))]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        with pq.ParquetFile(path, read_dictionary=texts) as opened:
            names = opened.schema_arrow.names
            if twice := next((column for column in names if names.count(column) > 1), None):
                raise InputError(f"{name}: two columns are named {twice!r}")
            for group in range(opened.num_row_groups):
                about = opened.metadata.row_group(group)
                a_row = max(1, about.total_byte_size // max(1, about.num_rows))
                size = min(_MOST_ROWS, max(1, _BATCH_BYTES // a_row))
                for batch in opened.iter_batches(size, row_groups=[group]):
                    temporal = [pa.types.is_temporal(column.type) for column in batch.columns]
                    for i in range(batch.num_rows):
                        cells = zip(names, (column[i] for column in batch.columns), temporal, strict=True)
                        row = {key: _moment(cell) if is_moment else cell.as_py() for key, cell, is_moment in cells}
                        yield json.dumps(row, ensure_ascii=False, default=_no_json).encode()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # some of Arrow's are bare OSErrors
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot read {name}: {why}") from None
    except RecursionError:
        raise InputError(f"{name}: objects and lists are nested more than {MAX_DEPTH} levels deep") from None


def _moment(cell: Any) -> dict[str, str] | None:
    """Stand for a date, a time or a duration: Python's hold neither nanoseconds nor all of Arrow's years."""
    return {"type": str(cell.type).partition("[")[0]} if cell.is_valid else None


def _no_json(value: Any) -> dict[str, str]:
    """What stands for bytes and decimals, as for dates: no text, so that nothing takes it for one."""
    return {"type": type(value).__name__}
