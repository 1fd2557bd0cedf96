r"""Pairs of answers for differential tests: one value spelled in two ways, or two values that are near each other."""

import random
from fractions import Fraction
from typing import Any

Value = tuple[Any, ...]

LETTERS = "xynkzpq"
UNITS = ["\\text{ cm}", "^\\circ", "^{\\circ}", "\\text{ inches}^2", "\\%", " cm", ".0", ".00", "\\text{ units}"]
OTHER_KINDS = [
    "poly",
    "product",
    "list",
    "set",
    "matrix",
    "union",
    "x=",
    "i",
    "line",
    "power",
    "symbols",
    "roots union",
]
OTHER_KINDS += ["percent", "equation", "plane", "conic", "tuples", "degrees", "base", "over root", "x=set"]


class Spellings:
    """`pair()` draws two spellings; a value is a tuple of its kind and its parts."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.choice = self.random.choice

    def pair(self) -> tuple[str, str]:
        """Two spellings, of one value in seven cases of ten."""
        value = self.value()
        other = value if self.random.random() < 0.7 else self.near(value)
        return self.spell(value), self.spell(other)

    def integer(self) -> Fraction:
        return Fraction(self.choice([-7, -5, -3, -2, -1, 1, 2, 3, 4, 5, 6, 9, 12]))

    def rational(self) -> Fraction:
        return self.integer() / self.choice([1, 1, 2, 3, 4, 5, 6, 8])

    def value(self, constant: bool = False) -> Value:
        kinds = ["rational"] * 3 + ["root", "pi", "sum"]
        kind = self.choice(kinds if constant else [*kinds, *OTHER_KINDS])
        several = [self.value(constant=True) for _ in range(self.choice([2, 2, 3]))] if not constant else []
        match kind:
            case "rational":
                special = Fraction(self.choice([1000, 25, 12345, 2500000, 64, 100, 50, 36, 27, 0]))
                return kind, self.rational() if self.random.random() < 0.6 else special
            case "root":
                return kind, self.rational(), self.choice([2, 3, 5, 6, 7, 10])
            case "pi":
                return kind, self.rational()
            case "sum":
                return kind, self.rational(), self.rational(), self.choice([2, 3, 5, 7])
            case "poly":
                coefficients = (self.integer(), self.integer(), *map(Fraction, self.choice([(1, 0), (-1, 1), (2, 0)])))
                return kind, coefficients, self.choice(LETTERS)
            case "product":
                return kind, self.choice([1, 2, 3]), self.choice([-3, -2, 1, 2, 4]), self.choice("xnk")
            case "list":
                return kind, tuple(several), self.choice(["()", "()", "[]", "(]"])
            case "set" | "matrix":
                return kind, tuple(several)
            case "union":
                ends = tuple(map(Fraction, sorted(self.random.sample(range(-4, 6), 4))))
                return kind, ends, self.choice(["(]", "[)", "()"]), self.choice(["(]", "[)"])
            case "roots union":
                roots = tuple(sorted(self.random.sample([-9, -8, -4, -3, -2, -1, 1, 2, 3, 4, 5, 8], 4)))
                return kind, roots, self.random.random() < 0.5, self.choice(["(]", "[)", "()", "[]"])
            case "line":
                return kind, self.rational(), self.integer(), self.choice("yzk"), self.choice("xxan")
            case "power":
                return (
                    kind,
                    self.choice([2, 3, 8, 12, 64]),
                    Fraction(self.choice([-2, -1, 1, 2, 3]), self.choice([3, 4, 7])),
                )
            case "symbols":
                letter = self.choice("kni")
                return kind, tuple((self.rational(), self.integer(), letter) for _ in several)
            case "x=set":
                return kind, tuple(several), self.choice("xyn")
            case "percent":
                return kind, self.choice([Fraction(1), Fraction(5, 2), self.integer(), self.integer() * 10])
            case "equation":
                return kind, self.integer(), self.integer(), self.integer()
            case "plane":
                return kind, self.integer(), self.integer(), self.integer(), self.integer()
            case "conic":
                return (
                    kind,
                    self.choice([1, 4]),
                    self.choice([1, -1, 9]),
                    self.choice([-1, 1, -36, 0]),
                    self.choice("xa"),
                )
            case "tuples":
                return kind, tuple((self.integer(), self.integer()) for _ in several)
            case "degrees":
                return kind, tuple({self.integer() * 15 for _ in range(2)})
            case "base":
                return kind, self.choice([10, 212, 1021]), self.choice(["", "-"]), self.choice([3, 4, 7])
            case "over root":
                return kind, self.integer(), self.choice([2, 3, 5, 7])
            case "x=":
                return kind, several[0], self.choice("xykn")
            case _:
                return kind, self.integer(), self.integer()

    def near(self, value: Value) -> Value:
        """A value that is easily taken for this one."""
        kind, first, *rest = value
        if kind == "rational":
            tenths = Fraction(1, self.choice([10, 100, 1000]))
            return kind, self.choice([first + 1, -first, first + tenths, first * 100, first / 100])
        if kind in ("list", "set", "matrix", "x=set"):
            return kind, (self.near(first[0]), *first[1:]), *rest
        if kind == "union":
            return kind, (*first[:3], first[3] + 1), *rest
        if kind == "symbols":
            ((a, b, letter), *others) = first
            return kind, ((a, b + 1, letter), *others)
        if kind == "tuples":
            return kind, ((first[0][0], first[0][1] + 1), *first[1:])
        if kind == "degrees":
            return kind, (first[0] + 5, *first[1:])
        if kind == "roots union":
            return kind, (*first[:3], first[3] + 3), *rest
        if kind == "x=":
            return kind, self.near(first), *rest
        if kind == "poly":
            return kind, (first[0] + 1, *first[1:]), *rest
        if kind == "product":
            return kind, first, rest[0] + 1, rest[1]
        return kind, first + self.choice([-2, 1]), *rest

    def spell(self, value: Value) -> str:
        kind, first, *rest = value
        match kind:
            case "rational":
                return self._rational(first, alone=True)
            case "root":
                return self._root(first, rest[0])
            case "pi":
                return self._multiple(first, "\\pi")
            case "sum":
                if self.random.random() < 0.4:
                    below = self.choice([2, 3, 4, 6])
                    parts = [self._rational(first * below), self._root(rest[0] * below, rest[1])]
                    return f"\\frac{{{self._sum(parts)}}}{{{below}}}"
                return self._sum([self._rational(first), self._root(rest[0], rest[1])])
            case "poly":
                return self._polynomial(first, rest[0])
            case "product":
                number, letter = rest
                factors = [f"({letter}{number:+d})", f"({letter}+5)"]
                self.random.shuffle(factors)
                expanded = (Fraction(first * number * 5), Fraction(first * (number + 5)), Fraction(first))
                product = (str(first) if first > 1 else "") + "".join(factors)
                return self.choice([product, self._polynomial(expanded, letter)])
            case "list":
                brackets = rest[0] if len(first) == 2 else "()"
                return brackets[0] + self.choice([",", ", "]).join(map(self._item, first)) + brackets[1]
            case "set":
                items = list(map(self._item, first))
                self.random.shuffle(items)
                text = ",".join(items)
                return self.choice([text, f"\\{{{text}\\}}", f"\\left\\{{{text}\\right\\}}"])
            case "matrix":
                delimiter = self.choice("pb")
                inner = self.choice([" \\\\ ", "\\\\"]).join(map(self._item, first))
                return f"\\begin{{{delimiter}matrix}}{inner}\\end{{{delimiter}matrix}}"
            case "union":
                a, b, c, d = map(self._rational, first)
                parts = [rest[0][0] + f"{a},{b}" + rest[0][1], rest[1][0] + f"{c},{d}" + rest[1][1]]
                return self.choice(["\\cup", " \\cup "]).join(parts)
            case "roots union":
                ends = [f"{'-' if end < 0 else ''}\\sqrt{{{abs(end)}}}" for end in first]
                inner = [ends[1], ends[2]] if rest[0] else [ends[2], ends[1]]  # apart or not
                parts = [f"({ends[0]},{inner[0]}{rest[1][1]}", f"{rest[1][0]}{inner[1]},{ends[3]})"]
                self.random.shuffle(parts)
                return "\\cup".join(parts)
            case "line":
                return f"{rest[1]}={self._sum([self._multiple(first, rest[2]), self._rational(rest[0])])}"
            case "power":
                return self.choice(["", "-", "2"]) + f"{first}^{{{rest[0]}}}" if self.random.random() < 0.9 else "2"
            case "symbols":
                text = ",".join(self._sum([self._multiple(a, c), self._rational(b)]) for a, b, c in first)
                return self.choice([text, f"\\{{{text}\\}}", f"x={text}"])
            case "x=set":
                return f"{rest[0]}={','.join(map(self._item, first))}"
            case "percent":
                value = first if self.random.random() < 0.7 else first / 100
                return f"{float(first):g}\\%" if self.random.random() < 0.5 else self._rational(value, alone=True)
            case "equation":
                left, right = f"{first}x+{abs(rest[0])}y", rest[1]
                return self.choice([f"{left}={right}", f"{left}={right}", f"{right}", f"x^2+y^2={right}", "x+y=7"])
            case "plane":
                times = self.choice([1, 1, 1, -1, 2])
                a, b, c, d = (int(times * x) for x in (first, *rest))
                return self.choice([f"{a}x{b:+}y{c:+}z{d:+}=0", f"{b}y{a:+}x{c:+}z={-d}"])
            case "conic":
                a, b, c = (int(x) for x in (first, *rest[:2]))
                forms = [f"{a}{rest[2]}^2{b:+}y^2{c:+}=0", f"{b}y^2={-c}-{a}{rest[2]}^2", f"y={a}{rest[2]}^2{b:+}"]
                return self.choice([*forms, f"{rest[2]}^2={abs(c)}", f"{rest[2]}^2+{a}={b}"])
            case "tuples":
                return self.choice([",", ", "]).join(f"({x}, {y})" for x, y in first)
            case "degrees":
                return self.choice([",", ", "]).join(f"{x}{self.choice(UNITS[1:3])}" for x in first)
            case "base":
                return self.choice(
                    [f"{rest[0]}{first}_{rest[1]}", f"{rest[0]}{first}_{{{rest[1]}}}", f"\\${rest[0]}{first}"]
                )
            case "over root":
                forms = [f"{first}/\\sqrt{{{rest[0]}}}", f"\\frac{{{first}}}{{\\sqrt{{{rest[0]}}}}}"]
                return self.choice([*forms, self._root(first / rest[0], rest[0])])
            case "x=":
                return self.choice([f"{rest[0]}=", f"{rest[0]} = ", ""]) + self._item(first)
            case _:
                return f"{first}{int(rest[0]):+d}i"

    def _item(self, value: Value) -> str:
        return self._rational(value[1]) if value[0] == "rational" else self.spell(value)

    def _rational(self, value: Fraction, alone: bool = False) -> str:
        """`alone`: also in the ways in which a number is written that is all of an answer."""
        sign, size, times = "-" if value < 0 else "", abs(value), self.choice([1, 1, 1, 2, 3])
        above, below = size.numerator * times, size.denominator * times
        forms = [f"{sign}\\frac{{{above}}}{{{below}}}", f"{sign}\\dfrac{{{above}}}{{{below}}}"]
        forms.append(f"\\frac{{{sign}{above}}}{{{below}}}")
        if above < 10 and below < 10:
            forms.append(f"{sign}\\frac{above}{below}")
        whole = size.denominator == 1
        if whole:
            forms += [f"{sign}{size}"] * 3
        if alone:
            forms.append(f"{sign}{above}/{below}")
            if (size * 10**4).denominator == 1:
                forms.append(f"{sign}{float(size):.{self.choice([4, 5, 6])}f}")
            if size > 1 and not whole:
                forms.append(f"{sign}{int(size)}\\frac{{{(size % 1).numerator}}}{{{size.denominator}}}")
            if whole:
                forms += [f"{sign}{size}{self.choice(UNITS)}", f"{sign}{int(size):,}", f"\\${sign}{size}"]
                forms += [f"{sign}{base}^{{{e}}}" for base in range(2, 9) for e in range(2, 7) if base**e == size]
            if value > 0 and (value**2).numerator < 500:
                forms.append(f"\\sqrt{{{self._rational(value**2)}}}")
        return self.choice(forms)

    def _multiple(self, value: Fraction, symbol: str) -> str:
        if value == 0:
            return "0"
        sign, above, below = "-" if value < 0 else "", abs(value.numerator), value.denominator
        product = (str(above) if above > 1 else "") + symbol
        if below == 1:
            return sign + self.choice([product, f"{above}\\cdot {symbol}"])
        of_fraction = f"{sign}{self._rational(abs(value))}{symbol}"
        return self.choice([f"{sign}\\frac{{{product}}}{{{below}}}", of_fraction, f"{sign}{product}/{below}"])

    def _root(self, value: Fraction, radicand: int) -> str:
        times = self.choice([1, 1, 2, 3])
        forms = [self._multiple(value, f"\\sqrt{{{radicand}}}"), self._multiple(value, f"\\sqrt {radicand}")]
        forms.append(self._multiple(value / times, f"\\sqrt{{{radicand * times**2}}}"))
        if value.denominator == 1 and value:
            forms.append(f"{'-' if value < 0 else ''}\\sqrt{{{value.numerator**2 * radicand}}}")
        if value == Fraction(1, radicand):
            forms.append(f"\\frac{{1}}{{\\sqrt{{{radicand}}}}}")
        return self.choice(forms)

    def _sum(self, parts: list[str]) -> str:
        self.random.shuffle(parts)
        first, *others = parts
        return first + "".join(part if part[0] == "-" else self.choice(["+", " + "]) + part for part in others)

    def _polynomial(self, coefficients: tuple[Fraction, ...], letter: str) -> str:
        powers = ["", letter, f"{letter}^2", f"{letter}^{{3}}"]
        parts = [
            self._multiple(coefficient, power) if power else self._rational(coefficient)
            for coefficient, power in zip(coefficients, powers, strict=False)
            if coefficient
        ]
        return self._sum(parts or ["0"])
