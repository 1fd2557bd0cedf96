"""One holder at a time, counting processes that inherited the lock; a holder may remove the file."""

import subprocess
import threading
from pathlib import Path

import pytest

from micota_fast.common.lock import locked
from micota_fast.errors import InputError


def test_a_second_holder_is_refused_and_a_later_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "made" / ".lock"
    with locked(path, "run"), pytest.raises(InputError, match=r"another run holds .*made/\.lock"), locked(path, "run"):
        pass
    with locked(path, "run"):
        pass


def test_a_holder_is_waited_for(tmp_path: Path) -> None:
    path, said = tmp_path / ".lock", []
    held, waiting = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(path, "run"):
            held.set()
            waiting.wait()

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with locked(path, "run", 60.0, say):
        pass
    thread.join()
    assert said == [f"waiting for another run to end, which holds {path}"]


def test_a_process_that_inherited_the_lock_holds_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, "run") as file:
        child = subprocess.Popen(["sleep", "600"], pass_fds=(file.fileno(),))
    with pytest.raises(InputError, match="another run holds"), locked(path, "run"):
        pass
    child.kill()
    child.wait()
    with locked(path, "run"):
        pass


def test_a_holder_may_remove_the_file(tmp_path: Path) -> None:
    path, order = tmp_path / "folder" / "lock", []
    waiting = threading.Event()

    def wait() -> None:
        with locked(path, "run", 60.0, lambda _: waiting.set()):
            order.append(path.exists())

    with locked(path, "run"):
        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait()
        path.unlink()
        path.parent.rmdir()
        order.append("removed")
    thread.join()
    assert order == ["removed", True]


@pytest.mark.parametrize("place", ["file/.lock", "/proc/.lock", f"{'n' * 256}/.lock", "link"])
def test_a_place_without_a_lock_file_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(InputError, match=r"cannot write .*(lock|link)"), locked(tmp_path / place, "run"):
        pass
    assert (tmp_path / "file").read_text() == "keep"
