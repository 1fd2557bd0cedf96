"""Checks that options of several stages share."""

import math
import re
from collections.abc import Iterable

from micota_fast.errors import InputError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")  # names become folders


def check_names(where: str, names: Iterable[str]) -> None:
    """Refuse names that cannot be a folder's.

    Raises:
        InputError: naming the first one.
    """
    for name in names:
        if not NAME.fullmatch(name):
            raise InputError(f"`{where}`: {name!r} is not a name; use letters, digits and . _ + -")


def at_least(options: object, **lows: float) -> None:
    """Check that each named option is a number (no NaN or infinity) of at least the given value.

    Raises:
        InputError: one is not.
    """
    for name, low in lows.items():
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= low):
            raise InputError(f"`{name}` must be at least {low}, not {value}")
