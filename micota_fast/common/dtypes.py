"""The types of stored tensors: safetensors' codes, torch's names, and sizes. Imports no torch."""

from typing import NamedTuple


class StoredDtype(NamedTuple):
    """A type of tensor elements: its name in torch and its size in bytes."""

    name: str
    bytes: int


DTYPES = {
    "F64": StoredDtype("float64", 8),
    "F32": StoredDtype("float32", 4),
    "F16": StoredDtype("float16", 2),
    "BF16": StoredDtype("bfloat16", 2),
    "I64": StoredDtype("int64", 8),
    "I32": StoredDtype("int32", 4),
    "I16": StoredDtype("int16", 2),
    "I8": StoredDtype("int8", 1),
    "U8": StoredDtype("uint8", 1),
    "BOOL": StoredDtype("bool", 1),
}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
FLOATS = ("float32", "bfloat16", "float16", "float64")
"""Types of weights."""


def bytes_per_element(name: str) -> int:
    """Return the size of an element of a type by its name in torch."""
    return DTYPES[CODES[name]].bytes
