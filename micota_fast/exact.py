r"""Verdicts that need no computer algebra: typical answers read exactly, in the cases where math-verify agrees.

A small grammar is read into exact values: integers, fractions, decimals, percentages, square roots, multiples of π,
polynomials, tuples, intervals, sets and matrices of such numbers, choices and `x = 5`, with units and currency as
math-verify treats them. Two values are compared exactly. Whatever is outside the grammar, or so near that the rounding
of math-verify (six decimals, 15 digits) could matter, has no verdict here. That the verdicts are math-verify's is not
proven but tested: by generated pairs and by the gold answers of the benchmarks (tests/test_exact.py).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from micota_fast.sums import (
    ONE,
    NotReadable,
    Sum,
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
LARGEST, SMALLEST = 1e12, 1e-9  # outside, 15 digits may not tell two irrational numbers apart
ROUNDING = Fraction(2, 10**6)  # two decimals nearer than this may or may not round to the same six places


@dataclass(frozen=True)
class _Number:
    """How it is written matters: math-verify rounds what has a decimal point, and takes 50% for 50 (digits) and 1/2.

    The value of a `percent` is the number before the sign.
    """

    value: Sum
    kind: Literal["exact", "digits", "decimal", "percent"] = "exact"


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
    """Of intervals with rational or infinite ends, in order and apart."""

    intervals: tuple[_Ordered, ...]


@dataclass(frozen=True)
class _Unordered:
    items: tuple[Sum, ...]


@dataclass(frozen=True)
class _Matrix:
    rows: tuple[tuple[Sum, ...], ...]


@dataclass(frozen=True)
class _Assigned:
    letter: str
    value: Sum


_Answer = _Number | _Word | _Ordered | _Union | _Unordered | _Matrix | _Assigned


def settle(answer: str, gold: str) -> Literal["correct", "wrong"] | None:
    """The verdict on two answers, spelled as by `answers.normalise`, where it certainly is math-verify's; else None."""
    if answer == gold:
        return "correct"
    a, b = _read(answer), _read(gold)
    equal = None if a is None or b is None else _equal(a, b)
    return None if equal is None else "correct" if equal else "wrong"


def _equal(a: _Answer, b: _Answer) -> bool | None:
    if isinstance(a, _Assigned) and isinstance(b, _Assigned):
        return _same_sum(a.value, b.value) if a.letter == b.letter else None
    if isinstance(a, _Assigned) and isinstance(b, _Number):
        return _same_number(_Number(a.value), b)
    if isinstance(a, _Number) and isinstance(b, _Assigned):
        return _same_number(a, _Number(b.value))
    if isinstance(a, _Number) and isinstance(b, _Number):
        return _same_number(a, b)
    if isinstance(a, _Word) and isinstance(b, _Word):
        return a.name == b.name
    if isinstance(a, _Ordered) and isinstance(b, _Ordered):
        return _same_ordered(a, b)
    if isinstance(a, _Union) and isinstance(b, _Union):
        return a == b
    if isinstance(a, _Unordered) and isinstance(b, _Unordered):
        return _same_unordered(a.items, b.items)
    if isinstance(a, _Matrix) and isinstance(b, _Matrix):
        if [len(row) for row in a.rows] != [len(row) for row in b.rows]:
            return False
        return _all_same([x for row in a.rows for x in row], [x for row in b.rows for x in row])
    number, other = (a, b) if isinstance(a, _Number) else (b, a)
    if isinstance(number, _Number) and isinstance(other, _Word | _Ordered | _Union | _Unordered | _Matrix):
        return False if is_constant(number.value) else None
    return None


def _same_number(a: _Number, b: _Number) -> bool | None:
    if {a.kind, b.kind} <= {"exact", "digits"}:
        return _same_sum(a.value, b.value)
    if not (is_constant(a.value) and is_constant(b.value)):
        return None
    if a.kind == b.kind == "percent":
        return _same_decimal(a.value, b.value)
    if "percent" in (a.kind, b.kind):  # 50% equals 50 and 1/2; it certainly differs from what is neither
        percent, plain = (a, b) if a.kind == "percent" else (b, a)
        if percent.value == plain.value and plain.kind == "digits":
            return True
        hundredth = {ONE: rational(percent.value) / 100}
        apart = _same_decimal(percent.value, plain.value) is False and _same_decimal(hundredth, plain.value) is False
        return False if apart else None
    return _same_decimal(a.value, b.value)


def _same_sum(a: Sum, b: Sum) -> bool | None:
    """Exact equality; None where numbers are so near, or so large, that 15 digits might not tell them apart."""
    if a == b:
        return True
    if is_rational(a) and is_rational(b):
        return False
    if is_constant(a) and is_constant(b):
        x, y = to_float(a), to_float(b)
        size = max(1.0, abs(x), abs(y))
        return False if size < LARGEST and abs(x - y) > SMALLEST * size else None
    sizes = [abs(float(coefficient)) for coefficient in plus(a, b, -1).values()]
    return False if max(sizes) < LARGEST and min(sizes) > SMALLEST else None


