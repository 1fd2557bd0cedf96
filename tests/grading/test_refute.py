r"""What is refuted by its value at a point is wrong to math-verify, and equal expressions are never refuted."""

import json
import random
from functools import cache
from typing import Any

import pytest
import sympy
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

from helpers.paths import DATA
from helpers.spellings import Spellings
from helpers.unaided import math_verify_verdicts
from micota_fast.grading.refute import certainly_differ
from micota_fast.grading.spelling import normalise

TARGETS = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


@cache
def read(answer: str) -> Any:
    return parse(f"\\boxed{{{normalise(answer)}}}", TARGETS, parsing_timeout=None)


def refuted(answer: str, gold: str) -> bool:
    return certainly_differ(read(gold), read(answer))


EXPRESSIONS = [
    "\\sqrt{x^2}",
    "\\sqrt{18x^3}",
    "\\frac{x^2-1}{x-1}",
    "\\frac{1}{x-1}-\\frac{1}{x+1}",
    "(x+y)^3-(x-y)^3",
    "\\sin 2x",
    "\\sin^2 x-\\cos^2 x",
    "\\tan x\\cos x",
    "\\frac{1-\\cos 2x}{\\sin 2x}",
    "\\sec^2 x",
    "\\cot x",
    "e^{x+1}",
    "(1-x)^{1/3}",
    "\\sqrt{x-3}",
    "\\sqrt{1-x}\\sqrt{2-x}",
    "x^{y+1}",
    "\\sqrt{x\\sqrt{x}}",
    "\\pi x^2-\\frac{\\pi}{4}x^2",
    "\\frac{\\sqrt{6}-\\sqrt{2}}{4}",
    "\\sqrt[3]{-8}",
    "2^{2/3}",
]


@pytest.mark.parametrize("latex", EXPRESSIONS)
def test_rewritten_expressions_are_not_refuted(latex: str) -> None:
    expression = read(latex)[0]
    rewritings = [sympy.simplify, sympy.expand, sympy.factor, sympy.together, sympy.expand_trig, sympy.powsimp]
    for rewrite in rewritings:
        assert not certainly_differ([expression, "a"], [rewrite(expression), "b"]), rewrite
    assert certainly_differ([expression, "a"], [2 * expression + 1, "b"])


# Each is equal, or is compared by a rule that is not the value's.
NOT_REFUTED = [
    ("50", "50\\%"),
    ("\\frac{1}{2}", "50\\%"),
    ("9\\%", "0.09"),
    ("\\frac{1}{3}", "0.333333"),
    ("ab", "\\text{ab}"),
    ("x", "\\text{x}"),
    ("2", "x=2"),
    ("x^2=4", "x^2=5"),
    ("(1,2)", "1,2"),
    ("1<x<2", "(1,2)"),
    ("\\begin{pmatrix}1\\end{pmatrix}", "1"),
    ("\\infty", "5"),
    ("2+i", "2+3i"),
    ("x+i", "x+2i"),
    ("2^{-98}", "-2^{-98}"),
    ("10^{10^{10}}", "7"),
    ("99999999!", "7"),
    ("\\lfloor x\\rfloor", "x"),
    ("\\binom{n}{2}", "\\frac{n(n-1)}{2}"),
    ("x^{100}", "x^{101}"),
    ("\\frac{1}{x-x}", "1"),
    ("|x|", "x"),
    ("\\sqrt{x^2}", "|x|"),
]


@pytest.mark.parametrize(("answer", "gold"), NOT_REFUTED)
def test_what_is_no_plain_expression_is_left_to_math_verify(answer: str, gold: str) -> None:
    assert not refuted(answer, gold)
    assert not refuted(gold, answer)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("\\sin x", "\\cos x"), ("36x\\sqrt{35x}", "42x\\sqrt{5x}"), ("18", "\\frac{1}{1+s}"), ("2\\pi", "\\sec\\theta")],
)
def test_different_plain_expressions_are_refuted(answer: str, gold: str) -> None:
    assert refuted(answer, gold)
    assert refuted(gold, answer)


def test_equal_spellings_decide_before_values() -> None:
    assert not certainly_differ([sympy.Integer(1), "1"], [sympy.Integer(2), "1"])


PARTS = 4  # of the thorough test; each is one process of math-verify's, which some pairs take seconds


@pytest.mark.parametrize(
    ("seed", "number"), [(0, 60), *(pytest.param(part, 500, marks=pytest.mark.slow) for part in range(1, PARTS + 1))]
)
def test_refuted_pairs_are_wrong_to_math_verify(seed: int, number: int) -> None:
    source = Spellings(seed)
    pairs = [source.pair() for _ in range(number)]
    choose = random.Random(seed).choice
    every = [(a, b) for a in EXPRESSIONS for b in EXPRESSIONS if a != b]
    pairs += every[seed - 1 :: PARTS] if seed else [choose(every) for _ in range(number)]
    if DATA.is_dir():
        golds: dict[str, None] = {}
        for name in ("math500", "math_train", "olympiadbench"):
            with (DATA / f"{name}.jsonl").open(encoding="utf-8") as lines:
                golds |= dict.fromkeys(json.loads(line)["answer"] for line in lines)
        unusual = [gold for gold in golds if not gold.isdigit()]
        pairs += [(choose(unusual), choose(unusual)) for _ in range(number)]
    asked = [pair for pair in pairs if refuted(*pair)]
    assert len(asked) > number // 5
    assert [pair for pair, their in zip(asked, math_verify_verdicts(asked), strict=True) if their != "wrong"] == []
