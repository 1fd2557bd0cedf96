"""Files and folders that appear whole or not at all, and are then on the disk."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from micota_fast.errors import InputError


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears whole or not at all: aside in the same directory, fsync, rename.

    Raises:
        InputError: the directory cannot be written or the disk is full.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file with `open_atomic`.

    Raises:
        InputError: the directory cannot be written or the disk is full.
    """
    with open_atomic(path) as file:
        file.writelines(chunks)


def refuse_to_overwrite(out: str | Path, *inputs: str | Path) -> None:
    """See that what is to be written is none of the files that it is made of.

    Raises:
        InputError: it is.
    """
    for file in inputs:
        if os.path.exists(out) and os.path.exists(file) and os.path.samefile(out, file):
            raise InputError(f"{out} is also read: writing it would destroy that; name another `out`")


def publish(aside: Path, out_dir: Path) -> None:
    """Sync a flat folder with all its files and rename it to `out_dir` (absent or empty), which is then on the disk."""
    for path in (*aside.iterdir(), aside):
        sync(path)
    aside.rename(out_dir)
    sync(out_dir.parent)


def sync(path: Path) -> None:
    """fsync a file or folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
