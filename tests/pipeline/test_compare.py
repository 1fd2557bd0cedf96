"""`micota compare`: what differs between two runs is named, with both values; wrong inputs are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from micota_fast.cli import main
from micota_fast.common.json_io import write_json
from micota_fast.pipeline.compare import differing, read_run
from micota_fast.pipeline.record import DONE, MAKING


def stage(run: Path, name: str, verb: str, options: dict[str, Any], record: str = DONE, **more: Any) -> Path:
    folder = run / name
    folder.mkdir(parents=True)
    identity = {"verb": verb, "options": options, "inputs": []} | more.pop("identity", {})
    write_json(folder / record, {"identity": identity, "outputs": more.get("outputs", {}), "seconds": 1.0})
    return folder


def made_run(run: Path, lr: float, accuracy: float, weight: float, corpus: str) -> Path:
    """Write what a run leaves: a corpus, a merge, trainings of two seeds, one stage set aside, and a report."""
    stage(run, "corpus/mid", "filter", {"rules": [{"max": 5}]}, outputs={"corpus.jsonl": corpus})
    merge = {"files": {"mergekit.yaml": f"models:\n- model: sha256:aa\n  parameters:\n    weight: {weight}\n"}}
    stage(run, "model/mid", "merge", {"seed": 1}, identity=merge)
    stage(run, "model/mid~0123456789", "merge", {"seed": 9})
    for seed in (1, 2):
        data = {"seed": seed, "lr": lr, "compile": False, "data": f"sha256:{corpus}", "model": "sha256:base"}
        folder = stage(run, f"student/mid-seed{seed}", "train", data | {"out": f"RUN/student/mid-seed{seed}"})
        rows = ({"step": step, "loss": lr * seed / step} for step in range(1, 9))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"mean": accuracy, "sd": 0.01, "seeds": [accuracy], "interval95": [0.0, 1.0]}
    arms = {"mid": {"average": one, "benchmarks": {"gsm": one | {"sd": None}}}}
    report = {"arm_order": ["mid"], "benchmark_order": ["gsm"], "problems": {"gsm": 10}, "arms": arms}
    write_json(run / "report/report.json", report)
    write_json(run / "fingerprints.json", {})
    return run


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return made_run(tmp_path / "a", 0.5, 0.6, 0.9, "c0"), made_run(tmp_path / "b", 0.25, 0.7, 0.5, "c1")


def test_options_that_differ_stand_once_with_the_stages_where_they_do(runs: tuple[Path, Path]) -> None:
    found = differing(*(read_run(str(run)) for run in runs))
    assert [tuple(of) for of in found] == [
        ("lr", ("0.5", "0.25"), ["student/mid-seed1", "student/mid-seed2"]),
        ("mergekit.yaml: models.0.parameters.weight", ("0.9", "0.5"), ["model/mid"]),
    ], "the corpus that the run made itself is no difference of its own"


def test_both_runs_stand_side_by_side(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    stage(runs[1], "align", "align", {}, MAKING)
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "| lr | 0.5 | 0.25 | student/mid (2 seeds) |" in said
    assert f"Only in {runs[1]}: align.".replace("_", "\\_") in said
    assert "| mid | 60.0 ± 1.0 | 70.0 ± 1.0 | +10.0 | +10.0 |" in said
    assert "| student/mid | 8 → 8 | 0.750 → 0.375 | 0.375 → 0.188 |" in said


def test_each_round_of_a_training_is_compared_over_its_seeds(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for run, loss in zip(runs, (3.0, 2.0), strict=True):
        for seed in (1, 2):
            folder = stage(run, f"student/mid-seed{seed}-round1", "train", {"seed": seed, "lr": loss})
            (folder / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {loss * seed}}}\n')
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "| lr | 3.0 | 2.0 | student/mid-round1 (2 seeds) |" in said
    assert "| student/mid-round1 | 1 → 1 | 4.50 → 3.00 |" in said


def test_the_page_draws_each_training_of_both_runs_and_has_the_same_bytes_twice(runs: tuple[Path, Path]) -> None:
    page = runs[0].parent / "page.html"
    assert main(["compare", *map(str, runs), "--out", str(page)]) == 0
    first = page.read_bytes()
    assert first.count(b"<svg") == 1
    assert b"Training loss of student/mid: first run ends at 0.094, second ends at 0.047." in first
    assert main(["compare", *map(str, runs), "--out", str(page)]) == 0
    assert page.read_bytes() == first


def test_a_run_without_a_report_or_a_training_is_compared_without_them(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[1] / "report/report.json").unlink()
    for seed in (1, 2):
        (runs[1] / f"student/mid-seed{seed}/metrics.jsonl").unlink()
    assert main(["compare", *map(str, runs)]) == 0
    said = capsys.readouterr().out
    assert "Options that differ" in said
    assert "**Arms**" not in said
    assert "**Training loss**" not in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("same", "are the same folder"),
        ("no run", "contains no fingerprints.json"),
        ("empty", "contains no stage that has begun"),
        ("damaged", "done.json"),
        ("other report", "report.json: key 'arms.mid.average.mean'"),
    ],
)
def test_wrong_inputs_are_refused_by_name(
    wrong: str, said: str, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = runs
    if wrong == "same":
        second = first / ".." / "a"
    elif wrong in ("no run", "empty"):
        second = first.parent / "c"
        second.mkdir()
        if wrong == "empty":
            write_json(second / "fingerprints.json", {})
    elif wrong == "damaged":
        (second / "model/mid" / DONE).write_text("{")
    else:
        text = (second / "report/report.json").read_text()
        (second / "report/report.json").write_text(text.replace('"mean": 0.7', '"mean": "0.7"'))
    assert main(["compare", str(first), str(second)]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert str(second) in complaint
