"""The final answer in a text: which box or boxes hold it."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BARE = re.compile(r"[^\s$]+")
MOST_BOXES = 20  # of one list
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


# Between two boxes of which each is a part of the answer: `x = \boxed{1}$, $y = \boxed{2}`, `\boxed{1} and \boxed{2}`.
_NAME = r"(?:\(?[A-Za-z](?:_\{?\w\}?|\([A-Za-z]\))?(?:,[A-Za-z])?\)?\s*&?=\s*&?)"
_BETWEEN = re.compile(
    rf"[\s$*.]*(?:\\[)\]])?\s*(?:,|;|,?\s*(?:and|or|\\text\{{\s*(?:and|or)\s*\}}))\s*(?:\\q?quad)?(?:\\text\{{\s*(?:and|or)\s*\}}|and\b)?"
    rf"[\s$*]*(?:\\[(\[])?\s*(?P<name>{_NAME})?\s*-?"
)
_LINES = re.compile(rf"{_BETWEEN.pattern}|[\s$]*")  # which joins parts that the gold answer asks for
_NAMED = re.compile(rf"(?P<name>{_NAME})\s*$")
_SEVERAL = re.compile(r"[,;]|\\pm|\band\b|\bor\b")
_SIGNED = re.compile(r"- *\\(?:boxed|fbox)")
_MINUS = re.compile(r"(?:(?:[$=]|\\\(|\\\[)\s*-\s*|(?<!\S)-)$")  # not the one of a list, which a space follows


def final_answer(text: str, gold: str) -> str | None:
    r"""The answer that a text gives to a question whose gold answer this is; None if there is no complete box.

    That is what the last box holds, with a minus sign that stands before it in the formula. Boxes joined by a comma,
    "and" or "or" are one list (`x=\boxed{1}, y=\boxed{2}` is "x=1,y=2"): if the gold answer has one value, the last
    of them counts only if they have names or all hold the same, as two answers to one question are none.
    """
    last = extract_boxed(text)
    starts = text.count("\\boxed") + text.count("\\fbox")
    if not last or (starts == 1 and not _SIGNED.search(text)):
        return last
    several = bool(_SEVERAL.search(gold))
    boxes = _last_boxes(text, _LINES if several else _BETWEEN)
    if not boxes:
        return last
    (_, last), *before = reversed(boxes)
    if all(content == last for _, content in before) or _SEVERAL.search(last):
        return last
    named = all(name or "=" in content for name, content in boxes)
    if named and not several:
        return last
    return ",".join(name + content for name, content in boxes)


def _last_boxes(text: str, between: re.Pattern[str]) -> list[tuple[str, str]]:
    """Name and content of the last box and of those joined to it, in order; nothing if the last is not complete."""
    found: list[tuple[str, str]] = []
    end_of_text = len(text)
    while (start := max(text.rfind("\\boxed{", 0, end_of_text), text.rfind("\\fbox{", 0, end_of_text))) >= 0:
        content = extract_boxed(text[start:end_of_text])
        if content is None:
            break
        before = text[max(0, start - 40) : start]
        if found:
            opened = text.index("{", start)
            after = text[_closing(text, opened) + 1 : end_of_text]
            joined = len(after) <= 80 and between.fullmatch(after)
            if not joined:
                break
        name = match["name"] if (match := _NAMED.search(before.rstrip(" -"))) else ""
        sign = "-" if _MINUS.search(before) else ""
        found.append(("".join(name.replace("&", "").split()), sign + content))
        end_of_text = start
        if len(found) == MOST_BOXES:
            break
    return found[::-1]


def _closing(text: str, opened: int) -> int:
    """Where the brace opened there is closed, which it is."""
    depth = 0
    for token in _BRACE.finditer(text, opened):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return token.start()
    return len(text)


_SENTENCE = re.compile(r"(?i)\banswers?\b\W*(?:is|are|:|=)|^\W*(?:therefore|thus|hence|so)\b.*\d")
_PROSE = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{[^{}]*\}")


def why_unreadable(gold: str) -> str | None:
    """Say why no answer could equal this gold answer, as the end of a sentence about it; None if it can be read.

    A gold answer is the bare answer, as it would stand in a box. Nothing is extracted from a longer text, as what is
    the answer there is for the maker of the file to say.
    """
    bare = gold.strip().strip("$").strip()
    if not bare.strip("., "):
        return "is empty"
    if "####" in bare:
        return "is a whole solution; keep what follows ####"
    braces = [brace for brace in _BRACE.findall(bare) if brace in "{}"]
    if braces.count("{") != braces.count("}"):
        return "has braces that do not match"
    if _SENTENCE.search(_PROSE.sub("", bare)):
        return "is a sentence; keep the bare answer"
    return None
