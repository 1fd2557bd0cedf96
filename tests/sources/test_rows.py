"""Every form of a file gives the same rows, in bounded memory, and what is damaged or unknown is named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from micota_fast.common.json_io import parse_json
from micota_fast.errors import InputError
from micota_fast.sources import json_array, rows
from micota_fast.sources.rows import is_plain, read_rows

ROWS: list[dict[str, Any]] = [
    {
        "id": "ä",
        "problem": "1 + 1\n= \u2028?",
        "answer": "2",
        "messages": [{"role": "user", "content": "½"}],
        "n": None,
    },
    {"id": "b", "problem": 'say "]," and \\', "answer": "[", "messages": [], "n": 7},
    {"id": "c", "problem": "", "answer": "}", "messages": [{"role": "x", "content": ""}], "n": 2**62},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(data: bytes, path: Path) -> bytes:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(data)
    return path.read_bytes()


FORMS = ["lines", "list", "spread list", "gzip", "list in gzip", "two gzips", "zstd", "two zstds", "parquet", "groups"]


def write(form: str, path: Path) -> Path:
    as_list = json.dumps(ROWS, ensure_ascii=False).encode()
    if form in ("parquet", "groups"):
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1 if form == "groups" else None)
        return path
    contents = {
        "lines": lambda: LINES,
        "list": lambda: as_list,
        "spread list": lambda: (
            b"\xef\xbb\xbf \r\n" + json.dumps(ROWS, indent=2).replace("\n", "\r\n").encode() + b"\n\n"
        ),
        "gzip": lambda: gzip.compress(LINES),
        "list in gzip": lambda: gzip.compress(as_list),
        "two gzips": lambda: gzip.compress(LINES[:50]) + gzip.compress(LINES[50:]),
        "zstd": lambda: zstd(LINES, path),
        "two zstds": lambda: zstd(LINES[:50], path) + zstd(LINES[50:], path),
    }
    path.write_bytes(contents[form]())
    return path


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_BLOCK", block)
    path = write(form, tmp_path / "no name says what it is")
    found = list(read_rows(path))
    assert [parse_json(row.line, row.where) for row in found] == ROWS
    assert [row.number for row in found] == [1, 2, 3]
    assert found[2].where in (f"{path}:3", f"{path}, row 3")
    assert all(b"\n" not in row.line.rstrip(b"\n") for row in found), (
        "a row is one line, as verbs that copy it write it"
    )
    assert is_plain(path) == (form == "lines")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"a": 1}, {"a": ', r"row 2: not JSON: the text ends too early \(character 6 of the row\)"),
        (b'[{"a": 1} {"a": 2}]', "expected , or ] after row 1; found '{\"a\": 2}]'"),
        (b'[{"a": 1},]', r"row 2: not JSON: Expecting value \(character 1 of the row\)"),
        (b'[{"a": 1}', "the file ends within the list"),
        (b'[{"a": 1}] {"a": 2}', "text follows the end of the list"),
        (b'[{"a": 1}, {"a": "\xff"}]', "not UTF-8: byte 0xff"),
        (b"[" * 100_000, "row 1: objects and lists are nested more than 100 levels deep"),
        (gzip.compress(LINES)[:-9], "damaged gzip"),
        (gzip.compress(LINES)[:30] + b"\0\0\0\0\0\0\0\0", "damaged gzip"),
        (b"\x28\xb5\x2f\xfd\x04\x58\x51", "runcated"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 50, "cannot read .*ZSTD"),
        (b"PAR1 and no more", "cannot read .*Parquet"),
        (b"ARROW1\0\0", "is an Arrow file; write it as Parquet"),
        (b"PK\x03\x04 and more", "is a zip archive"),
        ("[]".encode("utf-16"), "is UTF-16 text"),
        (b'{\n "data": []\n}\n', ":1: not JSON Lines but an object over several lines"),
    ],
)
def test_what_is_damaged_or_unknown_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        list(read_rows(path))
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("form", ["lines", "list", "gzip", "zstd", "parquet"])
def test_a_row_has_the_same_limits_in_every_form(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a few bytes become many."""
    limit = 1 << 16
    for module in ("common.json_io", "common.records", "sources.json_array"):
        monkeypatch.setattr(f"micota_fast.{module}.MAX_BYTES", limit)
    text, path = "x" * (limit + 10), tmp_path / "rows"
    line = json.dumps({"problem": text}).encode()
    if form == "parquet":
        pq.write_table(pa.table({"problem": [text]}), path, compression="zstd")
    else:
        path.write_bytes(
            {"lines": lambda: line, "list": lambda: b"[" + line + b"]", "gzip": lambda: gzip.compress(line),
             "zstd": lambda: zstd(line, path)}[form]()
        )  # fmt: skip
    with pytest.raises(InputError, match="65,536 bytes"):
        [parse_json(row.line, row.where) for row in read_rows(path)]


