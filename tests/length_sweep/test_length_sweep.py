"""The length sweep: its curve by hand and by property, and whole sweeps through real merges and a real server."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import micota_fast
from helpers.checkpoints import make_checkpoint
from helpers.schemas import check_schema
from helpers.waiting import wait_for
from micota_fast.cli import main
from micota_fast.common.records import Completion, Problem, write_rows
from micota_fast.config import loader
from micota_fast.config.recipe import Recipe
from micota_fast.errors import InputError
from micota_fast.length_sweep.curve import Point, bend, isotonic, measure, weight_of
from micota_fast.length_sweep.results import Sweep
from micota_fast.pipeline.graph import build_stages
from micota_fast.pipeline.run import Run
from micota_fast.statistics.intervals import wilson95


def curve(*medians: float, spread: float = 1.0, cut: int | None = None) -> list[Point]:
    """Points at weights 0, 0.1, ...; intervals of `spread` to either side."""
    return [Point(i / 10, m, (m - spread, m + spread), cut is not None and i >= cut) for i, m in enumerate(medians)]


class TestBend:
    def test_a_curve_that_levels_off_has_a_knee(self) -> None:
        points = curve(0, 50, 80, 90, 95, 100)
        assert bend(points, "knee") == points[2]  # above the chord by 30, 40, 30, 15
        assert bend(points, "elbow") is None

    def test_a_curve_that_takes_off_has_an_elbow(self) -> None:
        points = curve(40, 41, 42, 60, 160)
        assert bend(points, "elbow") == points[3]
        assert bend(points, "knee") is None

    def test_an_s_shaped_curve_has_both(self) -> None:
        points = curve(40, 41, 42, 100, 158, 159, 160)
        assert (bend(points, "elbow"), bend(points, "knee")) == (points[2], points[4])

    def test_what_may_be_chance_is_none(self) -> None:
        assert bend(curve(0, 24, 51, 74, 100, spread=2), "knee") is None
        assert bend(curve(0, 50, 80, 100, spread=60), "knee") is None
        unknown = [Point(p.weight, p.median, None, False) for p in curve(0, 50, 80, 100)]
        assert bend(unknown, "knee") is None

    def test_a_curve_that_does_not_rise_has_none(self) -> None:
        for points in (curve(50, 90, 50), curve(90, 50, 20), curve(1, 2)):
            assert bend(points, "knee") is None
            assert bend(points, "elbow") is None


class TestWeight:
    def test_between_two_points(self) -> None:
        points = curve(40, 60, 100)
        assert [weight_of(m, points) for m in (40, 50, 60, 70, 100)] == [0, 0.05, 0.1, 0.125, 0.2]

    def test_the_smallest_where_several_do(self) -> None:
        assert weight_of(60, curve(40, 60, 60, 80)) == 0.1
        assert weight_of(40, curve(40, 40, 60)) == 0

    def test_medians_that_fall_are_levelled(self) -> None:
        points = curve(40, 70, 50, 80)  # 70 and 50 count as 60
        assert weight_of(60, points) == 0.1
        assert weight_of(70, points) == 0.25

    def test_out_of_reach(self) -> None:
        for median in (39, 101):
            with pytest.raises(InputError, match=r"from 0 to 0\.2 gives a median of .*: they reach from 40 to 100"):
                weight_of(median, curve(40, 60, 100))

    def test_beyond_what_was_cut_off(self) -> None:
        points = curve(40, 60, 100, cut=2)
        assert weight_of(60, points) == 0.1
        with pytest.raises(InputError, match=r"beyond weight 0\.1.* at 0\.2 were cut off; raise generate.max_new_toke"):
            weight_of(61, points)

    @given(st.lists(st.integers(0, 50), min_size=1, max_size=12))
    def test_isotonic_is_the_nearest_rising_sequence(self, values: list[int]) -> None:
        levels = isotonic(values)
        assert len(levels) == len(values)
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(levels))
        assert sum(levels) == pytest.approx(sum(values))
        # min-max formula (Barlow et al. 1972)
        n = len(values)
        for i, level in enumerate(levels):
            wanted = max(min(sum(values[lo : hi + 1]) / (hi + 1 - lo) for hi in range(i, n)) for lo in range(i + 1))
            assert level == pytest.approx(wanted)

    @given(st.lists(st.integers(1, 20), min_size=2, max_size=8), st.floats(0, 1))
    def test_it_is_the_inverse_of_the_curve(self, steps: list[int], share: float) -> None:
        medians = [sum(steps[: i + 1]) for i in range(len(steps))]
        weight = weight_of(medians[0] + share * (medians[-1] - medians[0]), curve(*medians))
        at, within = int(weight * 10 + 1e-9), weight * 10 - int(weight * 10 + 1e-9)
        after = medians[min(at + 1, len(medians) - 1)]
        got = medians[at] + within * (after - medians[at])
        assert got == pytest.approx(medians[0] + share * (medians[-1] - medians[0]), abs=20 * 10 * 0.00006)


def test_what_is_said_of_a_weight() -> None:
    def row(i: int, finish: str, tokens: int) -> Completion:
        return Completion(str(i), 0, "?", "7", "", finish, 1, tokens, None)

    rows = [*(row(i, "stop", 10 * (i + 1)) for i in range(6)), row(6, "length", 100), row(7, "abort", 3)]
    got = measure(0.5, 8, rows, 4)
    assert (got.finished, got.truncated, got.aborted) == (0.75, 0.125, 0.125)
    assert (got.answers, got.correct, got.accuracy) == (8, 4, 0.5)
    assert got.wilson95 == wilson95(0.5, 8)
    assert got.tokens.p50 == 40, "of 10 to 60 and 100; the aborted one does not count"
    assert got.median95 == (10, 100)
    assert not got.median_is_cut
    assert measure(0.5, 4, [row(i, "length" if i > 1 else "stop", 9) for i in range(4)], 0).median_is_cut
    with pytest.raises(InputError, match=r"weight 0\.5: the server aborted every answer"):
        measure(0.5, 2, [row(0, "abort", 0)] * 2, 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mergekit file of a model into its base, both of random weights, and problems."""
    folder = tmp_path_factory.mktemp("sweep")
    for seed, name in enumerate(("base", "long")):
        make_checkpoint(folder / name, seed=seed)
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "long", "parameters": {"weight": 1}}],
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(content))
    write_rows(folder / "problems.jsonl", [Problem(str(i), f"What is {i} + {i}?", str(2 * i)) for i in range(9)])
    return folder


