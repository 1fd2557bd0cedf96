"""Results as frozen dataclasses, and the JSON objects they are written as: the writer and every reader share the class.

A dataclass is a JSON object whose keys are its fields, in their order. When it is read,

- each value must have the type of its field, and lie within the field's `Bounds`; NaN and infinities are refused;
- a field without a default must be there; null stands for None, where the type allows it;
- keys that are not fields are ignored, so that a file with more in it can still be read.
"""

import enum
import functools
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, Union

from micota_fast.common.json_io import read_json
from micota_fast.errors import InputError

T = TypeVar("T")


class Absent(enum.Enum):
    """Value of a field that has no key in this file: `x: int | Absent = ABSENT`. False, as None is."""

    ABSENT = "absent"

    def __bool__(self) -> Literal[False]:
        return False


ABSENT: Final = Absent.ABSENT


@dataclass(frozen=True)
class Bounds:
    """The least and the greatest value of a number: `Annotated[float, Bounds(0, 1)]`."""

    low: float = -math.inf
    high: float = math.inf

    def words(self, number: str) -> str:
        """Return `number` ("number", "whole number") with its article and these bounds."""
        if math.isfinite(self.high):
            return f"a {number} from {self.low:g} to {self.high:g}"
        finite = f"a {number}" if number.startswith("whole") else f"a finite {number}"
        return f"{finite} of at least {self.low:g}" if math.isfinite(self.low) else finite


Count = Annotated[int, Bounds(0)]
PositiveCount = Annotated[int, Bounds(1)]
Share = Annotated[float, Bounds(0, 1)]
NonNegative = Annotated[float, Bounds(0)]


