"""Letters of a multiple choice, by its own rule and by math-verify's."""

import pytest

from micota_fast.grading.choices import grade_choice, why_unreadable_as_choice
from micota_fast.grading.grader import Grader

ANSWERS = {
    r"So \boxed{C}.": "correct",
    r"\boxed{(C)}": "correct",
    r"\boxed{\text{C}}": "correct",
    r"\boxed{\text{(C)}}": "correct",
    r"\boxed{\textbf{C}}": "correct",
    r"\boxed{\mathbf{C}}": "correct",
    r"$\boxed{\mathrm{(C)}}$": "correct",
    r"\boxed{C.}": "correct",
    r"\boxed{C) 10 m}": "correct",
    r"\boxed{\text{C) ten metres}}": "correct",
    r"\boxed{A} no, \boxed{C}": "correct",
    r"\boxed{B}": "wrong",
    r"\boxed{(D)}": "wrong",
    r"\boxed{10}": "wrong",
    r"\boxed{\text{ten metres}}": "wrong",
    r"\boxed{B, C}": "wrong",
    "It is C.": "no_answer",
    r"\boxed{}": "no_answer",
}


def test_a_letter_counts_however_it_is_set() -> None:
    assert {text: grade_choice(text, "C").status for text in ANSWERS} == ANSWERS
    with Grader(1) as grader:
        strict = grader.grade([(text, "C") for text in ANSWERS])
    assert {text: verdict.status for text, verdict in zip(ANSWERS, strict, strict=True)} == ANSWERS


@pytest.mark.parametrize(("gold", "unreadable"), [("C", False), ("c", True), ("(C)", True), ("", True), ("10", True)])
def test_a_gold_answer_that_no_letter_equals_is_named(gold: str, unreadable: bool) -> None:
    assert (why_unreadable_as_choice(gold) is not None) == unreadable
