"""Accuracy within a token budget is what an evaluation with that limit would have found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.report_runs import made, write_evaluation
from micota_fast.config.report import ReportConfig
from micota_fast.evaluation.results import GradedAnswer
from micota_fast.report.budget import budget_curves, ladder, within
from micota_fast.report.inputs import load_inputs
from micota_fast.report.summary import summarise

# (tokens, correct) of three problems, two samples each
SHORT = [[(10, True), (12, False)], [(14, False), (11, False)], [(9, True), (10, True)]]
LONG = [[(90, True), (80, True)], [(70, True), (100, True)], [(60, True), (95, False)]]


def evaluation(folder: Path, answers: list[list[tuple[int, bool]]]) -> str:
    asked: dict[str, Any] = {"problem": "?", "answer": "1", "completion": "...", "finish_reason": "stop"}
    asked |= {"prompt_tokens": 1, "seed": None}
    rows = [
        GradedAnswer(id=f"p{p}", sample=s, outcome="correct" if right else "wrong", completion_tokens=tokens, **asked)
        for p, of_problem in enumerate(answers)
        for s, (tokens, right) in enumerate(of_problem)
    ]
    return write_evaluation(folder, {"math": rows})


@pytest.fixture
def config(tmp_path: Path) -> ReportConfig:
    base = evaluation(tmp_path / "base", [[(8, False)] * 2] * 3)
    arms = {"short": [evaluation(tmp_path / "short", SHORT)], "long": [evaluation(tmp_path / "long", LONG)]}
    return ReportConfig(title="Budgets", out=str(tmp_path / "out"), base=base, arms=arms)


@pytest.mark.parametrize("limit", [8, 9, 10, 64, 80, 99, 100])
def test_answers_that_end_later_count_as_wrong(config: ReportConfig, limit: int) -> None:
    cut = within(load_inputs(config), limit)
    assert cut is not None
    averages = {arm.name: arm.average.mean for arm in summarise(cut).arms}
    assert averages == {
        name: sum(right and tokens <= limit for of in answers for tokens, right in of) / 6
        for name, answers in {"base": [], "short": SHORT, "long": LONG}.items()
    }


def test_the_limits_reach_from_the_shortest_correct_answer_to_the_longest(config: ReportConfig) -> None:
    inputs = load_inputs(config)
    assert ladder(inputs) == [8, 12, 16, 24, 32, 48, 64, 96, 128]
    curves = budget_curves(inputs)
    assert curves["short"] == [(8, 0.0)] + [(limit, 0.5) for limit in ladder(inputs)[1:]]
    assert curves["long"][-1] == (128, pytest.approx(5 / 6))
    assert curves["long"] == sorted(curves["long"])


def test_the_report_draws_it_where_rows_are_there(config: ReportConfig, tmp_path: Path) -> None:
    _, _, html = made(config)
    assert "long 0.0% at 8, 0.0% at 12" in html
    (tmp_path / "long" / "rows" / "math.jsonl").unlink()
    _, _, html = made(replace(config, out=str(tmp_path / "without")))
    assert "token budget" not in html
