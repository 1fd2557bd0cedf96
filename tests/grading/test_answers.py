"""Which box or boxes hold the answer, and which gold answers cannot be read."""

import json

import pytest

from helpers.paths import DATA
from helpers.waiting import soon
from micota_fast.grading.answers import final_answer, why_unreadable


@pytest.mark.parametrize(
    ("text", "gold", "answer"),
    [
        (r"$x=\boxed{1}$, $y=\boxed{2}$", "(1,2)", "x=1,y=2"),
        (r"\boxed{1} and \boxed{2}", "1,2", "1,2"),
        ("\\boxed{1}\n\n\\boxed{2}", "1,2", "1,2"),
        ("\\boxed{1}\n\n\\boxed{2}", "2", "2"),
        (r"\boxed{1}, \boxed{2}", "2", "1,2"),  # two answers to one question
        (r"\boxed{2}, \boxed{2}", "2", "2"),
        (r"$x=\boxed{1}$, $y=\boxed{2}$", "2", "2"),  # of two that have names the last
        (r"first \boxed{6}, no: \boxed{7}", "6,7", "7"),
        (r"\boxed{1}, \boxed{2, 3}", "2,3", "2, 3"),
        (r"it is $-\boxed{7}$", "7", "-7"),
        (r"so $x = - \boxed{7}$", "7", "-7"),
        (r"- \boxed{7}", "7", "7"),  # an item of a list
        (r"$5-\boxed{7}$", "7", "7"),
        (r"\boxed{1}, \boxed{2", "1", None),
        (r"\boxed{\boxed{3}}", "3", "3"),
        ("none", "3", None),
    ],
)
def test_boxes_that_hold_the_answer(text: str, gold: str, answer: str | None) -> None:
    assert final_answer(text, gold) == answer


def test_many_boxes_take_linear_time() -> None:
    nested = "\\boxed{" * 50_000 + "1" + "}" * 50_000
    with soon():
        for text in ("\\boxed{1}," * 50_000, nested, "-\\boxed{" + "{}" * 200_000 + "}"):
            final_answer(text, "1,2")


@pytest.mark.parametrize(
    "gold", ["", "  ", "$$", ".", "The answer is 5.", "Answer: 5", "So x = 5", "#### 5", "2+3=5\n#### 5", "{1"]
)
def test_gold_answers_that_no_answer_equals_are_named(gold: str) -> None:
    assert why_unreadable(gold)


@pytest.mark.parametrize(
    "gold", ["5", "$5$", r"\boxed{5}", r"\text{Evelyn}", "so", r"\{1\}", r"\text{the answer is no}", "x=5"]
)
def test_gold_answers_that_can_be_read(gold: str) -> None:
    assert why_unreadable(gold) is None


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}")
def test_gold_answers_of_the_benchmarks_can_be_read() -> None:
    for path in (DATA / f"{name}.jsonl" for name in ("aime2024", "amc23", "gsm8k_test", "math500", "olympiadbench")):
        with path.open(encoding="utf-8") as lines:
            assert not [row["id"] for row in map(json.loads, lines) if why_unreadable(row["answer"])]
