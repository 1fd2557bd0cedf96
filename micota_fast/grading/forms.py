r"""Answers of special forms, judged as a person would: choices, words, times, ratios, percentages, angles, units.

What is left is mathematics, and handed on in the spelling in which both sides may be compared.
"""

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from micota_fast.grading.spelling import LONGEST
from micota_fast.grading.units import without_units

Pair = tuple[str, str]  # answer, gold answer
Settled = Literal["correct", "wrong"]

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d*)\.?\d*")


def judge(answer: str, gold: str) -> Settled | list[Pair]:
    """Return a verdict on answers spelled as by `spelling.normalise`, or pairs to compare.

    The answer is right if one of the pairs is equal.
    """
    if answer == gold or _without_braces(answer) == _without_braces(gold):
        return "correct"
    if max(len(answer), len(gold)) > LONGEST:  # the expressions here are not linear
        return [(answer, gold)]
    if _NUMBER.fullmatch(answer) and _NUMBER.fullmatch(gold):
        return [(answer, gold)]
    for rule in (_letters, _choices, _words, _times, _ratios, _bases, _lists):
        settled = rule(answer, gold)
        if settled is not None:
            return settled
    answer, gold = map(_without_letter, (answer, gold))
    if _of_different_kinds(answer, gold):
        return "wrong"
    pair = without_units(answer, gold)
    if pair is None:
        return "wrong"
    answer, gold = (_in_words_to_digits(_radians(text)) for text in pair)
    answer, gold = _one_kind_of_angle(answer, gold)
    answer, gold = _solved(answer), _solved(gold)
    if bool(_FUNCTION.match(answer)) != bool(_FUNCTION.match(gold)):
        answer, gold = _FUNCTION.sub("", answer), _FUNCTION.sub("", gold)
    answer, gold = _one_kind_of_vector(_coordinates(answer, gold), _coordinates(gold, answer))
    return _percentages(answer, gold)


def _without_braces(text: str) -> str:
    """A list that stands in the braces of a set."""
    return text[2:-2] if text[:2] == "\\{" and text[-2:] == "\\}" and "," in text else text


# Choices.

_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|xi|pi|rho|sigma|tau|phi|chi|psi|omega"
_LETTER = re.compile(rf"(?:[A-Za-z]|\\(?i:{_GREEK}))(?:_\w|_\{{\w{{1,3}}\}})?'*")
_NAME = re.compile(r"[A-Z]{3,}")
_COMMAND = r"\\(?:text|textbf|textit|textrm|mathrm|mbox)"
_CHOICE = re.compile(
    rf"(?:(?:{_COMMAND}\{{){{0,2}}(?i:option|choice|answer:?|spinner|plan|point|graph|figure|set|group|team)? ?)"
    rf"(?:[(\[](?P<a>[A-Za-z])[)\]]|(?P<b>[A-Z])[).]?)[ .:]*\}}{{0,2}}"
)
_CHOICE_AND_VALUE = re.compile(
    rf"(?:{_COMMAND}\{{(?:\((?P<a>[A-Z])\)|(?P<b>[A-Z])[.:)])[ .:]*\}}"
    r"|\((?P<c>[A-Z])\)|(?P<d>[A-Z])[.:)]) ?(?P<value>.+)"
)
_CHOICE_AND_TEXT = re.compile(rf"{_COMMAND}\{{(?:\((?P<a>[A-Z])\)|(?P<b>[A-Z])[.:)]) ?(?P<value>[^{{}}]+)\}}")
_SEVERAL = re.compile(r"(?:\\text\{)?([A-H](?:(?:, ?| and |\\text\{ and \}|, and )?[A-H])+)\}?")


def _letters(answer: str, gold: str) -> Settled | None:
    """Single letters are symbols: their case, index and primes matter; so does the order in names such as ABC."""
    for pattern in (_LETTER, _NAME):
        if pattern.fullmatch(answer) and pattern.fullmatch(gold):
            a, b = (re.sub("[{}]", "", text) for text in (answer, gold))
            return "correct" if a == b else "wrong"
    return None


def _choices(answer: str, gold: str) -> Settled | None:
    a, b = choice(answer), choice(gold)
    if a is not None and b is not None:
        return "correct" if a[0].upper() == b[0].upper() else "wrong"
    letters = [_SEVERAL.fullmatch(text) for text in (answer, gold)]
    if letters[0] and letters[1] and not (answer.isalpha() and gold.isalpha()):
        x, y = (sorted(re.findall(r"\b[A-H]+\b", match[1])) for match in letters if match)
        return "correct" if sorted("".join(x)) == sorted("".join(y)) else "wrong"
    return None


