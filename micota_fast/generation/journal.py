"""The rows of a run that is under way, kept in a folder that a SIGKILL, a power cut or a full disk does not spoil.

The folder holds `manifest.json` (format, fingerprint of the request), `lock` (an flock, which the kernel drops with the
process), segments `000000.jsonl`, ... and `index.bin`, one fixed-size record a row. A line of a segment is the row's
object with two more keys at its end, `"entry": [problem, sample, verdict, tokens, prompt_tokens]` and `"crc32"`, eight
hex digits over the bytes before that key: it is read by any JSON reader and checked without one.

A row reaches the operating system before `append` returns, so a killed process loses none. At every sync the segment is
brought to the disk first and the index after it, so what the index names was on the disk once. After a power cut only
what lies behind it may be missing or bad; that is cut off at the first bad line. A bad line before it is damage, and an
error. Only verdicts that `settle` changed live in the index alone: without it a row has that of its appending.
"""

import contextlib
import os
import re
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micota_fast.common.files import write_at
from micota_fast.common.fingerprint import differences
from micota_fast.common.json_io import as_read_back, read_json, write_json
from micota_fast.common.lock import locked
from micota_fast.common.records import encode_row
from micota_fast.errors import InputError
from micota_fast.generation.journal_index import Index

FORMAT = 1
SEGMENT_BYTES = 64 << 20  # a row longer than that has a segment of its own
_ENTRY = b', "entry": ['
_TAIL = re.compile(rb', "entry": \[(\d+), (\d+), (\d+), (\d+), (\d+)\], "crc32": "([0-9a-f]{8})"\}\n')
_TAIL_BYTES = 120  # no tail is longer
_CRC = b', "crc32": "%08x"}\n'
_CRC_BYTES = len(_CRC % 0)
_BATCH = 1 << 12  # rows looked up together by `rows`
_OPEN_SEGMENTS = 64  # by `rows`, at a time


