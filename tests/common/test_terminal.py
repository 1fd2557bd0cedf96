"""Nothing that comes from outside steers the terminal, and every terminal shows what is printed."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from micota_fast.cli import main
from micota_fast.common.terminal import escaped, one_line, safe_output


def test_controls_are_shown_and_other_text_is_left_alone() -> None:
    assert escaped("a\tb\n é \U0001f600 \\x1b") == "a\tb\n é \U0001f600 \\x1b"
    assert escaped("\x1b[31m\x00\x7f\x9b\r\u202e") == "\\x1b[31m\\x00\\x7f\\x9b\\r\\u202e"
    assert one_line("a\nb\x1b") == "a\\nb\\x1b"


def test_progress_may_be_rewritten_and_what_is_printed_may_not() -> None:
    out = io.StringIO()
    before = sys.stdout
    sys.stdout = out
    try:
        with safe_output():
            print("\rmine", "\x1b]0;title\x07", sep="")
            sys.stdout.write("\r")
            sys.stdout.writelines(["a\x1b", "b"])
            sys.stdout.flush()
    finally:
        sys.stdout = before
    assert out.getvalue() == "\\rmine\\x1b]0;title\\x07\n\ra\\x1bb"


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(encoding, marks=pytest.mark.slow) for encoding in ("latin-1", "cp1252"))]
)
@pytest.mark.parametrize("verb", [["run", "micro", "--dry-run"], ["plan", "micro"], ["train", "--help"]])
def test_every_encoding_of_a_terminal_will_do(encoding: str, verb: list[str], tmp_path: Path) -> None:
    out = [] if "--help" in verb else ["--out", str(tmp_path / "größer \U0001f600"), "--set", "title=é ≥ ñ"]
    command = [sys.executable, "-m", "micota_fast", *verb, *out]
    ran = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert b"Error" not in ran.stderr
    if verb[0] == "run":
        assert rb"\U0001f600" in ran.stdout


FORGED = "x\x1b[31m\nmicota: all is well"


def test_names_and_messages_from_outside_are_shown_as_they_are(
    tmp_path: Path, qwen2_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = json.dumps({FORGED: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (folder / "config.json").write_bytes((qwen2_checkpoint / "config.json").read_bytes())
    (tmp_path / "merge.yaml").write_text(
        f"merge_method: linear\nmodels: [{{model: {folder}, parameters: {{weight: 1}}}}]\n"
    )
    (tmp_path / "key.yaml").write_text(f"{json.dumps(FORGED)}: 1\n")
    (tmp_path / "value.yaml").write_text(f"merge_method: {json.dumps(FORGED)}\nmodels: []\n")
    (tmp_path / "row.jsonl").write_text(json.dumps({"id": "a", "problem": FORGED, "answer": FORGED, FORGED: 1}) + "\n")
    place = tmp_path / FORGED
    (place / "taken").mkdir(parents=True)
    for arguments in (
        ["merge", str(tmp_path / "merge.yaml"), str(tmp_path / "out")],
        ["merge", str(tmp_path / "key.yaml"), str(tmp_path / "out")],
        ["merge", str(tmp_path / "value.yaml"), str(tmp_path / "out")],
        ["merge", str(tmp_path / FORGED), str(tmp_path / "out")],
        ["filter", "--set", f"completions={tmp_path / 'row.jsonl'}", "--set", f"out={tmp_path / 'out'}"],
        ["filter", "--set", f"completions={json.dumps(str(place))}", "--set", f"out={tmp_path / 'out'}"],
        ["filter", "--set", f"{FORGED}=1"],
        ["run", str(tmp_path / FORGED)],
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert "\x1b" not in said
        assert not any(line.startswith("micota: ") for line in said.splitlines()), said


@pytest.mark.parametrize("verb", ["run", "plan", "doctor", "merge", "export", "filter", "generate"])
def test_a_name_that_is_too_long_is_said(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "n" * 300
    options = {
        "run": ["micro", "--out", name],
        "plan": ["micro", "--out", name],
        "doctor": ["micro", "--out", name],
        "merge": [name, str(tmp_path / "out")],
        "export": [name, str(tmp_path / "out")],
        "filter": ["--set", f"completions={name}", "--set", f"out={tmp_path / 'out'}"],
        "generate": ["--set", f"model={name}", "--set", f"problems={name}", "--set", f"out={tmp_path / 'out'}"],
    }[verb]
    assert main([verb, *options]) == 2
    assert "File name too long" in capsys.readouterr().err


def test_a_name_that_the_locale_cannot_spell_is_said_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("completions: é.jsonl\nout: out\n", encoding="utf-8")
    command = [sys.executable, "-m", "micota_fast", "filter", str(tmp_path / "options.yaml")]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run(command, env=os.environ | locale, capture_output=True, check=False)
    assert ended.returncode == 2
    assert rb"micota filter: \xe9.jsonl: this locale's encoding of file names, ascii, lacks a character" in ended.stderr
    assert b"PYTHONUTF8=1" in ended.stderr
