"""`micota prune`: only what is set aside and not needed goes, after a question, under the run's lock."""

import fcntl
import os
from pathlib import Path

import pytest

from micota_fast.cli import main
from micota_fast.common.json_io import write_json
from micota_fast.errors import InputError
from micota_fast.pipeline.prune import prune
from micota_fast.pipeline.record import DONE, MAKING, set_aside_name

DAY_S = 86400


def record(folder: Path, seed: int, name: str = DONE) -> None:
    identity = {"verb": "train", "options": {"seed": seed}, "inputs": []}
    folder.mkdir(parents=True)
    write_json(folder / name, {"identity": identity, "outputs": {}, "seconds": 1.0})
    (folder / "weights").write_bytes(bytes(1500))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A stage that is done and was set aside twice, one that is unfinished, and folders that are not the run's."""
    folder = tmp_path / "run"
    record(folder / "model/long", 0)
    for seed, days in ((1, 3), (2, 40)):
        aside = set_aside_name(folder / "model/long", identity(seed))
        record(aside, seed)
        os.utime(aside / DONE, (os.stat(aside).st_mtime - days * DAY_S,) * 2)
    record(folder / "model/short", 0, MAKING)
    record(set_aside_name(folder / "model/short", identity(1)), 1)
    record(set_aside_name(folder / "model/gone", identity(1)), 1)  # killed before it was back in its place
    (folder / "model/long~0123456789").mkdir()
    (folder / "model/long~0123456789/thesis.tex").write_text("years of work")
    (folder / "model/long~abcdefabcd").symlink_to(folder / "model/long")
    (folder / "fingerprints.json").write_text("{}")
    return folder


def identity(seed: int) -> dict[str, object]:
    return {"verb": "train", "options": {"seed": seed}, "inputs": []}


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "model").iterdir()}


def test_only_what_no_stage_needs_is_removed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(run)
    gone = {set_aside_name(run / "model/long", identity(seed)).name for seed in (1, 2)}
    assert main(["prune", str(run), "--yes"]) == 0
    said = capsys.readouterr().out
    assert names(run) == before - gone
    assert "Removed 2 folders, 3.2 kB." in said
    assert said.count("short is not done, and may take over from it") == 1
    assert said.count("gone is not done, and may take over from it") == 1
    assert "0123456789" not in said
    assert main(["prune", str(run), "--yes"]) == 0
    assert "Nothing to remove." in capsys.readouterr().out


def test_what_is_young_stays(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = set_aside_name(run / "model/long", identity(2)).name
    before = names(run)
    assert main(["prune", str(run), "--yes", "--older-than", "30"]) == 0
    assert before - names(run) == {old}
    assert "kept: not older than 30 days" in capsys.readouterr().out


@pytest.mark.parametrize(("reply", "removed"), [("y", 2), ("", 0), ("no", 0)])
def test_it_asks_first(run: Path, reply: str, removed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(run)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: reply)
    prune(str(run))
    assert len(before - names(run)) == removed


def test_without_a_terminal_nothing_is_removed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(run)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(InputError, match="--yes removes what is listed"):
        prune(str(run))
    assert names(run) == before


def test_a_run_at_work_is_left_alone(run: Path) -> None:
    with (run / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run holds"):
            prune(str(run), yes=True)


def test_what_a_killed_removal_left_goes_with_the_next(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aside = set_aside_name(run / "model/long", identity(1))
    left = aside.with_name(f".{aside.name}.0123456789abcdef.partial")
    aside.rename(left)
    (left / DONE).unlink()
    prune(str(run), yes=True)
    assert not left.exists()
    assert aside.name in capsys.readouterr().out


def test_a_folder_that_is_not_a_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not the folder of a run: it contains no fingerprints\.json"):
        prune(str(tmp_path), yes=True)
    assert list(tmp_path.iterdir()) == []
