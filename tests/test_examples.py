"""The files of examples/ are read, and the commands that stand in them run, in their order, as they stand."""

import json
import re
import shutil
from pathlib import Path

import pytest

from helpers.paths import ROOT
from micota_fast.cli import main

EXAMPLES = ROOT / "examples"
COMMANDS = [
    match[1].split()
    for name in ("train", "merge", "generate", "evaluate", "recipe")
    for match in re.finditer(r"^#     micota (.*)$", (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"), re.M)
]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder that looks like the repository to the examples, and has none of its runs."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    (tmp_path / "micota_fast").symlink_to(ROOT / "micota_fast")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_example_has_a_command() -> None:
    named = {word for words in COMMANDS for word in words if word.startswith("examples/")}
    assert named == {f"examples/{file.name}" for file in EXAMPLES.glob("*.yaml")}
    assert len(named) == 5


def test_the_recipe_is_read_and_its_stages_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "examples/recipe.yaml", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "missing: " not in said
    assert "student/large-seed2" in said


@pytest.mark.slow
def test_the_commands_run_in_their_order(copy: Path) -> None:
    for words in COMMANDS:
        if words[:2] != ["run", "examples/recipe.yaml"]:  # as a recipe's runs have tests of their own
            assert main(words) == 0, words
    runs = copy / "runs" / "examples"
    assert (runs / "train" / "model" / "model.safetensors").is_file()
    assert (runs / "merged" / "model.safetensors").is_file()
    answers = [json.loads(line) for line in (runs / "answers.jsonl").read_text().splitlines()]
    assert {row["id"] for row in answers} == {f"train-{number:03}" for number in range(8)}
    assert json.loads((runs / "evaluation" / "results.json").read_text())["benchmarks"].keys() == {"press-4", "press-5"}
