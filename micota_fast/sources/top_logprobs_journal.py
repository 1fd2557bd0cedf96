"""Scored documents of a store that is under way, in a folder that a SIGKILL, a power cut or a full disk does not spoil.

Segments `000000.log`, ... hold record after record: a head (checksum of the rest of the head; checksum of the body;
bytes of the problem's id, tokens, sample), and a body: the id in UTF-8 and the document's arrays. A record reaches the
operating system before `append` returns, so a killed process loses none. A segment is begun when the one before
has been synced, so only the last one can be torn: it is cut at its first bad record. A bad head before that is damage,
and an error; a bad body is found when it is read.
"""

import contextlib
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.common.files import reading, sync, write_at, writing
from micota_fast.common.fingerprint import differences
from micota_fast.common.json_io import as_read_back, read_json, write_json
from micota_fast.common.lock import locked
from micota_fast.errors import InputError

SEGMENT_BYTES = 64 << 20  # a longer document has a segment of its own
_FSYNC_INTERVAL_S = 2.0
_HEAD = struct.Struct("<IIIIq")  # checksum of what follows in the head, of the body; id bytes, tokens, sample
_HEAD_TAIL = struct.Struct("<IIIq")

Key = tuple[str, int]
"""A document: id of the problem, sample."""


def row_bytes(top_k: int) -> int:
    """Return the bytes of a token: its id and log-probability, and K ids and log-probabilities."""
    return 4 + 4 + 6 * top_k


class _Place(NamedTuple):
    """Where a record lies."""

    path: Path
    offset: int  # of its body
    id_bytes: int
    tokens: int
    crc32: int  # of the body


