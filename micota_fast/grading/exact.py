r"""Verdicts that need no computer algebra: typical answers read exactly, in the cases where math-verify agrees.

A small grammar is read into exact values: integers, fractions, decimals, percentages, roots, multiples of π,
polynomials, tuples, intervals, sets and matrices of such numbers, choices and equations, with units and currency as
math-verify treats them. Two values are compared exactly. Whatever is outside the grammar, or so near that the rounding
of math-verify (six decimals, 15 digits) could matter, has no verdict here. That the verdicts are math-verify's is not
proven but tested: by generated pairs and by the gold answers of the benchmarks (tests/grading/test_exact.py).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from micota_fast.grading.sums import (
    ONE,
    NotReadable,
    Sum,
    has_other_zeros,
    has_roots,
    is_constant,
    is_rational,
    is_symbol,
    number,
    plus,
    rational,
    read_sum,
    to_float,
)

LONGEST = 200  # characters; a longer answer is left to math-verify
LARGEST, SMALLEST = 1e12, 1e-9  # outside, floats may not tell two irrational numbers apart
NEAR = Fraction(1, 10**6)  # relative, of a decimal to what it stands for


@dataclass(frozen=True)
class _Number:
    """How it is written matters: math-verify rounds what has a decimal point, and takes 50% for 50 (digits) and 1/2.

    The value of a `percent` is the number before the sign. `places`: digits after the decimal point.
    """

    value: Sum
    kind: Literal["exact", "digits", "decimal", "percent"] = "exact"
    places: int = 0


@dataclass(frozen=True)
class _Word:
    name: str


@dataclass(frozen=True)
class _Ordered:
    """A tuple or an interval of numbers. None as an end of an interval is infinity.

    math-verify takes brackets around two numbers for an interval if the first is smaller, and else for a tuple.
    """

    items: tuple[Sum | None, ...]
    brackets: str


@dataclass(frozen=True)
class _Union:
    """Of intervals, in order and apart; `joined` if two of those written were one."""

    intervals: tuple[_Ordered, ...]
    joined: bool = False


@dataclass(frozen=True)
class _Unordered:
    """`repeated`: an item was written twice (it stands once in `items`), or perhaps, spelled in two ways."""

    items: tuple[Sum, ...]
    repeated: bool


@dataclass(frozen=True)
class _Several:
    """A set of tuples or intervals."""

    items: tuple[_Ordered, ...]


@dataclass(frozen=True)
class _Matrix:
    rows: tuple[tuple[Sum, ...], ...]


@dataclass(frozen=True)
class _Assigned:
    letter: str
    value: _Number | _Unordered


@dataclass(frozen=True)
class _Equation:
    """Whose left side is more than a letter. `difference`: of left side and right."""

    difference: Sum
    right: Sum


_Answer = _Number | _Word | _Ordered | _Union | _Unordered | _Several | _Matrix | _Assigned | _Equation


def settle(answer: str, gold: str) -> Literal["correct", "wrong"] | None:
    """The verdict on two answers, spelled as by `answers.normalise`, where it certainly is math-verify's; else None."""
    if answer == gold:
        return "correct"
    a, b = _read(answer), _read(gold)
    try:
        equal = None if a is None or b is None else _equal(a, b)
    except OverflowError:  # no float holds it
        return None
    return None if equal is None else "correct" if equal else "wrong"


