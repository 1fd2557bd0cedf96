"""Completions as Parquet: the same rows in the same order, in bounded memory, whole or not at all."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from micota_fast.cli import main
from micota_fast.common.records import Completion, encode_row, write_rows
from micota_fast.corpus import export
from micota_fast.errors import InputError

ROW = Completion("p", 0, "½?", "2", "so \u2028 \\boxed{2}", "stop", 5, 7, None)
ROWS = [
    ROW,
    replace(ROW, sample=1, seed=2**31 - 1, correct=True, model="m"),
    replace(ROW, id="q", completion="", correct=False, finish_reason="length"),
]


def test_rows_are_read_back_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "c.jsonl", tmp_path / "new" / "c.parquet"
    write_rows(source, ROWS)
    assert main(["export", str(source), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 3 completions\n"
    table = pq.read_table(out)
    assert [Completion(**row) for row in table.to_pylist()] == ROWS
    assert {field.name: (field.type, field.nullable) for field in table.schema} == {
        "id": (pa.string(), False),
        "sample": (pa.int64(), False),
        "problem": (pa.string(), False),
        "answer": (pa.string(), False),
        "completion": (pa.string(), False),
        "finish_reason": (pa.string(), False),
        "prompt_tokens": (pa.int64(), False),
        "completion_tokens": (pa.int64(), False),
        "seed": (pa.int64(), True),
        "correct": (pa.bool_(), True),
        "model": (pa.string(), False),
    }
    first = out.read_bytes()
    export.export(source, out)
    assert out.read_bytes() == first


def test_rows_go_in_groups_by_number_and_by_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "GROUP_ROWS", 10)
    monkeypatch.setattr(export, "GROUP_CHARACTERS", 1000)
    rows = [replace(ROW, sample=i, completion="x" * (900 if i > 40 else 9)) for i in range(47)]
    write_rows(tmp_path / "c.jsonl", rows)
    assert export.export(tmp_path / "c.jsonl", tmp_path / "c.parquet") == 47
    file = pq.ParquetFile(tmp_path / "c.parquet")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    assert groups == [10, 10, 10, 10, 3, 2, 2]
    assert [Completion(**row) for row in file.read().to_pylist()] == rows


def test_no_rows_make_a_file_without_rows(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").touch()
    assert export.export(tmp_path / "c.jsonl", tmp_path / "c.parquet") == 0
    assert pq.read_table(tmp_path / "c.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{\n", r"c\.jsonl:3: not JSON"),
        (encode_row(replace(ROW, id="r"))[:-30] + b"\n", r"c\.jsonl:3: not JSON"),
        (encode_row(replace(ROW, sample=1)), r"c\.jsonl:3: \('p', sample 1\) occurs already at .*c\.jsonl:2"),
        (encode_row(replace(ROW, id="r", seed=2**70)), r"c\.jsonl:3: key 'seed' must fit 64 bits"),
    ],
)
def test_a_bad_row_is_named_and_the_old_file_stays(
    tmp_path: Path, line: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "GROUP_ROWS", 2)  # a group is written by then
    (tmp_path / "c.jsonl").write_bytes(b"".join(map(encode_row, ROWS[:2])) + line)
    (tmp_path / "c.parquet").write_bytes(b"old")
    with pytest.raises(InputError, match=said):
        export.export(tmp_path / "c.jsonl", tmp_path / "c.parquet")
    assert (tmp_path / "c.parquet").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "c.parquet"]


LIMITED_CODE = """
import resource, sys
from micota_fast.cli import main
from micota_fast.corpus.export import schema
schema()
limit, kind = int(sys.argv[3]), getattr(resource, sys.argv[4])
if sys.argv[4] == "RLIMIT_DATA":
    limit += 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1])
resource.setrlimit(kind, (limit, limit))
sys.exit(main(["export", *sys.argv[1:3]]))
"""


def limited(source: Path, out: Path, limit: int, kind: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", LIMITED_CODE, str(source), str(out), str(limit), kind]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_hundred_thousand_rows_in_bounded_memory(tmp_path: Path) -> None:
    """300 MB of rows, and no more than 250 MB of memory beyond what the program takes anyway."""
    source, out = tmp_path / "c.jsonl", tmp_path / "c.parquet"
    before, after = encode_row(replace(ROW, completion="x " * 1500)).split(b'"sample": 0')
    with source.open("wb") as file:
        file.writelines(b'%b"sample": %d%b' % (before, i, after) for i in range(100_000))
    assert source.stat().st_size > 300e6
    ran = limited(source, out, 250 << 20, "RLIMIT_DATA")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert pq.read_table(out, columns=["sample"])["sample"].to_pylist() == list(range(100_000))


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    source, out = tmp_path / "c.jsonl", tmp_path / "out" / "c.parquet"
    write_rows(source, (replace(ROW, sample=i) for i in range(1000)))
    ran = limited(source, out, 2000, "RLIMIT_FSIZE")
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"micota export: cannot write {out}: File too large (")
    assert list(out.parent.iterdir()) == []


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'micota-fast\[parquet\]'"):
        export.export(tmp_path / "c.jsonl", tmp_path / "c.parquet")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "usage: micota export" in capsys.readouterr().out


def test_what_is_read_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    write_rows(path, [ROW])
    before = path.read_bytes()
    (tmp_path / "link.parquet").symlink_to(path)
    for out in (path, tmp_path / "link.parquet"):
        with pytest.raises(InputError, match="is also read: writing it would destroy that"):
            export.export(path, out)
    assert path.read_bytes() == before
