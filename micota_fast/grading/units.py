r"""Units of measure and currencies at an answer: told from variables, dropped, or converted."""

import re
from fractions import Fraction

_LENGTHS: dict[str, int | str] = {
    "mm": "1/1000",
    "cm": "1/100",
    "dm": "1/10",
    "m meter metre": 1,
    "km kilometer kilometre": 1000,
}
_LENGTHS |= {"in inch": "0.0254", "ft foot feet": "0.3048", "yd yard": "0.9144", "mi mile": "1609.344"}
_DIMENSIONS: dict[str, dict[str, int | str]] = {
    "length": _LENGTHS,
    "time": {"s sec second": 1, "min minute": 60, "h hr hour": 3600, "day": 86400, "week": 604800},
    "mass": {"mg": "1/1000", "g gram": 1, "kg kilogram": 1000},
    "imperial mass": {"oz ounce": 1, "lb": 16},
    "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": 1},
    "dollars": {"$ dollar usd": 1, "cent ¢": "1/100"},
    "euros": {"€ euro eur": 1},
    "sterling": {"£ gbp": 1},
    "rupees": {"₹ rupee rs inr": 1},
    "yen": {"¥ yen": 1},
    "Celsius": {"celsius": 1},
    "Fahrenheit": {"fahrenheit": 1},
}
_UNITS = {
    name: (dimension, Fraction(size))
    for dimension, sizes in _DIMENSIONS.items()
    for names, size in sizes.items()
    for name in names.split()
}
_OTHER_SHORT = {"mph", "kph", "lbs", "deg", "rpm", "hrs", "mins", "secs", "usd"}
_SET_APART = {"m", "g", "s", "h", "L", "l"}  # units if a space stands before them: 5 m, but not 5m
_MULTIPLES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_NO_UNIT = re.compile(
    r"\b(?:and|or|to|not|no|than|less|more|if|th|st|nd|rd|mod|percent|percentage|pct|infinity|inf|sqrt|am|pm)\b"
    r"|[ap]\.m|^(?:factorial|squared|cubed|half|halves|thirds|fourths|tenths|hundredths)\b"
)
_COMMAND = r"\\(?:text|mbox|mathrm|textrm|operatorname)\{"
_POWER = r"(?:\^(?:\{(?P<p>\d)\}|(?P<q>\d)))?"
_IN_COMMAND = re.compile(rf"(?<=.){_COMMAND}(?P<unit>[A-Za-z€£₹¥¢ ./]+)\}}{_POWER}$")
_IN_TWO_COMMANDS = re.compile(rf"(?<=[A-Za-z])\}}/{_COMMAND}(?=[A-Za-z]+\}}(?:\^\{{?\d\}}?)?$)")  # \text{m}/\text{s}^2
_QUOTIENT = re.compile(rf"(?<=[\d}})])\\frac\{{{_COMMAND}[A-Za-z ]+\}}\}}\{{{_COMMAND}[A-Za-z ]+\}}(?:\^\d)?\}}$")
_SPACED = re.compile(rf"(?:(?<=\d)|(?<=\\pi)) (?P<unit>[A-Za-z]+(?:[ /][A-Za-z]+)*){_POWER}$")
_ATTACHED = re.compile(rf"(?<=\d)(?P<unit>[A-Za-z]{{2,4}}){_POWER}$")
_TEMPERATURE = re.compile(rf"\^\\circ(?:{_COMMAND} ?(?P<a>[CF])\}}| ?(?P<b>[CF]))$")
_QUALIFIED = re.compile(  # 5 or more, 4 squared
    rf"{_COMMAND}(?:[^{{}}]*\b(?:or|and|not|than)\b| ?(?:factorial|squared|cubed|half|halves|thirds|fourths|tenths)\b)"
    r"[^{}]*\}$"
)
_VARIABLE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]")
_SIGN_BEFORE = re.compile(r"(?P<minus>-?)(?:US)?(?P<unit>\\?\$|[€£₹¥]|(?:Rs|USD|EUR)\.? ?)(?=-?[\d.])")
_SIGN_BEHIND = re.compile(r"(?<=\d)(?P<unit>\\?\$|[€£₹¥¢])$")


