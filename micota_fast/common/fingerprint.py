"""Fingerprints of files and folders by content, and a memory of them so that an unchanged file is read once."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from micota_fast.common.files import write_atomic
from micota_fast.errors import InputError


def of_json(value: Any) -> str:
    """sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


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
            with contextlib.suppress(OSError, ValueError):  # a lost memory only costs time
                self._known = json.loads(memory.read_bytes())

    def of(self, path: Path) -> str:
        """sha256 of a file's bytes, or of the names and hashes of all files in a folder.

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
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[str(path)] = [*state, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Keep what was hashed for the next run."""
        if self._changed and self._memory is not None:
            alive = {name: state for name, state in self._known.items() if os.path.exists(name)}
            write_atomic(self._memory, [json.dumps(alive, indent=0).encode()])
            self._changed = False
