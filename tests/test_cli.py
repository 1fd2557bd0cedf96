"""The command line as a stranger meets it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from micota_fast.cli import STAGES, main


@pytest.mark.parametrize("verb", ["run", "merge", "serve", *STAGES])
def test_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    assert "usage: micota " + verb in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere"], "micota run: nowhere: cannot read"),
        (["run", "micro", "--set", "seedz=1"], "`seedz`: unknown key"),
        (["generate", "--set", "model=nowhere"], "`problems`: this key is required"),
        (["filter", "--set", "completions=nowhere.jsonl", "--set=out=o.jsonl"], "cannot read nowhere.jsonl"),
        (["serve", "nowhere"], "nowhere"),
        (["merge", "nowhere.yaml", "out"], "nowhere.yaml"),
    ],
)
def test_errors_are_one_message_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_recipes_name_is_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro").mkdir()
    assert main(["run", "micro", "--dry-run"]) == 0


def test_the_command_line_starts_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom micota_fast.cli import main\n"
        f"assert main(['run', 'micro', '--dry-run', '--out', {str(tmp_path)!r}]) == 0\n"
        "assert not {'torch', 'matplotlib', 'math_verify', 'numba'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_a_reader_that_goes_away_is_no_mistake(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "micota_fast", "run", "micro", "--dry-run", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
