r"""One spelling for answers that only look different: white space, markup, Unicode, programs' notation."""

import re
from fractions import Fraction
from functools import lru_cache

LONGEST = 1000  # characters; of what is longer only the white space and the commonest LaTeX is tidied

# Unicode that models write where LaTeX has a command; math-verify would not parse it.
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "°": "^\\circ ", "％": "\\%"}
    | {"≤": "\\le ", "≥": "\\ge ", "√": "\\sqrt ", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "±": "\\pm ", "÷": "/"}
    | {
        "∪": "\\cup ",
        "∩": "\\cap ",
        "∈": "\\in ",
        "≠": "\\ne ",
        "∅": "\\emptyset ",
        "θ": "\\theta ",
        "ℝ": "\\mathbb{R}",
    }
    | {"½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}"}
    | {"∗": "\\cdot ", "⋅": "\\cdot ", "：": ":", "，": ",", "（": "(", "）": ")"}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
_SUPERSCRIPT = re.compile(f"[{_SUPERSCRIPTS}]+")
_PLAIN = re.compile(r"-?\d+")
_AROUND = (("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"), ("\\(", "\\)"), ("\\[", "\\]"))

# Order matters: each works on what those before it leave.
_MARKUP = (
    (re.compile(r"\\(?:mathbf|bold|boldsymbol|bm|underline|mathsf|mathit|ensuremath)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\{((?:[-\d., /:;()[\]]|\\\$)+)\}"), r"\1"),
    (re.compile(r"\\(?:text)?color\{\w+\}"), ""),
    (re.compile(r"\\(?:displaystyle|textstyle|large|Large|huge|Huge|checkmark|bf|it|rm)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,|\\ )(?=\d{3}(?!\d))"), ""),  # 1{,}000 and 1\,000
    (re.compile(r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-zA-Z]))|~"), " "),
    (re.compile(r"\\hspace\{[^{}]*\}|</?(?:b|i|em|strong)>"), ""),
    (re.compile(r"\\(?:text|mathrm)\{([0-9A-F]+)\}(?=_)"), r"\1"),  # \text{2A}_{16}
    (re.compile(r"\\mathrm\{([ei])\}"), r"\1"),
    (re.compile(r"\\(?:dots|cdots)(?![a-zA-Z])"), r"\\ldots"),
    (re.compile(r"\\\\\[\d*\.?\d+ ?(?:mm|cm|pt|em|ex)\]"), r"\\\\"),  # a matrix's rows set apart
    (re.compile(r"\\not ?(=|\\in(?![a-zA-Z]))"), lambda match: "\\ne " if match[1] == "=" else "\\notin "),
    (re.compile(r"\\log_(?:e|\{e\})(?![a-zA-Z])"), r"\\ln"),
    (re.compile(r"(?<=\\circ)\{\}"), ""),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\([gl]eq)slant(?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"\\degree(?![a-zA-Z])|\^\{\\circ ?\}"), r"^\\circ"),
    (re.compile(r"\\colon(?![a-zA-Z])|\{:\}"), ":"),
    (re.compile(r"\\ast(?![a-zA-Z])"), r"\\cdot"),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
)
_TIDY = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z.])"), ""),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<![\w\\]) | (?!\w)"), ""),  # a space matters only between two word characters and after a \
)
# Of programs and plain text, in an answer that has been tidied.
_NOTATION = (
    (re.compile(r"(?<=[\w)}])\*\*(?=[\w({-])"), "^"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<=\d) ?[xX] ?(?=10\^)"), r"\\times "),
    (re.compile(r"(?<=\d)\^\{?o\}?(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"\\frac ?(\d|\\pi(?![a-zA-Z])) ?(?=\\pi(?![a-zA-Z]))"), r"\\frac{\1}"),  # \frac1\pi
    (re.compile(r"\\frac ?\\pi(?![a-zA-Z]) ?"), r"\\frac{\\pi}"),  # \frac\pi3
    (re.compile(r"(\\frac\{[^{}]*\}) ?(\\pi(?![a-zA-Z])|\d)"), r"\1{\2}"),
)
# All of an answer.
_WHOLE = (
    (re.compile(r"(-?\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})"), r"\1\\times 10^{\2}"),
    (re.compile(r"(-?\d{1,3})(?: \d{3})+(?:\.\d+)?"), None),  # 1 000 000
    (re.compile(r"\^\{?(\d+)\}?/_\{?(\d+)\}?"), r"\\frac{\1}{\2}"),
    (re.compile(r"\{?(\w+)\\choose ?(\w+)\}?"), r"\\binom{\1}{\2}"),
    (re.compile(r"\](-?[^][,]+),([^][,]+)\["), r"(\1,\2)"),
    (re.compile(r"(-?\d+) ?(?:\\text\{ ?to ?\}|to) ?(\d+)"), r"\1:\2"),
    (re.compile(r"\\text\{(?: ?[Tt]he)? ?(?:final )?[Aa]nswer(?: is)?:? ?\}(.+)"), r"\1"),
    (re.compile(r"\\text\{(?: ?[Tt]he)? ?(?:final )?[Aa]nswer(?: is|:) ?([^{}]+)\}"), r"\\text{\1}"),
)
_MIXED = re.compile(r"(-?\d{1,6}) (\d{1,6})/(\d{1,6})")
_REPEATING = re.compile(r"(-?)(\d{0,9})\.(\d{0,9})\\(?:overline|bar|dot) ?\{?(\d{1,9})\}?(\\?%|\^\\circ)?")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\{( ?-?\\?\$?\d[^{}]*)\}")
_ROWS = re.compile(r"\[(\[[^][]+\](?:,\[[^][]+\])*)\]")
_SPACED_LIST = re.compile(r" ?(-?\d+(?:, +-?\d+)+)[ .,]*")
_PROSE = re.compile(r"\\text\{[^{}]*\}")


def normalise(answer: str) -> str:
    r"""One spelling for what only looks different: white space, dollar signs around, `\dfrac`, `**73**`."""
    if _PLAIN.fullmatch(answer):
        return answer if answer.isascii() else answer.translate(_UNICODE)
    return _normalise(answer) if len(answer) <= LONGEST else _tidy(_without_dollars(answer.translate(_UNICODE).strip()))


@lru_cache(maxsize=1 << 14)
def _normalise(answer: str) -> str:
    if not answer.isascii():
        answer = _SUPERSCRIPT.sub(_raised, answer).translate(_UNICODE)
    answer = _unwrapped(answer)
    if answer.endswith("\\") and not answer.endswith("\\\\"):  # a control space at the end, of which the space is gone
        answer = answer[:-1]
    if "\\" in answer or "~" in answer or "<" in answer or "{:}" in answer:
        if "\\\\" in answer and "\\begin" not in answer:
            answer = re.sub(r"\\\\(?=[a-zA-Z{}%$])", r"\\", answer)
        for pattern, replacement in (_MARKUP[0], *_MARKUP):  # the first may stand in itself
            answer = pattern.sub(replacement, answer)
        if match := _TEXT.fullmatch(answer.strip().rstrip(".,")):  # \text{20 people}
            answer = match[1]
    if match := _SPACED_LIST.fullmatch(answer):  # 100, 200 is no number
        answer = f"\\{{{match[1]}\\}}"
    answer = _tidy(_unwrapped(answer)).rstrip(",;")
    for pattern, replacement in _NOTATION:
        answer = pattern.sub(replacement, answer)
    return _spelled_whole(answer)


def _tidy(answer: str) -> str:
    for pattern, replacement in _TIDY:
        answer = pattern.sub(replacement, answer)
    return answer.strip().removesuffix(".")


def _raised(match: re.Match[str]) -> str:
    return "^{" + "".join("-" if c == "⁻" else str(_SUPERSCRIPTS.index(c)) for c in match[0]) + "}"


def _unwrapped(answer: str) -> str:
    """Without the markup around all of it."""
    before = ""
    while answer != before:
        before = answer
        answer = _without_dollars(answer.strip())
        for start, end in _AROUND:
            if answer.startswith(start) and answer.endswith(end) and len(answer) > len(start + end):
                answer = answer[len(start) : -len(end)]
    return answer


def _spelled_whole(answer: str) -> str:
    for pattern, replacement in _WHOLE:
        if match := pattern.fullmatch(answer):
            answer = answer.replace(" ", "") if replacement is None else match.expand(replacement)
    if (match := _MIXED.fullmatch(answer)) and int(match[2]) < int(match[3]):
        return f"{match[1]}\\frac{{{match[2]}}}{{{match[3]}}}"
    if match := _REPEATING.fullmatch(answer):
        sign, whole, fixed, period, unit = match.groups()
        value = Fraction(int(whole + fixed or "0")) + Fraction(int(period), 10 ** len(period) - 1)
        value /= 10 ** len(fixed)
        return f"{sign}\\frac{{{value.numerator}}}{{{value.denominator}}}{unit or ''}"
    if match := _ROWS.fullmatch(answer):
        rows = [row.replace(",", "&") for row in match[1][1:-1].split("],[")]
        return "\\begin{pmatrix}" + "\\\\".join(rows) + "\\end{pmatrix}"
    if ";" in answer and "," not in answer:
        answer = answer.replace(";", ",")
    return _both_signs(answer) if "\\pm" in answer or "\\mp" in answer else answer


def _both_signs(answer: str) -> str:
    r"""`1\pm\sqrt{2}` as the list of both; math-verify does not read the sign inside a fraction."""
    if "," in answer or _PROSE.search(answer):
        return answer
    both = []
    for upper, lower in (("+", "-"), ("-", "+")):
        one = re.sub(r"\\pm ?(?![a-z])", upper, re.sub(r"\\mp ?(?![a-z])", lower, answer))
        both.append(re.sub(r"(^|[=({])\+", r"\1", one))
    return ",".join(both) if "\\" not in "".join(re.findall(r"\\[pm]m", "".join(both))) else answer


def _without_dollars(answer: str) -> str:
    """Without the pairs of dollar signs around it; linear also for a million of them."""
    start, end = 0, len(answer)
    while end - start > 1 and answer[start] == "$" == answer[end - 1] and answer[end - 2] != "\\":
        start, end = start + 1, end - 1
        while start < end and answer[start].isspace():
            start += 1
        while start < end and answer[end - 1].isspace():
            end -= 1
    return answer[start:end]