def _equal(a: _Answer, b: _Answer) -> bool | None:
    if _RANK[type(a)] > _RANK[type(b)]:
        a, b = b, a
    match a, b:
        case _Number(), _Number():
            return _same_number(a, b)
        case _Word(), _Word():
            return a.name == b.name
        case _Ordered(), _Ordered():
            return _same_ordered(a, b)
        case ((_Ordered() | _Union()), _Union()):
            return _same_union(_Union((a,)) if isinstance(a, _Ordered) else a, b)
        case _Ordered(), _Unordered():  # which may be compared item by item
            return False if _all_differ(_differences(a.items, b.items)) else None
        case _Several(), _Several():
            return False if _all_differ([[_same_ordered(x, y) is False for y in b.items] for x in a.items]) else None
        case ((_Ordered() | _Union() | _Unordered()), _Several()):
            return None
        case _Unordered(), _Unordered():
            return _same_unordered(a, b)
        case _Matrix(), _Matrix():
            if [len(row) for row in a.rows] != [len(row) for row in b.rows]:
                return False
            return _all_same([x for row in a.rows for x in row], [x for row in b.rows for x in row])
        case _Assigned(), _Assigned():
            return _same_assigned(a, b)
        case _Assigned(value=_Number()), _Equation():
            return False if _same_equation(_equation(a), b) is False else None
        case _, _Assigned():
            return _equal(a, b.value)
        case _Number(), _Equation():  # which 25 answers if it is the right side, at times
            return False if is_constant(a.value) and _same_number(a, _Number(b.right)) is False else None
        case _Equation(), _Equation():
            return _same_equation(a, b)
        case _, _Equation():
            return None
        case _Number(), _:
            return False if is_constant(a.value) and not _perhaps_one(b) else None
        case _:
            return None if _perhaps_one(b) else False


_KINDS = [_Number, _Word, _Ordered, _Union, _Unordered, _Several, _Matrix, _Assigned, _Equation]
_RANK = {kind: rank for rank, kind in enumerate(_KINDS)}


def _perhaps_one(answer: _Answer) -> bool:
    """Whether it may be a set of one item, which equals the item."""
    return isinstance(answer, _Unordered) and answer.repeated


def _same_number(a: _Number, b: _Number) -> bool | None:
    if {a.kind, b.kind} <= {"exact", "digits"}:
        return _same_sum(a.value, b.value)
    if not (is_constant(a.value) and is_constant(b.value)):
        return None
    if a.kind == b.kind == "percent":
        return _same_decimal(a, b)
    if "percent" in (a.kind, b.kind):  # 50% equals 50 and 1/2; it certainly differs from what is neither
        percent, plain = (a, b) if a.kind == "percent" else (b, a)
        if percent.value == plain.value and plain.kind == "digits" and rational(percent.value) >= 0:
            return True
        hundredth = _Number({ONE: rational(percent.value) / 100}, "percent", percent.places + 2)
        apart = _same_decimal(percent, plain) is False and _same_decimal(hundredth, plain) is False
        return False if apart else None
    return _same_decimal(a, b)


def _same_sum(a: Sum, b: Sum) -> bool | None:
    """Exact equality; None where numbers are so near, or so large, that 15 digits might not tell them apart."""
    if is_symbol(a) and is_symbol(b) and _bare(a) == _bare(b):  # compared as written, which 1x and x are not alike
        return None
    if a == b:
        return True
    if is_rational(a) and is_rational(b):
        return False
    if is_constant(a) and is_constant(b):
        x, y = to_float(a), to_float(b)
        size = max(1.0, abs(x), abs(y))
        return False if size < LARGEST and abs(x - y) > SMALLEST * size else None
    if has_roots(a) or has_roots(b):
        return None
    sizes = [abs(float(coefficient)) for coefficient in plus(a, b, -1).values()]
    return False if max(sizes) < LARGEST and min(sizes) > SMALLEST else None


def _same_decimal(a: _Number, b: _Number) -> bool | None:
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
    same = [x is y if x is None or y is None else _same_sum(x, y) for x, y in zip(a, b, strict=True)]
    return False if False in same else None if None in same else True


def _same_ordered(a: _Ordered, b: _Ordered) -> bool | None:
    if len(a.items) != len(b.items):
        return False
    if _interval(a) and _interval(b) and a.brackets != b.brackets:
        return False
    return _all_same(a.items, b.items)


def _interval(answer: _Ordered) -> bool:
    low, high = answer.items[0], answer.items[-1]
    return len(answer.items) == 2 and (low is None or high is None or to_float(low) < to_float(high))


