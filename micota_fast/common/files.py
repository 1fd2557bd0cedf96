"""Files and folders that appear whole or not at all, and are then on the disk.

What is being written has a random name next to its place, `.NAME.<16 hex digits>.tmp` or `.partial`, so that nobody can
put a link there first, and is locked (flock(2)) by its writer. The kernel drops the lock with the writer, however that
ends; the next writer of the same place removes what nobody holds any more.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from micota_fast.errors import InputError

_STEM_CHARACTERS = 48  # of a place's name in the temporary one, which must not become longer than a name may be
_FILE, _FOLDER = ".tmp", ".partial"


@contextlib.contextmanager
def writing(place: str | Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError of the block into an InputError that names `place` and the reason.

    Args:
        place: what the block writes.
        needed: about how many bytes it writes, to be named next to those that are free when they are too few.

    Raises:
        InputError: the block raised OSError.
    """
    try:
        yield
    except OSError as error:
        other = f" ({error.filename})" if error.filename not in (None, str(place), place) else ""
        room = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            room = " (" if needed is None else f" ({needed:,} bytes to write, "
            room += f"{_free_bytes(Path(place)):,} free); make room and give the same command again"
        raise InputError(f"cannot write {place}: {error.strerror or error}{other}{room}") from None


def require_folder(path: str | Path) -> None:
    """Raise InputError if a folder that results go into can be none, because it, or one above it, is a file."""
    for place in (Path(path), *Path(path).parents):
        if os.path.lexists(place) and not place.is_dir():
            named = "it" if place == Path(path) else place
            raise InputError(f"cannot write into {path}: {named} is not a folder; choose another place")


@contextlib.contextmanager
def reading(place: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into an InputError that names `place` and the reason.

    Raises:
        InputError: the block raised OSError.
    """
    try:
        yield
    except OSError as error:
        instead = "; name a file in it" if isinstance(error, IsADirectoryError) else ""
        raise InputError(f"cannot read {place}: {error.strerror or error}{instead}") from None


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that appears whole or not at all: aside in the same directory, fsync, rename.

    Raises:
        InputError: the directory cannot be written or the disk is full; or the path cannot be a file, or is a device.
    """
    with writing(path):
        _check_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside, fd = _make_aside(path, _FILE)
        try:
            with open(fd, "wb") as file:
                yield file
                file.flush()
                os.fsync(fd)
                aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        sync(path.parent)


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file with `open_atomic`.

    Raises:
        InputError: the directory cannot be written or the disk is full.
    """
    with open_atomic(path) as file:
        file.writelines(chunks)


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Make a folder to fill that appears as `out` whole or not at all: aside in the same directory, fsync, rename.

    When the block ends, `out` must be absent or an empty folder; a block that replaces `out` removes it last.

    Raises:
        InputError: the directory cannot be written or the disk is full; or the path cannot be a folder, or is a device.
    """
    with writing(out):
        _check_place(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        aside, fd = _make_aside(out, _FOLDER)
        try:
            yield aside
            publish(aside, out)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            os.close(fd)


@contextlib.contextmanager
def temporary_folder(place: Path) -> Iterator[Path]:
    """Yield an empty folder next to `place`, named after it and readable by the user alone; the block's end removes it.

    What an earlier one of the same place has left goes first, if its process was killed; one that lives keeps its own.

    Raises:
        InputError: the folder cannot be made.
    """
    with writing(place):
        aside, fd = _make_aside(place, _FOLDER, 0o700)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(fd)


def publish(aside: Path, out: Path) -> None:
    """Sync a folder with all that is in it and rename it to `out` (absent or empty), which is then on the disk."""
    sync_tree(aside)
    aside.rename(out)
    sync(out.parent)


def remove_whole(folder: Path) -> None:
    """Delete a folder, if it is there, such that no part of it is ever found under its name.

    What a removal or a writer that was killed has left of it goes, too.
    """
    _clear_left(folder, _FOLDER)
    aside = _random_name(folder, _FOLDER)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)  # what is left goes with the next one


def sync_tree(folder: Path) -> None:
    """Sync to the disk all files and folders in a folder, and it."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Sync a file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Write all of it: a disk that fills up takes a part first and reports it at the next attempt.

    Raises:
        OSError: the disk is full or fails.
    """
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def refuse_to_overwrite(out: str | Path, *inputs: str | Path) -> None:
    """See that what is to be written is none of the files that it is made of.

    Raises:
        InputError: it is.
    """
    for file in inputs:
        if os.path.exists(out) and os.path.exists(file) and os.path.samefile(out, file):
            raise InputError(f"{out} is also read: writing it would destroy that; name another `out`")


def _free_bytes(place: Path) -> int:
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _check_place(path: Path) -> None:
    if path.name in ("", ".."):
        raise InputError(f"cannot write {path}: it is a folder that is in use; name a place in it")
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"cannot write {path}: it is a device, pipe or socket, which a rename would replace")


def _make_aside(path: Path, kind: str, folder_mode: int = 0o777) -> tuple[Path, int]:
    """Make an empty file or folder next to `path` that is ours alone; returns it and the descriptor that locks it."""
    _clear_left(path, kind)
    while True:
        aside = _random_name(path, kind)
        if kind == _FILE:
            fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        else:
            aside.mkdir(folder_mode)
            fd = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        with contextlib.suppress(OSError):  # a file system without locks: what a killed writer leaves there stays
            fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), aside.stat()):
                return aside, fd
        os.close(fd)  # another writer took it for one that was left, before we locked it


def _clear_left(path: Path, kind: str) -> None:
    """Remove what killed writers of `path` have left: it has a name of ours and nobody locks it."""
    name = re.compile(rf"\.{re.escape(_stem(path))}\.[0-9a-f]{{16}}{re.escape(kind)}")
    with contextlib.suppress(OSError):
        for aside in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with contextlib.suppress(OSError):  # it has gone, or is in use
                fd = os.open(aside, flags | os.O_DIRECTORY if kind == _FOLDER else flags)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(aside) if kind == _FOLDER else aside.unlink()
                finally:
                    os.close(fd)


def _random_name(path: Path, kind: str) -> Path:
    return path.with_name(f".{_stem(path)}.{os.urandom(8).hex()}{kind}")


def _stem(path: Path) -> str:
    return path.name[:_STEM_CHARACTERS]
