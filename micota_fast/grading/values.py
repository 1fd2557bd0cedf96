"""What an answer may be when it is read exactly, and when two numbers are certainly equal or not."""

from dataclasses import dataclass
from typing import Literal

from micota_fast.grading.sums import Sum, has_roots, is_constant, is_rational, is_symbol, plus, to_float

LARGEST, SMALLEST = 1e12, 1e-9  # outside, floats may not tell two irrational numbers apart


@dataclass(frozen=True)
class Number:
    """How it is written matters: math-verify rounds what has a decimal point, and takes 50% for 50 (digits) and 1/2.

    The value of a `percent` is the number before the sign. `places`: digits after the decimal point.
    """

    value: Sum
    kind: Literal["exact", "digits", "decimal", "percent"] = "exact"
    places: int = 0


@dataclass(frozen=True)
class Word:
    name: str


@dataclass(frozen=True)
class Ordered:
    """A tuple or an interval of numbers. None as an end of an interval is infinity.

    math-verify takes brackets around two numbers for an interval if the first is smaller, and else for a tuple.
    """

    items: tuple[Sum | None, ...]
    brackets: str


@dataclass(frozen=True)
class Union:
    """Of intervals, in order and apart; `joined` if two of those written were one."""

    intervals: tuple[Ordered, ...]
    joined: bool = False


@dataclass(frozen=True)
class Unordered:
    """`repeated`: an item was written twice (it stands once in `items`), or perhaps, spelled in two ways."""

    items: tuple[Sum, ...]
    repeated: bool


@dataclass(frozen=True)
class Several:
    """A set of tuples or intervals."""

    items: tuple[Ordered, ...]


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Sum, ...], ...]


@dataclass(frozen=True)
class Assigned:
    letter: str
    value: Number | Unordered


@dataclass(frozen=True)
class Equation:
    """Whose left side is more than a letter. `difference`: of left side and right."""

    difference: Sum
    right: Sum


Answer = Number | Word | Ordered | Union | Unordered | Several | Matrix | Assigned | Equation


def is_interval(answer: Ordered) -> bool:
    low, high = answer.items[0], answer.items[-1]
    return len(answer.items) == 2 and (low is None or high is None or to_float(low) < to_float(high))


def same_sum(a: Sum, b: Sum) -> bool | None:
    """Exact equality; None where numbers are so near, or so large, that 15 digits might not tell them apart."""
    if is_symbol(a) and a == b:  # compared as written, which 1x and x are not alike
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
