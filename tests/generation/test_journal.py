"""A journal loses nothing to a SIGKILL or a full disk, next to nothing to a power cut, and names what is damaged."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.disks import small_file_system
from micota_fast.common.records import encode_row
from micota_fast.errors import InputError
from micota_fast.generation import journal as module
from micota_fast.generation.journal import Journal
from micota_fast.generation.journal_index import ENTRY

FINGERPRINT = {"model": "m", "sampling": {"stop": ("a", "b")}}
NEVER = 1e9  # seconds between two syncs


def row(i: int) -> dict[str, Any]:
    """The i-th row; its keys and text are of the kind that a journal adds itself."""
    text = ["so \u2028 ½\n", '"}', ', "entry": [1, 2, 3, 4, 5], "crc32": "00000000"}', "x" * 3000][i % 4]
    return {"id": f"p{i // 2}", "entry": [i], "completion": text * (i % 3), "crc32": None}


def append(journal: Journal, i: int) -> None:
    journal.append(i // 2, i % 2, i % 5, 10 + i, 20 + i, row(i))


def texts(journal: Journal) -> list[bytes]:
    """The rows, by problem and sample."""
    entries = journal.entries
    return list(journal.rows(np.lexsort((entries["sample"], entries["problem"]))))


def expected(numbers: range) -> list[bytes]:
    return [encode_row(row(i)) for i in numbers]


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 4000)


def test_rows_come_back_as_they_were_in_any_order(tmp_path: Path, small_segments: None) -> None:
    order = random.Random(0).sample(range(60), 60)
    with Journal(tmp_path / "o.parts", FINGERPRINT) as journal:
        for i in order[:30]:
            append(journal, i)
        with pytest.raises(ValueError, match=r"\(problem \d+, sample [01]\) is written already"):
            append(journal, order[3])
    with Journal(tmp_path / "o.parts", FINGERPRINT) as journal:
        for i in order[30:]:
            append(journal, i)
        entries = journal.entries
        assert len(journal) == len(entries) == 60
        assert not entries.flags.writeable
        assert (entries["problem"] * 2 + entries["sample"]).tolist() == order
        assert [entries[name].tolist() for name in ("verdict", "tokens", "prompt_tokens")] == [
            [f(i) for i in order] for f in (lambda i: i % 5, lambda i: 10 + i, lambda i: 20 + i)
        ]
        assert texts(journal) == expected(range(60))
        assert all(journal.contains(i // 2, i % 2) for i in order)
        assert not any(journal.contains(*key) for key in [(0, 2), (30, 0), (1 << 20, 0), (0, 65535)])
    segments = sorted((tmp_path / "o.parts").glob("*.jsonl"))
    assert len(segments) > 3
    assert all(segment.stat().st_size <= 4000 or len(segment.read_bytes().splitlines()) == 1 for segment in segments)
    for line in b"".join(segment.read_bytes() for segment in segments).splitlines():
        assert json.loads(line)["entry"][0] < 30  # a JSON object a line


def test_numbers_out_of_range_are_refused_and_leave_nothing_behind(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {}) as journal:
        for numbers in [(1 << 32, 0, 0, 0, 0), (0, 1 << 16, 0, 0, 0), (0, 0, 256, 0, 0), (-1, 0, 0, 0, 0)]:
            with pytest.raises(ValueError, match="sample"):
                journal.append(*numbers, {"a": 1})
        assert len(journal) == 0
        append(journal, 0)
    assert len((tmp_path / "j" / "000000.jsonl").read_bytes().splitlines()) == 1


def test_verdicts_can_change(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {}, NEVER) as journal:
        for i in range(9000):
            journal.append(i, 0, 0, 0, 0, {"a": i})
            if i % 4000 == 0:
                journal.sync()
        for i in (0, 3999, 4000, 8000, 8001, 8999):  # in the file, far and near, and not yet there
            journal.settle(i, 0, 7)
        journal.settle(8999, 0, 255)
        for key in [(0, 1, 1), (9000, 0, 1), (0, 0, 256)]:
            with pytest.raises(ValueError, match=r"not written|range"):
                journal.settle(*key)
    with Journal(tmp_path / "j", {}) as journal:
        verdicts = journal.entries["verdict"]
        assert np.flatnonzero(verdicts).tolist() == [0, 3999, 4000, 8000, 8001, 8999]
        assert verdicts[8000:].max() == 255
        assert next(journal.rows(np.array([4000]))) == encode_row({"a": 4000})


@pytest.mark.parametrize("kept", [0, 1, 13, 39, 40])
def test_rows_that_are_cut_back_are_gone_and_others_can_follow(tmp_path: Path, small_segments: None, kept: int) -> None:
    """Whether they were synced or not, over several segments, and also when the journal is opened again."""
    folder = tmp_path / "o.parts"
    with Journal(folder, FINGERPRINT, NEVER) as journal:
        for i in range(30):
            append(journal, i)
        journal.sync()
        for i in range(30, 40):
            append(journal, i)
        assert len(list(folder.glob("0*.jsonl"))) > 3
        journal.cut_back(kept)
        assert len(journal) == kept
        assert [journal.contains(i // 2, i % 2) for i in range(40)] == [i < kept for i in range(40)]
        assert texts(journal) == expected(range(kept))
        append(journal, 39) if kept < 40 else None
    with Journal(folder, FINGERPRINT) as journal:
        assert (journal.cut_bytes, journal.duplicates) == (0, 0)
        assert texts(journal) == expected(range(kept)) + expected(range(39, 40))[: kept < 40]
        for i in range(kept, 39):
            append(journal, i)
        assert texts(journal) == expected(range(40))


def test_killed_while_it_cuts_back_rows_never_return_by_themselves(
    tmp_path: Path, small_segments: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "o.parts"
    with Journal(folder, FINGERPRINT, NEVER) as journal:
        for i in range(40):
            append(journal, i)
        monkeypatch.setattr(module.Index, "cut_back", lambda self, length: None)  # it does not come to that any more
        journal.cut_back(13)
        journal._closed = True  # nor to a sync
    with pytest.raises(InputError, match=r"ends at byte \d+, but .*index.bin names rows.*delete index.bin to resume"):
        Journal(folder, FINGERPRINT)
    (folder / "index.bin").unlink()
    with Journal(folder, FINGERPRINT) as journal:
        assert texts(journal) == expected(range(13))


def test_another_fingerprint_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", FINGERPRINT) as journal:
        append(journal, 0)
    with pytest.raises(InputError, match=r"j belongs to another run \(it differs in: sampling\.\w+\); delete it"):
        Journal(tmp_path / "j", {**FINGERPRINT, "sampling": {}})
    with Journal(tmp_path / "j", FINGERPRINT) as journal:
        assert texts(journal) == expected(range(1))
    (tmp_path / "j" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        Journal(tmp_path / "j", FINGERPRINT)
    (tmp_path / "j" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        Journal(tmp_path / "j", FINGERPRINT)


def test_a_journal_without_a_row_is_begun_anew_under_another_fingerprint(tmp_path: Path) -> None:
    """Settings that let no answer come are mended, and the same command must then do."""
    for fingerprint in (FINGERPRINT, {**FINGERPRINT, "sampling": {}}):
        with Journal(tmp_path / "j", fingerprint) as journal:
            (tmp_path / "j" / "prompts-checked.json").touch()
    with Journal(tmp_path / "j", FINGERPRINT) as journal:
        assert not (tmp_path / "j" / "prompts-checked.json").exists()  # it was of the former settings
        append(journal, 0)
    with Journal(tmp_path / "j", FINGERPRINT) as journal:
        assert texts(journal) == expected(range(1))


def test_a_sync_brings_the_rows_to_the_disk_before_the_index_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Journal(tmp_path / "j", FINGERPRINT, fsync_interval_s=1e9) as journal:
        append(journal, 0)
        named: list[tuple[str, int]] = []
        fsync = os.fsync

        def told(fd: int) -> None:
            named.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, journal._index._written))
            fsync(fd)

        monkeypatch.setattr(os, "fsync", told)
        journal.sync()
    assert named[:2] == [("000000.jsonl", 0), ("index.bin", 0)]


def test_two_writers_keep_apart_until_the_first_is_killed(tmp_path: Path) -> None:
    code = "import sys, time; from micota_fast.generation.journal import Journal\n"
    code += "journal = Journal(sys.argv[1], {}); print('open', flush=True); time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "j")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"open\n"
            with pytest.raises(InputError, match=r"another process holds .*j/lock"):
                Journal(tmp_path / "j", {})
        finally:
            holder.kill()
    Journal(tmp_path / "j", {}).close()


@pytest.mark.parametrize("left", [("index.bin", "000000.jsonl", "lock"), ("lock",), ("000000.jsonl", "mine", "lock")])
def test_discard_removes_the_folder_also_when_it_was_killed_in_the_middle(tmp_path: Path, left: tuple[str]) -> None:
    folder = tmp_path / "j"
    with Journal(folder, FINGERPRINT) as journal:
        append(journal, 0)
        (folder / "mine").touch()  # a file that the run's other parts keep there
    (folder / "manifest.json").rename(folder / "discarded")
    for path in folder.iterdir():
        if path.name not in (*left, "discarded"):
            path.unlink()
    with Journal(folder, {"another": "run"}) as journal:
        assert len(journal) == 0
        append(journal, 1)
        journal.discard()
    assert not folder.exists()


# What a kill and a power cut leave behind

# For each line that it reads, a child of its own (which need not import anything) appends what is missing: as many rows
# as the line says, and then it waits to be killed.
APPENDING_CODE = """
import os, random, signal, sys
from micota_fast.generation import journal as module
sys.path.insert(0, sys.argv[2])
from test_journal import append
module.SEGMENT_BYTES = 30_000
for line in sys.stdin:
    if (child := os.fork()) == 0:
        os.write(1, b"%d\\n" % os.getpid())
        with module.Journal(sys.argv[1], {}, 0.003) as journal:
            order = random.Random(1).sample(range(3000), 3000)
            missing = [i for i in order if not journal.contains(i // 2, i % 2)]
            for i in missing[: int(line)]:
                append(journal, i)
                os.write(1, b"%d\\n" % i)
            if int(line) < len(missing):
                signal.pause()
        os._exit(0)
    os.waitpid(child, 0)
    os.write(1, b"ended\\n")
"""


def test_twenty_sigkills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    folder, randomly = tmp_path / "j", random.Random(0)
    command = [sys.executable, "-c", APPENDING_CODE, str(folder), str(Path(__file__).parent)]
    acknowledged: set[int] = set()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for _ in range(20):
            rows = randomly.randrange(100)
            parent.stdin.write(b"%d\n" % (rows + 50))
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            said = [parent.stdout.readline() for _ in range(rows)]
            time.sleep(randomly.uniform(0, 0.001))
            os.kill(child, signal.SIGKILL)
            said += iter(parent.stdout.readline, b"ended\n")
            acknowledged |= set(map(int, said))
            with Journal(folder, {}) as journal:
                entries = journal.entries
                there = (entries["problem"] * 2 + entries["sample"]).tolist()
                assert len(set(there)) == len(there)
                assert acknowledged <= set(there)
                assert len(there) <= len(acknowledged) + 20  # a kill may fall between an append and its acknowledgement
        assert 20 <= len(acknowledged) < 3000
        parent.communicate(b"3000\n")
    with Journal(folder, {}) as journal:
        assert journal.cut_bytes == journal.duplicates == 0
        assert texts(journal) == expected(range(3000))


SYNCED, ROWS = 12, 24


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal's files meanwhile: SYNCED rows are on the disk, the others stand behind them in the last segment."""
    folder = tmp_path_factory.mktemp("journal") / "j"
    with pytest.MonkeyPatch.context() as patch, Journal(folder, {}, NEVER) as journal:
        patch.setattr(module, "SEGMENT_BYTES", 4000)
        for i in range(SYNCED):
            append(journal, i)
        journal.sync()
        patch.setattr(module, "SEGMENT_BYTES", 1 << 30)
        for i in range(SYNCED, ROWS):
            append(journal, i)
        image = folder.with_name("image")
        shutil.copytree(folder, image)
    assert (image / "index.bin").stat().st_size == SYNCED * ENTRY.itemsize
    return image


@contextlib.contextmanager
def copy(image: Path) -> Iterator[Path]:
    folder = image.with_name("copy")
    shutil.copytree(image, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def synced_bytes(folder: Path) -> tuple[Path, int]:
    """The last segment, and the byte at which its synced rows end."""
    last = np.fromfile(folder / "index.bin", ENTRY)[SYNCED - 1]
    return folder / f"{last['segment']:06d}.jsonl", int(last["offset"] + last["length"])


def spoil(path: Path, start: int, place: float, how: str, length: int) -> None:
    """Cut a file off, or overwrite some of it, somewhere behind `start`."""
    content = bytearray(path.read_bytes())
    at = start + int(place * (len(content) - start))
    if how == "cut":
        del content[at:]
    else:
        length = min(length, len(content) - at)
        content[at : at + length] = bytes(length) if how == "zeros" else os.urandom(length)
    path.write_bytes(content)


PLACES = st.floats(0, 1, exclude_max=True)
HOW = st.sampled_from(["cut", "zeros", "noise"])
LENGTHS = st.integers(1, 5000)


@given(PLACES, HOW, LENGTHS)
@settings(deadline=None, max_examples=40)
def test_what_was_spoilt_behind_the_last_sync_is_cut_off(
    interrupted: Path, place: float, how: str, length: int
) -> None:
    with copy(interrupted) as folder:
        path, start = synced_bytes(folder)
        spoil(path, start, place, how, length)
        with Journal(folder, {}) as journal:
            n = len(journal)
            assert SYNCED <= n < ROWS or journal.cut_bytes == 0
            assert texts(journal) == expected(range(n))
            for i in range(n, ROWS):
                append(journal, i)
        with Journal(folder, {}) as journal:
            assert journal.cut_bytes == 0
            assert texts(journal) == expected(range(ROWS))


@given(PLACES, HOW, LENGTHS)
@settings(deadline=None, max_examples=40)
def test_an_index_spoilt_anywhere_costs_no_row(interrupted: Path, place: float, how: str, length: int) -> None:
    with copy(interrupted) as folder:
        Journal(folder, {}).close()  # the index is complete
        spoil(folder / "index.bin", 0, place, how, length)
        with Journal(folder, {}) as journal:
            assert texts(journal) == expected(range(ROWS))
            assert (journal.entries["verdict"] == [i % 5 for i in range(ROWS)]).all()
            assert journal.cut_bytes == journal.duplicates == 0


@given(PLACES, st.sampled_from(["cut", "noise"]))
@settings(deadline=None, max_examples=40)
def test_what_was_spoilt_before_the_last_sync_is_named_and_the_rest_can_be_had(
    interrupted: Path, place: float, how: str
) -> None:
    with copy(interrupted) as folder:
        path, end = synced_bytes(folder)
        whole = path.read_bytes()
        at = int(place * end)
        path.write_bytes(whole[:at] if how == "cut" else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for _ in range(2):  # no attempt makes it worse
            with pytest.raises(InputError, match=r"ends at byte|is damaged") as error:
                Journal(folder, {})
            assert str(path) in str(error.value)
        line = whole[:at].count(b"\n")
        if how == "noise":
            assert f"{path}:{line + 1}:" in str(error.value)
            lines = path.read_bytes().splitlines(keepends=True)  # do as the message says
            del lines[line]
            path.write_bytes(b"".join(lines))
        (folder / "index.bin").unlink()
        earlier = sum(p.read_bytes().count(b"\n") for p in folder.glob("*.jsonl") if p < path)
        with Journal(folder, {}) as journal:
            assert texts(journal)[: earlier + line] == expected(range(earlier + line))
            assert len(journal) == (earlier + line if how == "cut" else ROWS - 2 if whole[at] == 10 else ROWS - 1)


def test_without_an_index_a_bad_line_is_damage_unless_nothing_good_follows(interrupted: Path) -> None:
    with copy(interrupted) as folder:
        (folder / "index.bin").unlink()
        path = sorted(folder.glob("*.jsonl"))[-1]
        whole = path.read_bytes()
        path.write_bytes(whole[:100] + bytes(10) + whole[110:])
        for _ in range(2):
            with pytest.raises(InputError, match="is damaged"):
                Journal(folder, {})
        path.write_bytes(whole[:-10])
        with Journal(folder, {}) as journal:
            assert texts(journal) == expected(range(ROWS - 1))
            assert journal.cut_bytes > 0


def test_damage_in_an_early_segment_is_named_when_it_is_read(interrupted: Path) -> None:
    with copy(interrupted) as folder:
        path = folder / "000000.jsonl"
        content = path.read_bytes()
        path.write_bytes(content.replace(b'"p0"', b'"q0"', 1))
        with (
            Journal(folder, {}) as journal,
            pytest.raises(InputError, match=rf"{path}:1: the row at byte 0 is damaged"),
        ):
            texts(journal)
        path.unlink()
        with pytest.raises(InputError, match=rf"{path} is missing"):
            Journal(folder, {})


def test_of_a_row_that_is_there_twice_the_first_stays(interrupted: Path) -> None:
    with copy(interrupted) as folder:
        (folder / "index.bin").unlink()
        path = sorted(folder.glob("*.jsonl"))[-1]
        path.write_bytes(path.read_bytes() + (folder / "000000.jsonl").read_bytes())
        with Journal(folder, {}) as journal:
            assert journal.duplicates == (folder / "000000.jsonl").read_bytes().count(b"\n")
            assert texts(journal) == expected(range(ROWS))
        with Journal(folder, {}) as journal:  # from its index, in which the passed-over rows are gaps
            assert texts(journal) == expected(range(ROWS))


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", "256k") as disk:
        yield disk


def fill(journal: Journal) -> None:
    for i in range(len(journal), 1000):
        append(journal, i)


@pytest.mark.parametrize("fsync_interval_s", [0.0, NEVER])
def test_a_full_disk_is_said_and_the_journal_goes_on_once_there_is_room(
    small_disk: Path, fsync_interval_s: float
) -> None:
    """With an interval of 0 the index fills the disk as often as the rows do."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(100_000))
    with Journal(small_disk / "j", {}, fsync_interval_s) as journal:
        with pytest.raises(InputError, match="j: No space left on device; what was written before is kept"):
            fill(journal)
        n = len(journal)
        assert n > 20
        assert not journal.contains(n // 2, n % 2)
        with pytest.raises(InputError, match="No space left"):
            fill(journal)
        n = len(journal)
        ballast.unlink()
        assert texts(journal) == expected(range(n))
        append(journal, n)
    with Journal(small_disk / "j", {}) as journal:
        assert journal.cut_bytes == 0
        assert texts(journal) == expected(range(n + 1))


def test_a_limit_on_the_size_of_files_stops_it_in_the_middle_of_a_row(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_journal import append, Journal\n"
        "journal = Journal(sys.argv[1], {})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "for i in range(100):\n"
        "    append(journal, i)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "j"), str(Path(__file__).parent)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "InputError: cannot write" in ran.stderr
    assert "File too large; what was written before is kept" in ran.stderr
    with Journal(tmp_path / "j", {}) as journal:
        assert journal.cut_bytes == 0
        assert texts(journal) == expected(range(len(journal)))
        assert len(journal) > 5
        append(journal, len(journal))