class Journal:
    """Append rows to a folder, and resume from what an interrupted run has left there.

    Memory stays bounded: the index is mapped from its file, and membership takes a bit a row.

    Args:
        folder: made if missing.
        fingerprint: JSON object that names the making of the rows; must equal that of an existing folder.
        fsync_interval_s: seconds between two syncs; a power cut loses at most what came since the last.

    Attributes:
        cut_bytes: what was cut off behind the last sync because it was torn or bad.
        duplicates: rows passed over while they were read back, as their (problem, sample) was there already.

    Raises:
        InputError: the folder belongs to another fingerprint, is written by another process, or is damaged before the
            last sync; or it cannot be read or written.
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any], fsync_interval_s: float = 2.0) -> None:
        self.folder = Path(folder)
        self.cut_bytes = self.duplicates = 0
        self._fsync_interval_s = fsync_interval_s
        self._synced_at = time.monotonic()
        self._segment = self._offset = 0  # where the next row goes
        self._segment_fd = -1
        self._closed = False
        self._held = contextlib.ExitStack()
        try:
            with self._errors():
                self._held.enter_context(locked(self.folder / "lock", "process"))
                rebuild, n_segments = self._prepare(as_read_back(fingerprint))
                # Named index.bin once it is whole: as long as that is missing, it is known to be.
                self._index = Index(self.folder / ("index.new" if rebuild else "index.bin"))
                self._held.callback(self._index.close)
                self._held.callback(lambda: os.close(self._segment_fd))
                self._open_segment(0)
                self._take_up(rebuild, n_segments)
        except BaseException:
            self._held.close()
            raise

    @contextlib.contextmanager
    def _errors(self, addition: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror}{addition}") from None

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment:06d}.jsonl"

    def _segments(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.jsonl"), key=lambda path: int(path.stem))

    def _prepare(self, fingerprint: Mapping[str, Any]) -> tuple[bool, int]:
        """Check the folder's files. Returns whether the index is missing, and how many segments there are."""
        if (self.folder / "discarded").exists():
            self._remove_files()
        (self.folder / "index.new").unlink(missing_ok=True)
        segments = self._segments()
        self._check_manifest(fingerprint, segments)
        segments = self._segments()
        for number, path in enumerate(segments):
            if path != self._path(number):
                raise InputError(f"{self._path(number)} is missing; put it back, or delete {self.folder} to start over")
        return not (self.folder / "index.bin").exists(), len(segments)

    def _check_manifest(self, fingerprint: Mapping[str, Any], segments: list[Path]) -> None:
        path = self.folder / "manifest.json"
        ours = {"format": FORMAT, "fingerprint": fingerprint}
        if not path.exists():
            if segments:
                raise InputError(f"{path} is missing; put it back, or delete {self.folder} to start over")
            (self.folder / "index.bin").touch()
            write_json(path, ours, 2)
            return
        try:
            manifest = read_json(path)
            known, theirs = manifest["format"] == FORMAT, dict(manifest["fingerprint"])
        except (InputError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error!r}); mend it, or delete {self.folder} to start over") from None
        if not known:
            raise InputError(f"{path} has a format this version does not know; delete {self.folder} to start over")
        differing = sorted(differences(theirs, fingerprint))
        if differing and not any(segment.stat().st_size for segment in segments):
            path.replace(self.folder / "discarded")  # it has no row: it was begun with settings that were mended since
            self._remove_files()
            self._check_manifest(fingerprint, [])
            return
        if differing:
            raise InputError(
                f"{self.folder} belongs to another run (it differs in: {', '.join(differing)}); "
                "delete it to start over, or write elsewhere"
            )

    def _take_up(self, rebuild: bool, n_segments: int) -> None:
        """Take the rows that are there, and check those of the last segment."""
        spans, dropped = self._index.take_up()
        for segment, (_, end) in spans.items():
            path = self._path(segment)
            size = path.stat().st_size if segment < n_segments else 0
            if size < end:
                raise InputError(
                    f"{path} ends at byte {size}, but {self._index.path} names rows up to byte {end}; "
                    f"delete {self._index.path.name} to resume with the rows that are there"
                )
        if (last := n_segments - 1) in spans:
            for _ in self.rows(np.arange(spans[last][0], len(self._index))):
                pass
        self._segment = max(spans, default=0)
        self._offset = spans[self._segment][1] if spans else 0
        self._scan(n_segments, dropped, rebuild)
        self._sync()
        self._index.cut()
        self._index.move(self.folder / "index.bin")

    def _scan(self, n_segments: int, synced: int, rebuild: bool) -> None:
        """Enter the rows that the index does not name, and cut off a bad tail of the last segment.

        Args:
            n_segments: how many there are.
            synced: number of rows that are known to have been on the disk.
            rebuild: the index is missing, so nobody knows what was: a bad line before a good one is taken for damage.
        """
        while True:
            self._open_segment(self._segment)
            last = self._segment >= n_segments - 1
            with self._path(self._segment).open("rb") as lines:
                lines.seek(self._offset)
                for line in lines:
                    entry = _entry_of(line)
                    if entry is None:
                        if not last or synced > 0 or (rebuild and any(map(_entry_of, lines))):
                            raise self._damage(self._segment, self._offset)
                        self.cut_bytes = os.fstat(lines.fileno()).st_size - self._offset
                        os.ftruncate(self._segment_fd, self._offset)
                        break
                    synced -= 1
                    crc32, problem, sample, *rest = entry
                    if self._index.has(problem, sample):
                        self.duplicates += 1
                    else:
                        self._index.enter(self._segment, self._offset, len(line), crc32, problem, sample, *rest)
                    self._offset += len(line)
            if last:
                return
            self._index.write()  # its rows are on the disk: a segment is begun after a sync
            self._segment, self._offset = self._segment + 1, 0

    def _damage(self, segment: int, offset: int) -> InputError:
        path, number, left = self._path(segment), 1, offset
        with path.open("rb") as file:
            while block := file.read(min(left, 1 << 20)):
                number += block.count(b"\n")
                left -= len(block)
        return InputError(
            f"{path}:{number}: the row at byte {offset} is damaged (it does not match its checksum); "
            f"to resume without it, delete that line and {self.folder / 'index.bin'}"
        )

    def _open_segment(self, segment: int) -> None:
        fd = os.open(self._path(segment), os.O_RDWR | os.O_CREAT, 0o666)
        directory = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        if self._segment_fd >= 0:
            os.close(self._segment_fd)
        self._segment_fd = fd

    def append(
        self, problem: int, sample: int, verdict: int, tokens: int, prompt_tokens: int, row: Mapping[str, Any]
    ) -> None:
        """Add one row.

        Args:
            problem: ordinal of the problem in its file, below 2**32.
            sample: below 2**16; with `problem` the row's key.
            verdict: below 256, of the caller's meaning.
            tokens: of the completion.
            prompt_tokens: of the prompt.
            row: the JSON object that `rows` gives back; not empty.

        Raises:
            ValueError: the (problem, sample) is there already, or a number is out of its range.
            InputError: the disk is full or the folder cannot be written; what was written before is kept, and the same
                row can be appended again once there is space.
        """
        if self._index.has(problem, sample):
            raise ValueError(f"(problem {problem}, sample {sample}) is written already")
        numbers = (problem, sample, verdict, tokens, prompt_tokens)
        text = b'%b, "entry": [%d, %d, %d, %d, %d]' % (encode_row(row)[:-2], *numbers)
        crc32 = zlib.crc32(text)
        line = text + _CRC % crc32
        with self._errors("; what was written before is kept"):
            if self._offset + len(line) > SEGMENT_BYTES and self._offset:
                self._sync()
                self._open_segment(self._segment + 1)
                self._segment, self._offset = self._segment + 1, 0
            try:
                write_at(self._segment_fd, line, self._offset)
                self._index.enter(self._segment, self._offset, len(line), crc32, *numbers)
            except (OSError, struct.error) as error:
                os.ftruncate(self._segment_fd, self._offset)
                if isinstance(error, OSError):
                    raise
                raise ValueError(f"(problem {problem}, sample {sample}): {error}") from None
            self._offset += len(line)
            if time.monotonic() - self._synced_at >= self._fsync_interval_s:
                try:
                    self._sync()
                except OSError:
                    self._index.withdraw(problem, sample)
                    self._offset -= len(line)
                    os.ftruncate(self._segment_fd, self._offset)
                    raise

    def settle(self, problem: int, sample: int, verdict: int) -> None:
        """Change the verdict of a row that is there; the change reaches the disk with the next sync that follows.

        Raises:
            ValueError: there is no such row, or the verdict is out of its range.
            InputError: the folder cannot be written.
        """
        if not self._index.has(problem, sample):
            raise ValueError(f"(problem {problem}, sample {sample}) is not written")
        with self._errors():
            self._index.settle(problem, sample, verdict)

    def settle_entry(self, entry: int, verdict: int) -> None:
        """Settle a row as `settle` does, by its place in `entries`: no search."""
        with self._errors():
            self._index.settle_record(entry, verdict)

    def cut_back(self, length: int) -> None:
        """Remove all rows but the first `length`; arrays taken from `entries` before must not be read any more.

        Killed in the middle, the next journal raises InputError: the index then names rows that are gone, and without
        it those that are left are taken up.

        Raises:
            InputError: the folder cannot be written.
        """
        with self._errors():
            self._sync()
            entries = self._index.entries()
            if length >= len(entries):
                return
            segment, offset = (int(entries[name][length]) for name in ("segment", "offset"))
            for path in self._segments()[segment + 1 :]:
                path.unlink()
            self._open_segment(segment)
            os.ftruncate(self._segment_fd, offset)
            os.fsync(self._segment_fd)
            self._index.cut_back(length)
            self._segment, self._offset = segment, offset

    def sync(self) -> None:
        """Bring every row and the index to the disk.

        Raises:
            InputError: the disk is full or the folder cannot be written; the rows stay readable.
        """
        with self._errors("; what was written before is kept"):
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._segment_fd)
        self._index.write()
        self._synced_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._index)

    def contains(self, problem: int, sample: int) -> bool:
        """Return whether the row of this key is there."""
        return self._index.has(problem, sample)

    @property
    def entries(self) -> NDArray[Any]:
        """The index [rows] in order of arrival, of dtype ENTRY, read-only: mapped from its file, after a sync.

        Raises:
            InputError: see `sync`.
        """
        if len(self._index) != len(self._index.entries()):
            self.sync()
        return self._index.entries()

    def rows(self, order: NDArray[np.integer[Any]]) -> Iterator[bytes]:
        """Yield `encode_row` of the rows of `entries[order]`, each checked against its checksum.

        Raises:
            InputError: a row is damaged (file and line are named), or cannot be read.
        """
        entries = self.entries
        files: dict[int, int] = {}
        try:
            for start in range(0, len(order), _BATCH):
                batch = entries[order[start : start + _BATCH]]
                places = (batch[name].tolist() for name in ("segment", "offset", "length", "crc32"))
                for segment, offset, length, crc32 in zip(*places, strict=True):
                    fd = files.get(segment)
                    if fd is None:
                        if len(files) == _OPEN_SEGMENTS:
                            os.close(files.pop(next(iter(files))))
                        fd = files[segment] = os.open(self._path(segment), os.O_RDONLY)
                    line = os.pread(fd, length, offset)
                    if zlib.crc32(memoryview(line)[:-_CRC_BYTES]) != crc32 or not line.endswith(_CRC % crc32):
                        raise self._damage(segment, offset)
                    yield line[: line.rindex(_ENTRY)] + b"}\n"
        except OSError as error:
            raise InputError(f"cannot read {self.folder}: {error.strerror}") from None
        finally:
            for fd in files.values():
                os.close(fd)

    def discard(self) -> None:
        """Remove the folder with all files in it and release it. Killed in the middle, a next journal begins anew."""
        with self._errors():
            (self.folder / "manifest.json").replace(self.folder / "discarded")
            self._remove_files()
            (self.folder / "lock").unlink()
            with contextlib.suppress(OSError):  # another process makes a new journal there, or it has a folder in it
                self.folder.rmdir()
        self._closed = True
        self._held.close()

    def _remove_files(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in ("lock", "discarded") and not path.is_dir():
                path.unlink()
        (self.folder / "discarded").unlink()

    def close(self) -> None:
        """Bring every row to the disk and release the folder; it can be taken up again later.

        Raises:
            InputError: see `sync`; the folder is released all the same.
        """
        with self._held:
            if not self._closed:
                self._closed = True
                self.sync()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _entry_of(line: bytes) -> tuple[int, int, int, int, int, int] | None:
    """crc32, problem, sample, verdict, tokens and prompt_tokens of a segment's line; None: it is torn or bad."""
    start = line.rfind(_ENTRY, max(len(line) - _TAIL_BYTES, 0))
    found = start >= 0 and _TAIL.fullmatch(line, start)
    if not found:
        return None
    crc32 = int(found[6], 16)
    if zlib.crc32(memoryview(line)[:-_CRC_BYTES]) != crc32:
        return None
    problem, sample, verdict, tokens, prompt_tokens = map(int, found.groups()[:5])
    return crc32, problem, sample, verdict, tokens, prompt_tokens
