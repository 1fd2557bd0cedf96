"""Problems as labs have them: from any file, with ids made where there are none and whole numbers taken as text."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from micota_fast.common.json_io import parse_json
from micota_fast.common.records import Problem, parse_row
from micota_fast.errors import InputError
from micota_fast.sources.columns import advice, quoted, renamed
from micota_fast.sources.rows import read_rows

_LEVEL = re.compile(r"[Ll]evel (\d{1,3})")  # as MATH has it


def read_problems(
    source: str | Path,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    need_answers: bool = True,
) -> list[Problem]:
    """Read problems in file order; with `limit`, the first `limit` of them. See `iter_problems`.

    Raises:
        InputError: as `iter_problems`; or an id occurs twice, or there is no row at all.
    """
    problems: list[Problem] = []
    first_seen: dict[str, str] = {}
    for where, problem in iter_problems(source, limit, columns, need_answers=need_answers):
        if problem.id in first_seen:
            raise InputError(f"{where}: id {problem.id!r} occurs already at {first_seen[problem.id]}")
        first_seen[problem.id] = where
        problems.append(problem)
    if not problems:
        raise InputError(f"{source}: no problems")
    return problems


def iter_problems(
    source: str | Path,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    need_answers: bool = True,
) -> Iterator[tuple[str, Problem]]:
    """Yield (where, problem) of each row of a file that `read_rows` reads.

    A row without `id` gets the `text_id` of its problem, and the second row with that text the same with -2 behind it.
    Whole numbers are taken as ids and answers.

    Args:
        source: the file, or a dataset of the Hub.
        limit: only the first N rows; None: all.
        columns: our key -> the file's, as in `renamed`.
        need_answers: whether a row must have `answer`; else a missing one is "".

    Raises:
        InputError: the file cannot be read, or a row is bad (with where it is).
    """
    made: Counter[str] = Counter()
    for where, _, line in islice(read_rows(source), limit):
        row = parse_json(line, where)
        try:
            row = renamed(row, columns or {})
            problem = _problem(row, need_answers)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if problem["id"] is None:
            same = problem["id"] = text_id(problem["problem"])
            made[same] += 1
            if made[same] > 1:
                problem["id"] = f"{same}-{made[same]}"
        yield where, parse_row(Problem, problem, where)


def text_id(problem: str) -> str:
    """Make the id of a problem that has none: the first 16 digits of its text's SHA-256, so the same in every file."""
    return hashlib.sha256(problem.encode()).hexdigest()[:16]


def row_id(row: Mapping[str, Any]) -> str | None:
    """Return the id of a row's problem, made if need be; None if the row has neither `id` nor a text `problem`.

    Raises:
        InputError: the id is neither text nor a whole number.
    """
    if row.get("id") is not None:
        return _text(row["id"], "id")
    return text_id(row["problem"]) if isinstance(row.get("problem"), str) else None


def _problem(row: Mapping[str, Any], need_answers: bool) -> dict[str, Any]:
    """The fields of a row; `id` is None where one is to be made."""
    needed = ["problem", *(["answer"] if need_answers else [])]
    if missing := [key for key in needed if row.get(key) is None]:
        keys = f"keys {quoted(missing)} are" if len(missing) > 1 else f"key {missing[0]!r} is"
        raise InputError(
            f"{keys} missing; the row has {quoted(row)}. {advice(missing, row)} says which keys to read instead"
        )
    answer, level = row.get("answer"), row.get("level")
    if isinstance(level, str) and (found := _LEVEL.fullmatch(level)):
        level = int(found[1])
    if type(level) is int and not 0 <= level <= 127:
        raise InputError(f"key 'level' must be 0 to 127, got {level}")
    return {
        "id": row_id(row) if row.get("id") is not None else None,
        "problem": row["problem"],
        "answer": "" if answer is None else _text(answer, "answer"),
        "solution": row.get("solution"),
        "level": level,
        "subject": row.get("subject"),
    }


def _text(value: Any, key: str) -> str:
    if isinstance(value, float) and value.is_integer():  # what a column of whole numbers with gaps becomes in pandas
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise InputError(f"key {key!r} must be a string or a whole number, got {type(value).__name__} {value!r:.60}")
    return value