class TopLogprobsJournal:
    """Append documents to a folder, and resume from what an interrupted run has left there.

    Args:
        folder: made if missing.
        manifest: JSON object that names the making of the documents, with `top_k`; equal to that of a folder that is
            there.

    Attributes:
        cut_bytes: what was cut off the last segment because it was torn or bad.

    Raises:
        InputError: the folder belongs to another manifest, is in use by another process, or is damaged; or it cannot be
            read or written.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.cut_bytes = 0
        self._top_k = int(manifest["top_k"])
        self._places: dict[Key, _Place] = {}
        self._fd, self._end = -1, 0  # of the last segment
        self._number = 0
        self._synced_at = time.monotonic()
        self._held = contextlib.ExitStack()
        try:
            self._held.enter_context(locked(folder / "lock", "process"))
            self._held.callback(self._close_segment)
            with writing(folder):
                self._check_manifest(as_read_back(manifest))
                self._take_up()
        except BaseException:
            self._held.close()
            raise

    def _check_manifest(self, manifest: Mapping[str, Any]) -> None:
        path = self.folder / "manifest.json"
        if not path.exists():
            if segment := next(self.folder.glob("*.log"), None):
                raise InputError(f"{path} is missing next to {segment.name}; delete {self.folder} to start over")
            write_json(path, manifest, 2)
        theirs = read_json(path)
        if differing := sorted(differences(theirs, manifest)):
            raise InputError(
                f"{self.folder} belongs to another run (it differs in: {', '.join(differing)}); "
                "delete it to start over, or write elsewhere"
            )

    def _take_up(self) -> None:
        segments = sorted(self.folder.glob("*.log"))
        for path in segments:
            end = self._read_segment(path, last=path == segments[-1])
            self._number, self._end = int(path.stem), end
        self._fd = self._open_segment()
        os.ftruncate(self._fd, self._end)

    def _read_segment(self, path: Path, last: bool) -> int:
        """Enter a segment's documents; of the last one up to the first bad record, whose offset is returned."""
        offset = 0
        with reading(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while offset < size:
                found = self._read_record(file, path, offset, checked=last)
                if found is None and not last:
                    raise InputError(
                        f"{path}: the record at byte {offset} is damaged; delete this file, and the same command makes "
                        f"its documents again"
                    )
                if found is None:
                    self.cut_bytes = size - offset
                    break
                self._places[found[0]] = found[1]
                offset = file.tell()
        return offset

    def _read_record(self, file: BinaryIO, path: Path, offset: int, checked: bool) -> tuple[Key, _Place] | None:
        """Read a record's head and id, and its body if it is to be checked; None: it is torn or bad."""
        file.seek(offset)
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size or zlib.crc32(head[4:]) != int.from_bytes(head[:4], "little"):
            return None
        _, crc32, id_bytes, tokens, sample = _HEAD.unpack(head)
        place = _Place(path, offset + _HEAD.size, id_bytes, tokens, crc32)
        end = place.offset + self._body_bytes(id_bytes, tokens)
        if end > os.fstat(file.fileno()).st_size:
            return None
        name = file.read(id_bytes)
        if checked and zlib.crc32(file.read(end - file.tell()), zlib.crc32(name)) != crc32:
            return None
        file.seek(end)
        return (name.decode("utf-8", "replace"), sample), place

    def _body_bytes(self, id_bytes: int, tokens: int) -> int:
        return id_bytes + tokens * row_bytes(self._top_k)

    def _open_segment(self) -> int:
        fd = os.open(self.folder / f"{self._number:06d}.log", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        sync(self.folder)
        return fd

    def _close_segment(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def sizes(self) -> dict[Key, int]:
        """Return the tokens of each document."""
        return {key: place.tokens for key, place in self._places.items()}

    def append(self, key: Key, arrays: tuple[NDArray[Any], ...]) -> None:
        """Add a document of little-endian arrays.

        These are token_ids int32 [T], token_logprobs float32 [T], top_ids int32 [T, K] and top_logprobs float16 [T, K].

        Raises:
            InputError: the disk is full or the folder cannot be written; what was written before is kept.
        """
        name = key[0].encode()
        body = b"".join((name, *(array.tobytes() for array in arrays)))
        tail = _HEAD_TAIL.pack(zlib.crc32(body), len(name), len(arrays[0]), key[1])
        record = zlib.crc32(tail).to_bytes(4, "little") + tail + body
        with writing(self.folder, len(record)):
            if self._end and self._end + len(record) > SEGMENT_BYTES:
                self._sync()
                self._close_segment()
                self._number, self._end = self._number + 1, 0
                self._fd = self._open_segment()
            try:
                write_at(self._fd, record, self._end)
            except OSError:
                os.ftruncate(self._fd, self._end)
                raise
            path = self.folder / f"{self._number:06d}.log"
            body_at = self._end + _HEAD.size
            self._places[key] = _Place(path, body_at, len(name), len(arrays[0]), zlib.crc32(body))
            self._end += len(record)
            if time.monotonic() - self._synced_at >= _FSYNC_INTERVAL_S:
                self._sync()

    def _sync(self) -> None:
        os.fsync(self._fd)
        self._synced_at = time.monotonic()

    def documents(self, keys: list[Key]) -> Iterator[tuple[NDArray[Any], ...]]:
        """Yield the arrays of these documents, as `append` took them.

        Raises:
            InputError: a document is damaged, or cannot be read.
        """
        k = self._top_k
        for key in keys:
            path, offset, id_bytes, tokens, crc32 = self._places[key]
            with reading(path), path.open("rb") as file:
                file.seek(offset)
                body = file.read(self._body_bytes(id_bytes, tokens))
            if zlib.crc32(body) != crc32:
                raise InputError(
                    f"{path}: the document of ({key[0]!r}, sample {key[1]}) at byte {offset} is damaged (it does not "
                    f"match its checksum); delete this file, and the same command makes its documents again"
                )
            top_at = id_bytes + 8 * tokens
            yield (
                np.frombuffer(body, "<i4", tokens, id_bytes),
                np.frombuffer(body, "<f4", tokens, id_bytes + 4 * tokens),
                np.frombuffer(body, "<i4", tokens * k, top_at).reshape(tokens, k),
                np.frombuffer(body, "<f2", tokens * k, top_at + 4 * tokens * k).reshape(tokens, k),
            )

    def close(self) -> None:
        """Bring every document to the disk and release the folder; it can be taken up again later."""
        with self._held, writing(self.folder):
            if self._fd >= 0:
                os.fsync(self._fd)
