"""JSON files as the report reads them: each key checked, each complaint with its file and key."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from micota_fast.errors import InputError


@dataclass(frozen=True)
class Node:
    """A JSON object together with where it stands, so that every complaint can name its file and key."""

    data: Mapping[str, Any]
    where: str
    prefix: str = ""

    def _value(self, key: str, kind: str, optional: bool) -> Any:
        value = self.data.get(key)
        if value is None and not optional:
            found = ", ".join(map(str, self.data)) or "no keys at all"
            raise InputError(f"{self.where}: key '{self.prefix}{key}' ({kind}) is missing; found {found}")
        return value

    def _wrong(self, key: str, kind: str, value: Any) -> InputError:
        return InputError(f"{self.where}: key '{self.prefix}{key}' must be {kind}, found {json.dumps(value)[:80]}")

    def number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float:
        value = self.optional_number(key, low, high)
        return float(self._value(key, "a number", optional=False)) if value is None else value

    def optional_number(self, key: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        value = self._value(key, "a number", optional=True)
        if value is None:
            return None
        kind = "a finite number" if math.isinf(low) else f"a number from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, kind, value)
        if not math.isfinite(value) or not low <= value <= high:
            raise self._wrong(key, kind, value)
        return float(value)

    def count(self, key: str, low: int = 0) -> int:
        value = self.optional_count(key, low)
        return int(self._value(key, "a whole number", optional=False)) if value is None else value

    def optional_count(self, key: str, low: int = 0) -> int | None:
        value = self._value(key, "a whole number", optional=True)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise self._wrong(key, f"a whole number of at least {low}", value)
        return value

    def child(self, key: str) -> "Node":
        child = self.optional_child(key)
        if child is None:
            self._value(key, "an object", optional=False)
            raise AssertionError("unreachable: a missing child is an error above")
        return child

    def optional_child(self, key: str) -> "Node | None":
        value = self._value(key, "an object", optional=True)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object", value)
        return Node(value, self.where, f"{self.prefix}{key}.")

    def text(self, key: str) -> str:
        value = self._value(key, "a string", optional=False)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def length(self, key: str) -> int:
        value = self._value(key, "a list", optional=False)
        if not isinstance(value, list):
            raise self._wrong(key, "a list", value)
        return len(value)

    def numbers(self, key: str) -> tuple[float | None, ...]:
        """Numbers of at least 0, and nulls; none where there is no such key."""
        value = self._value(key, "a list of numbers", optional=True) or []
        if not isinstance(value, list) or not all(
            item is None or (type(item) in (int, float) and 0 <= item < math.inf) for item in value
        ):
            raise self._wrong(key, "a list of finite numbers of at least 0, or nulls", value)
        return tuple(None if item is None else float(item) for item in value)

    def children(self, key: str) -> "list[Node]":
        """The objects of a list; none where there is no such key."""
        value = self._value(key, "a list of objects", optional=True) or []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._wrong(key, "a list of objects", value)
        return [Node(item, self.where, f"{self.prefix}{key}.{place}.") for place, item in enumerate(value)]

    def lengths(self, key: str) -> tuple[int, ...]:
        value = self._value(key, "a list of token counts", optional=True) or []
        if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
            raise self._wrong(key, "a list of token counts", value)
        return tuple(value)


def read(path: Path) -> str:
    """A file's text.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); rerun the stage that writes it, or mend the path"
        ) from error


def parse(text: str, where: str) -> Node:
    """The JSON object that the text is; `where` names it in complaints.

    Raises:
        InputError: it is no JSON, or no object.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error}); rerun the stage that writes it") from error
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a JSON object, found {text.strip()[:40]!r}")
    return Node(data, where)