def _same_union(a: _Union, b: _Union) -> bool | None:
    if a.intervals == b.intervals:
        plain = not (a.joined or b.joined) and all(
            x is None or is_rational(x) for part in a.intervals for x in part.items
        )
        return True if plain else None
    if len(a.intervals) != len(b.intervals) or not all(_interval(part) for part in (*a.intervals, *b.intervals)):
        return False
    same = [_same_ordered(x, y) for x, y in zip(a.intervals, b.intervals, strict=True)]
    return False if False in same else None


def _same_unordered(a: _Unordered, b: _Unordered) -> bool | None:
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
    return [[x is not y if x is None or y is None else _same_sum(x, y) is False for y in b] for x in a]


def _all_differ(differences: list[list[bool]]) -> bool:
    """Whether an item of one differs from every item of the other."""
    return any(map(all, differences)) or any(map(all, zip(*differences, strict=True)))


def _same_assigned(a: _Assigned, b: _Assigned) -> bool | None:
    if isinstance(a.value, _Number) and isinstance(b.value, _Number):
        if a.letter == b.letter:
            same = _equal(a.value, b.value)
            if same is None or same or (is_constant(a.value.value) and is_constant(b.value.value)):
                return same
        return _same_equation(_equation(a), _equation(b))
    # equations for sets are equal to math-verify only as written
    return False if a.letter == b.letter and _equal(a.value, b.value) is False else None


def _equation(answer: _Assigned | _Equation) -> _Equation:
    if isinstance(answer, _Equation):
        return answer
    assert isinstance(answer.value, _Number)
    right = answer.value.value
    return _Equation(plus({(1, ((answer.letter, 1),)): Fraction(1)}, right, -1), right)


def _same_equation(a: _Equation, b: _Equation) -> bool | None:
    """Different equations may have the same solutions, or none, which is one to math-verify."""
    if a.difference == b.difference:
        return True
    apart = has_other_zeros(a.difference, b.difference) or has_other_zeros(b.difference, a.difference)
    return False if apart else None


# Reading.

_PLAIN = r"\d{1,15}|[1-9]\d{0,2}(?:,\d{3}){1,4}"
_NUMBER = re.compile(
    rf"(?P<sign>-?)(?:\\\$(?P<late>-?))?(?:(?P<int>{_PLAIN})|(?P<dec>\d{{1,9}}\.\d{{1,6}}|\.\d{{1,6}}))"
)
_PERCENT = re.compile(r"(-?\d{1,9}(?:\.\d{1,4})?)\\?%")
_DEGREES = re.compile(r"(-?\d{1,9}(?:\.\d{1,6})?)\^(?:\\circ|\{\\circ\})")
_ITEM_DEGREES = re.compile(r"(?<=\d)\^(?:\\circ|\{\\circ\})$")
_BASE = re.compile(r"(-?\d{1,15})_(?:\d|\{\d{1,2}\})")  # a number to a base; math-verify drops the base
_MIXED = re.compile(r"(-?)(\d{1,6})\\frac(?:(\d)(\d)|\{(\d{1,6})\}\{(\d{1,6})\})")
_RATIO = re.compile(r"(-?\d{1,9})[/:](\d{1,9})")
_UNIT = re.compile(
    r"(?:(?<=[\d}])|(?<=\\pi))\\(?:(?:text|mbox)\{(?P<a>[A-Za-z .]+)|mathrm\{~?(?!th\})(?P<b>[A-Za-z ]{2,}))\}"
    r"(?:\^\d|\^\{\d\})?$"
)
_PLAIN_UNIT = re.compile(r"(?<=\d) (?:cm|mm|km|m|kg|g|feet|inches|miles|hours|minutes|days|years|degrees)$")
_NOT_A_UNIT = re.compile(r"\b(?:and|or)\b|perc|pct|inf|sqrt")
_CHOICE = re.compile(
    r"\((?P<a>[A-Z])\)|(?P<b>[A-Z])|\\text(?:bf|rm|it)?\{(?:\((?P<c>[A-Z])\)|(?P<d>[A-Za-z][A-Za-z ]*))\}"
)
_ASSIGNED = re.compile(r"([abckmnpqrstuvwxyz])=([^=]+)")
_EQUATION = re.compile(r"([^=,]+)=([^=,]+)")
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.+)\\end\{\1matrix\}")
# math-verify strips what it takes for a unit off the end (2t is 2, 2ab is 2); these letters certainly are none
_MAYBE_UNIT = re.compile(r"[\d}\s]\s*(?![abixyznkpqruvw]$|xyz?$|yz$)[a-z]+$")
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
# In 2+i but not in 2+3i: math-verify then takes no symbol of the answer for real.
_COMPLEX = re.compile(r"\bi\b")
_MAYBE_COMPLEX = re.compile(r"\\(?:frac|sqrt)(?:\{.*\})?\d.*(?<![a-z])i(?![a-z])")  # it puts braces around the digits


