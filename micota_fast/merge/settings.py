"""A merge's parameter as mergekit's files give it: one value, a gradient over the layers, or either by tensor name."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from micota_fast.errors import InputError

Scalar = bool | float | str
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class Case(NamedTuple):
    """Values for the tensors whose name contains `filter` (None: all); several are a gradient over the layers."""

    filter: str | None
    values: tuple[Scalar, ...]


Setting = tuple[Case, ...]
"""The first case that fits a tensor holds, so settings of lower precedence are simply appended."""


class Parameter(NamedTuple):
    """What a file may give a parameter.

    `read(key, value)` checks one value and returns it in the parameter's type; it raises InputError naming the key.
    `default` holds where the file says nothing; None: a method has its own, or the file must say.
    """

    read: Callable[[str, Any], Scalar]
    default: Scalar | None = None


def number(low: float | None = None, high: float | None = None) -> Callable[[str, Any], Scalar]:
    """Return a reader (see `Parameter`) of numbers from `low` to `high`, both or neither given."""

    def read(key: str, value: Any) -> Scalar:
        try:
            found = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-5 as a string
        except (TypeError, ValueError):
            found = math.nan
        if math.isnan(found):
            raise InputError(f"`{key}` must be a number, not {value!r}")
        if low is not None and high is not None and not low <= found <= high:
            raise InputError(f"`{key}` must lie between {low:g} and {high:g}, not {value}")
        if abs(found) > 1e6:
            raise InputError(f"`{key}` is out of range: {value}")
        return found

    return read


def truth(key: str, value: Any) -> Scalar:
    """Read true or false; 1 and 0 too, as mergekit writes its own files. Raises InputError naming the key."""
    if value not in (True, False):
        raise InputError(f"`{key}` must be true or false, not {value!r}")
    return bool(value)


def read_setting(key: str, value: Any, scalar: Callable[[str, Any], Scalar]) -> Setting:
    """Read a parameter's value in a file: a scalar, a list of scalars, a mapping {filter, value}, or a list of those.

    Args:
        key: named in errors.
        scalar: checks one scalar of the parameter and returns it in its type; raises InputError.
    """
    if isinstance(value, dict):
        return (_case(key, value, scalar),)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return tuple(_case(f"{key}.{i}", item, scalar) for i, item in enumerate(value))
    return (Case(None, _values(key, value, scalar)),)


def _case(key: str, content: dict[str, Any], scalar: Callable[[str, Any], Scalar]) -> Case:
    for name in content:
        if name not in ("filter", "value"):
            raise InputError(f"`{key}.{name}`: unknown key; known here: filter, value")
    if "value" not in content:
        raise InputError(f"`{key}`: this case has no `value`")
    part = content.get("filter")
    if part is not None and not isinstance(part, str):
        raise InputError(f"`{key}.filter` must be a part of a tensor's name, not {part!r}")
    return Case(None if part in ("*", "") else part, _values(f"{key}.value", content["value"], scalar))


def _values(key: str, value: Any, scalar: Callable[[str, Any], Scalar]) -> tuple[Scalar, ...]:
    if not isinstance(value, list):
        return (scalar(key, value),)
    if not value:
        raise InputError(f"`{key}` is an empty list")
    return tuple(scalar(f"{key}.{i}", item) for i, item in enumerate(value))


def value_at(setting: Setting, tensor: str, depth: float) -> Scalar | None:
    """Return what holds for a tensor; None if no case fits its name.

    Args:
        depth: 0 at the first layer to 1 at the last. Numbers are interpolated linearly between the gradient's points,
            which lie at equal distances; of words and truth values the one at or before the depth is taken.
    """
    values = next((case.values for case in setting if case.filter is None or case.filter in tensor), None)
    if values is None:
        return None
    place = depth * (len(values) - 1)
    at, share = int(place), place - int(place)
    first, second = values[at], values[min(at + 1, len(values) - 1)]
    if isinstance(first, bool | str) or isinstance(second, bool | str):
        return first
    return (1 - share) * first + share * second


def depth_of(tensor: str, num_layers: int) -> float:
    """Return where a tensor stands between the first layer (0) and the last (1).

    What belongs to no layer (embedding, final norm, head) counts as the first, and a sole layer as the last.
    """
    layer = _LAYER.match(tensor)
    if layer is None:
        return 0.0
    return int(layer[1]) / (num_layers - 1) if num_layers > 1 else 1.0


def plain(setting: Setting) -> Any:
    """Write it as a file would say it."""
    shown = [list(case.values) if len(case.values) > 1 else case.values[0] for case in setting]
    if len(setting) == 1 and setting[0].filter is None:
        return shown[0]
    return [{"filter": case.filter, "value": value} for case, value in zip(setting, shown, strict=True)]