def split(answer: str) -> tuple[str, str]:
    """The value and the unit, "" if there is none, of an answer spelled as by `spelling.normalise`."""
    if match := _SIGN_BEFORE.match(answer):
        value, _ = split(answer[match.end() :])  # million
        return match["minus"] + value, match["unit"].removeprefix("\\").rstrip(". ")
    if match := _SIGN_BEHIND.search(answer):
        return answer[: match.start()], match["unit"].removeprefix("\\")
    if match := _TEMPERATURE.search(answer):
        return answer[: match.start()], "celsius" if "C" in (match["a"], match["b"]) else "fahrenheit"
    if match := _QUOTIENT.search(answer):
        return answer[: match.start()], "quotient"
    answer = _IN_TWO_COMMANDS.sub("/", answer)
    for pattern in (_IN_COMMAND, _SPACED, _ATTACHED):
        if (match := pattern.search(answer)) and _is_unit(name := match["unit"].strip(), pattern):
            value = answer[: match.start()].rstrip()
            if pattern is not _IN_COMMAND and _VARIABLE.search(value):
                return answer, ""
            if name in _MULTIPLES:
                return f"{value}\\cdot {_MULTIPLES[name]}", ""
            power = match["p"] or match["q"]
            return value, f"{name}^{power}" if power else name
    return answer, ""


def _is_unit(name: str, pattern: re.Pattern[str]) -> bool:
    if _NO_UNIT.search(name.lower()):
        return False
    if pattern is _IN_COMMAND:
        return True
    if pattern is _ATTACHED:
        return _known(name) is not None or name in _OTHER_SHORT
    return name in _SET_APART or (len(name) > 1 and (_known(name) is not None or name in _OTHER_SHORT)) or len(name) > 3


def _known(name: str) -> tuple[str, Fraction] | None:
    """Dimension and size of a unit; None if it is not in the table."""
    name, _, power = name.partition("^")
    words = name.replace(".", "").lower().split()
    if len(words) == 2 and words[0] in ("square", "sq", "cubic", "cu"):
        power, words = "2" if words[0].startswith("sq") else "3", words[1:]
    if len(words) != 1:
        return None
    word = words[0]
    singular = word if word in _UNITS else word.removesuffix("es") if word == "inches" else word.removesuffix("s")
    if singular not in _UNITS:
        return None
    dimension, size = _UNITS[singular]
    return (f"{dimension}^{power}", size ** int(power)) if power else (dimension, size)


def without_units(answer: str, gold: str) -> tuple[str, str] | None:
    """Both in the gold answer's unit, without it; None if they are of different kinds.

    A unit on one side only is dropped, as the question gives it; so is one that is not in the table.
    """
    if bool(_QUALIFIED.search(answer)) != bool(_QUALIFIED.search(gold)):
        return None
    (a, unit_a), (b, unit_b) = split(answer), split(gold)
    if not unit_a and unit_b and _ends_in(answer, unit_b):  # 5m for 5\text{ m}
        a, unit_a = answer[: -len(unit_b)], unit_b
    elif not unit_b and unit_a and _ends_in(gold, unit_a):
        b, unit_b = gold[: -len(unit_a)], unit_a
    known_a, known_b = _known(unit_a), _known(unit_b)
    if known_a is None or known_b is None or known_a == known_b:
        return a, b
    if known_a[0] != known_b[0]:
        return None
    ratio = known_a[1] / known_b[1]
    return f"({a})\\cdot\\frac{{{ratio.numerator}}}{{{ratio.denominator}}}", b


def _ends_in(answer: str, unit: str) -> bool:
    return unit.isalpha() and answer.endswith(unit) and answer[: -len(unit)].replace(".", "").isdigit()
