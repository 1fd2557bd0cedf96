"""Parsed answers that certainly differ: plain expressions whose values at one point lie far apart.

math-verify simplifies the difference of two expressions to see whether it is zero, which takes it tens of milliseconds
and at times for ever. It cannot become zero if it is not zero somewhere, so most wrong answers need no simplification.
Only for expressions of numbers and real symbols by sums, products, powers and elementary functions; sets, relations,
matrices, decimals, percentages and lone symbols, for which math-verify has rules of their own, are left to it.
"""

import cmath
import math
import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sympy

LARGEST = 1e6  # of the values on the way: what is lost to rounding stays below LARGEST * 1e-15 a step
APART = 1e-3  # relative; math-verify takes for equal what differs by less than 1e-6
MOST_NODES = 200


class _NotPlain(Exception):
    """The expression is no plain one, or its value is not to be trusted."""


_FUNCTIONS: dict[type, Callable[[complex], complex]] = {
    sympy.sin: cmath.sin,
    sympy.cos: cmath.cos,
    sympy.tan: cmath.tan,
    sympy.sec: lambda z: 1 / cmath.cos(z),
    sympy.csc: lambda z: 1 / cmath.sin(z),
    sympy.cot: lambda z: 1 / cmath.tan(z),
    sympy.exp: cmath.exp,
    sympy.Abs: lambda z: complex(abs(z)),
}


def certainly_differ(a: list[Any], b: list[Any]) -> bool:
    """Whether two answers as `math_verify.parse` yields them, expression and spelling, are surely not equal to it."""
    if len(a) != 2 or len(b) != 2 or a[1] == b[1] or isinstance(a[0], sympy.Symbol) or isinstance(b[0], sympy.Symbol):
        return False
    try:
        x, y = (_Value().of(expression) for expression in (a[0], b[0]))
    except (_NotPlain, ArithmeticError, ValueError, RecursionError):
        return False
    return abs(x - y) > APART * (1 + abs(x) + abs(y))


class _Value:
    """Of one expression, at the point that `_coordinate` chooses."""

    def __init__(self) -> None:
        self.nodes = 0

    def of(self, expression: Any) -> complex:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            raise _NotPlain
        value = self._of(expression)
        if not abs(value) <= LARGEST:
            raise _NotPlain
        return value

    def _of(self, node: Any) -> complex:
        kind = type(node)
        if isinstance(node, sympy.Rational):
            if max(abs(node.p), node.q) > LARGEST:
                raise _NotPlain
            return complex(node.p / node.q)
        if kind is sympy.Symbol:
            if node.is_real is not True or node.name == "i":  # which may be the imaginary unit
                raise _NotPlain
            return complex(_coordinate(node.name))
        if node is sympy.pi or node is sympy.E:
            return complex(math.pi if node is sympy.pi else math.e)
        if kind is sympy.Add:
            return sum((self.of(part) for part in node.args), 0j)
        if kind is sympy.Mul:
            return math.prod((self.of(part) for part in node.args), start=1 + 0j)
        if kind is sympy.Pow:
            base, exponent = map(self.of, node.args)
            if abs(base) < 1 / LARGEST:  # a pole, or zero but for rounding
                raise _NotPlain
            return base**exponent
        if kind in _FUNCTIONS:
            return _FUNCTIONS[kind](self.of(node.args[0]))
        raise _NotPlain


@lru_cache(maxsize=1 << 10)
def _coordinate(symbol: str) -> float:
    """Positive, so that no simplification rests on a sign that it has not here."""
    return random.Random(symbol).uniform(0.5, 2.0)
