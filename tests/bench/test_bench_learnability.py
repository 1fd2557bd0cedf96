"""bench/learnability.py: its recipe is one that `micota run` takes, and its statistics are those that it tells of."""

import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import learnability as bench

from micota_fast.cli import main
from micota_fast.micro import build

MODELS = ROOT / "micota_fast" / "micro" / "checkpoints"


@pytest.mark.parametrize("quick", [False, True])
def test_its_recipe_can_be_run(quick: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build.write_problems(tmp_path / "problems", 1)
    elders = {name: MODELS / name for name in ("teacher", "assistant")}
    recipe = bench.write_recipe(tmp_path, elders, MODELS / "student", [1, 2], quick)
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "absent" not in told
    corpora = ["long", "short", "bare"]
    if not quick:
        corpora += [*(f"mid-{weight}" for weight in bench.WEIGHTS), "long-1-short-4", "mid-1-short-1", "own"]
    assert {line.split()[0] for line in told.splitlines() if line.startswith("student/")} == {
        f"student/{corpus}-seed{seed}" for corpus in corpora for seed in (1, 2)
    }
    assert (tmp_path / "bare.jsonl").read_text().count("\\\\boxed{") == 600


def rows_of(world: int, student: str, nats: list[float], accuracy: list[float]) -> list[dict[str, object]]:
    names = [bench.BARE, *(f"corpus{i}" for i in range(1, len(nats)))]
    others = dict.fromkeys(bench.MEASURES[1:], 1.0)
    return [
        {"world": world, "student": student, "corpus": name, **others, "nats_per_answer": n, "accuracy": a}
        for name, n, a in zip(names, nats, accuracy, strict=True)
    ]


def test_less_is_easier_and_bare_answers_are_told_of_apart() -> None:
    rows = rows_of(0, "a", [1, 2, 3, 4], [0, 90, 80, 70]) + rows_of(1, "a", [1, 2, 3, 4], [0, 70, 80, 90])
    found = {(row["summary"], row["with_bare_answers"]): row for row in bench.summaries(rows)}
    score = found["nats_per_answer", False]
    assert (score["spearman"], score["spearman_min"], score["spearman_max"]) == (0.0, -1.0, 1.0)
    assert score["points_lost"] == (0 + 20) / 2
    half = 12.706 * 2**0.5 / 2**0.5  # of two worlds that say the opposite
    assert score["spearman_95"] == pytest.approx([-half, half], rel=1e-4)
    assert found["perplexity", False]["score_ahead"] == 0.0
    assert found["perplexity", False]["points_lost"] == 10  # of equals the mean: 90 - 80
    assert found["nats_per_answer", True]["points_lost"] == 90.0
    assert found["perplexity", False]["spearman"] == 0.0