def choice(text: str) -> tuple[str, str] | None:
    """Return the letter of a choice such as `(C)` or `C. 7`, and what it stands for if that is written with it.

    None if a text, spelled as by `spelling.normalise`, is no choice.
    """
    if match := _CHOICE.fullmatch(text):
        return match["a"] or match["b"], ""
    if match := _CHOICE_AND_TEXT.fullmatch(text):
        return match["a"] or match["b"], f"\\text{{{match['value']}}}" if not match["value"][0].isdigit() else match[
            "value"
        ]
    if (match := _CHOICE_AND_VALUE.fullmatch(text)) and "," not in text[:4]:
        return next(filter(None, match.group("a", "b", "c", "d"))), match["value"]
    return None


def _without_letter(text: str) -> str:
    """What stands beside the letter of a choice, or the text."""
    found = choice(text)
    return text if found is None else found[1] or text


# Words.

_WORDS = re.compile(rf"(?:{_COMMAND}\{{)?(?P<words>[A-Za-z][A-Za-z\d' ,.-]+)\}}?")
_ARTICLE = re.compile(r"^(?:the|an|a) ")
_SYNONYMS = {"dne": "does not exist", "none": "no solution", "no real solution": "no solution"}
_NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def _words(answer: str, gold: str) -> Settled | None:
    """Words are equal whatever their case, article, hyphens and plural."""
    a, b = _bare_words(answer), _bare_words(gold)
    if a is None or b is None or not ("\\" in answer + gold or " " in answer + gold or (len(a) > 3 < len(b))):
        return None  # short ones may be products of symbols
    return "correct" if a == b else None


def _bare_words(text: str) -> str | None:
    match = _WORDS.fullmatch(text)
    if match is None or ("{" in text) != text.endswith("}"):
        return None
    words = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", match["words"].lower().replace("'", ""))
    if any(map(str.isdigit, words)) and not re.match("[a-z]{3,} ", words):  # March 5, but not x2
        return None
    names = [" ".join(re.sub(r"[^a-z\d ]", " ", name).split()) for name in re.split(r",? and |,", words)]
    words = _ARTICLE.sub("", " and ".join(sorted(names)))
    words = _SYNONYMS.get(words.removesuffix("s"), words)
    return words.removesuffix("s") if len(words) > 4 else words


_SYMBOLS = {"infinity": "\\infty", "positive infinity": "\\infty", "infinitely many": "\\infty"}
_SYMBOLS |= dict.fromkeys(
    ["all real number", "all real", "real number", "set of all real number"], "(-\\infty,\\infty)"
)
_SYMBOLS |= dict.fromkeys(["set of real number", "any real number"], "(-\\infty,\\infty)")
_SYMBOLS |= {"negative infinity": "-\\infty", "no solution": "\\emptyset", "empty set": "\\emptyset"}


def _in_words_to_digits(text: str) -> str:
    if "\\" not in text and not text.isalpha():
        return text
    words = _bare_words(text)
    if words in _NUMERALS:
        return str(_NUMERALS.index(words))
    return _SYMBOLS.get(words or "", text)


# Times of day and ratios.

_HALF = r"(?:\\(?:text|mathrm)\{)? ?(?:([AaPp])\.?[Mm]\.?|noon)\}?"
_TIME = re.compile(rf"(\d{{1,2}}):(\d{{2}})(?: ?{_HALF})?")
_HOUR = re.compile(rf"(\d{{1,2}})( ?{_HALF})")
_RATIO = re.compile(r"(?:\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})(?::(?:\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}))+")


def _times(answer: str, gold: str) -> Settled | None:
    a, b = (_TIME.fullmatch(_HOUR.sub(r"\1:00\2", text) if ":" not in text else text) for text in (answer, gold))
    if not any(match and (match[3] or match[2][0] == "0") for match in (a, b)) and not (b and _is_time(b)):
        return None  # 3:4, or 3:10, which may be a ratio
    if a is None or b is None:
        return "wrong"
    halves = {match[3].lower() for match in (a, b) if match[3]}
    times = [(int(match[1]), int(match[2])) for match in (a, b)]
    if times[0] == times[1]:
        return "wrong" if len(halves) == 2 else "correct"
    if len(halves) == 1:  # 3:00 PM is 15:00
        times = [
            ((hour % 12) + 12 * (match[3].lower() == "p") if match[3] else hour, minute)
            for match, (hour, minute) in zip((a, b), times, strict=True)
        ]
        return "correct" if times[0] == times[1] else "wrong"
    return "wrong"


def _is_time(match: re.Match[str]) -> bool:
    """Certainly no ratio in lowest terms."""
    hour, minute = int(match[1]), int(match[2])
    return hour < 24 and minute < 60 and math.gcd(hour, minute) > 1