@lru_cache(maxsize=1 << 14)
def _read(answer: str) -> _Answer | None:
    """The value of an answer, None for what the grammar does not hold."""
    if len(answer) > LONGEST or not answer.isascii():
        return None
    try:
        return _read_answer(answer)
    except (NotReadable, ZeroDivisionError, RecursionError):
        return None


def _read_answer(answer: str) -> _Answer:
    if choice := _CHOICE.fullmatch(answer):
        return _word(next(filter(None, choice.groups())), bare=choice.lastgroup in ("a", "b"))
    if unit := _UNIT.search(answer):
        if _NOT_A_UNIT.search((unit["a"] or unit["b"]).lower()):
            raise NotReadable
        answer = answer[: unit.start()]
    answer = _PLAIN_UNIT.sub("", answer)
    mark = "'" if _COMPLEX.search(answer) else ""
    if not mark and _MAYBE_COMPLEX.search(answer):
        raise NotReadable
    if match := _NUMBER.fullmatch(answer):
        sign = (-1 if match["sign"] else 1) * (-1 if match["late"] else 1)
        if match["int"] is not None:
            return _Number(number(sign * int(match["int"].replace(",", ""))), "digits")
        return _Number(number(sign * Fraction(match["dec"])), "decimal", _places(match["dec"]))
    if match := _PERCENT.fullmatch(answer):
        return _Number(number(Fraction(match[1])), "percent", _places(match[1]))
    if match := _DEGREES.fullmatch(answer):
        return _Number(number(Fraction(match[1])), "decimal" if "." in match[1] else "exact", _places(match[1]))
    if match := _BASE.fullmatch(answer):
        return _Number(number(int(match[1])))
    if match := _MIXED.fullmatch(answer):
        value = int(match[2]) + Fraction(int(match[3] or match[5]), int(match[4] or match[6]))
        return _Number(number(-value if match[1] else value))
    if match := _RATIO.fullmatch(answer):
        return _Number(number(Fraction(int(match[1]), int(match[2]))))
    if match := _MATRIX.fullmatch(answer):
        rows = [tuple(map(_constant_item, row.split("&"))) for row in match[2].split("\\\\")]
        if len({len(row) for row in rows}) != 1:
            raise NotReadable
        return _Matrix(tuple(rows))
    if _MAYBE_UNIT.search(answer) or ("\\frac" in answer and re.search(r"\}\d", answer)):
        raise NotReadable
    if match := _ASSIGNED.fullmatch(answer):
        assigned = _read_list(match[2], mark) if "," in match[2] else _Number(_item(match[2], mark))
        if isinstance(assigned, _Ordered):
            raise NotReadable
        return _Assigned(match[1] + mark, assigned)
    if match := _EQUATION.fullmatch(answer):
        left, right = read_sum(match[1], mark), read_sum(match[2], mark)
        return _Equation(plus(left, right, -1), right)
    if "\\cup" in answer:
        return _read_union(answer)
    if "),(" in answer and answer[0] == "(" and answer[-1] == ")":
        parts = [_read_list(f"({part})") for part in answer[1:-1].split("),(")]
        return _Several(tuple(part for part in parts if isinstance(part, _Ordered)))
    if "," in answer:
        return _read_list(answer, mark)
    return _Number(read_sum(answer, mark))


