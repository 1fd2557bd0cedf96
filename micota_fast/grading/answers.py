"""The final answer in a text: which box holds it, and one spelling for what only looks different."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BARE = re.compile(r"[^\s$]+")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def extract_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` or `\fbox{...}` of a text, stripped; None if there is none or it never closes.

    Braces nest; escaped ones (`\{`) do not count. `\boxed 7` without braces yields what follows up to white space, a
    dollar sign or the end. Where boxes are nested the innermost last one counts. Linear in the length of the text.
    """
    start = -1
    for match in _BOX.finditer(text, max(text.rfind("\\boxed"), text.rfind("\\fbox"), 0)):
        start = match.end()
    if start < 0:  # the last occurrence was another command, such as \boxedtext: look at all
        for match in _BOX.finditer(text):
            start = match.end()
    if start < 0:
        return None
    if text[start : start + 1] != "{":
        bare = _BARE.match(text, start)
        return bare.group().rstrip(".,;:") or None if bare else None
    depth = 0
    for token in _BRACE.finditer(text, start):
        if token.group() == "{":
            depth += 1
        elif token.group() == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : token.start()].strip()
    return None


# Unicode that models write where LaTeX has a command; math-verify would not parse it.
_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "°": "^\\circ ", "％": "\\%"}
    | {"≤": "\\le ", "≥": "\\ge ", "√": "\\sqrt ", "\u00a0": " ", "\u2009": " ", "\u202f": " "}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_TIDY = (
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z.])"), ""),
    (re.compile(r"\\!"), ""),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))"), ""),  # 1{,}000 and 1\,000
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<![\w\\]) | (?!\w)"), ""),  # a space matters only between two word characters and after a \
)
_PLAIN = re.compile(r"-?\d+")


def normalise(answer: str) -> str:
    r"""One spelling for what only looks different: white space, dollar signs around, `\dfrac`, `\left`, a full stop."""
    if answer.isascii():
        if _PLAIN.fullmatch(answer):
            return answer
    else:
        answer = answer.translate(_UNICODE)
    answer = _without_dollars(answer.strip())
    for pattern, replacement in _TIDY:
        answer = pattern.sub(replacement, answer)
    return answer.strip().removesuffix(".")


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
