"""The experiment in the micro worlds: its rule for the merge's weight, and recipes that can be run."""

import dataclasses
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import micro_worlds as bench

from micota_fast.cli import main
from micota_fast.length_sweep.results import AnswerTokens, Measurement, Sweep

POINT = Measurement(
    weight=0.5,
    problems=120,
    answers=120,
    finished=1.0,
    truncated=0.0,
    aborted=0.0,
    tokens=AnswerTokens(mean=80.0, p10=1.0, p25=1.0, p50=1.0, p75=1.0, p90=1.0),
    median95=None,
    median_is_cut=False,
    correct=120,
    accuracy=1.0,
    wilson95=(0.9, 1.0),
)


def sweep(*points: tuple[float, float, float]) -> Sweep:
    """Of (weight, mean tokens, accuracy)."""
    measured = (
        dataclasses.replace(
            POINT, weight=weight, tokens=dataclasses.replace(POINT.tokens, mean=tokens), accuracy=accuracy
        )
        for weight, tokens, accuracy in points
    )
    return Sweep(
        method="dare_ties",
        seed=1,
        points=tuple(measured),
        knee=None,
        elbow=None,
        target=None,
        model=None,
        versions={},
    )


def test_the_weight_is_chosen_by_length_in_logarithm_among_those_that_are_right() -> None:
    # 80 lies 20 below 100 and 130 lies 30 above it; by ratio 80 is nearer, and 101 is too often wrong.
    assert bench.choose_weight(sweep((0.5, 80, 0.95), (0.6, 101, 0.89), (0.7, 130, 1.0)), 100.0) == 0.5
    assert bench.choose_weight(sweep((0.5, 75, 0.95), (0.7, 130, 1.0)), 100.0) == 0.7  # 0.75 against 1 / 1.3
    with pytest.raises(SystemExit, match="P4"):
        bench.choose_weight(sweep((0.5, 80, 0.5)), 100.0)


@pytest.mark.parametrize("arms", [False, True])
def test_its_recipe_trains_students_only_if_asked(
    arms: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = bench.write_recipe(tmp_path / "world-0", bench.MICRO, 0.55, arms)
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    students = {line.split()[0] for line in told.splitlines() if line.startswith("student/")}
    assert len(students) == (20 if arms else 0)
    assert "model/assistant-mid" in told
