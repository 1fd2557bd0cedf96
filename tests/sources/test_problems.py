"""Problems of any file: bad rows are named, ids are made where there are none."""

from pathlib import Path

import pytest

from micota_fast.common.records import Problem, write_rows
from micota_fast.errors import InputError
from micota_fast.sources.problems import read_problems


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
        ('{"id": "b", "problem": "x", "answer": 4.5}', "'answer' must be a string or a whole number, got float 4.5"),
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
