"""Verdicts that came after their rows were written: a log beside the journal."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micota_fast.errors import InputError

_RECORD = np.dtype([("problem", "<u4"), ("sample", "<u2"), ("verdict", "u1"), ("check", "u1")])


class VerdictLog:
    """Appends (problem, sample, verdict); a killed process loses none, a power cut the last few, which are judged anew.

    Args:
        path: the file; made if missing. A torn or bad record and what follows it are cut off.
        fresh: the journal beside it is empty, so whatever stands here belongs to another.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, path: Path, fresh: bool) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o666)
            records = np.fromfile(path, _RECORD)
            good = _check(records) == records["check"]
            self._end = (len(records) if good.all() else int(np.argmin(good))) * _RECORD.itemsize
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None

    def add(self, problem: int, sample: int, verdict: int) -> None:
        """Note a verdict; a later one for the same answer wins."""
        record = np.array([(problem, sample, verdict, 0)], _RECORD)
        record["check"] = _check(record)
        try:
            self._end += os.pwrite(self._fd, record.tobytes(), self._end)
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}") from None

    def of(self, entries: NDArray[Any]) -> NDArray[np.uint8]:
        """The verdict of each of a journal's entries: the journal's own where the log has none."""
        verdicts: NDArray[np.uint8] = entries["verdict"].copy()
        records = np.fromfile(self._path, _RECORD)
        if len(records) and len(entries):
            keys = _key(entries)
            order = np.argsort(keys)
            at = np.searchsorted(keys, _key(records), sorter=order).clip(max=len(keys) - 1)
            there = keys[order[at]] == _key(records)
            verdicts[order[at[there]]] = records["verdict"][there]
        return verdicts

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> "VerdictLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _key(records: NDArray[Any]) -> NDArray[np.uint64]:
    return records["problem"].astype(np.uint64) << np.uint64(16) | records["sample"]


def _check(records: NDArray[Any]) -> NDArray[np.uint8]:
    """Never 0 for a record of zeros, which is what a power cut may leave."""
    mixed = records["problem"] * np.uint32(0x9E3779B1) ^ records["sample"] * np.uint32(0x85EBCA6B)
    return (((mixed >> np.uint32(24)) ^ records["verdict"]) + np.uint32(1)).astype(np.uint8)