@pytest.fixture(scope="module")
def micro() -> Path:
    return Path(micota_fast.__file__).parent / "micro"


def settings(models: Path, out: Path, **changes: Any) -> Path:
    """The sweep's configuration, beside `out`."""
    content = {
        "config": str(models / "merge.yaml"),
        "problems": str(models / "problems.jsonl"),
        "out": str(out),
        "weights": [0, 1],
        "limit": 8,
        "generate": {"max_new_tokens": 24, "serve": {"dtype": "float64", "device": "cpu"}},
    } | changes
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(content))
    return path


def results(out: Path) -> dict[str, bytes]:
    """What a sweep has made, but for logs and what depends on the clock or on file times."""
    paths = (path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix not in (".txt", ".yaml", ".log"))
    passing = ("fingerprints.json", ".lock", "completions.jsonl.meters.json")
    return {str(p.relative_to(out)): p.read_bytes() for p in paths if p.name not in passing}


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"weights": [0.5]}, "`weights` must list at least two"),
            ({"weights": [0.5, 0.5]}, "`weights` must list at least two, all different"),
            ({"weights": [0.5, float("nan")]}, "must be a finite number"),
            ({"target_median_tokens": 0}, "`target_median_tokens` must be at least 1"),
            ({"generate": {"url": "http://127.0.0.1:1"}}, "a sweep makes several"),
            ({"generate": {"url": "http://127.0.0.1:1"}, "limit": 0}, "line"),
            ({"limit": 0}, "`limit` must be at least 1"),
            ({"problems": "nowhere.jsonl"}, "cannot read nowhere.jsonl"),
            ({"config": "nowhere.yaml"}, "cannot read nowhere.yaml"),
        ],
    )
    def test_wrong_settings(
        self, models: Path, tmp_path: Path, changes: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["length-sweep", str(settings(models, tmp_path / "out", **changes))]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_merge_that_fails_is_told_with_its_log(
        self, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = shutil.copytree(models, tmp_path / "models")
        file = folder / "long" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
        save_file(tensors, file, metadata={"format": "pt"})
        assert main(["length-sweep", str(settings(folder, tmp_path / "out"))]) == 2
        said = capsys.readouterr().err
        assert "`micota merge` failed with status 2" in said
        assert "tensor model.norm.weight holds NaN" in said
        assert not list((tmp_path / "out").rglob("*.safetensors"))

    def test_something_else_in_the_models_place(
        self, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "out" / "model").mkdir(parents=True)
        (tmp_path / "out" / "model" / "notes.txt").write_text("keep")
        assert main(["length-sweep", str(settings(models, tmp_path / "out"))]) == 2
        assert "out/model is not a merge" in capsys.readouterr().err
        assert (tmp_path / "out" / "model" / "notes.txt").read_text() == "keep"


@pytest.mark.slow
def test_a_sweep_killed_at_any_time_and_again(models: Path, tmp_path: Path) -> None:
    """Sweeps are killed until one comes through; then all is as if none had been."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["length-sweep", str(settings(models, whole))]) == 0
    sweep = json.loads((whole / "sweep.json").read_text())
    assert [point["weight"] for point in sweep["points"]] == [0, 1]
    check_schema(Sweep, whole / "sweep.json")
    for point in sweep["points"]:
        assert (point["problems"], point["answers"]) == (8, 8)
        assert point["finished"] + point["truncated"] == 1
        assert 0 < point["tokens"]["p50"] <= 24
    assert not list(whole.rglob("*.safetensors")), "models go once they are sampled"
    assert (whole / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| 1 | " in (whole / "sweep.md").read_text()
    made = results(whole)
    logs = {path: path.read_bytes() for path in whole.rglob("log.txt")}
    assert main(["length-sweep", str(tmp_path / "whole.yaml")]) == 0
    assert results(whole) == made
    assert {path: path.read_bytes() for path in whole.rglob("log.txt")} == logs, "nothing was merged or sampled again"

    command = [sys.executable, "-m", "micota_fast", "length-sweep", str(settings(models, cut))]
    # where a kill falls: a path that has just appeared below OUT
    for appeared in ("*/merging", "*/model", "*/completions.jsonl.parts/0*.jsonl", "*/done.json"):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            wait_for(lambda at=appeared: process.poll() is not None or list(cut.glob(at)), 240)  # type: ignore[misc]
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL, f"it came to its end before {appeared}"
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert results(cut) == made
    assert not list(cut.rglob("merging")) + list(cut.rglob(".*.partial")) + list(cut.rglob(".*.tmp"))


def endless(micro: Path, folder: Path) -> tuple[Path, Path, list[int]]:
    """A model that ends its answers, and the same unable to; the tokens that end them."""
    short, long = micro / "checkpoints" / "assistant", folder / "long"
    shutil.copytree(short, long)
    tensors = load_file(long / "model.safetensors")
    end: list[int] = json.loads((short / "generation_config.json").read_text())["eos_token_id"]
    tensors["model.embed_tokens.weight"][end] = 0
    save_file(tensors, long / "model.safetensors", metadata={"format": "pt"})
    return short, long, end


@pytest.mark.slow
def test_a_merge_of_a_wanted_length_in_a_recipe(micro: Path, tmp_path: Path) -> None:
    short, long, _ = endless(micro, tmp_path)
    mergekit = {
        "merge_method": "task_arithmetic",
        "base_model": "short",
        "models": [{"model": "long", "parameters": {"weight": 1}}],
    }
    wanted = {"mergekit": mergekit, "median_tokens": 26, "sweep": {"weights": [0, 1], "limit": 3}}
    problems = str(micro / "problems" / "press-4.jsonl")
    content = {
        "name": "tiny",
        "models": {"short": {"checkpoint": str(short)}, "long": {"checkpoint": str(long)}, "mid": {"merge": wanted}},
        "problems": {"train": {"path": problems}},
        "corpora": {},
        "student": "mid",
        "arms": {},
        "generate": {"max_new_tokens": 60, "serve": {"dtype": "float64", "device": "cpu"}},
        "evaluate": {"benchmarks": [{"name": "easy", "path": problems}]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = loader.load(Recipe, tmp_path / "recipe.yaml")
    stages = build_stages(recipe, tmp_path / "recipe.yaml", tmp_path / "run")
    (sweep,) = (stage for stage in stages if stage.name == "model/mid")
    run = Run([sweep], recipe.launch, tmp_path / "run")
    run.run(lambda _: None)
    folder = tmp_path / "run" / "model" / "mid"
    target = json.loads((folder / "sweep.json").read_text())["target"]
    about = json.loads((folder / "model" / "merge.json").read_text())
    assert about["plan"]["inputs"][0]["weight"] == target["weight"]
    assert about["plan"]["base"] == "assistant"
    assert run.statuses()["model/mid"].state == "done"


@pytest.mark.slow
def test_the_merge_of_a_wanted_length(micro: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, long, end = endless(micro, tmp_path)
    merge: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(short)}
    merge["models"] = [{"model": str(long), "parameters": {"weight": 1}}]
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(merge))
    out = tmp_path / "out"
    sampling = {"max_new_tokens": 60, "serve": {"dtype": "float64", "device": "cpu"}}
    problems = str(micro / "problems" / "press-4.jsonl")
    changes = {"problems": problems, "limit": 9, "keep_models": True, "generate": sampling, "target_median_tokens": 59}
    path = settings(tmp_path, out, **changes)

    assert main(["length-sweep", str(path)]) == 2
    assert "beyond weight 0, but half of the answers at 1 were cut off" in capsys.readouterr().err
    check_schema(Sweep, out / "sweep.json")
    sweep = json.loads((out / "sweep.json").read_text())
    first, last = sweep["points"]
    assert first["finished"] == 1
    assert first["accuracy"] > 0.5 > last["accuracy"]
    assert (last["truncated"], last["tokens"]["p50"], last["median_is_cut"]) == (1, 60, True)
    assert sweep["target"]["weight"] is None
    assert "were cut off" in (out / "sweep.md").read_text()
    assert not (out / "model").exists()
    kept = {path.parent.name.partition("~")[0]: path for path in out.glob("weight-*/model")}
    assert load_file(kept["weight-1"] / "model.safetensors")["model.embed_tokens.weight"][end].abs().max() == 0

    logs = {path: path.read_bytes() for path in out.rglob("log.txt")}
    wanted = f"target_median_tokens={math.ceil(first['tokens']['p50'])}"
    assert main(["length-sweep", str(path), "--set", wanted]) == 0
    sweep = json.loads((out / "sweep.json").read_text())
    assert 0 <= sweep["target"]["weight"] < 0.1
    about = json.loads((out / "model" / "merge.json").read_text())
    assert about["plan"]["inputs"][0]["weight"] == sweep["target"]["weight"]
    made = results(out)
    assert main(["length-sweep", str(path), "--set", wanted]) == 0
    assert results(out) == made
    assert {path: path.read_bytes() for path in out.rglob("log.txt")} == logs, "nothing was sampled again"
    assert (out / "model-log.txt").read_text().count("$ ") == 1, "nor merged"
