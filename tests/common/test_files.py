"""Files and folders appear whole or not at all, and nothing that lies in the way is written through."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from micota_fast.common import files
from micota_fast.common.files import open_atomic, remove_whole, temporary_folder, whole_folder, write_atomic
from micota_fast.errors import InputError

WRITER = """
import os, sys
from pathlib import Path
from micota_fast.common.files import open_atomic, temporary_folder, whole_folder
out = Path(sys.argv[2])
if sys.argv[1] == "temporary":
    with temporary_folder(out) as folder:
        (folder / "part").write_bytes(b"half")
        print("writing", flush=True)
        sys.stdin.read()
elif sys.argv[1] == "file":
    with open_atomic(out) as file:
        file.write(b"half")
        print("writing", flush=True)
        sys.stdin.read()
else:
    with whole_folder(out) as aside:
        (aside / "part").write_bytes(b"half")
        print("writing", flush=True)
        sys.stdin.read()
"""


def start_writer(kind: str, out: Path) -> subprocess.Popen[bytes]:
    """A process that is in the middle of writing `out`, until its input is closed."""
    command = [sys.executable, "-c", WRITER, kind, str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


def write(kind: str, out: Path, text: str) -> None:
    if kind == "file":
        write_atomic(out, [text.encode()])
    else:
        with whole_folder(out) as aside:
            (aside / "part").write_text(text)


def read(kind: str, out: Path) -> str:
    return (out if kind == "file" else out / "part").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_neither_file_nor_folder_is_not_replaced(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    monkeypatch.chdir(tmp_path)
    for place, why in (
        (pipe, "a device, pipe"),
        (tmp_path / "link", "a device, pipe"),
        (Path("/"), "in use"),
        (Path(), "in use"),
    ):
        with pytest.raises(InputError, match=f"^cannot write {place}: it is .*{why}"):
            write(kind, place, "new")
    assert pipe.is_fifo()
    assert names(tmp_path) == ["link", "pipe"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_goes_and_what_another_one_is_writing_stays(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = start_writer(kind, out)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (left,) = names(tmp_path)
    writing = start_writer(kind, out)
    (its,) = names(tmp_path)
    assert its != left
    write(kind, out, "ours")
    assert names(tmp_path) == [its, "out"]
    assert read(kind, out) == "ours"
    if kind == "folder":
        remove_whole(out)
        assert names(tmp_path) == [its]
    writing.communicate(b"")
    assert writing.returncode == 0
    assert names(tmp_path) == ["out"]
    assert read(kind, out) == "half"


def test_a_temporary_folder_of_a_killed_process_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    place = tmp_path / "merged"
    killed = start_writer("temporary", place)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (left,) = names(tmp_path)
    living = start_writer("temporary", place)
    (its,) = names(tmp_path)
    assert its != left
    with temporary_folder(place) as ours:
        assert ours.stat().st_mode & 0o777 == 0o700, "a model may be of nobody else's business"
        assert names(tmp_path) == sorted([its, ours.name])
        assert names(tmp_path / its) == ["part"]
    assert names(tmp_path) == [its]
    living.communicate(b"")
    assert names(tmp_path) == []
    with pytest.raises(InputError, match=f"cannot write {left}/none: "), temporary_folder(Path(left) / "none"):
        pass


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_written_through_a_link_that_was_put_in_the_way(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir() if kind == "folder" else victim.write_text("keep")
    out = tmp_path / "out"
    for name in (f".out.{os.getpid()}.tmp", ".out.partial", ".out.part"):
        (tmp_path / name).symlink_to(victim)
    guessed = bytes(8)
    monkeypatch.setattr(files.os, "urandom", lambda size: guessed)
    aside = tmp_path / f".out.{guessed.hex()}{'.tmp' if kind == 'file' else '.partial'}"
    aside.symlink_to(victim)
    with pytest.raises(InputError, match=r"cannot write .*out: File exists"):
        write(kind, out, "ours")
    monkeypatch.undo()
    write(kind, out, "ours")
    assert read(kind, out) == "ours"
    assert victim.read_text() == "keep" if kind == "file" else not names(victim)


def test_only_left_behind_files_of_our_naming_are_removed(tmp_path: Path) -> None:
    ours = ".out.0123456789abcdef"
    others = [".out.tmp", ".out.0123456789abcdeg.tmp", ".other.0123456789abcdef.tmp", f"{ours}.tmp.bak", ".out.partial"]
    for name in [f"{ours}.tmp", *others]:
        (tmp_path / name).write_text("")
    write_atomic(tmp_path / "out", [b""])
    assert names(tmp_path) == sorted([*others, "out"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_left_of_a_write_that_fails(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), open_atomic(out) if kind == "file" else whole_folder(out):
        raise ZeroDivisionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_name_as_long_as_names_may_be(kind: str, tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 127, "𝒏" * 63):
        write(kind, tmp_path / name, "ours")
        assert read(kind, tmp_path / name) == "ours"
    with pytest.raises(InputError, match=r"cannot write .*: File name too long"):
        write(kind, tmp_path / ("n" * 256), "ours")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_place_that_cannot_be_written_is_named(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/out: (Not a directory|File exists)"):
        write(kind, tmp_path / "file" / "out", "ours")


def test_a_folder_in_a_folder_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, synced = os.fsync, []
    out = tmp_path / "out"

    def note(fd: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, out.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    with whole_folder(out) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "file").write_text("x")
    assert synced == [("file", False), ("inner", False), (aside.name, False), (tmp_path.name, True)]


def test_a_folder_that_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write("folder", out, "first")
    with pytest.raises(InputError, match="Directory not empty"):
        write("folder", out, "second")
    assert read("folder", out) == "first"
    with whole_folder(out) as aside:
        (aside / "part").write_text("second")
        remove_whole(out)
    assert read("folder", out) == "second"
    assert names(tmp_path) == ["out"]


def test_no_part_of_a_folder_is_found_under_its_name_once_its_removal_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write("folder", out, "x")
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda *_, **__: None)
        remove_whole(out)
    assert not out.exists()
    assert len(names(tmp_path)) == 1
    remove_whole(out)
    assert names(tmp_path) == []
