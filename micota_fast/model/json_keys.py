"""Typed look-ups in a JSON object of config.json whose errors name the file and the key. Imports no torch."""

import math
from collections.abc import Mapping
from typing import Any

from micota_fast.errors import InputError

MOST = 2**31 - 1  # kernels and files count in int32


class Keys:
    """One JSON object. `prefix` is what its keys go by in the file: "rope_scaling."."""

    def __init__(self, d: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.d, self.where, self.prefix = d, where, prefix

    def refuse(self, key: str, why: str) -> InputError:
        """Return the error to raise for what is wrong with a key."""
        return InputError(f"{self.where}: {self.prefix}{key}: {why}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.d.get(key)
        value = default if value is None else value
        if value is None:
            raise self.refuse(key, "missing; the architecture needs it")
        return value

    def positive_int(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """Return an integer from 1 to `most`. Raises InputError for another value, or for none without a default."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(key, f"expected a positive integer, found {value!r}")
        if value > most:
            raise self.refuse(key, f"too large; expected at most {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number above 0. Raises InputError for another value, or for none without a default."""
        value = self._value(key, default)
        try:
            number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except OverflowError:
            number = math.inf
        if not 0 < number < math.inf:
            raise self.refuse(key, f"expected a positive number, found {value!r}")
        return number

    def optional_number(self, key: str) -> float | None:
        return None if self.d.get(key) is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, f"expected true or false, found {value!r}")
        return value
