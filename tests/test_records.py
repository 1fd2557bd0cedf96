"""Rows on disk: bad input is named by file and line, a torn file is taken up again, two writers keep apart."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from micota_fast.errors import InputError
from micota_fast.records import (
    Completion,
    CompletionWriter,
    Problem,
    encode_row,
    read_completions,
    read_problems,
    write_rows,
)

FINGERPRINT = {"model": "m", "sampling": {"stop": ("a", "b")}}


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
        ("{", "not a JSON object"),
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


def test_writer_resumes_refuses_duplicates_and_sorts(tmp_path: Path) -> None:
    part, out = tmp_path / "o.part", tmp_path / "o.jsonl"
    with CompletionWriter(part, FINGERPRINT) as writer:
        writer.append(row("p1", 1))
        with pytest.raises(ValueError, match="written already"):
            writer.append(row("p1", 1))
    with CompletionWriter(part, FINGERPRINT) as writer:
        assert set(writer.rows) == {("p1", 1)}
        writer.append(row("p0", 0))
        writer.append(row("p1", 0))
        rows = writer.finalise(out, ["p1", "p0"])
        writer.discard()
    assert [(r.id, r.sample) for r in rows] == [("p1", 0), ("p1", 1), ("p0", 0)]
    assert read_completions(out) == rows
    assert not part.exists()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    part = tmp_path / "o.part"
    with CompletionWriter(part, FINGERPRINT) as writer:
        for sample in range(3):
            writer.append(row(sample=sample))
    whole = part.read_bytes()
    part.write_bytes(whole[:-cut])
    with CompletionWriter(part, FINGERPRINT) as writer:
        assert set(writer.rows) == {("p0", 0), ("p0", 1)}
        writer.append(row(sample=2))
    assert part.read_bytes() == whole


def test_a_torn_header_is_written_again(tmp_path: Path) -> None:
    part = tmp_path / "o.part"
    CompletionWriter(part, FINGERPRINT).close()
    header = part.read_bytes()
    part.write_bytes(header[:9])
    CompletionWriter(part, FINGERPRINT).close()
    assert part.read_bytes() == header


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    part = tmp_path / "o.part"
    with CompletionWriter(part, FINGERPRINT) as writer:
        writer.append(row(sample=0))
    header, line = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(header + line[:20] + b"\n" + encode_row(row(sample=1)))
    with pytest.raises(InputError, match=r"o\.part:2: not a JSON object"):
        CompletionWriter(part, FINGERPRINT)
    part.write_bytes(header + line + line)
    with pytest.raises(InputError, match=r"o\.part:3: .* occurs twice"):
        CompletionWriter(part, FINGERPRINT)


def test_another_fingerprint_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    part = tmp_path / "o.part"
    with CompletionWriter(part, FINGERPRINT) as writer:
        writer.append(row())
    before = part.read_bytes()
    with pytest.raises(InputError, match=r"belongs to another run \(it differs in: sampling\)"):
        CompletionWriter(part, {**FINGERPRINT, "sampling": {}})
    assert part.read_bytes() == before


def test_two_writers_keep_apart_until_the_first_is_killed(tmp_path: Path) -> None:
    part = tmp_path / "o.part"
    code = (
        "import sys, time\n"
        "from micota_fast.records import CompletionWriter\n"
        "writer = CompletionWriter(sys.argv[1], {})\n"
        "print('open', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(part)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"open\n"
            with pytest.raises(InputError, match="being written by another process"):
                CompletionWriter(part, {})
        finally:
            os.kill(holder.pid, signal.SIGKILL)
    CompletionWriter(part, {}).close()


def test_a_full_disk_is_an_error_that_keeps_what_was_written(tmp_path: Path) -> None:
    """A limit on the file's size (setrlimit) fails a write in the middle of a row, as a full disk does."""
    part = tmp_path / "o.part"
    code = (
        "import resource, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_records import row\n"
        "from micota_fast.records import CompletionWriter\n"
        "writer = CompletionWriter(sys.argv[1], {})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for sample in range(100):\n"
        "    writer.append(row(sample=sample))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(part), str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert "InputError: cannot write" in ran.stderr
    assert "File too large; what was written before is kept" in ran.stderr
    whole_rows = part.read_bytes().splitlines(keepends=True)[1:]
    assert whole_rows == [encode_row(row(sample=sample)) for sample in range(len(whole_rows))]
    with CompletionWriter(part, {}) as writer:
        assert len(writer.rows) == len(whole_rows) > 0
        writer.append(row(sample=len(whole_rows)))


def test_rows_are_the_same_bytes_every_time() -> None:
    assert encode_row(row()) == encode_row(replace(row()))
    assert b"\\u" not in encode_row(row())  # text as it is
