"""Fingerprints of files and folders by content, and a memory of them so that an unchanged file is read once."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from micota_fast.common.json_io import read_json_if_there, write_json
from micota_fast.errors import InputError


def of_json(value: Any) -> str:
    """Return the sha256 of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()  # file names need not be UTF-8


def of_file(path: Path) -> str:
    """Return the sha256 of a file's bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, dotted where objects lie in objects, with the old and the new value.

    Lists are compared whole; None stands for a value that one of them has not.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys((*new, *old)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= {f"{key}.{inner}": values for inner, values in differences(before, after).items()}
        elif before != after:
            found[key] = before, after
    return found


class Fingerprints:
    """Content hashes of files and folders.

    A file whose size, inode, modification and change time (nanoseconds) are as remembered is not read again. So nothing
    is judged by its time: a touched file is hashed anew and found equal.

    Args:
        memory: file that keeps the hashes between runs; None: they last as long as this process.
    """

    def __init__(self, memory: Path | None) -> None:
        self._memory = memory
        self._changed = False
        self._known: dict[str, list[Any]] = {}
        if memory is not None:
            with contextlib.suppress(InputError):  # a lost or damaged memory only costs time
                known = read_json_if_there(memory) or {}
                self._known = {name: state for name, state in known.items() if _is_state(state)}

    def of(self, path: Path) -> str:
        """Return the sha256 of a file's bytes, or of the names and hashes of all files in a folder.

        Raises:
            InputError: the path cannot be read.
        """
        try:
            if path.is_dir():
                files = sorted(file for file in path.rglob("*") if file.is_file())
                return of_json([[file.relative_to(path).as_posix(), self._of_file(file)] for file in files])
            return self._of_file(path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None

    def _of_file(self, path: Path) -> str:
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(str(path))
        if known is not None and known[:-1] == state:
            return str(known[-1])
        digest = of_file(path)
        self._known[str(path)] = [*state, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Keep what was hashed for the next run."""
        if self._changed and self._memory is not None:
            alive = {name: state for name, state in self._known.items() if os.path.exists(name)}
            with contextlib.suppress(InputError):  # the folder may be only read
                write_json(self._memory, alive, 0)
            self._changed = False


def _is_state(value: Any) -> bool:
    """Whether it is as `Fingerprints` remembers a file: four numbers and a digest."""
    return isinstance(value, list) and [type(item) for item in value] == [int, int, int, int, str]
