r"""Verdicts that need no computer algebra: typical answers read exactly, and compared.

A small grammar (`reading`) is read into exact values (`values`): integers, fractions, decimals, percentages, roots,
multiples of π, polynomials, tuples, intervals, sets and matrices of such numbers, choices and equations. Whatever is
outside the grammar, or so near that floats cannot tell it apart, has no verdict here. That the verdicts are those of
the comparison in a worker is not proven but tested: by generated pairs and by the gold answers of the benchmarks
(tests/grading/test_exact.py). They are math-verify's but for small numbers and decimals, see bench/README.md.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from micota_fast.grading.reading import has_bare_i, read
from micota_fast.grading.sums import ONE, Sum, has_other_zeros, is_constant, is_rational, plus, rational, to_float
from micota_fast.grading.values import (
    Answer,
    Assigned,
    Equation,
    Matrix,
    Number,
    Ordered,
    Several,
    Union,
    Unordered,
    Word,
    is_interval,
    same_sum,
)

NEAR = Fraction(1, 10**6)  # relative, of a decimal to what it stands for


def settle(answer: str, gold: str) -> Literal["correct", "wrong"] | None:
    """The verdict on two answers, spelled as by `answers.normalise`, where it certainly is math-verify's; else None."""
    if answer == gold:
        return "correct"
    a, b = read(answer), read(gold)
    try:
        equal = None if a is None or b is None else _equal(a, b)
    except OverflowError:  # no float holds it
        return None
    if equal and has_bare_i(answer) != has_bare_i(gold):  # symbols of two kinds to math-verify
        return None
    return None if equal is None else "correct" if equal else "wrong"


def _equal(a: Answer, b: Answer) -> bool | None:
    if _RANK[type(a)] > _RANK[type(b)]:
        a, b = b, a
    match a, b:
        case Number(), Number():
            return _same_number(a, b)
        case Word(), Word():
            return a.name == b.name
        case Ordered(), Ordered():
            return _same_ordered(a, b)
        case ((Ordered() | Union()), Union()):
            return _same_union(Union((a,)) if isinstance(a, Ordered) else a, b)
        case Ordered(), Unordered():  # which may be compared item by item
            return False if _all_differ(_differences(a.items, b.items)) else None
        case Several(), Several():
            return False if _all_differ([[_same_ordered(x, y) is False for y in b.items] for x in a.items]) else None
        case ((Ordered() | Union() | Unordered()), Several()):
            return None
        case Unordered(), Unordered():
            return _same_unordered(a, b)
        case Matrix(), Matrix():
            if [len(row) for row in a.rows] != [len(row) for row in b.rows]:
                return False
            return _all_same([x for row in a.rows for x in row], [x for row in b.rows for x in row])
        case Assigned(), Assigned():
            return _same_assigned(a, b)
        case Assigned(value=Number()), Equation():
            return False if _same_equation(_equation(a), b) is False else None
        case _, Assigned():
            return _equal(a, b.value)
        case Number(), Equation():  # which 25 answers if it is the right side, at times
            return False if is_constant(a.value) and _same_number(a, Number(b.right)) is False else None
        case Equation(), Equation():
            return _same_equation(a, b)
        case _, Equation():
            return None
        case Number(), _:
            return False if is_constant(a.value) and not _perhaps_one(b) else None
        case _:
            return None if _perhaps_one(b) else False


_KINDS = [Number, Word, Ordered, Union, Unordered, Several, Matrix, Assigned, Equation]
_RANK = {kind: rank for rank, kind in enumerate(_KINDS)}


def _perhaps_one(answer: Answer) -> bool:
    """Whether it may be a set of one item, which equals the item."""
    return isinstance(answer, Unordered) and answer.repeated


def _same_number(a: Number, b: Number) -> bool | None:
    if {a.kind, b.kind} <= {"exact", "digits"}:
        return same_sum(a.value, b.value)
    if not (is_constant(a.value) and is_constant(b.value)):
        return None
    if a.kind == b.kind == "percent":
        return _same_decimal(a, b)
    if "percent" in (a.kind, b.kind):  # 50% equals 50 and 1/2; it certainly differs from what is neither
        percent, plain = (a, b) if a.kind == "percent" else (b, a)
        if percent.value == plain.value and plain.kind == "digits" and rational(percent.value) >= 0:
            return True
        hundredth = Number({ONE: rational(percent.value) / 100}, "percent", percent.places + 2)
        apart = _same_decimal(percent, plain) is False and _same_decimal(hundredth, plain) is False
        return False if apart else None
    return _same_decimal(a, b)


