r"""math-verify's comparison, with those of its rules replaced that call different answers equal.

math-verify (https://github.com/huggingface/Math-Verify) reads LaTeX into sympy and compares. Three of its rules are
replaced here, which is why its verdicts and ours differ (each difference is judged in bench/README.md):

- Two exact expressions are equal to it if their difference vanishes in 15 digits, so 1/2004! is 1/2006!. Here exact
  values are compared exactly: to 100 digits, relative to their size. Only where one side is a decimal there is a
  tolerance, and it is relative as well.
- It lowers the case of symbols, and strips letters off the end which it takes for units, so A is a, and 2t is 2.
- A symbol `i` is not the imaginary unit to it, so e^{i\pi} is not -1.

Runs in a worker process only: it replaces two functions of math-verify's modules, and knows no limits.
"""

import functools
import re
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, grader, parse, parser, verify

from micota_fast.grading.refute import certainly_differ

DIGITS = 120  # to which exact constants are evaluated
SAME = sympy.Rational(1, 10**100)  # relative; exact constants nearer than this are one number
NEAR = sympy.Rational(1, 10**6)  # relative, of a decimal to what it stands for
ROUNDED = sympy.Rational(1, 10**4)  # relative, if both are the same number when rounded to six decimal places

_TARGETS = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
_LETTERS_AT_END = re.compile(r"(?<=[\d}\s])([A-Za-z]{1,3})$")  # which math-verify may take for a unit


def read(answer: str) -> list[Any]:
    """The answer as sympy's object, if it can be read, and as math-verify spells it."""
    answer = _LETTERS_AT_END.sub(r"{\1}", answer)  # units are gone already (`units`), so letters are variables
    parsed: list[Any] = parse(f"\\boxed{{{answer}}}", _TARGETS, parsing_timeout=None)
    return parsed


def equal(gold: list[Any], answer: list[Any]) -> bool:
    """Whether an answer equals the gold answer, both as `read` yields them."""
    if certainly_differ(gold, answer):
        return False
    if _verify(gold, answer):
        return True
    complex_ = [_as_complex(parsed) for parsed in (gold, answer)]
    return complex_ != [gold, answer] and _verify(*complex_)


def _verify(gold: list[Any], answer: list[Any]) -> bool:
    # the option makes 1 < x < 2 and (1, 2) equal whichever of them is the gold answer
    return bool(verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True))


def _as_complex(parsed: list[Any]) -> list[Any]:
    """With `i` as the imaginary unit and all others real, which math-verify takes them for unless it sees an `i`."""
    if not parsed or not isinstance(parsed[0], sympy.Basic | sympy.MatrixBase):
        return parsed
    symbols = {
        symbol: sympy.I if symbol.name == "i" else sympy.Symbol(symbol.name, real=True)
        for symbol in parsed[0].free_symbols
    }
    # the spelling is left out: it was compared before
    return [parsed[0].xreplace(symbols)] if any(old != new for old, new in symbols.items()) else parsed


def _numerically_equal(a: Any, b: Any, float_rounding: int, numeric_precision: int) -> bool:
    """In place of math-verify's function of this signature."""
    if isinstance(a, sympy.MatrixBase | sympy.MatrixExpr) and isinstance(b, sympy.MatrixBase | sympy.MatrixExpr):
        a, b = grader.safe_sympy_doit(a), grader.safe_sympy_doit(b)
        if not (isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase) and a.shape == b.shape):
            return False
        pairs = zip(a.flat(), b.flat(), strict=True)
        return all(_numerically_equal(x, y, float_rounding, numeric_precision) for x, y in pairs)
    decimal = any(isinstance(value, sympy.Basic) and value.has(sympy.Float) for value in (a, b))
    try:
        if a.free_symbols or b.free_symbols:
            if decimal:  # 0.5x is x/2
                return bool(grader.sympy_symbolic_eq(*map(_with_fractions, (a, b))))
            return False  # not numbers: left to simplification
        if not decimal and any(grader.is_atomic_or_pct_atomic(value, sympy.Number) for value in (a, b)):
            return bool(_math_verifys(a, b, float_rounding, numeric_precision))  # exact, and 9% is 9 by its rule
        return _near(a, b, float_rounding) if decimal else _same(a, b)
    except (AttributeError, TypeError, ValueError):  # not numbers
        return False


def _with_fractions(value: Any) -> Any:
    return value.replace(lambda part: part.is_Float, lambda part: sympy.Rational(str(part)))


def _same(a: Any, b: Any) -> bool:
    x, y = (value.evalf(DIGITS, maxn=4 * DIGITS) for value in (a, b))
    if abs(x - y) > SAME * max(abs(x), abs(y)):
        return False
    x, y = (grader.safe_sympy_doit(value) for value in (a, b))  # 100! and 100! + 1 agree to more digits
    return bool(x == y) if isinstance(x, sympy.Rational) and isinstance(y, sympy.Rational) else True


def _near(a: Any, b: Any, places: int) -> bool:
    x, y = (grader.safe_sympy_doit(value).evalf(30) for value in (a, b))
    size, distance = max(abs(x), abs(y)), abs(x - y)
    if distance <= NEAR * size:
        return True
    return bool(distance <= ROUNDED * size and x.round(places) == y.round(places))


_math_verifys = grader.sympy_numeric_eq
grader.sympy_numeric_eq = _numerically_equal
parser.latex2sympy = functools.partial(parser.latex2sympy, conversion_config=ConversionConfig(lowercase_symbols=False))
