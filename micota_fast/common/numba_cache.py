"""Numba-compiled functions whose machine code is kept on disk."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile at the first call, or take the machine code from disk where some cache folder can be written.

    The function runs without the interpreter's lock, so threads run it side by side. Division by zero gives infinity or
    NaN as in numpy: the check that Python makes would keep loops from being vectorised. Arithmetic is never reordered
    or fused, so results are the same on every CPU.

    What is on disk is used as long as the function's own file is unchanged, so compiled functions that it calls have to
    stand in that file, too.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    made: Any
    try:
        made = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba: "no locator available": neither the source's folder nor the user's takes a file
        made = numba.njit(**options)(function)
    return cast(Function, made)
