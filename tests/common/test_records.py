"""Rows on disk: bad input is named by file and line, equal rows are equal bytes."""

from dataclasses import replace
from pathlib import Path

import pytest

from micota_fast.common.records import (
    Completion,
    Problem,
    encode_row,
    iter_completions,
    read_completions,
    read_problems,
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


def test_problems_round_trip(tmp_path: Path) -> None:
    problems = [Problem("a", "1\n+ 1", "2"), Problem("b", "2 + 2", "4", solution="it is 4", level=3, subject="x")]
    write_rows(tmp_path / "p.jsonl", problems)
    assert read_problems(tmp_path / "p.jsonl") == problems
    assert read_problems(tmp_path / "p.jsonl", limit=1) == problems[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[1]", "expected a JSON object"),
        ('{"id": "b", "problem": "x"}', "'answer' is missing"),
        ('{"id": "b", "problem": "x", "answer": 4}', "'answer' must be str, got int"),
        ('{"id": "b", "problem": "x", "answer": "4", "level": true}', "'level' must be int or null, got bool"),
        ('{"id": "a", "problem": "x", "answer": "4"}', "occurs already at"),
    ],
)
def test_bad_problem_rows_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "problem": "x", "answer": "1"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=message) as error:
        read_problems(path)
    assert f"{path}:3" in str(error.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_problems(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no problems"):
        read_problems(tmp_path / "empty.jsonl")


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
