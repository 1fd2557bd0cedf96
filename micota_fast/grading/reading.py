"""Reading an answer into exact values, as far as the grammar goes; what is not in it has no value here."""

import math
import re
from fractions import Fraction
from functools import lru_cache

from micota_fast.grading.sums import NotReadable, Sum, is_constant, number, plus, read_sum, to_float
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

LONGEST = 200  # characters; a longer answer is left to math-verify

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
_PLAIN_UNIT = re.compile(r"([^a-zA-Z]*\d) (?:cm|mm|km|m|kg|g|feet|inches|miles|hours|minutes|days|years|degrees)")
_NOT_A_UNIT = re.compile(r"\b(?:and|or)\b|^ ?(?:factorial|squared|cubed|half)\b|perc|pct|inf|sqrt")
_CHOICE = re.compile(
    r"\((?P<a>[A-Z])\)|(?P<b>[A-Z])|\\text(?:bf|rm|it)?\{(?:\((?P<c>[A-Z])\)|(?P<d>[A-Za-z][A-Za-z ]*))\}"
)
_ASSIGNED = re.compile(r"([abckmnpqrstuvwxyz])=([^=]+)")
_EQUATION = re.compile(r"([^=,]+)=([^=,]+)")
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.+)\\end\{\1matrix\}")
# math-verify strips what it takes for a unit off the end (2t is 2, 2ab is 2); these letters certainly are none
_MAYBE_UNIT = re.compile(r"[\d}\s]\s*(?![abixyznkpqruvw]$|xyz?$|yz$)[a-z]+$")
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")
_BARE_I = re.compile(r"\bi\b")
_MAYBE_COMPLEX = re.compile(r"\\(?:frac|sqrt)(?:\{.*\})?\d.*(?<![a-z])i(?![a-z])")  # it puts braces around the digits


@lru_cache(maxsize=1 << 14)
def read(answer: str) -> Answer | None:
    """Return the value of an answer spelled as by `spelling.normalise`, None for what the grammar does not hold."""
    if len(answer) > LONGEST or not answer.isascii():
        return None
    try:
        return _read_answer(answer)
    except (NotReadable, ZeroDivisionError, RecursionError):
        return None


def has_bare_i(answer: str) -> bool:
    """Whether math-verify sees an `i`, as in 2+i but not in 2+3i, and then takes no symbol of the answer for real."""
    return _BARE_I.search(answer) is not None


def _read_answer(answer: str) -> Answer:
    if choice := _CHOICE.fullmatch(answer):
        return _word(next(filter(None, choice.groups())), bare=choice.lastgroup in ("a", "b"))
    if unit := _UNIT.search(answer):
        if _NOT_A_UNIT.search((unit["a"] or unit["b"]).lower()):
            raise NotReadable
        answer = answer[: unit.start()]
    if plain_unit := _PLAIN_UNIT.fullmatch(answer):
        answer = plain_unit[1]
    if not has_bare_i(answer) and _MAYBE_COMPLEX.search(answer):
        raise NotReadable
    if match := _NUMBER.fullmatch(answer):
        sign = (-1 if match["sign"] else 1) * (-1 if match["late"] else 1)
        if match["int"] is not None:
            return Number(number(sign * int(match["int"].replace(",", ""))), "digits")
        return Number(number(sign * Fraction(match["dec"])), "decimal", _places(match["dec"]))
    if match := _PERCENT.fullmatch(answer):
        return Number(number(Fraction(match[1])), "percent", _places(match[1]))
    if match := _DEGREES.fullmatch(answer):
        return Number(number(Fraction(match[1])), "decimal" if "." in match[1] else "exact", _places(match[1]))
    if match := _BASE.fullmatch(answer):
        return Number(number(int(match[1])))
    if match := _MIXED.fullmatch(answer):
        value = int(match[2]) + Fraction(int(match[3] or match[5]), int(match[4] or match[6]))
        return Number(number(-value if match[1] else value))
    if match := _RATIO.fullmatch(answer):
        return Number(number(Fraction(int(match[1]), int(match[2]))))
    if match := _MATRIX.fullmatch(answer):
        rows = [tuple(map(_constant_item, row.split("&"))) for row in match[2].split("\\\\")]
        if len({len(row) for row in rows}) != 1:
            raise NotReadable
        return Matrix(tuple(rows))
    if _MAYBE_UNIT.search(answer) or ("\\frac" in answer and re.search(r"\}\d", answer)):
        raise NotReadable
    if match := _ASSIGNED.fullmatch(answer):
        assigned = _read_list(match[2]) if "," in match[2] else Number(_item(match[2]))
        if isinstance(assigned, Ordered):
            raise NotReadable
        return Assigned(match[1], assigned)
    if match := _EQUATION.fullmatch(answer):
        left, right = read_sum(match[1]), read_sum(match[2])
        return Equation(plus(left, right, -1), right)
    if "\\cup" in answer:
        return _read_union(answer)
    if "),(" in answer and answer[0] == "(" and answer[-1] == ")":
        parts = [_read_list(f"({part})") for part in answer[1:-1].split("),(")]
        return Several(tuple(part for part in parts if isinstance(part, Ordered)))
    if "," in answer:
        return _read_list(answer)
    return Number(read_sum(answer))


