"""The types of a merge's results."""

from micota_fast.common.dtypes import CODES, DTYPES
from micota_fast.errors import InputError


def result_code(codes: set[str], dtype: str | None) -> str:
    """Return safetensors' code of a result's type: as asked, else the inputs', else the one that holds them all."""
    if dtype is not None:
        return CODES[dtype]
    return next(iter(codes)) if len(codes) == 1 else "F32"


def overflow(where: str, code: str) -> InputError:
    """Return the error for a result that does not fit its type."""
    advice = "use out_dtype: bfloat16 or float32" if code == "F16" else "the weights are too large"
    return InputError(f"{where}: the result overflows {DTYPES[code].name}; {advice}")
