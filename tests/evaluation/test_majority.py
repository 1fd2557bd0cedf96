"""maj@k by the grader's own classes of equal answers."""

from collections.abc import Sequence

from micota_fast.common.records import Completion
from micota_fast.evaluation.majority import majority_correct
from micota_fast.grading.grader import Grader, Verdict
from micota_fast.grading.paper_rules import grade_by_string

# Four answers to a problem; gold; whether the most frequent is right by math-verify and by strings. "": no answer.
CASES = {
    "one of three": (["7", "3", "7", "5"], "7", True, True),
    "outvoted": (["7", "3", "3", "5"], "7", False, False),
    "of equals the first, which is right": (["7", "3", "3", "7"], "7", True, True),
    "of equals the first, which is wrong": (["3", "7", "7", "3"], "7", False, False),
    "all differ": (["3", "7", "5", "6"], "7", False, False),
    "spelled differently": (["3", "3", "0.25", r"\frac14"], "1/4", False, False),
    "equal values outvote": (["3", "0.25", r"\frac14", "1/4"], "0.25", True, False),
    "what is no answer has no vote": (["", "", "", "7"], "7", True, True),
    "no vote": (["", "", "", ""], "7", False, False),
    "what was broken off has no vote": (["abort 3", "content_filter 3", "7", "5"], "7", True, True),
    "what was cut off has": (["length 3", "length 3", "7", "5"], "7", False, False),
}


def row(problem: str, sample: int, given: str) -> Completion:
    reason, _, answer = given.rpartition(" ")
    text = f"It is \\boxed{{{answer}}}." if answer else "I do not know."
    return Completion(problem, sample, "?", CASES[problem][1], text, reason or "stop", 1, 1, None)


def test_the_most_frequent_answer_counts_by_each_rule() -> None:
    rows = [row(name, i, given) for name, case in CASES.items() for i, given in enumerate(case[0])]
    pairs = [(of.completion, of.answer) for of in rows]

    def by_string(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        return [grade_by_string(*pair) for pair in pairs]

    strings = majority_correct(rows, by_string(pairs), 4, by_string)
    with Grader(1) as grader:
        strict = majority_correct(rows, grader.grade(pairs), 4, grader.grade)
    found = dict(zip(CASES, zip(strict, strings, strict=True), strict=True))
    assert found == {name: case[2:] for name, case in CASES.items()}


def test_answers_are_compared_until_no_other_can_win() -> None:
    compared: list[int] = []

    def by_string(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        compared.append(len(pairs))
        return [grade_by_string(*pair) for pair in pairs]

    def voted(answers: str) -> bool:
        rows = [Completion("a", i, "?", "7", f"\\boxed{{{x}}}", "stop", 1, 1, None) for i, x in enumerate(answers)]
        verdicts = [grade_by_string(of.completion, of.answer) for of in rows]
        [correct] = majority_correct(rows, verdicts, len(rows), by_string)
        return correct

    assert voted("127777734444")
    assert compared == [4, 3, 2]  # 1, 2 and 7 with what is left, each spelling once; 3 and 4 could not outvote 7
    assert not voted("37735"), "of equals the first, also where others could still have won"


def test_an_answer_whose_comparison_came_to_no_end_is_equal_to_its_own_spelling_only() -> None:
    compared: list[str] = []

    def by_string(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        compared.extend(text + gold for text, gold in pairs)
        return [grade_by_string(*pair) for pair in pairs]

    rows = [
        Completion("a", i, "?", "7", f"\\boxed{{{x}}}", "stop", 1, 1, None)
        for i, x in enumerate(["9!", "7", "9!", "8"])
    ]
    verdicts = [Verdict("timeout", "9!") if "!" in of.completion else Verdict("correct", "7") for of in rows[:3]]
    assert majority_correct(rows, [*verdicts, Verdict("wrong", "8")], 4, by_string) == [False]
    assert majority_correct(rows[1:], [*verdicts[1:], Verdict("wrong", "8")], 3, by_string) == [True]
    assert compared == [r"\boxed{8}7"]
