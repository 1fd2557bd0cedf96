r"""Exact sums of rational multiples of square roots, powers of π, other roots and symbols: reading, and arithmetic."""

import math
import random
import re
from fractions import Fraction
from functools import lru_cache

# A product of a square root and powers of symbols; "π" is a symbol as well, as it is transcendental. Different
# monomials of squarefree radicands are linearly independent over the rationals, so sums of them are equal only if
# their coefficients are. Not so with other roots, which are symbols such as "12^1/7": two sums may then be one number.
Monomial = tuple[int, tuple[tuple[str, int], ...]]
Sum = dict[Monomial, Fraction]

ONE: Monomial = (1, ())
MOST_TERMS = 40
MOST_BITS = 256  # of a numerator or denominator


class NotReadable(Exception):
    """The answer is not in the grammar."""


_TOKEN = re.compile(r"\\(?:frac|sqrt|pi|cdot|times)(?![a-zA-Z]) ?|\d+|[abckmnpqrstuvwxyzi]|[-+/^(){}]")


def read_sum(text: str) -> Sum:
    r"""The value of LaTeX such as `\frac{3+\sqrt{5}}{2}` or `2x^2-1`, spelled as by `answers.normalise`.

    Raises:
        NotReadable: it is outside the grammar, or too large.
        ZeroDivisionError: a denominator is zero.
    """
    tokens = [token.rstrip() for token in _TOKEN.findall(text)]
    if len("".join(tokens)) != len(text.replace(" ", "")) or re.search(r"[^a-z0-9] | [^a-z0-9]", text):
        raise NotReadable  # something between the tokens
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.peek() or any(symbol[0] == "i" and power != 1 for _, powers in value for symbol, power in powers):
        raise NotReadable  # a power of i may be the number -1
    return value


