"""Verdicts that a person would give, over the kinds of answers that graders are known to get wrong."""

import json
from pathlib import Path

from micota_fast.grading.grader import Grader

CASES = Path(__file__).with_name("strict_cases.jsonl")
# Right answers that are rejected: known, and counted by kind in bench/README.md.
REJECTED = {
    ("times and dates", r"\text{3 May}"),
    ("times and dates", r"\text{12:00 noon}"),
    ("times and dates", r"\text{Fri}"),
    ("text", r"\text{right-angled triangle}"),
    ("text", r"\text{odd function}"),
    ("text", r"\text{Isosceles triangle}"),
    ("boxes", r"\boxed{3}+\boxed{4}i"),
    ("boxes", r"\frac{\boxed{1}}{\boxed{2}}"),
    ("variables", "td"),
    ("markdown and spelling", "#42"),
    ("readings", "10"),
    ("readings", r"\frac{1}{2}"),
    ("readings", "about 7"),
}


def test_verdicts_are_those_of_a_person() -> None:
    with CASES.open(encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    assert len(cases) >= 250
    texts = [case.get("completion") or f"So it is $\\boxed{{{case['answer']}}}$." for case in cases]
    with Grader(workers=1) as grader:
        verdicts = grader.grade([(text, case["gold"]) for text, case in zip(texts, cases, strict=True)])
    others = [
        (case["kind"], case["gold"], case.get("answer") or case["completion"], verdict.status)
        for case, verdict in zip(cases, verdicts, strict=True)
        if verdict.status != case["right"]
    ]
    assert [row for row in others if row[3] == "correct"] == []  # no wrong answer is accepted
    assert {(kind, answer) for kind, _, answer, _ in others} == REJECTED
