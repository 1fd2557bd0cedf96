"""Problems of any file: bad rows are named, ids are made where there are none."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from micota_fast.common.records import Problem, write_rows
from micota_fast.errors import InputError
from micota_fast.generation.problem_file import ProblemFile
from micota_fast.sources.problems import read_problems


def test_problems_round_trip(tmp_path: Path) -> None:
    problems = [Problem("a", "1\n+ 1", "2"), Problem("b", "2 + 2", "4", solution="it is 4", level=3, subject="x")]
    write_rows(tmp_path / "p.jsonl", problems)
    assert read_problems(tmp_path / "p.jsonl") == problems
    assert read_problems(tmp_path / "p.jsonl", limit=1) == problems[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: the text ends too early"),
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


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ids_are_made_of_the_text_and_whole_numbers_are_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"problem": "1 + 1", "answer": 2, "level": "Level 5"},
        {"id": 17, "problem": "1 + 2", "answer": 3.0},
        {"problem": "1 + 1", "answer": "2"},
    )
    same = hashlib.sha256(b"1 + 1").hexdigest()[:16]
    expected = [
        Problem(same, "1 + 1", "2", level=5),
        Problem("17", "1 + 2", "3"),
        Problem(f"{same}-2", "1 + 1", "2"),
    ]
    assert read_problems(path) == expected
    with ProblemFile(path) as problems:
        assert list(problems) == expected


def test_keys_of_other_names_are_read_as_columns_say(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"uuid": "u", "question": "1 + 1", "expected_answer": 2, "problem": "other"})
    columns = {"id": "uuid", "problem": "question", "answer": "expected_answer"}
    assert read_problems(path, columns=columns) == [Problem("u", "1 + 1", "2")]
    with ProblemFile(path, columns=columns) as problems:
        assert list(problems) == [Problem("u", "1 + 1", "2")]
    with pytest.raises(
        InputError, match=r"p\.jsonl:1: `columns` names 'q', 'gold', which the row lacks; it has 'uuid', "
    ):
        read_problems(path, columns={"problem": "q", "answer": "gold"})


def test_all_missing_keys_are_named_with_what_is_there_and_how_to_read_it(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"question": "1 + 1", "final_answer": "2", "source": None})
    said = (
        r"p\.jsonl:1: keys 'problem', 'answer' are missing; the row has 'question', 'final_answer', 'source'\. "
        r"`columns: \{problem: question, answer: final_answer\}` says which keys to read instead"
    )
    for read in (read_problems, ProblemFile):
        with pytest.raises(InputError, match=said):
            read(path)


def test_answers_are_needed_only_where_something_grades(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"id": "a", "problem": "1 + 1"})
    assert read_problems(path, need_answers=False) == [Problem("a", "1 + 1", "")]
    with ProblemFile(path, need_answers=False) as problems:
        assert list(problems) == [Problem("a", "1 + 1", "")]
    with pytest.raises(InputError, match="key 'answer' is missing; the row has 'id', 'problem'"):
        ProblemFile(path)


@pytest.mark.parametrize("form", ["list", "gzip", "parquet"])
def test_problems_of_any_form_are_those_of_the_lines(form: str, tmp_path: Path) -> None:
    """And so is their fingerprint, so that answers to one form are answers to the others."""
    problems = [Problem(f"p{i}", f"{i} + 1 ½", str(i + 1), level=i) for i in range(20)]
    lines, other, parts = tmp_path / "lines", tmp_path / "other", tmp_path / "parts"
    write_rows(lines, problems)
    rows = [vars(problem) for problem in problems]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), other)
    else:
        other.write_bytes(json.dumps(rows).encode() if form == "list" else gzip.compress(lines.read_bytes()))
    parts.mkdir()
    with ProblemFile(lines, 15) as plain, ProblemFile(other, 15, parts / "index") as copied:
        assert list(copied) == list(plain) == problems[:15]
        assert copied[-1] == problems[14]
        assert copied.sha256 == plain.sha256
        assert copied.levels.tolist() == plain.levels.tolist()
    assert list(parts.iterdir()) == []


def test_an_id_that_is_there_twice_is_named_by_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_text(json.dumps([vars(Problem("a", str(i), "1")) for i in range(3)]))
    for read in (read_problems, ProblemFile):
        with pytest.raises(InputError, match=r"p, row 2: id 'a' occurs already at .*p, row 1"):
            read(path)