class _Parser:
    """Recursive descent over sums of products; raises NotReadable where TeX and math-verify might read otherwise."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise NotReadable

    def sum(self) -> Sum:
        sign = -1 if self.peek() == "-" else 1
        if self.peek() in ("-", "+"):
            self.take()
        total = times(number(sign), self.product())
        while self.peek() in ("-", "+"):
            sign = -1 if self.take() == "-" else 1
            total = plus(total, self.product(), sign)
        return total

    def product(self) -> Sum:
        total, before = self.power()
        while (token := self.peek()) not in ("", "-", "+", ")", "}"):
            if token in ("\\cdot", "\\times"):
                self.take()
            elif token == "/":
                self.take()
                if not self.peek().isdigit() and self.peek() != "\\sqrt":
                    raise NotReadable
                total = times(total, _inverse(self.factor()[0]))
                if self.peek() not in ("", "-", "+", ")", "}"):  # 1/2x
                    raise NotReadable
                break
            elif (
                token.isdigit()
                or (token == "\\frac" and before.isdigit())
                or (token == "(" and before != ")" and not before.isalnum())
            ):  # x2, 3\frac{1}{2}, \pi(x+1)
                raise NotReadable
            factor, before = self.power()
            total = times(total, factor)
        return total

    def power(self) -> tuple[Sum, str]:
        """A factor and the kind of its last token."""
        base, last = self.factor()
        if self.peek() != "^":
            return base, last
        self.take()
        if last == "\\frac":
            raise NotReadable
        if self.peek() == "{":
            self.take()
            sign = -1 if self.peek() == "-" else 1
            if sign < 0:
                self.take()
            digits = self.take()
            if self.peek() == "/":
                self.take()
                root = self.take()
                self.expect("}")
                return _root(base, sign, digits, root), "^"
            self.expect("}")
        else:
            sign, digits = 1, self.take()
            if len(digits) != 1:
                raise NotReadable
        if not digits.isdigit() or len(digits) > 3 or self.peek() == "^":
            raise NotReadable
        return _power(base, sign * int(digits)), "^"

    def factor(self) -> tuple[Sum, str]:
        token = self.take()
        if token.isdigit():
            if len(token) > 15:
                raise NotReadable
            return number(int(token)), token
        if token == "\\pi":
            return {(1, (("π", 1),)): Fraction(1)}, token
        if token.isalpha():
            return {(1, ((token, 1),)): Fraction(1)}, token
        if token == "(":
            value = self.sum()
            self.expect(")")
            return value, ")"
        if token == "\\sqrt":
            return _square_root(self.argument()), token
        if token == "\\frac":
            if self.peek().isdigit():
                digits = self.take()
                if len(digits) == 2:
                    return number(Fraction(int(digits[0]), int(digits[1]))), token
                if len(digits) != 1 or self.peek() != "{":
                    raise NotReadable
                return times(number(int(digits)), _inverse(self.argument())), token
            return times(self.argument(), _inverse(self.argument())), token
        raise NotReadable

    def argument(self) -> Sum:
        """{...}, or one digit."""
        if len(token := self.take()) == 1 and token.isdigit():
            return number(int(token))
        if token != "{":
            raise NotReadable
        value = self.sum()
        self.expect("}")
        return value


# Arithmetic.


def number(value: int | Fraction) -> Sum:
    """The sum that is this number; zero has no terms."""
    return {ONE: Fraction(value)} if value else {}


def is_rational(value: Sum) -> bool:
    return not value or value.keys() == {ONE}


def rational(value: Sum) -> Fraction:
    """The number that it is, if `is_rational`."""
    return value.get(ONE, Fraction(0))


def is_constant(value: Sum) -> bool:
    """Whether it holds no symbol but π and roots."""
    return all(_constant(symbol) is not None for _, powers in value for symbol, _ in powers)


def has_roots(value: Sum) -> bool:
    """Whether it holds roots that are not square: other sums may then be the same number."""
    return any("^" in symbol for _, powers in value for symbol, _ in powers)


@lru_cache(maxsize=1 << 10)
def _constant(symbol: str) -> float | None:
    """What a symbol stands for, None if for a variable."""
    if symbol == "π":
        return math.pi
    base, _, exponent = symbol.partition("^")
    return float(int(base) ** Fraction(exponent)) if exponent else None


def is_symbol(value: Sum) -> bool:
    """Whether it is one symbol and nothing else (π is none)."""
    if len(value) != 1:
        return False
    ((radicand, powers), coefficient) = next(iter(value.items()))
    return radicand == coefficient == 1 and len(powers) == 1 and powers[0][1] == 1 and _constant(powers[0][0]) is None


def to_float(value: Sum) -> float:
    """Of a constant."""
    total = 0.0
    for (radicand, powers), coefficient in value.items():
        size = float(coefficient) * math.sqrt(radicand)
        for symbol, power in powers:
            constant = _constant(symbol)
            assert constant is not None
            size *= constant**power
        total += size
    return total


def has_other_zeros(a: Sum, b: Sum) -> bool:
    """Whether a real zero of the polynomial `a`, at which it changes its sign, is found that is none of `b`'s."""
    symbols = sorted({s for value in (a, b) for _, powers in value for s, _ in powers if _constant(s) is None})
    monomials = [powers for value in (a, b) for _, powers in value]
    # of high degree a zero may be multiple, and found only roughly
    simple = all(power > 0 for powers in monomials for _, power in powers) and all(
        sum(power for symbol, power in powers if symbol != "π") <= 4 for powers in monomials
    )
    if not simple or not 1 <= len(symbols) <= 4 or any("'" in symbol for symbol in symbols):
        return False
    sizes = _at({monomial: abs(coefficient) for monomial, coefficient in b.items()}, symbols, [10.0] * len(symbols))
    source = random.Random(0)
    for _ in range(20):
        low, high = ([source.uniform(-10, 10) for _ in symbols] for _ in range(2))
        sign = _at(a, symbols, low) > 0
        if (_at(a, symbols, high) > 0) == sign:
            continue
        for _ in range(60):
            middle = [(x + y) / 2 for x, y in zip(low, high, strict=True)]
            if (_at(a, symbols, middle) > 0) == sign:
                low = middle
            else:
                high = middle
        if abs(_at(b, symbols, low)) > 1e-3 * sizes:
            return True
    return False