def _same_decimal(a: Sum, b: Sum) -> bool | None:
    if a == b:
        return True
    if is_rational(a) and is_rational(b):
        return False if abs(rational(a) - rational(b)) > ROUNDING else None
    x, y = to_float(a), to_float(b)
    return False if max(abs(x), abs(y)) < 1e6 and abs(x - y) > ROUNDING else None


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


def _same_unordered(a: tuple[Sum, ...], b: tuple[Sum, ...]) -> bool | None:
    if len(a) != len(b):
        return False
    by_value = [sorted(items, key=to_float) for items in (a, b)]
    return _all_same(*by_value)


# Reading.

_PLAIN = r"\d{1,15}|[1-9]\d{0,2}(?:,\d{3}){1,4}"
_NUMBER = re.compile(rf"(?P<sign>-?)(?:\\\$)?(?:(?P<int>{_PLAIN})|(?P<dec>\d{{1,9}}\.\d{{1,6}}|\.\d{{1,6}}))")
_PERCENT = re.compile(r"(\d{1,9}(?:\.\d{1,4})?)\\?%")
_DEGREES = re.compile(r"(-?\d{1,9}(?:\.\d{1,6})?)\^(?:\\circ|\{\\circ\})")
_BASE = re.compile(r"(\d{1,15})_(?:\d|\{\d{1,2}\})")  # a number to a base; math-verify drops the base
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
_ASSIGNED = re.compile(r"([abckmnpqrstuvwxyz])=(.+)")
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.+)\\end\{\1matrix\}")
# math-verify strips what it takes for a unit off the end (2t is 2, 2ab is 2); these letters certainly are none
_MAYBE_UNIT = re.compile(r"[\d}]\s*(?![ixyznkpqruvw]$|xyz?$|yz$)[a-z]+$")
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")


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
    if match := _NUMBER.fullmatch(answer):
        sign = -1 if match["sign"] else 1
        if match["int"] is not None:
            return _Number(number(sign * int(match["int"].replace(",", ""))), "digits")
        return _Number(number(sign * Fraction(match["dec"])), "decimal")
    if match := _PERCENT.fullmatch(answer):
        return _Number(number(Fraction(match[1])), "percent")
    if match := _DEGREES.fullmatch(answer):
        return _Number(number(Fraction(match[1])), "decimal" if "." in match[1] else "exact")
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
        return _Assigned(match[1], _constant_item(match[2]))
    if "\\cup" in answer:
        return _read_union(answer)
    if "," in answer:
        return _read_list(answer)
    total = read_sum(answer)
    if is_symbol(total):  # compared by its name
        raise NotReadable
    return _Number(total)


def _word(text: str, bare: bool) -> _Word:
    if _NOT_A_UNIT.search(text.lower()) or (bare and text in "EID"):
        raise NotReadable
    return _Word(text.replace(" ", "").lower())


def _read_list(answer: str) -> _Answer:
    if _THOUSANDS.search(answer):  # (1,100) may be one number or two
        raise NotReadable
    if answer[0] in "([" and answer[-1] in ")]":
        items = answer[1:-1].split(",")
        ends = [None if item == infinity else _constant_item(item) for item, infinity in _with_infinity(items)]
        ordered = _Ordered(tuple(ends), answer[0] + answer[-1])
        if ordered.brackets != "()" and not _interval(ordered):  # an empty set, equal to every other
            raise NotReadable
        return ordered
    if answer.startswith("\\{") and answer.endswith("\\}"):
        answer = answer[2:-2]
    values = tuple(map(_constant_item, answer.split(",")))
    if len({frozenset(value.items()) for value in values}) < len(values):
        raise NotReadable
    return _Unordered(values)


def _read_union(answer: str) -> _Union:
    intervals = [_read_list(part) for part in answer.split("\\cup")]
    ordered = [part for part in intervals if isinstance(part, _Ordered) and _interval(part)]
    if len(ordered) < len(intervals) or not all(x is None or is_rational(x) for part in ordered for x in part.items):
        raise NotReadable
    ordered.sort(key=lambda part: -math.inf if part.items[0] is None else rational(part.items[0]))
    for left, right in pairwise(ordered):
        end, start = left.items[1], right.items[0]
        if end is None or start is None or rational(end) > rational(start):
            raise NotReadable
        if end == start and (left.brackets[1], right.brackets[0]) != (")", "("):
            raise NotReadable
    return _Union(tuple(ordered))


def _with_infinity(items: list[str]) -> list[tuple[str, str]]:
    """Each item with the infinity that may stand in its place: below the first and above the second of two."""
    if len(items) != 2:
        return [(item, "") for item in items]
    return [(items[0], "-\\infty"), (items[1], "\\infty")]


def _constant_item(item: str) -> Sum:
    if match := _RATIO.fullmatch(item):
        return number(Fraction(int(match[1]), int(match[2])))
    value = read_sum(item)
    if not is_constant(value):
        raise NotReadable
    return value
