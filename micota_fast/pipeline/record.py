"""What a stage's folder says of itself: making.json while the stage runs, done.json once its outputs are whole."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from micota_fast.common.fingerprint import differences, of_json
from micota_fast.common.json_io import read_json_if_there
from micota_fast.common.schema import from_json
from micota_fast.errors import InputError

DONE, MAKING = "done.json", "making.json"
MOST_SHOWN = 40  # characters of an option's value in the reason why a stage is stale


@dataclass(frozen=True)
class Making:
    """What making.json says of a stage: what its result depends on."""

    identity: dict[str, Any]


@dataclass(frozen=True)
class Done(Making):
    """What done.json says of a stage, besides how it was made: the fingerprint of each output, and the time it took."""

    outputs: dict[str, str]
    seconds: float


Record = TypeVar("Record", bound=Making)


def set_aside_name(folder: Path, identity: dict[str, Any]) -> Path:
    """Return the path that a stage's folder made for an identity has while another one is wanted."""
    return folder.with_name(f"{folder.name}~{of_json(identity)[:10]}")


def what_differs(record: Making, identity: dict[str, Any]) -> str:
    """Return the options that differ between how a stage was made and how it is wanted, with both values if short."""
    differing = [
        _change(key.removeprefix("options."), old, new)
        for key, (old, new) in sorted(differences(record.identity, identity).items())
    ]
    return f"{', '.join(differing[:3])}{' and more' if len(differing) > 3 else ''}"


def _change(key: str, old: Any, new: Any) -> str:
    texts = [value if isinstance(value, str) else json.dumps(value) for value in (old, new)]
    if any(len(text) > MOST_SHOWN or "\n" in text or re.fullmatch("[0-9a-f]{64}", text) for text in texts):
        return f"{key} changed"
    return f"{key} {texts[0]} -> {texts[1]}"


def read_done(folder: Path) -> Done | None:
    """Read a stage's done.json; returns None if its folder has none.

    Raises:
        InputError: it is damaged.
    """
    return _read(Done, folder / DONE)


def read_making(folder: Path) -> Making | None:
    """Read a stage's making.json; returns None if its folder has none.

    Raises:
        InputError: it is damaged.
    """
    return _read(Making, folder / MAKING)


def made_for(folder: Path) -> dict[str, Any] | None:
    """Return the identity that a folder was made for; None if it is not ours.

    Raises:
        InputError: its record is damaged.
    """
    record = read_done(folder) or read_making(folder)
    return None if record is None else record.identity


def _read(kind: type[Record], path: Path) -> Record | None:
    try:
        value = read_json_if_there(path)
        return None if value is None else from_json(kind, value, str(path))
    except InputError as error:
        raise InputError(f"{error}; delete {path} to run its stage again") from None
