"""The command line as a stranger meets it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from micota_fast.cli import main
from micota_fast.pipeline.stages import VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    assert "usage: micota " + verb in capsys.readouterr().out


def test_a_stage_that_was_asked_to_end_has_not_failed_and_a_number_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    for returned, status in ((None, 0), (True, 0), (False, 0), (0, 0), (1, 1)):
        monkeypatch.setattr("micota_fast.corpus.mix.run", lambda config, returned=returned: returned)
        assert main(["mix", "--set", "parts={a: 1}", "--set", "out=b"]) == status


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nowhere"], "micota run: nowhere: no such file, and no shipped recipe; shipped: micota-qwen2.5-3b"),
        (["run", "micro", "--set", "seedz=1"], "`seedz`: unknown key"),
        (["generate", "--set", "model=nowhere"], "`problems`: this key is required"),
        (["filter", "--set", "completions=nowhere.jsonl", "--set=out=o.jsonl"], "cannot read nowhere.jsonl"),
        (["serve", "nowhere"], "nowhere"),
        (["merge", "nowhere.yaml", "o", "--push-to-hub", "mine"], "`push_to_hub` must be ORG/NAME, not 'mine'"),
        (
            ["merge", "nowhere.yaml", "o", "--push-to-hub", "a/b", "--weights", "0.1", "0.2"],
            "`push_to_hub` uploads one model",
        ),
        (
            ["train", "--set=model=nowhere", "--set=data=d.jsonl", "--set=out=o", "--set=push_to_hub=mine"],
            "`push_to_hub` must be ORG/NAME, not 'mine'",
        ),
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
