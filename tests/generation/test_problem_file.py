"""A file of problems that is not held: rows and errors as of reading it whole, and a cache that is safe."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from micota_fast.common.records import Problem, encode_row, write_rows
from micota_fast.errors import InputError
from micota_fast.generation.problem_file import ProblemFile
from micota_fast.sources.problems import read_problems

PROBLEMS = [Problem(f"p{i}", "½ + \u2028" * i, str(i), level=None if i % 3 == 0 else i) for i in range(20)]
LINES = [encode_row(problem) for problem in PROBLEMS]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_rows(tmp_path / "p.jsonl", PROBLEMS)
    return tmp_path / "p.jsonl"


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("limit", [None, 7, 100])
def test_problems_are_those_of_the_file(path: Path, limit: int | None, cached: bool) -> None:
    cache = path.with_name("cache") if cached else None
    expected = PROBLEMS[:limit]
    for _ in range(2):
        with ProblemFile(path, limit, cache) as problems:
            assert len(problems) == len(expected)
            assert list(problems) == expected == read_problems(path, limit)
            assert problems[3] == expected[3]
            assert problems[-1] == expected[-1]
            with pytest.raises(IndexError):
                problems[len(expected)]
            assert problems.levels.dtype == np.int8
            assert problems.levels.tolist() == [-1 if p.level is None else p.level for p in expected]
            assert problems.sizes.dtype == np.uint32
            assert problems.sizes.tolist() == [len(line) for line in LINES[:limit]]
            assert problems.sha256 == hashlib.sha256(b"".join(LINES[:limit])).hexdigest()


@pytest.mark.parametrize("limit", [None, 7])
def test_a_part_is_counted_round_the_end_and_the_cache_is_of_all(path: Path, limit: int | None) -> None:
    cache, all_of_them = path.with_name("cache"), PROBLEMS[:limit]
    last = len(all_of_them) - 2
    for part, expected in (
        ((3, 2), all_of_them[3:5]),
        ((last, 3), [*all_of_them[last:], all_of_them[0]]),
        ((5 * len(all_of_them) + 1, 1), [all_of_them[1]]),
        ((1, 100), [*all_of_them[1:], all_of_them[0]]),
        ((2**63 - 1, 2), [all_of_them[(2**63 - 1 + i) % len(all_of_them)] for i in range(2)]),
        ((2**63 - 1, 2**63 - 1), [all_of_them[(2**63 - 1 + i) % len(all_of_them)] for i in range(len(all_of_them))]),
    ):
        with ProblemFile(path, limit, cache, part=part) as problems:
            assert list(problems) == expected
            assert problems.sizes.tolist() == [len(encode_row(problem)) for problem in expected]
            assert problems.levels.tolist() == [-1 if p.level is None else p.level for p in expected]
    with ProblemFile(path, limit, cache) as problems:
        assert list(problems) == all_of_them


@given(
    st.lists(st.sampled_from([*LINES[:3], b"\n", b" \n", b"{\n", b'{"id": "p0"}\n', b"\xff\n"]), max_size=8),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_errors_are_those_of_reading_it_whole(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], newline: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"".join(lines) if newline else b"".join(lines)[:-1])
    outcomes: list[object] = []
    open_whole: Callable[[], list[Problem]] = lambda: read_problems(path)  # noqa: E731
    for read in (open_whole, lambda: list(ProblemFile(path))):
        try:
            outcomes.append(read())
        except InputError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_equal_hashes_of_different_ids_are_no_duplicates(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("micota_fast.generation.problem_file.hash", lambda text: len(text), raising=False)
    assert len(ProblemFile(path)) == len(PROBLEMS)
    path.write_bytes(path.read_bytes() + LINES[4])
    with pytest.raises(InputError, match=rf"{path}:21: id 'p4' occurs already at {path}:5"):
        ProblemFile(path)


def test_missing_file_and_level_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.jsonl: No such file"):
        ProblemFile(tmp_path / "none.jsonl")
    write_rows(tmp_path / "p.jsonl", [Problem("a", "?", "1", level=0), Problem("b", "?", "1", level=128)])
    with pytest.raises(InputError, match=r"p\.jsonl:2: key 'level' must be 0 to 127, got 128"):
        ProblemFile(tmp_path / "p.jsonl")


def test_a_change_while_it_is_open_is_an_error(path: Path) -> None:
    with ProblemFile(path) as problems:
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.write(content.replace(b'"answer": "0"', b'"answer": "9"'))
        os.utime(path, ns=(0, 1))  # a clock that ticks coarsely might not show it
        with pytest.raises(InputError, match="was changed while it was in use"):
            problems[0]
    with ProblemFile(path) as problems:
        write_rows(path, PROBLEMS[:1])  # another file of this name: the one that is open stays
        assert list(problems)[1:] == PROBLEMS[1:]


def test_the_cache_saves_the_check_and_is_never_believed_wrongly(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = path.with_name("cache")
    checks: list[int] = []
    check = ProblemFile._check
    monkeypatch.setattr(ProblemFile, "_check", lambda self: (checks.append(1), check(self))[1])

    def checked(limit: int | None = None) -> bool:
        checks.clear()
        with ProblemFile(path, limit, cache) as problems:
            assert list(problems) == read_problems(path, limit)
        return bool(checks)

    assert checked()
    assert not checked()
    os.utime(path, ns=(0, 1))
    assert not checked()  # the same bytes
    path.write_bytes(path.read_bytes().replace(b'"answer": "3"', b'"answer": "4"'))
    assert checked()
    assert checked(5)
    path.write_bytes(path.read_bytes() + encode_row(Problem("new", "?", "1")))
    assert not checked(5)
    assert checked()
    path.write_bytes(path.read_bytes() + LINES[0])
    with pytest.raises(InputError, match="occurs already"):
        ProblemFile(path, None, cache)
    write_rows(path, PROBLEMS)
    assert checked()
    whole = cache.read_bytes()
    for spoilt in (b"", whole[:5], whole[:-3], whole[:-50] + bytes([whole[-50] ^ 1]) + whole[-49:], b"[]\n", b"{}\n"):
        cache.write_bytes(spoilt)
        assert checked()
        assert cache.read_bytes() == whole
