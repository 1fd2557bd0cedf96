"""The index of a journal: one fixed-size record a row in a file, and a bit a row in memory."""

import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micota_fast.common.files import write_at

# A record, little-endian: these fields, at byte 35 the verdict's complement, and at byte 36 a check over all but the
# verdict, which may change. The two bytes of the verdict never straddle two sectors, so a power cut tears no change.
ENTRY = np.dtype(
    {
        "names": ["offset", "problem", "tokens", "prompt_tokens", "segment", "length", "crc32", "sample", "verdict"],
        "formats": ["<u8", "<u4", "<u4", "<u4", "<u4", "<u4", "<u4", "<u2", "u1"],
        "offsets": [0, 8, 12, 16, 20, 24, 28, 32, 34],
        "itemsize": 40,
    }
)
_SIZE, _WORDS, _VERDICT = ENTRY.itemsize, ENTRY.itemsize // 4, 34
_PACK = struct.Struct("<Q6IH2BI").pack
_MULTIPLIERS = np.array([pow(0x9E3779B1, k, 1 << 32) for k in range(1, _WORDS)], np.uint32)
_SEED = np.uint32(1)  # records of zeros are bad
_CHUNK = 1 << 18  # records looked at together


def _checks(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Checks of records given as words [N, 10]: a linear hash, so that it is a product for all of them together."""
    sample = words[:, 8] & np.uint32(0xFFFF)
    return words[:, :8] @ _MULTIPLIERS[:8] + sample * _MULTIPLIERS[8] + _SEED


def _are_good(words: NDArray[np.uint32]) -> NDArray[np.bool_]:
    verdicts = words[:, 8] >> np.uint32(16)
    return (_checks(words) == words[:, 9]) & (verdicts >> np.uint32(8) ^ verdicts & np.uint32(0xFF) == 0xFF)


class Index:
    """Records in order of arrival: those in the file, and behind them those that the next `write` brings there.

    Args:
        path: of the file; made if missing. `take_up` reads it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._pairs = _Pairs()
        self._written = 0  # records in the file
        self._pending = bytearray()
        self._verdict_changed = False
        self._mapped: NDArray[Any] = np.empty(0, ENTRY)

    def __len__(self) -> int:
        return self._written + len(self._pending) // _SIZE

    def has(self, problem: int, sample: int) -> bool:
        """Return whether there is a record of this key."""
        return self._pairs.has(problem, sample)

    def take_up(self) -> tuple[dict[int, tuple[int, int]], int]:
        """Take the file's records up to the first bad one; what follows stays in the file until `cut`.

        Returns:
            By segment, the ordinal of its first record and the byte at which its last row ends; and how many records
            follow.
        """
        size = os.fstat(self._fd).st_size
        spans: dict[int, tuple[int, int]] = {}
        before = -1  # segment and end of the record before, as one number
        with self.path.open("rb") as file:
            while len(words := np.fromfile(file, "<u4", _CHUNK * _WORDS)) >= _WORDS:
                words = words[: len(words) // _WORDS * _WORDS].reshape(-1, _WORDS)
                entries = words.view(ENTRY)[:, 0]
                starts = entries["segment"].astype(np.int64) << 40 | entries["offset"].astype(np.int64)
                ends = starts + entries["length"]
                good = _are_good(words) & (starts >= np.concatenate(([before], ends[:-1])))
                entries = entries[: len(good) if good.all() else int(np.argmin(good))]
                self._pairs.add_all(entries)
                segments = entries["segment"].astype(np.int64)
                firsts = np.flatnonzero(np.diff(segments, prepend=-1))
                lasts = np.flatnonzero(np.diff(segments, append=-1))
                for first, last in zip(firsts, lasts, strict=True):
                    segment = int(segments[last])
                    first_record = spans.get(segment, (self._written + int(first), 0))[0]
                    spans[segment] = first_record, int(entries["offset"][last]) + int(entries["length"][last])
                self._written += len(entries)
                if len(entries) < len(good):
                    break
                before = int(ends[-1])
        return spans, -(-size // _SIZE) - self._written

    def cut(self) -> None:
        """Cut off what follows the records that are known."""
        os.ftruncate(self._fd, self._written * _SIZE)

    def cut_back(self, length: int) -> None:
        """Remove the file's records but the first `length`; nothing may be pending."""
        gone = self.entries()[length:]
        for problem, sample in zip(gone["problem"].tolist(), gone["sample"].tolist(), strict=True):
            self._pairs.remove(problem, sample)
        self._written = length
        self._mapped = np.empty(0, ENTRY)
        self.cut()
        os.fsync(self._fd)

    def move(self, path: Path) -> None:
        """Give the file another name."""
        self.path = self.path.replace(path)

    def enter(
        self,
        segment: int,
        offset: int,
        length: int,
        crc32: int,
        problem: int,
        sample: int,
        verdict: int,
        tokens: int,
        prompt_tokens: int,
    ) -> None:
        """Add a record; `has` must be false of its key.

        Raises:
            struct.error: a number is out of its range.
        """
        self._pending += _PACK(
            offset, problem, tokens, prompt_tokens, segment, length, crc32, sample, verdict, 255 - verdict, 0
        )
        self._pairs.add(problem, sample)

    def withdraw(self, problem: int, sample: int) -> None:
        """Take back the record entered last, whose key this is; `write` has not brought it to the file."""
        del self._pending[-_SIZE:]
        self._pairs.remove(problem, sample)

    def write(self) -> None:
        """Bring everything to the disk.

        Raises:
            OSError: the disk is full or fails; the file is as it was before.
        """
        if self._pending or self._verdict_changed:
            words = np.array(self._pending, np.uint8).view("<u4").reshape(-1, _WORDS)
            words[:, 9] = _checks(words)
            end = self._written * _SIZE
            try:
                write_at(self._fd, words.tobytes(), end)
                os.fsync(self._fd)
            except OSError:
                os.ftruncate(self._fd, end)
                raise
            self._written += len(words)
            self._pending = bytearray()
            self._verdict_changed = False

    def entries(self) -> NDArray[Any]:
        """Map the file's records [N] of dtype ENTRY, read-only: they take no memory of the process's own."""
        if len(self._mapped) != self._written:
            self._mapped = np.frombuffer(mmap.mmap(self._fd, self._written * _SIZE, access=mmap.ACCESS_READ), ENTRY)
        return self._mapped

    def settle(self, problem: int, sample: int, verdict: int) -> None:
        """Change the verdict of a record that is there: a search backwards from the newest."""
        value = bytes((verdict, 255 - verdict))
        place = _find(np.frombuffer(self._pending, ENTRY), problem, sample)
        if place is not None:
            at = place * _SIZE + _VERDICT
            self._pending[at : at + 2] = value
            return
        entries, stop, step = self.entries(), self._written, 1 << 12
        while stop > 0:
            start = max(stop - step, 0)
            place = _find(entries[start:stop], problem, sample)
            if place is not None:
                self.settle_record(start + place, verdict)
                return
            stop, step = start, min(2 * step, _CHUNK)

    def settle_record(self, place: int, verdict: int) -> None:
        """Change the verdict of a record of the file, by its place in `entries`."""
        write_at(self._fd, bytes((verdict, 255 - verdict)), place * _SIZE + _VERDICT)
        self._verdict_changed = True

    def close(self) -> None:
        """Release the file; `entries` taken before stay."""
        os.close(self._fd)


class _Pairs:
    """Which (problem, sample) are there: one bit each, in pages of 4096 problems by one sample index.

    About an eighth of a byte a row where problems are answered one after the other; a page, 600 bytes, at worst.
    """

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def has(self, problem: int, sample: int) -> bool:
        page = self._pages.get(sample << 20 | problem >> 12)
        return page is not None and bool(page[problem >> 3 & 511] >> (problem & 7) & 1)

    def add(self, problem: int, sample: int) -> None:
        key = sample << 20 | problem >> 12
        page = self._pages.get(key)
        if page is None:
            page = self._pages[key] = bytearray(512)
        page[problem >> 3 & 511] |= 1 << (problem & 7)

    def remove(self, problem: int, sample: int) -> None:
        self._pages[sample << 20 | problem >> 12][problem >> 3 & 511] &= ~(1 << (problem & 7))

    def add_all(self, entries: NDArray[Any]) -> None:
        keys = entries["sample"].astype(np.uint64) << np.uint64(32) | entries["problem"]
        keys.sort()
        starts = np.flatnonzero(np.diff(keys >> np.uint64(12))) + 1
        for part in np.split(keys, starts) if len(keys) else ():
            bits = np.zeros(4096, bool)
            bits[part & np.uint64(4095)] = True
            page = self._pages.setdefault(int(part[0]) >> 12, bytearray(512))
            np.frombuffer(page, np.uint8)[:] |= np.packbits(bits, bitorder="little")


def _find(entries: NDArray[Any], problem: int, sample: int) -> int | None:
    found = np.flatnonzero((entries["problem"] == problem) & (entries["sample"] == sample))
    return int(found[0]) if len(found) else None
