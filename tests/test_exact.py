r"""The verdicts that need no sympy are those that math-verify gives."""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spellings import Spellings

from micota_fast import grade as grading
from micota_fast.answers import normalise
from micota_fast.exact import settle
from micota_fast.grade import Grader

DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = ["aime2024", "amc23", "gsm8k_test", "math500", "math_train", "olympiadbench"]


@pytest.fixture(scope="module")
def unaided() -> Iterator[Grader]:
    """A grader that asks math-verify about every pair."""
    with pytest.MonkeyPatch.context() as patch, Grader(workers=2, timeout_s=10) as grader:
        patch.setattr(grading, "settle", lambda answer, gold: None)
        yield grader


def differing(grader: Grader, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str, str, str]]:
    """(answer, gold, our verdict, math-verify's) of the settled pairs on which they differ."""
    theirs = grader.grade([(f"\\boxed{{{answer}}}", gold) for answer, gold in pairs])
    return [
        (answer, gold, str(ours), verdict.status)
        for (answer, gold), verdict in zip(pairs, theirs, strict=True)
        if (ours := settle(normalise(answer), normalise(gold))) is not None and ours != verdict.status
    ]


@pytest.mark.parametrize("seed_and_number", [(0, 80), pytest.param((1, 5000), marks=pytest.mark.slow)])
def test_generated_pairs(unaided: Grader, seed_and_number: tuple[int, int]) -> None:
    seed, number = seed_and_number
    source = Spellings(seed)
    pairs = [source.pair() for _ in range(number)]
    settled = Counter(settle(normalise(answer), normalise(gold)) for answer, gold in pairs)
    assert settled["correct"] > number // 3
    assert settled["wrong"] > number // 10
    assert settled[None] < number // 8
    assert differing(unaided, pairs) == []


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
]


@pytest.mark.parametrize("turned", [False, True])
def test_quirks_of_math_verify_are_kept_or_left_to_it(unaided: Grader, turned: bool) -> None:
    assert differing(unaided, [(b, a) if turned else (a, b) for a, b in QUIRKS]) == []


def test_every_kind_against_every_other(unaided: Grader) -> None:
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
    ]
    kinds += ["\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"]
    pairs = [(a, b) for a in kinds for b in kinds if a != b]
    assert sum(settle(*pair) is not None for pair in pairs) > len(pairs) // 2
    assert differing(unaided, pairs) == []


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
@pytest.mark.parametrize("number", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_gold_answers_against_each_other(unaided: Grader, number: int) -> None:
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
    assert differing(unaided, pairs) == []