def _places(digits: str) -> int:
    return len(digits.partition(".")[2])


def _word(text: str, bare: bool) -> _Word:
    if _NOT_A_UNIT.search(text.lower()) or (bare and text in "EID"):
        raise NotReadable
    return _Word(text.replace(" ", "").lower())


def _read_list(answer: str, mark: str = "") -> _Ordered | _Unordered:
    if answer[0] in "([" and answer[-1] in ")]":
        items = answer[1:-1].split(",")
        ends = [None if item == infinity else _constant_item(item) for item, infinity in _with_infinity(items)]
        ordered = _Ordered(tuple(ends), answer[0] + answer[-1])
        if ordered.brackets != "()" and not _interval(ordered):  # an empty set, equal to every other
            raise NotReadable
        return ordered
    if answer.startswith("\\{") and answer.endswith("\\}"):
        answer = answer[2:-2]
    elif _THOUSANDS.search(answer):  # one number or two
        raise NotReadable
    values = [_item(item, mark) for item in answer.split(",")]
    distinct = [value for at, value in enumerate(values) if value not in values[:at]]
    sure = all(_same_sum(x, y) is False for at, x in enumerate(distinct) for y in distinct[:at])
    return _Unordered(tuple(distinct), repeated=len(distinct) < len(values) or not sure)


def _read_union(answer: str) -> _Union:
    intervals = [_read_list(part) for part in answer.split("\\cup")]
    ordered = [part for part in intervals if isinstance(part, _Ordered) and _interval(part)]
    if len(ordered) < len(intervals):
        raise NotReadable
    ordered.sort(key=lambda part: -math.inf if part.items[0] is None else to_float(part.items[0]))
    joined = ordered[:1]
    for part in ordered[1:]:
        (start, end), start_bracket, end_bracket = joined[-1].items, *joined[-1].brackets
        if _compare(end, part.items[0], (1, -1)) < (end_bracket + part.brackets[0] == ")("):
            joined.append(part)
            continue
        if _compare(start, part.items[0], (-1, -1)) == 0 and part.brackets[0] == "[":
            start_bracket = "["
        order = _compare(end, part.items[1], (1, 1))
        if order < 0 or (order == 0 and part.brackets[1] == "]"):
            end, end_bracket = part.items[1], part.brackets[1]
        joined[-1] = _Ordered((start, end), start_bracket + end_bracket)
    return _Union(tuple(joined), joined=len(joined) < len(ordered))


def _compare(a: Sum | None, b: Sum | None, infinities: tuple[int, int]) -> int:
    """The sign of a - b, where None is infinity of the sign given for it."""
    if a == b:
        return (infinities[0] - infinities[1]) // 2 if a is None else 0
    if a is None or b is None:
        return infinities[0] if a is None else -infinities[1]
    if _same_sum(a, b) is not False:
        raise NotReadable
    return 1 if to_float(a) > to_float(b) else -1


def _with_infinity(items: list[str]) -> list[tuple[str, str]]:
    """Each item with the infinity that may stand in its place: below the first and above the second of two."""
    if len(items) != 2:
        return [(item, "") for item in items]
    return [(items[0], "-\\infty"), (items[1], "\\infty")]


def _item(item: str, mark: str = "") -> Sum:
    if match := _RATIO.fullmatch(item):
        return number(Fraction(int(match[1]), int(match[2])))
    return read_sum(_ITEM_DEGREES.sub("", item), mark)


def _constant_item(item: str) -> Sum:
    value = _item(item)
    if not is_constant(value):
        raise NotReadable
    return value


def _bare(symbol: Sum) -> str:
    """Its name without the mark."""
    ((_, ((name, _),)),) = symbol
    return name.rstrip("'")