def _places(digits: str) -> int:
    return len(digits.partition(".")[2])


def _word(text: str, bare: bool) -> Word:
    if _NOT_A_UNIT.search(text.lower()) or (bare and text in "EID"):
        raise NotReadable
    return Word(text.replace(" ", "").lower())


def _read_list(answer: str) -> Ordered | Unordered:
    if answer[0] in "([" and answer[-1] in ")]":
        items = answer[1:-1].split(",")
        ends = [None if item == infinity else _constant_item(item) for item, infinity in _with_infinity(items)]
        ordered = Ordered(tuple(ends), answer[0] + answer[-1])
        if ordered.brackets != "()" and not is_interval(ordered):  # an empty set, equal to every other
            raise NotReadable
        return ordered
    if answer.startswith("\\{") and answer.endswith("\\}"):
        answer = answer[2:-2]
    elif _THOUSANDS.search(answer):  # one number or two
        raise NotReadable
    values = [_item(item) for item in answer.split(",")]
    distinct = [value for at, value in enumerate(values) if value not in values[:at]]
    sure = all(same_sum(x, y) is False for at, x in enumerate(distinct) for y in distinct[:at])
    return Unordered(tuple(distinct), repeated=len(distinct) < len(values) or not sure)


def _read_union(answer: str) -> Union:
    intervals = [_read_list(part) for part in answer.split("\\cup")]
    ordered = [part for part in intervals if isinstance(part, Ordered) and is_interval(part)]
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
        joined[-1] = Ordered((start, end), start_bracket + end_bracket)
    return Union(tuple(joined), joined=len(joined) < len(ordered))


def _compare(a: Sum | None, b: Sum | None, infinities: tuple[int, int]) -> int:
    """The sign of a - b, where None is infinity of the sign given for it."""
    if a == b:
        return (infinities[0] - infinities[1]) // 2 if a is None else 0
    if a is None or b is None:
        return infinities[0] if a is None else -infinities[1]
    if same_sum(a, b) is not False:
        raise NotReadable
    return 1 if to_float(a) > to_float(b) else -1


def _with_infinity(items: list[str]) -> list[tuple[str, str]]:
    """Each item with the infinity that may stand in its place: below the first and above the second of two."""
    if len(items) != 2:
        return [(item, "") for item in items]
    return [(items[0], "-\\infty"), (items[1], "\\infty")]


def _item(item: str) -> Sum:
    if match := _RATIO.fullmatch(item):
        return number(Fraction(int(match[1]), int(match[2])))
    return read_sum(_ITEM_DEGREES.sub("", item))


def _constant_item(item: str) -> Sum:
    value = _item(item)
    if not is_constant(value):
        raise NotReadable
    return value
