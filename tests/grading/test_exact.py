r"""The verdicts that need no sympy are those that math-verify gives."""

import json
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.paths import DATA
from helpers.spellings import Spellings
from helpers.unaided import math_verify_verdicts
from micota_fast.grading.exact import settle
from micota_fast.grading.spelling import normalise

FILES = ["aime2024", "amc23", "gsm8k_test", "math500", "math_train", "olympiadbench"]


def differing(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str, str, str]]:
    """(answer, gold, our verdict, math-verify's) of the settled pairs on which they differ."""
    ours = {(answer, gold): settle(normalise(answer), normalise(gold)) for answer, gold in pairs}
    settled = [pair for pair, verdict in ours.items() if verdict is not None]
    theirs = math_verify_verdicts(settled)
    return [(*pair, str(ours[pair]), their) for pair, their in zip(settled, theirs, strict=True) if ours[pair] != their]


@pytest.mark.parametrize(
    ("seed", "number", "asked"), [(0, 80, 80), pytest.param(1, 5000, 1500, marks=pytest.mark.slow)]
)
def test_generated_pairs(seed: int, number: int, asked: int) -> None:
    """Of `number` pairs most are settled, and of the first `asked` all as math-verify, which is slow, does."""
    source = Spellings(seed)
    pairs = [source.pair() for _ in range(number)]
    settled = Counter(settle(normalise(answer), normalise(gold)) for answer, gold in pairs)
    assert settled["correct"] > number // 3
    assert settled["wrong"] > number // 10
    assert settled[None] < number * 13 // 100
    assert differing(pairs[:asked]) == []


# Where reading by the rules of mathematics or TeX would give another verdict than math-verify's.
QUIRKS = [
    ("50", "50\\%"),
    ("\\frac{1}{2}", "50\\%"),
    ("12.5", "12.5\\%"),
    ("-1", "-1\\%"),
    ("64\\%", "2^{6}"),
    ("2ab", "2"),  # "ab" is in its list of units
    ("2t", "2"),
    ("12_5", "12"),
    ("12_{5}", "12_{7}"),
    ("3:4", "\\frac{3}{4}"),
    ("3:00", "3:00"),
    ("[3,1]", "(3,1)"),  # no intervals, so two tuples
    ("(3,1]", "(5,2]"),  # both empty
    ("(1,100)", "1100"),
    ("1,100", "1100"),
    ("a", "A"),
    ("e", "E"),
    ("i", "I"),
    ("\\text{Yes}", "\\text{yes}"),
    ("\\text{not odd}", "\\text{notodd}"),
    ("3+i", "3+1i"),
    ("3\\frac{4}{2}", "5"),
    ("1/2x", "\\frac{1}{2}x"),
    ("x/2x", "\\frac{1}{2}"),
    ("2^23", "8\\cdot3"),
    ("\\frac123", "\\frac{3}{2}"),
    ("\\sqrt12", "2"),
    ("x(x+1)", "x^2+x"),
    ("2(x+1)", "2x+2"),
    ("x=5", "y=5"),
    ("x=5", "5"),
    ("1,2,2", "1,2"),
    ("0.1\\%", "0.001"),
    ("0.3333333", "\\frac{1}{3}"),
    ("10^{20}", "10^{20}+1"),
    ("\\text{cm}", "cm"),
    ("5\\text{ and }6", "5,6"),
    ("5 dollars", "5"),
    ("0^0", "1"),
    ("\\frac{1}{0}", "0"),
    ("-50\\%", "-50"),
    ("-50\\%", "-\\frac{1}{2}"),
    ("3i", "3\\cdot i"),  # the one is real, the other not
    ("2+i,3i", "3i,2+1i"),
    ("12+\\frac{9i}{4},-\\frac{2}{5}i+6", "12+\\frac{9i}{4},-\\frac25i+6"),
    ("i", "\\frac{1}{1}i"),
    ("x^2+1=0", "x^2+2=0"),  # no real solution, and so one to it
    ("x^2+y^2+1=0", "x^2+y^2+2=0"),
    ("y=x^2", "x^2=y"),
    ("2x-y=-3", "y=2x+3"),
    ("2x+2y=4", "x+y=2"),
    ("x+y=2", "2"),
    ("x^2=0", "x=0"),
    ("x^2y=0", "xy=0"),
    ("x=5", "5=x"),
    ("x=1,2", "x=2,1"),
    ("x=1,2", "1,2"),
    ("x=\\frac{2}{2},\\sqrt{8}", "x=1,2\\sqrt{2}"),
    ("x=5", "x=1,2"),
    ("8^{1/3}", "2"),
    ("2^{1/2}", "\\sqrt{2}"),
    ("8^{1/3}x", "2x"),
    ("4^{3/2}", "8"),
    ("\\pi^{999}", "7"),
    ("(1,000)", "(1,0)"),
    ("\\{1,000\\}", "1000"),
    ("12,345,67", "67,12,345"),
    ("75,75", "75"),
    ("\\sqrt{4},2", "2"),
    ("8^{1/3},2", "2"),
    ("(0,3)\\cup(2,5)", "(0,5)"),
    ("(0,3]\\cup(3,5)", "(0,3)\\cup[3,5)"),
    ("(-\\infty,3)\\cup(-3,\\infty)", "(-\\infty,\\infty)"),
    ("[0,3)\\cup(0,1)", "[0,3)"),
    ("(1,1),(3,2)", "(3,2),(1,1)"),
    ("(1,2),(1,2)", "(1,2)"),
    ("n", "N"),
    ("n", "5"),
    ("m", "5"),
    ("x m", "x"),
    ("2 m+1", "1+2m"),
    ("n(n+1)", "n^2+n"),
    ("-12_5", "12_7"),
    ("\\$-30", "-30"),
    ("45^\\circ,60^\\circ", "60,45"),
]


