"""Rows on disk: bad input is named by file and line, equal rows are equal bytes."""

from dataclasses import replace
from pathlib import Path

import pytest

from micota_fast.common.records import (
    Completion,
    encode_row,
    iter_completions,
    read_completions,
    write_rows,
)
from micota_fast.errors import InputError


def row(problem: str = "p0", sample: int = 0) -> Completion:
    return Completion(
        id=problem,
        sample=sample,
        problem="1 + 1 = ?",
        answer="2",
        completion="so \u2028 \\boxed{2} ½",  # a line separator in Unicode is not one in JSONL
        finish_reason="stop",
        prompt_tokens=5,
        completion_tokens=7,
        seed=None,
    )


def test_completions_are_read_one_by_one_and_doubles_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.jsonl"
    rows = [row("p1"), row("p0", 1), row("p0"), row("p1", 1)]
    write_rows(path, rows)
    assert list(iter_completions(path)) == read_completions(path) == rows
    first = iter_completions(path)
    write_rows(path, [*rows, row("p0")])
    assert next(first) == rows[0]
    double = r"c\.jsonl:5: \('p0', sample 0\) occurs already at .*c\.jsonl:3$"
    with pytest.raises(InputError, match=double):
        read_completions(path)
    with path.open("ab") as file:
        file.write(b"{\n")
    with pytest.raises(InputError, match=double):  # the first of two errors
        read_completions(path)
    monkeypatch.setattr("micota_fast.common.records.hash", lambda key: key[1], raising=False)
    with pytest.raises(InputError, match=double):  # also among keys of equal hashes
        read_completions(path)
    write_rows(path, rows)
    assert read_completions(path) == rows


def test_rows_are_the_same_bytes_every_time() -> None:
    assert encode_row(row()) == encode_row(replace(row()))
    assert b"\\u" not in encode_row(row())  # text as it is
