"""What the method presupposes: each condition by hand on small files, and the reason where it cannot be known."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.report_runs import alignment, made, rows_of, written
from micota_fast.common.records import Completion, Problem, write_rows
from micota_fast.config.report import ReportConfig, TrainingAnswersConfig
from micota_fast.errors import InputError

CONDITIONS = ("P1", "P2", "P3", "P4", "P5")
PROBLEMS = 20
LENGTHS = {"long": 400, "mid": 130, "short": 40, "student": 40}  # of the first answer, one more with each
RIGHT = {"long": PROBLEMS, "mid": PROBLEMS - 2, "short": 14, "student": 10}  # the first ones, which are the easier


def answers(folder: Path, part: str, right: int, tokens: int, graded: bool = True) -> str:
    """Write a filter's two files: `right` accepted answers to the first problems, the rest wrong."""
    rows = [
        Completion(
            id=f"p{i:02}",
            sample=0,
            problem="?",
            answer="1",
            completion="…",
            finish_reason="stop",
            prompt_tokens=1,
            completion_tokens=tokens + i,
            seed=None,
            correct=(i < right) if graded else None,
            model=part,
        )
        for i in range(PROBLEMS)
    ]
    path = folder / f"{part}.corpus.jsonl"
    write_rows(path, rows[:right])
    write_rows(f"{path}.rejects.jsonl", rows[right:])
    return str(path)


def world(folder: Path, **changes: Any) -> ReportConfig:
    """A report on answers by which every condition holds; `changes`: part -> options of its `answers`."""
    config = written(folder)
    files = {
        part: answers(folder, part, **({"right": RIGHT[part], "tokens": tokens} | changes.get(part, {})))
        for part, tokens in LENGTHS.items()
    }
    return dataclasses.replace(config, training_answers=TrainingAnswersConfig(answers=files))


def table(config: ReportConfig) -> dict[str, list[str]]:
    """First words of a condition -> whether it held, what was measured, the threshold."""
    markdown, numbers, _ = made(config)
    rows = rows_of(markdown[markdown.index("**What the method presupposes") :].split("\n\n")[1])
    found = {name: [cell.replace("*", "").replace("\\", "") for cell in cells[1:]] for name, cells in rows.items()}
    assert len(numbers["preconditions"]) == len(found) - 2  # without the heads and the rule below them
    return found


def row(config: ReportConfig, start: str) -> list[str]:
    (found,) = [cells for name, cells in table(config).items() if name.startswith(start)]
    return found


def test_a_world_in_which_all_hold(tmp_path: Path) -> None:
    found = table(world(tmp_path))
    verdicts = {name: cells[0] for name, cells in found.items() if name[:2] in CONDITIONS}
    assert [verdict for name, verdict in verdicts.items() if not name.startswith("P5")] == ["yes"] * 7
    by_name = {name[:9]: cells for name, cells in found.items()}
    # The harder half, the longest for the teacher, are the last ten: 10, 4 and 0 are right.
    measured = "+60.0 points (long 100.0, short 40.0, student 0.0 of 10 problems)"
    assert by_name["P1 Long m"][1:] == [measured, "at least +15.0 points"]
    assert by_name["P2 Long t"][1:] == ["8.3 × (410 to 50)", "at least 4 ×"]  # 409.5 and 49.5 on average
    assert by_name["P2 Mid to"][1:] == ["−2% (140 to 142)", "within ±30%"]
    assert by_name["P4 Merged"][1:] == ["90.0%", "at least 90%"]


@pytest.mark.parametrize(
    ("changes", "start", "verdict"),
    [
        ({"short": {"right": 19}}, "P1", "no"),
        ({"student": {"right": 19}}, "P1", "no"),
        ({"long": {"tokens": 120}}, "P2 Long", "no"),
        ({"mid": {"tokens": 180}}, "P2 Mid", "no"),
        ({"mid": {"tokens": 80}}, "P2 Mid", "no"),
        ({"student": {"tokens": 90}}, "P3 Untrained student's answers", "no"),
        ({"mid": {"right": 17}}, "P4", "no"),
        ({"mid": {"right": 18}}, "P4", "yes"),
    ],
)
def test_each_fails_by_its_own_threshold(
    tmp_path: Path, changes: dict[str, dict[str, int]], start: str, verdict: str
) -> None:
    assert row(world(tmp_path, **changes), start)[0] == verdict


def test_the_harder_half_goes_by_level_where_problems_have_one(tmp_path: Path) -> None:
    config = world(tmp_path)
    assert config.training_answers is not None
    problems = tmp_path / "problems.jsonl"  # the first ones, which all answer rightly, are the harder here
    write_rows(problems, [Problem(f"p{i:02}", "?", "1", level=9 if i < 10 else 1) for i in range(PROBLEMS)])
    config.training_answers.problems = str(problems)
    assert row(config, "P1")[:2] == ["no", "0.0 points (long 100.0, short 100.0, student 100.0 of 10 problems)"]


def test_a_benchmark_at_chance_or_at_the_top_is_named(tmp_path: Path) -> None:
    config = dataclasses.replace(world(tmp_path), chance={"gsm": 10.0, "aime": 20.0})  # base: 40% and 20%
    assert row(config, "P3 Benchmarks")[:2] == ["no", "1 of 2"]
    assert "aime 20.0%" in made(config)[0]
    assert row(dataclasses.replace(config, chance={}), "P3 Benchmarks")[:2] == ["yes", "0 of 2"]


def test_what_is_missing_is_named_and_not_judged(tmp_path: Path) -> None:
    config = written(tmp_path)
    found = table(config)
    assert {name[:3]: cells[0] for name, cells in found.items()}["P1 "] == "–"
    markdown, _, html = made(config)
    assert "P1 Long more accurate than short, harder half: not known, because the run has no long and no short and" in (
        markdown
    )
    assert "no alignment of a corpus has the rate" in html
    ungraded = world(tmp_path, short={"graded": False})
    assert row(ungraded, "P1")[:2] == ["–", "–"]
    assert "because the short answers were not graded." in made(ungraded)[0]


def test_rates_of_first_choices_are_shown_without_a_verdict(tmp_path: Path) -> None:
    config = written(tmp_path)
    path = tmp_path / "mid.top1.json"
    alignment(path, 90.0)
    data = json.loads(path.read_text())
    data["learnability"]["top1"] = 0.9876
    path.write_text(json.dumps(data))
    config = dataclasses.replace(config, corpora={"mid": {"alignment": str(path)}})
    assert row(config, "P5") == ["–", "98.8%", "–"]
    assert "Top-1 (% of tokens)" in made(config)[0]


def test_parts_that_are_unknown_or_files_that_are_gone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`answers` names 'mix'; known: long, mid, short, student"):
        TrainingAnswersConfig(answers={"mix": "x"})
    config = world(tmp_path)
    (tmp_path / "mid.corpus.jsonl.rejects.jsonl").unlink()
    with pytest.raises(InputError, match=r"mid\.corpus\.jsonl\.rejects\.jsonl"):
        made(config)