# math-verify calls them equal.
DIFFER = [("2^{-98}", "-2^{-98}"), ("\\frac{1}{10^{16}}", "\\frac{2}{10^{16}}"), ("0.000001", "0.000002")]


@pytest.mark.parametrize(("a", "b"), DIFFER)
def test_small_numbers_are_told_apart(a: str, b: str) -> None:
    assert settle(a, b) == "wrong"
    assert settle(b, a) == "wrong"


@pytest.mark.parametrize("turned", [False, True])
def test_quirks_of_math_verify_are_kept_or_left_to_it(turned: bool) -> None:
    assert differing([(b, a) if turned else (a, b) for a, b in QUIRKS]) == []


@pytest.mark.slow
def test_every_kind_against_every_other() -> None:
    kinds = ["7", "\\frac{1}{2}", "0.25", "50\\%", "2\\sqrt{3}", "\\frac{\\pi}{2}", "2x+1", "(1,2)", "(2,1)", "[1,2)"]
    kinds += [
        "(1,2,3)",
        "1,2",
        "\\{1,2,3\\}",
        "A",
        "\\text{Evelyn}",
        "x=5",
        "3+2i",
        "(-\\infty,2)",
        "90^\\circ",
        "[0,1)\\cup(2,3)",
        "(-\\sqrt{2},1)\\cup(1,2)",
        "x=1,2",
        "y=2x+3",
        "x^2+y^2=13",
        "x+y=2",
        "n",
        "n,n+1",
        "3i,-3i",
        "(1,2),(3,4)",
        "12^{1/7}",
    ]
    kinds += ["\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"]
    pairs = [(a, b) for a in kinds for b in kinds if a != b]
    assert sum(settle(*pair) is not None for pair in pairs) > len(pairs) // 2
    assert differing(pairs) == []


@given(st.text(alphabet="0123456789xi+-*/^_(){}[],.=\\% $fracsqtp", max_size=30), st.sampled_from(["7", "x", "(1,2)"]))
@settings(max_examples=500, deadline=None)
def test_never_raises_and_is_symmetric(answer: str, gold: str) -> None:
    assert settle(normalise(answer), gold) == settle(gold, normalise(answer))


@given(st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_symmetric(seed: int) -> None:
    answer, gold = map(normalise, Spellings(seed).pair())
    assert settle(answer, gold) == settle(gold, answer)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files at {DATA}")
@pytest.mark.parametrize("number", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_gold_answers_against_each_other(number: int) -> None:
    golds: dict[str, None] = {}
    for name in FILES:
        with (DATA / f"{name}.jsonl").open(encoding="utf-8") as lines:
            golds |= dict.fromkeys(json.loads(line)["answer"] for line in lines)
    unusual = [gold for gold in golds if not gold.isdigit()]
    source = random.Random(number)
    pairs = [
        (source.choice(unusual), source.choice(unusual if source.random() < 0.7 else list(golds)))
        for _ in range(number)
    ]
    assert sum(settle(normalise(a), normalise(b)) is not None for a, b in pairs) > number // 2
    assert differing(pairs) == []
