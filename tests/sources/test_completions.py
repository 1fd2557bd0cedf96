"""Completions are read one by one, from any form of file, and by `filter` and `export` alike."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from micota_fast.cli import main
from micota_fast.common.records import Completion, encode_row, write_rows
from micota_fast.config.corpus import FilterConfig
from micota_fast.corpus import filter as filter_
from micota_fast.errors import InputError
from micota_fast.sources.completions import iter_completions, read_completions


def row(problem: str = "p0", sample: int = 0, opened: str = "") -> Completion:
    text = "so \u2028 \\boxed{2} ½"  # a line separator in Unicode is not one in JSONL
    return Completion(problem, sample, "1 + 1 = ?", "2", text, "stop", 5, 7, None, opened=opened)


ROWS = [row("p1"), row("p0", 1), row("p0", opened="<think>\n"), row("p1", 1)]
LINES = b"".join(map(encode_row, ROWS))


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
    monkeypatch.setattr("micota_fast.sources.completions.hash", lambda key: key[1], raising=False)
    with pytest.raises(InputError, match=double):  # also among keys of equal hashes
        read_completions(path)
    write_rows(path, rows)
    assert read_completions(path) == rows


def _zstd(path: Path) -> None:
    with pa.CompressedOutputStream(str(path), "zstd") as file:
        file.write(LINES)


def _parquet(path: Path) -> None:
    write_rows(lines := path.with_name("lines"), ROWS)
    assert main(["export", str(lines), str(path)]) == 0


FORMS: dict[str, Callable[[Path], object]] = {
    "lines": lambda path: path.write_bytes(LINES),
    "list": lambda path: path.write_text(json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1)),
    "gzip": lambda path: path.write_bytes(gzip.compress(LINES)),
    "zstd": _zstd,
    "our Parquet": _parquet,
    "other Parquet": lambda path: pq.write_table(
        pa.Table.from_pylist([json.loads(line) | {"opened": ""} | json.loads(line) for line in LINES.splitlines()]),
        path,
    ),
}


def test_filter_and_export_read_every_form_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: dict[str, dict[str, bytes]] = {}
    for form, write in FORMS.items():
        (folder := tmp_path / form).mkdir()
        write(source := folder / "source")
        assert read_completions(source) == ROWS, form
        filter_.run(FilterConfig(completions=str(source), out=str(folder / "out.jsonl"), max_tokens=100, workers=1))
        assert main(["export", str(source), str(folder / "out.parquet")]) == 0
        made[form] = {file.name: file.read_bytes() for file in folder.glob("out*")}
    assert all(files == made["lines"] for files in made.values())
    assert made["lines"].keys() == {"out.jsonl", "out.jsonl.rejects.jsonl", "out.jsonl.counts.json", "out.parquet"}
    assert "3 of 4 accepted; rejected: 1 unclosed_thought" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"id": "a", "problem": "?", "generation": "4"}', "keys 'sample', 'answer', 'completion', 'finish_reason', "),
        (b'{"id": "a", "problem": "?", "generation": "4"}', "the row has 'id', 'problem', 'generation', so it is not"),
        (b"PK\x03\x04", "source is a zip archive; unpack it"),
        (b"[", "row 1: not JSON: the text ends too early (character 1 of the row)"),
    ],
)
def test_another_file_is_refused_by_what_it_is(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_completions(tmp_path / "source")
    assert said in str(caught.value)
