"""What is done stays done wherever the run's folder lies; what is damaged there is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from micota_fast.config.merge import MergeConfig
from micota_fast.config.recipe import LaunchConfig
from micota_fast.errors import InputError
from micota_fast.pipeline.run import Run
from micota_fast.pipeline.stage import Artefact, Stage

ODD = ["d/\u00e9", "a long way down " * 12, "it's: a #1 {folder}", "\u6570 \U0001f600"]


def merge_run(folder: Path) -> Run:
    """One merge of two models in the run's folder, as a recipe makes it."""
    models = [Artefact(str(folder / name)) for name in ("base", "other")]
    content = {
        "merge_method": "linear",
        "base_model": models[0].location,
        "models": [{"model": model.location, "parameters": {"weight": 1.0}} for model in models],
    }
    settings = MergeConfig(config=str(folder / "merged" / "mergekit.yaml"), out=str(folder / "merged" / "model"))
    files = {"mergekit.yaml": yaml.safe_dump(content, sort_keys=False)}
    return Run([Stage("merged", "merge", settings, tuple(models), ("model",), files)], LaunchConfig(), folder)


def done(folder: Path) -> Run:
    """The same with its merge done."""
    for name in ("base", "other", "merged/model"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)
    run = merge_run(folder)
    identity = run.statuses()["merged"].identity
    record = {
        "identity": identity,
        "outputs": {"model": run.fingerprints.of(folder / "merged" / "model")},
        "seconds": 1.0,
    }
    (folder / "merged" / "done.json").write_text(json.dumps(record))
    assert run.statuses()["merged"].state == "done"
    return run


@pytest.mark.parametrize("place", ODD)
def test_a_moved_run_has_nothing_to_do(place: str, tmp_path: Path) -> None:
    done(tmp_path / "run")
    moved = tmp_path / place / "run"
    moved.parent.mkdir(parents=True)
    shutil.move(tmp_path / "run", moved)
    assert merge_run(moved).statuses()["merged"].state == "done"


def test_a_run_that_was_done_before_files_were_parsed_stays_done(tmp_path: Path) -> None:
    """Where YAML neither folds nor escapes a path, the identity is the text with the contents in place of paths."""
    identity = done(tmp_path / "run").statuses()["merged"].identity
    assert identity is not None
    contents = identity["inputs"]
    entries = "".join(f"- model: {content}\n  parameters:\n    weight: 1.0\n" for content in contents)
    text = f"merge_method: linear\nbase_model: {contents[0]}\nmodels:\n{entries}"
    assert identity["files"] == {"mergekit.yaml": text}


SHAPES: list[Any] = [
    [],
    {},
    {"identity": 5},
    {"identity": {}, "outputs": [], "seconds": 1},
    {"identity": {}, "outputs": {"model": 5}, "seconds": 1},
    {"identity": {}, "outputs": {}, "seconds": "long"},
    {"identity": {}, "outputs": {}},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["done.json", "making.json"])
def test_a_record_of_another_shape_is_named(name: str, shape: Any, tmp_path: Path) -> None:
    done(tmp_path / "run")
    (tmp_path / "run" / "merged" / "done.json").unlink()
    path = tmp_path / "run" / "merged" / name
    path.write_text(json.dumps(shape))
    if name == "making.json" and isinstance(shape, dict) and isinstance(shape.get("identity"), dict):
        assert merge_run(tmp_path / "run").statuses()["merged"].state == "stale"  # it says no more than that
        return
    with pytest.raises(InputError, match=rf"{path}.*delete .* to run its stage again"):
        merge_run(tmp_path / "run").statuses()


def test_a_damaged_memory_of_fingerprints_only_costs_time(tmp_path: Path) -> None:
    done(tmp_path / "run")
    for text in ("{", "[" * 100_000, "[]", json.dumps({str(tmp_path / "run" / "base" / "file"): 5})):
        (tmp_path / "run" / "fingerprints.json").write_text(text)
        assert merge_run(tmp_path / "run").statuses()["merged"].state == "done"


def test_a_name_that_is_too_long_and_a_place_that_is_no_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"):
        merge_run(tmp_path / ("n" * 300)).statuses()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file"):
        merge_run(tmp_path / "file").run(print)