def _same_decimal(a: Number, b: Number) -> bool | None:
    """Equality of two numbers of which one is a decimal.

    It may stand for another number if it is that number rounded or cut off, to six figures or to six places.
    """
    if a.value == b.value:
        return True
    if not (is_rational(a.value) and is_rational(b.value)):
        u, v = to_float(a.value), to_float(b.value)
        return False if abs(u - v) > 2e-6 * max(1.0, abs(u), abs(v)) else None
    x, y = rational(a.value), rational(b.value)
    size, distance = max(abs(x), abs(y)), abs(x - y)
    ends = [Fraction(1, 10**number.places) for number in (a, b) if number.kind != "exact" and number.places]
    if not ends or distance >= max(ends):
        return False
    return distance <= NEAR * size or (distance <= 100 * NEAR * size and round(x * 10**6) == round(y * 10**6))


def _all_same(a: Sequence[Sum | None], b: Sequence[Sum | None]) -> bool | None:
    """Of two sequences of one length; an item that certainly differs outweighs one that is uncertain."""
    same = [x is y if x is None or y is None else same_sum(x, y) for x, y in zip(a, b, strict=True)]
    return False if False in same else None if None in same else True


def _same_ordered(a: Ordered, b: Ordered) -> bool | None:
    if len(a.items) != len(b.items):
        return False
    if is_interval(a) and is_interval(b) and a.brackets != b.brackets:
        return False
    return _all_same(a.items, b.items)


def _same_union(a: Union, b: Union) -> bool | None:
    if a.intervals == b.intervals:
        plain = not (a.joined or b.joined) and all(
            x is None or is_rational(x) for part in a.intervals for x in part.items
        )
        return True if plain else None
    if len(a.intervals) != len(b.intervals) or not all(is_interval(part) for part in (*a.intervals, *b.intervals)):
        return False
    same = [_same_ordered(x, y) for x, y in zip(a.intervals, b.intervals, strict=True)]
    return False if False in same else None


def _same_unordered(a: Unordered, b: Unordered) -> bool | None:
    if _all_differ(_differences(a.items, b.items)):
        return False
    if a.repeated or b.repeated or not all(map(is_constant, (*a.items, *b.items))):
        return None
    if len(a.items) != len(b.items):
        return False
    by_value = [sorted(answer.items, key=to_float) for answer in (a, b)]
    return _all_same(*by_value)


def _differences(a: Sequence[Sum | None], b: Sequence[Sum | None]) -> list[list[bool]]:
    """A row for each item of `a`: whether it certainly differs from each item of `b`."""
    return [[x is not y if x is None or y is None else same_sum(x, y) is False for y in b] for x in a]


def _all_differ(differences: list[list[bool]]) -> bool:
    """Whether an item of one differs from every item of the other."""
    return any(map(all, differences)) or any(map(all, zip(*differences, strict=True)))


def _same_assigned(a: Assigned, b: Assigned) -> bool | None:
    if isinstance(a.value, Number) and isinstance(b.value, Number):
        if a.letter == b.letter:
            same = _equal(a.value, b.value)
            if same is None or same or (is_constant(a.value.value) and is_constant(b.value.value)):
                return same
        return _same_equation(_equation(a), _equation(b))
    # equations for sets are equal to math-verify only as written
    return False if a.letter == b.letter and _equal(a.value, b.value) is False else None


def _equation(answer: Assigned | Equation) -> Equation:
    if isinstance(answer, Equation):
        return answer
    assert isinstance(answer.value, Number)
    right = answer.value.value
    return Equation(plus({(1, ((answer.letter, 1),)): Fraction(1)}, right, -1), right)


def _same_equation(a: Equation, b: Equation) -> bool | None:
    """Different equations may have the same solutions, or none, which is one to math-verify."""
    if a.difference == b.difference:
        return True
    apart = has_other_zeros(a.difference, b.difference) or has_other_zeros(b.difference, a.difference)
    return False if apart else None