class InvalidValueError(ValueError):
    """Raised by a dataclass's `__post_init__` when one of its values contradicts another.

    `from_json` turns it into an InputError that names the file and the whole key.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"key '{key}' {message}")
        self.key, self.message = key, message


def to_json(value: Any) -> Any:
    """Convert dataclasses and tuples, at any depth, to the objects and lists that `json.dumps` takes."""
    if is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
        return {name: to_json(item) for name, item in items if item is not ABSENT}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(kind: type[T], value: Any, where: str) -> T:
    """Build a dataclass, or a list or dict of them, from decoded JSON.

    Args:
        kind: the dataclass, or a type such as `dict[str, Entry]`.
        value: what `parse_json` returned.
        where: the file, and the line if it has several values; opens every message.

    Raises:
        InputError: a key is missing, or a value has the wrong type or is out of bounds; names the key.
    """
    hint: Any = kind
    made: T = _reader(hint).read(value, where, "")
    return made


def load(kind: type[T], path: Path) -> T:
    """Read a file of one JSON value with `from_json`.

    Raises:
        InputError: it cannot be read, is not JSON, or not of this kind.
    """
    try:
        value = read_json(path, object)
    except InputError as error:
        raise InputError(f"{error}; rerun the stage that writes it, or fix the path") from None
    return from_json(kind, value, str(path))


_Read = Callable[[Any, str, str], Any]  # value, where, key -> the value as a field holds it


class _Reader(NamedTuple):
    """How values of one type are read; `name` is what a message calls one that is missing."""

    name: str
    read: _Read
    nullable: bool = False


@functools.cache
def _reader(hint: Any) -> _Reader:
    bounds = Bounds()
    if typing.get_origin(hint) is Annotated:
        hint, bounds = typing.get_args(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return _object(typing.cast(type, hint))
    if origin in (Union, types.UnionType):
        return _optional(args)
    if origin is dict:
        return _mapping(_reader(args[1]))
    if origin in (list, tuple):
        return _sequence(origin, args)
    if origin is Literal:
        return _scalar("a string", f"one of {', '.join(args)}", lambda value: value if value in args else ABSENT)
    if hint is float:
        return _scalar("a number", bounds.words("number"), functools.partial(_float, bounds))
    if hint is int:
        return _scalar("a whole number", bounds.words("whole number"), functools.partial(_int, bounds))
    if hint is str:
        return _scalar("a string", "a string", lambda value: value if isinstance(value, str) else ABSENT)
    if hint is bool:
        return _scalar("true or false", "true or false", lambda value: value if isinstance(value, bool) else ABSENT)
    if hint is Any:
        return _Reader("a value", lambda value, where, key: value, nullable=True)
    raise TypeError(f"{hint} is not a type of a result's field")


def _wrong(where: str, key: str, expected: str, value: Any) -> InputError:
    found = json.dumps(value, ensure_ascii=False)[:80]
    place = f"{where}: key '{key}' must be" if key else f"{where}: expected"
    return InputError(f"{place} {expected}, found {found}")


def _missing(where: str, key: str, name: str, siblings: dict[str, Any]) -> InputError:
    found = ", ".join(siblings) or "no keys at all"
    return InputError(f"{where}: key '{key}' ({name}) is missing; found {found}")


def _scalar(name: str, expected: str, convert: Callable[[Any], Any]) -> _Reader:
    """`convert` returns ABSENT for a value that is not of the type."""

    def read(value: Any, where: str, key: str) -> Any:
        converted = convert(value)
        if converted is ABSENT:
            raise _wrong(where, key, expected, value)
        return converted

    return _Reader(name, read)


def _float(bounds: Bounds, value: Any) -> float | Absent:
    if type(value) not in (int, float):
        return ABSENT
    try:
        number = float(value)
    except OverflowError:  # JSON's whole numbers have no upper limit
        return ABSENT
    return number if math.isfinite(number) and bounds.low <= number <= bounds.high else ABSENT


def _int(bounds: Bounds, value: Any) -> int | Absent:
    return value if type(value) is int and bounds.low <= value <= bounds.high else ABSENT


def _optional(kinds: tuple[Any, ...]) -> _Reader:
    (reader,) = (_reader(kind) for kind in kinds if kind not in (types.NoneType, Absent))
    if types.NoneType not in kinds:
        return reader

    def read(value: Any, where: str, key: str) -> Any:
        return None if value is None else reader.read(value, where, key)

    return _Reader(reader.name, read, nullable=True)


def _sequence(make: type, kinds: tuple[Any, ...]) -> _Reader:
    """A list of any length, or a tuple of one reader per item."""
    fixed = make is tuple and kinds[-1] is not Ellipsis
    readers = [_reader(kind) for kind in kinds if kind is not Ellipsis]

    def read(value: Any, where: str, key: str) -> Any:
        if not isinstance(value, list) or (fixed and len(value) != len(readers)):
            raise _wrong(where, key, f"a list of {len(readers)}" if fixed else "a list", value)
        return make(readers[i if fixed else 0].read(item, where, f"{key}.{i}") for i, item in enumerate(value))

    return _Reader("a list", read)


def _mapping(reader: _Reader) -> _Reader:
    def read(value: Any, where: str, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(where, key, "an object", value)
        prefix = f"{key}." if key else ""
        return {name: reader.read(item, where, f"{prefix}{name}") for name, item in value.items()}

    return _Reader("an object", read)


def _object(kind: type) -> _Reader:
    hints = typing.get_type_hints(kind, include_extras=True)
    readers = [
        (field.name, _reader(hints[field.name]), field.default is MISSING and field.default_factory is MISSING)
        for field in fields(kind)
    ]

    def read(value: Any, where: str, key: str) -> Any:
        if not isinstance(value, dict):
            raise _wrong(where, key, "an object", value)
        prefix = f"{key}." if key else ""
        found = {}
        for name, reader, required in readers:
            item = value.get(name)
            if item is not None or (reader.nullable and name in value):
                found[name] = reader.read(item, where, f"{prefix}{name}")
            elif required:
                raise _missing(where, f"{prefix}{name}", reader.name, value)
        try:
            return kind(**found)
        except InvalidValueError as error:
            raise InputError(f"{where}: key '{prefix}{error.key}' {error.message}") from None

    return _Reader("an object", read)
