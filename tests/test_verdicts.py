"""The log of late verdicts."""

from pathlib import Path

import numpy as np
import pytest

from micota_fast.journal import ENTRY
from micota_fast.verdicts import VerdictLog


def entries(*rows: tuple[int, int, int]) -> np.ndarray:
    found = np.zeros(len(rows), ENTRY)
    for i, (problem, sample, verdict) in enumerate(rows):
        found[i]["problem"], found[i]["sample"], found[i]["verdict"] = problem, sample, verdict
    return found


def test_the_last_verdict_wins_and_others_are_the_journals(tmp_path: Path) -> None:
    there = entries((7, 1, 0), (0, 0, 1), (7, 0, 0), (2**32 - 1, 65535, 0))
    with VerdictLog(tmp_path / "v", True) as log:
        assert log.of(there).tolist() == [0, 1, 0, 0]
        assert log.of(entries()).tolist() == []
        log.add(7, 0, 3)
        log.add(2**32 - 1, 65535, 9)
        log.add(5, 5, 4)  # not among the entries
        log.add(7, 0, 2)
        assert log.of(there).tolist() == [0, 1, 2, 9]
    with VerdictLog(tmp_path / "v", False) as log:
        assert log.of(there).tolist() == [0, 1, 2, 9]
    with VerdictLog(tmp_path / "v", True) as log:
        assert log.of(there).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("tail", [b"\x01", bytes(8), bytes(20), b"\xff" * 11])
def test_a_bad_tail_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    with VerdictLog(tmp_path / "v", True) as log:
        log.add(1, 0, 2)
    with (tmp_path / "v").open("ab") as file:
        file.write(tail)
    with VerdictLog(tmp_path / "v", False) as log:
        log.add(2, 0, 3)
        assert log.of(entries((1, 0, 0), (2, 0, 0), (0, 0, 5))).tolist() == [2, 3, 5]
    assert (tmp_path / "v").stat().st_size == 16