def _ratios(answer: str, gold: str) -> Settled | None:
    if not (_RATIO.fullmatch(answer) and _RATIO.fullmatch(gold)):
        return None
    a, b = ([_fraction(part) for part in text.split(":")] for text in (answer, gold))
    if len(a) != len(b):
        return "wrong"
    return "correct" if all(x * b[0] == y * a[0] for x, y in zip(a, b, strict=True)) and any(a) == any(b) else "wrong"


def _fraction(text: str) -> Fraction:
    if text.startswith("\\frac"):
        above, below = map(int, re.findall(r"\d+", text))
        return Fraction(above, below) if below else Fraction(0)
    return Fraction(text)


_BASE = re.compile(r"(-?)([0-9A-F]{1,50})_(?:(\d)|\{(\d{1,2})\})")


def _bases(answer: str, gold: str) -> Settled | None:
    """Numbers to a base; on one side only it is as the question says, and dropped."""
    matches = [_BASE.fullmatch(answer), _BASE.fullmatch(gold)]
    if not all(matches):
        return None
    try:
        x, y = (int(match[1] + match[2], int(match[3] or match[4])) for match in matches if match)
    except ValueError:  # no such base or digit
        return None
    return "correct" if x == y else "wrong"


def _lists(answer: str, gold: str) -> Settled | None:
    """A list in which another item is repeated is another list; math-verify takes both for sets."""
    if gold[:1] == "(" and answer[:2] == "\\{" and "(" not in answer:  # a set has no order
        return "wrong"
    if "," not in answer or "," not in gold or re.search(r"[()\[\]{}]", answer + gold):
        return None
    a, b = (sorted(text.split(",")) for text in (answer, gold))
    return "wrong" if len(a) <= len(b) and set(a) == set(b) and a != b else None


# What is compared as mathematics, in one spelling.

_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|cis|operatorname\{cis\})")
_ANGLE = re.compile(r"(?<![\d.])(\d{1,6}(?:\.\d{1,6})?)\^\\circ")
_DEGREES_OF_PI = re.compile(r"\\pi.*\^\\circ")
_MINUTES = re.compile(r"\d'")
_MODULUS = re.compile(r"(?:\\[pb]?mod|\\text\{ ?mod ?\}) ?\{?(\d+)\}?\)?$")
_CIS = re.compile(r"\\(?:cis|operatorname\{cis\}) ?(?:\(([^()]+)\)|(\\frac\{[^{}]+\}\{[^{}]+\}|\d*\\pi))")


def _of_different_kinds(answer: str, gold: str) -> bool:
    """Whether one is in degrees of pi or minutes of arc, to a modulus, or ends in dots, and the other is not."""
    texts = (answer, gold)
    if any(map(_DEGREES_OF_PI.search, texts)) and not any(map(_TRIGONOMETRIC.search, texts)):
        return not all("\\pi" in text and "^\\circ" in text for text in texts)
    listed = ["\\ldots" in text for text in texts]
    if listed[0] != listed[1] and all("," in text for text in texts):  # a list that continues is another list
        return True
    if any("^\\circ" in text for text in texts) and bool(_MINUTES.search(answer)) != bool(_MINUTES.search(gold)):
        return True
    moduli = [_MODULUS.search(text) for text in texts]
    return all(moduli) and len({match[1] for match in moduli if match}) == 2


def _radians(text: str) -> str:
    """Angles in degrees under a trigonometric function."""
    if _TRIGONOMETRIC.search(text):
        text = _ANGLE.sub(_as_radians, text)
        text = _CIS.sub(lambda match: "(\\cos({0})+i\\sin({0}))".format(match[1] or match[2]), text)
    return text


def _as_radians(match: re.Match[str]) -> str:
    return f"\\frac{{{match[1]}\\pi}}{{180}}"


def _one_kind_of_angle(answer: str, gold: str) -> Pair:
    """90 degrees are pi/2, if one of them is written in degrees and the other in multiples of pi."""
    in_degrees = ["^\\circ" in text for text in (answer, gold)]
    of_pi = ["\\pi" in text for text in (answer, gold)]
    if in_degrees != of_pi and any(in_degrees) and any(of_pi) and not any(map(_TRIGONOMETRIC.search, (answer, gold))):
        return _ANGLE.sub(_as_radians, answer), _ANGLE.sub(_as_radians, gold)
    return answer, gold


_VECTOR = re.compile(r"\\begin\{([pb])matrix\}(.+?)(?:\\\\)?\\end\{\1matrix\}")


def _one_kind_of_vector(answer: str, gold: str) -> Pair:
    """A column or row beside a tuple is written as a tuple."""
    matrices = [_VECTOR.fullmatch(text) for text in (answer, gold)]
    if bool(matrices[0]) == bool(matrices[1]):
        return answer, gold
    match = matrices[0] or matrices[1]
    other = gold if matrices[0] else answer
    if match is None or other[:1] != "(" or ("&" in match[2] and "\\\\" in match[2]) or "begin" in match[2]:
        return answer, gold
    vector = "(" + match[2].replace("\\\\", "&").replace("&", ",") + ")"
    return (vector, gold) if matrices[0] else (answer, vector)


