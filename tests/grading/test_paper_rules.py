r"""The paper's string rules: verdicts recorded from the originals, and what they get wrong on purpose."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.waiting import soon
from micota_fast.grading.grader import Status, Verdict
from micota_fast.grading.paper_rules import equivalent, grade_by_string, grade_last_number, normalise

# Inputs written for this test; verdicts of hendrycks_math_500 and AIME (utils.py) and of gsm8k_cot_zeroshot's filter
# `flexible-extract` with its metric, in lm-evaluation-harness as Small-Model-Learnability-Gap has it at 814cf97, run on
# Python 3.11. Where the original stops by an AssertionError, `wrong` is recorded.
CASES = [
    json.loads(line)
    for line in Path(__file__).with_name("paper_rules_cases.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["completion"] + " / " + case["gold"])
def test_as_recorded_from_the_originals(case: dict[str, str]) -> None:
    completion, gold = case["completion"], case["gold"]
    assert grade_by_string(completion, gold).status == case["math500"]
    assert grade_by_string(completion, gold, trim_zeros=True).status == case["trim_zeros"]
    assert grade_last_number(completion, gold).status == case["last_number"]


@pytest.mark.parametrize(
    ("answer", "gold", "status"),
    [
        (r"\dfrac12", r"\frac{1}{2}", "correct"),
        ("0.5", "1/2", "correct"),
        ("x = 5", "5", "correct"),
        ("xy=5", "5", "correct"),
        ("xy = 5", "5", "wrong"),
        ("0.25", r"\frac{1}{4}", "wrong"),
        (r"\sqrt{12}", r"2\sqrt{3}", "wrong"),
        ("1,000", "1000", "wrong"),
        (r"\text{(B)}", "B", "wrong"),
        (r"12\text{ cm}", "12", "correct"),
        (r"12\text{cm}", "12", "wrong"),
        (r"50\%", "50", "correct"),
        ("50%", "50", "wrong"),
        ("a/b", " a/b", "wrong"),  # not integers: raw strings
        ("12.50", "12.5", "wrong"),
    ],
)
def test_what_the_rule_of_math_calls_equal(answer: str, gold: str, status: Status) -> None:
    assert grade_by_string(f"So \\boxed{{{answer}}}.", gold) == Verdict(status, answer)


def test_which_box() -> None:
    assert grade_by_string(r"\boxed{1} and \fbox{2}", "1") == Verdict("correct", "1")  # \boxed before a later \fbox
    assert grade_by_string(r"\boxed{3}, or $\boxed 7$ or \boxed{4}", "7") == Verdict("correct", "7")
    assert grade_by_string(r"\boxed{\{1\}}", r"\{1\}") == Verdict("correct", r"\{1\}")
    assert grade_by_string(r"\boxed{a\}b}", r"a\}b") == Verdict("wrong", "a\\")
    assert grade_by_string(r"\boxed{1} then \boxed{\frac{1", "1") == Verdict("no_answer", None)
    assert grade_by_string(r"\boxed{\fbox{7}}", "7") == Verdict("wrong", r"\boxed{\fbox{7}}")
    assert grade_by_string("no box: 7", "7") == Verdict("no_answer", None)


def test_trimmed_zeros() -> None:
    assert [equivalent("025.00", "25", trim) for trim in (False, True)] == [False, True]
    assert equivalent("0", "000", trim_zeros=True)
    assert equivalent("5.0.3", "5", trim_zeros=True)


def test_last_number() -> None:
    assert grade_last_number("She has 7 + 11 = $18.", "18") == Verdict("correct", "$18.")
    assert grade_last_number("It is 1,234, not 7", "1234").status == "wrong"
    assert grade_last_number("18 dollars...", "18") == Verdict("wrong", "...")
    assert grade_last_number("#### 72", "... so #### 72").status == "correct"
    assert grade_last_number("none at all", "72") == Verdict("no_answer", None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\\sqrt", "root"),
        ("1\\text{ m }2\\text{ cm}", "units"),
        ("a/b", "invalid literal"),
        ("\\frac", "fraction"),
        ("1/" + "2" * 5000, "digits"),
    ],
)
def test_normalise_fails_where_the_original_does(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        normalise(text)
    assert equivalent(text, text)


@given(st.text(alphabet="\\{}$ .,/=0123456789abfrcsqtboxed%^#-\n", max_size=60), st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_never_raises(text: str, gold: str) -> None:
    for completion in (text, f"\\boxed{{{text}}}", f"\\boxed {text}"):
        for trim in (False, True):
            grade_by_string(completion, gold, trim)
        grade_last_number(completion, gold)


@pytest.mark.parametrize(
    "unit", ["{", "}", "\\boxed", "\\boxed{", "\\frac", "\\frac1", "\\sqrt2", "1,", "$", "/", "0", "."]
)
def test_linear(unit: str) -> None:
    with soon():
        long = unit * (500_000 // len(unit))
        grade_by_string(f"\\boxed{{{long}}}", long, trim_zeros=True)
        grade_last_number(long, long)