@pytest.mark.parametrize("magic", ["gzip", "zstd"])
def test_a_bomb_of_one_line_is_refused_before_it_is_held(magic: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    bomb = b'{"problem": "' + b"x" * (160 << 20)
    path.write_bytes(gzip.compress(bomb, 1) if magic == "gzip" else zstd(bomb, path))
    del bomb
    with pytest.raises(InputError, match="bomb:1: a line of more than 134,217,728 bytes"):
        next(read_rows(path))


def test_a_long_text_that_many_rows_share_is_held_once(tmp_path: Path) -> None:
    """A Parquet file of 1 MB whose rows are 4 GB together."""
    path, text = tmp_path / "rows", "x" * (1 << 22)
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([text]))
    nested = pa.ListArray.from_arrays(pa.array(range(1001), pa.int32()), shared)
    pq.write_table(pa.table({"problem": shared, "list": nested}), path, compression="zstd", store_schema=False)
    before = pa.total_allocated_bytes()
    taken = read_rows(path)
    first = parse_json(next(taken).line, "")
    assert first == {"problem": text, "list": [text]}
    assert pa.total_allocated_bytes() - before < 100 << 20


def test_what_json_has_no_type_for_is_never_text(tmp_path: Path) -> None:
    import datetime
    import decimal

    table = pa.table({"a": [b"bytes"], "b": [datetime.date(2024, 1, 2)], "c": [decimal.Decimal("1.5")], "d": ["d"]})
    for name, unit in (("e", "us"), ("f", "ns")):  # a year that Python has not, and nanoseconds
        table = table.append_column(name, pa.array([2**62 + 1], pa.timestamp(unit)))
    table = table.append_column("g", pa.array([None], pa.timestamp("us")))
    pq.write_table(table, tmp_path / "rows")
    (row,) = read_rows(tmp_path / "rows")
    assert parse_json(row.line, "") == {
        "a": {"type": "bytes"},
        "b": {"type": "date32"},
        "c": {"type": "Decimal"},
        "d": "d",
        "e": {"type": "timestamp"},
        "f": {"type": "timestamp"},
        "g": None,
    }


def test_a_list_of_years_that_python_has_not_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([[2**62]], pa.list_(pa.timestamp("us")))}), tmp_path / "rows")
    with pytest.raises(InputError, match="cannot read"):
        list(read_rows(tmp_path / "rows"))


@pytest.mark.parametrize("magic", [rows._ZSTD, rows._PARQUET])
def test_without_pyarrow_it_says_what_to_install(magic: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows").write_bytes(magic + bytes(100))
    with pytest.raises(InputError, match=r"pip install 'micota-fast\[parquet\]'"):
        list(read_rows(tmp_path / "rows"))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["problem", "problem"]), tmp_path / "rows")
    with pytest.raises(InputError, match="two columns are named 'problem'"):
        list(read_rows(tmp_path / "rows"))