_ASSIGNMENTS = re.compile(r"[xyz]=[^=,]+(?:(?:,|\\text\{ ?and ?\}| and )[xyz]=[^=,]+)+")


def _coordinates(text: str, other: str) -> str:
    """y = 4, x = 3 as (3, 4), if the other is a tuple."""
    if other[:1] != "(" or not _ASSIGNMENTS.fullmatch(text):
        return text
    return (
        "(" + ",".join(value for _, value in sorted(re.findall(r"([xyz])=([^=,]+?)(?=,|\\text| and |$)", text))) + ")"
    )


_SIDE = r"(-?[^<>=,]+?)"
_OR = r"(?:\\text\{ ?or ?\}| or |\\lor ?|\\vee ?)"
_LOW_HIGH = re.compile(rf"([a-z])(<|\\leq? ?){_SIDE}{_OR}\1(>|\\geq? ?){_SIDE}")
_HIGH_LOW = re.compile(rf"([a-z])(>|\\geq? ?){_SIDE}{_OR}\1(<|\\leq? ?){_SIDE}")
_BETWEEN = re.compile(rf"{_SIDE}(<|\\leq? ?)[a-z](<|\\leq? ?){_SIDE}")
_NUMBER_FIRST = re.compile(r"(-?[\d.]+)=([a-z])")
_FACTORIAL = re.compile(r"(\d+)!=(-?[\d.,]+)")
_RESIDUE = re.compile(r"(?:[a-z] ?\\equiv ?)?(-?\d+) ?\(?(?:\\[pb]?mod|\\text\{ ?mod ?\}) ?\{?\d+\}?\)?")
_COMPREHENSION = re.compile(r"\\\{([a-z])(?:\\in ?\\mathbb\{R\})? ?(?:\\mid|\||:) ?([^{}]*\1[^{}]*)\\\}")
_FUNCTION = re.compile(r"[a-zA-Z]\([a-z]\)=")
_POINT = re.compile(r"[A-Z](\(.+,.+\))")


def _solved(text: str) -> str:
    """Inequalities joined by "or" as a union of intervals, 5 = x as x = 5, 5! = 120 as 120, P(1, 2) as (1, 2)."""
    if match := _NUMBER_FIRST.fullmatch(text):
        return f"{match[2]}={match[1]}"
    if match := _FACTORIAL.fullmatch(text):
        return match[2]
    if match := _RESIDUE.fullmatch(text):
        return match[1]
    if match := _COMPREHENSION.fullmatch(text):
        return match[2]
    if match := _POINT.fullmatch(text):
        return match[1]
    parts = [_BETWEEN.fullmatch(part) for part in re.split(_OR, text)]
    if len(parts) > 1 and all(parts):
        return "\\cup".join(
            f"{'(' if part[2] == '<' else '['}{part[1]},{part[4]}{')' if part[3] == '<' else ']'}"
            for part in parts
            if part
        )
    match = _LOW_HIGH.fullmatch(text)
    if match:
        low, high, ends = match[3], match[5], (match[2], match[4])
    elif match := _HIGH_LOW.fullmatch(text):
        low, high, ends = match[5], match[3], (match[4], match[2])
    else:
        return text
    return f"(-\\infty,{low}{')' if ends[0] == '<' else ']'}\\cup{'(' if ends[1] == '>' else '['}{high},\\infty)"


_DECIMAL = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?")
_PROPER_FRACTION = re.compile(r"-?(?:\\frac\{\d+\}\{\d+\}|\\frac\d\d|\d+/\d+)")
_PERCENT = re.compile(r"(.+?) ?(?:\\?%|\\text\{ ?(?:percent|%|\\%) ?\}|percent)")


def _percentages(answer: str, gold: str) -> list[Pair]:
    """50% answers 50, if the question asks for per cent, and one half."""
    a, b = _PERCENT.fullmatch(answer), _PERCENT.fullmatch(gold)
    if a and _DECIMAL.fullmatch(a[1]) and _PROPER_FRACTION.fullmatch(gold):  # 0.75% is not 3/4, for all that 75% is
        return [(_hundredth(a[1]), gold)]
    if bool(a) == bool(b):
        return [(a[1], b[1])] if a and b else [(answer, gold)]
    percent, other = (a[1], gold) if a else (b[1], answer) if b else ("", "")
    pairs = [(percent, other), (_hundredth(percent), other)]
    return pairs if a else [(other, percent) for percent, other in pairs]


def _hundredth(text: str) -> str:
    if _DECIMAL.fullmatch(text):
        return f"{Decimal(text).scaleb(-2):f}"
    return f"\\frac{{{text}}}{{100}}"
