"""The problems of a file, read one at a time: what is held are places and lengths, not text."""

import hashlib
import os
import tempfile
import zlib
from array import array
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micota_fast.common.files import write_atomic, writing
from micota_fast.common.json_io import MAX_BYTES, encode_json, parse_json
from micota_fast.common.records import Problem, bounded_lines, encode_row, parse_row, repeats
from micota_fast.errors import InputError
from micota_fast.sources.hub import is_hub
from micota_fast.sources.problems import iter_problems
from micota_fast.sources.rows import is_plain

FORMAT = 1
_BLOCK = 1 << 20
_DTYPES = ("<u8", "<u4", "i1")  # of offsets, sizes and levels


class _OtherRowError(Exception):
    """A row is an object, and not a `Problem` as it stands."""


class ProblemFile:
    """A file of problems that is checked once, when it is opened, and then read where it is asked for.

    The file must not change while it is open. While it is checked about 30 bytes per problem are held, then 13. Lines
    that are `Problem`s as they stand are read where they lie; of any other file a copy of such lines is made, without a
    name, which goes when it is closed.

    Args:
        path: a file that `sources.rows.read_rows` reads, or a dataset of the Hub.
        limit: only the first N problems count.
        cache: a file, made if missing, in which the outcome of the check is kept. While the problems' bytes are the
            same (their sha256 is taken at every opening), they are not checked again. A copy is made next to it.
        columns: our key -> the file's, as in `sources.columns.renamed`.
        part: (START, COUNT): only COUNT problems from number START on; the first follows the last; at most all.
        need_answers: whether a row must have `answer`; else a missing one is "".

    Attributes:
        sha256: hex digest of the lines' bytes up to the end of the last problem that counts, whatever the part.
        levels: int8 [problems], -1 where the file gives none.
        sizes: uint32 [problems], bytes of the problem's line.

    Raises:
        InputError: unreadable file, bad row or duplicate id (with file:line), no row at all, a level that is not
            0 to 127; the file changes while it is open; or the cache cannot be written.
    """

    sha256: str
    levels: NDArray[np.int8]
    sizes: NDArray[np.uint32]

    def __init__(
        self,
        path: str | Path,
        limit: int | None = None,
        cache: Path | None = None,
        columns: Mapping[str, str] | None = None,
        part: tuple[int, int] | None = None,
        *,
        need_answers: bool = True,
    ) -> None:
        self.path = str(path)
        self._limit = limit
        # Read again when a message must say where a problem lies.
        self._source = lambda: iter_problems(path, limit, columns, need_answers=need_answers)
        if columns or is_hub(path) or not is_plain(Path(path)) or not self._open(Path(path), cache):
            self._open_copy(cache)
        if part is not None:  # only now: the index in the cache is of all
            start, count = part
            # The remainder first: both numbers may be near 2**63.
            numbers = (start % len(self) + np.arange(min(count, len(self)))) % len(self)
            self._set_arrays(self._offsets[numbers], self.sizes[numbers], self.levels[numbers])

    def _open(self, path: Path, cache: Path | None) -> bool:
        """Open and check a file of lines as they stand; False: they are no `Problem`s, as far as they could be."""
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from None
        try:
            self._fd = self._file.fileno()
            self._state = self._state_now()
            if cache is None or not self._take_cache(cache):
                self._check()
                if cache is not None:
                    self._write_cache(cache)
            self._check_unchanged()
        except _OtherRowError:
            self.close()
            return False
        except OSError as error:
            self.close()
            raise InputError(f"cannot read {self.path}: {error.strerror}") from None
        except BaseException:
            self.close()
            raise
        return True

    def _open_copy(self, cache: Path | None) -> None:
        """Copy the problems as lines into a file without a name, and check that."""
        place = cache.parent if cache is not None else None
        copied = f"a copy of {self.path} in {place or tempfile.gettempdir()}"
        with writing(copied):
            self._file = tempfile.TemporaryFile(dir=place, buffering=0)  # noqa: SIM115
        try:
            self._fd = self._file.fileno()
            with writing(copied), open(self._fd, "wb", closefd=False) as lines:
                lines.writelines(encode_row(problem) for _, problem in self._source())
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._state = self._state_now()
            self._check()
        except BaseException:
            self.close()
            raise

    def _state_now(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    def _check_unchanged(self) -> None:
        if self._state_now() != self._state:
            raise InputError(f"{self.path} was changed while it was in use; start again")

    def _check(self) -> None:
        """Read and check every row."""
        offsets, sizes, levels, ids = array("Q"), array("I"), array("b"), array("q")
        digest = hashlib.sha256()
        position, skipped = 0, b""
        with open(self._fd, "rb", closefd=False) as lines:
            try:
                for number, line in bounded_lines(lines, self.path):
                    if self._limit is not None and len(ids) >= self._limit:
                        break
                    if line.strip():
                        where = f"{self.path}:{number}"
                        value = parse_json(line, where)
                        try:
                            row = parse_row(Problem, value, where)
                        except InputError:
                            raise _OtherRowError from None
                        if row.level is not None and not 0 <= row.level <= 127:
                            raise InputError(f"{where}: key 'level' must be 0 to 127, got {row.level}")
                        digest.update(skipped + line)
                        skipped = b""
                        ids.append(hash(row.id))
                        offsets.append(position)
                        sizes.append(len(line))
                        levels.append(-1 if row.level is None else row.level)
                    else:
                        skipped += line
                    position += len(line)
            finally:  # of two errors, the first in the file counts
                self._check_ids(ids, offsets, sizes)
        if not ids:
            raise InputError(f"{self.path}: no problems")
        self.sha256 = digest.hexdigest()
        self._set_arrays(*(np.frombuffer(a, d) for a, d in zip((offsets, sizes, levels), _DTYPES, strict=True)))

    def _check_ids(self, ids: "array[int]", offsets: "array[int]", sizes: "array[int]") -> None:
        for pair in repeats(ids):
            first, again = (self._read(offsets[i], sizes[i], f"{self.path}") for i in pair)
            if first.id == again.id:
                where, where_again = (next(islice(self._source(), i, None))[0] for i in pair)
                raise InputError(f"{where_again}: id {again.id!r} occurs already at {where}")

    def _set_arrays(self, offsets: NDArray[Any], sizes: NDArray[Any], levels: NDArray[Any]) -> None:
        self._offsets, self.sizes, self.levels = offsets, sizes, levels
        for values in (offsets, sizes, levels):
            values.flags.writeable = False

    def _take_cache(self, cache: Path) -> bool:
        """Use the cache; False: there is none, it is damaged, or it is of other problems."""
        try:
            with cache.open("rb") as file:
                header = parse_json(file.readline(MAX_BYTES), str(cache))
                count, size, sha256 = header["problems"], header["size"], header["sha256"]
                if not 0 < count <= size:
                    return False
                arrays = [np.fromfile(file, dtype, count) for dtype in _DTYPES]
            crc32 = 0
            for values in arrays:
                crc32 = zlib.crc32(values.data, crc32)
            good = (header["format"], header["limit"], header["crc32"]) == (FORMAT, self._limit, crc32) and count > 0
        except (InputError, OSError, ValueError, KeyError, TypeError):
            return False
        # What comes behind the limit is not looked at; without one, rows may have been added.
        if not good or (size != self._state[0] and count != self._limit):
            return False
        end, digest = int(arrays[0][-1]) + int(arrays[1][-1]), hashlib.sha256()
        for start in range(0, end, _BLOCK):
            digest.update(os.pread(self._fd, min(_BLOCK, end - start), start))
        if digest.hexdigest() != sha256:
            return False
        self.sha256 = sha256
        self._set_arrays(*arrays)
        return True

    def _write_cache(self, cache: Path) -> None:
        arrays = (self._offsets, self.sizes, self.levels)
        crc32 = 0
        for values in arrays:
            crc32 = zlib.crc32(values.data, crc32)
        header = {
            "format": FORMAT,
            "limit": self._limit,
            "problems": len(self),
            "size": self._state[0],
            "sha256": self.sha256,
            "crc32": crc32,
        }
        write_atomic(cache, [encode_json(header), b"\n", *(values.data for values in arrays)])

    def _read(self, offset: int, size: int, where: str) -> Problem:
        return parse_row(Problem, parse_json(os.pread(self._fd, size, offset), where), where)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> Problem:
        """The i-th problem.

        Raises:
            IndexError: there is none.
            InputError: the file was changed since it was opened.
        """
        self._check_unchanged()
        return self._read(int(self._offsets[i]), int(self.sizes[i]), f"{self.path}, problem {i}")

    def __iter__(self) -> Iterator[Problem]:
        for i in range(len(self)):
            yield self[i]

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> "ProblemFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