def _at(value: Sum, symbols: list[str], point: list[float]) -> float:
    """The value at a point."""
    place = dict(zip(symbols, point, strict=True))
    return sum(
        float(coefficient)
        * math.sqrt(radicand)
        * math.prod((place.get(symbol) or _constant(symbol) or 0.0) ** power for symbol, power in powers)
        for (radicand, powers), coefficient in value.items()
    )


def _checked(value: Sum) -> Sum:
    bits = [max(c.numerator.bit_length(), c.denominator.bit_length()) for c in value.values()]
    if len(value) > MOST_TERMS or any(number > MOST_BITS for number in bits):
        raise NotReadable
    return value


def plus(a: Sum, b: Sum, sign: int) -> Sum:
    """a + sign · b."""
    total = dict(a)
    for monomial, coefficient in b.items():
        total[monomial] = total.get(monomial, Fraction(0)) + sign * coefficient
    return _checked({monomial: coefficient for monomial, coefficient in total.items() if coefficient})


def times(a: Sum, b: Sum) -> Sum:
    """a · b."""
    total: Sum = {}
    for (radicand_a, powers_a), coefficient_a in a.items():
        for (radicand_b, powers_b), coefficient_b in b.items():
            common = math.gcd(radicand_a, radicand_b)  # both are squarefree
            powers = dict(powers_a)
            for symbol, power in powers_b:
                powers[symbol] = powers.get(symbol, 0) + power
            monomial = (
                (radicand_a // common) * (radicand_b // common),
                tuple(sorted((symbol, power) for symbol, power in powers.items() if power)),
            )
            total[monomial] = total.get(monomial, Fraction(0)) + coefficient_a * coefficient_b * common
    return _checked({monomial: coefficient for monomial, coefficient in total.items() if coefficient})


def _inverse(value: Sum) -> Sum:
    if len(value) != 1:
        raise NotReadable
    ((radicand, powers), coefficient) = next(iter(value.items()))
    inverse = tuple((symbol, -power) for symbol, power in powers)
    return {(radicand, inverse): 1 / (coefficient * radicand)}


def _power(base: Sum, exponent: int) -> Sum:
    if (len(base) > 1 and not 0 < exponent <= 8) or (not base and exponent <= 0):
        raise NotReadable
    factor = _inverse(base) if exponent < 0 else base
    total: Sum = number(1)
    for _ in range(abs(exponent)):
        total = times(total, factor)
    return total


def _root(base: Sum, sign: int, above: str, below: str) -> Sum:
    """`base` to a fraction, for an integer above 1."""
    if not (above.isdigit() and below.isdigit()) or len(above) > 2 or len(below) > 3 or not is_rational(base):
        raise NotReadable
    exponent = Fraction(sign * int(above), int(below))
    if exponent.denominator == 1 or rational(base).denominator != 1 or not 1 < rational(base) <= 1000:
        raise NotReadable
    return {(1, ((f"{rational(base)}^{exponent}", 1),)): Fraction(1)}


def _square_root(value: Sum) -> Sum:
    """Of a rational number that is not negative."""
    if not value:
        return {}
    number = rational(value)
    if not is_rational(value) or number < 0 or number.numerator * number.denominator > 10**8:
        raise NotReadable
    outside, inside = _squarefree(number.numerator * number.denominator)
    return {(inside, ()): Fraction(outside, number.denominator)}


def _squarefree(number: int) -> tuple[int, int]:
    """(a, b) with number = a² b and b squarefree."""
    outside, inside, factor = 1, number, 2
    while factor * factor <= inside:
        if inside % (factor * factor) == 0:
            inside //= factor * factor
            outside *= factor
        else:
            factor += 1
    return outside, inside
