"""LaTeX in problems and answers -> MathML, which browsers draw without a script or a font of ours.

latex2mathml (MIT) converts. Models wrote the formulas, so what it is given is short and free of macros, and of what it
returns only known elements and attributes are kept. A formula beyond these limits is shown as it was written.
"""

import html
import re
from collections.abc import Iterable, Iterator
from typing import Any
from xml.etree.ElementTree import Element

from micota_fast.errors import InputError

PATTERN = "|".join(
    (
        r"\$\$[^$]{1,500}\$\$",
        r"(?<!\\)\$(?![\s$])(?:[^$\\\n]|\\[^\n]){1,500}(?<!\s)\$(?![0-9])",  # not "$5 and $6"
        r"(?<!\\)\\\((?:[^\\]|\\[^()]){1,500}\\\)",
        r"(?<!\\)\\\[(?:[^\\]|\\[^[\]]){1,500}\\\]",
        r"\\f?boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]{0,500}\}){0,500}\}){0,500}\}",
    )
)
"""What is taken for a formula, with its delimiters: a pattern of Python's and of JavaScript's. It takes linear time,
since what may stand between two delimiters contains no opening one (of \\boxed: not more than two levels deep)."""

Node = str | list[Any]
"""A token as its kind and text, such as "ix" (see `_KINDS`); or [tag, attributes if any, its nodes or text]."""

_LONGEST = 500  # characters of a formula
_DEEPEST = 40  # elements within each other
_MOST_NODES = 1000
_SOURCE_ROOM = 320_000  # characters that are converted for a page: up to 60 microseconds each (of "a+a+a+...")
TREE_ROOM = 3_000_000
"""Bytes for the formulas of a page."""

_KINDS = {"mi": "i", "mn": "n", "mo": "o", "mtext": "t"}
_UNSTRETCHED = "p"  # the kind of <mo stretchy="false">, which each parenthesis is
_ROWS = frozenset(
    ("mrow", "mstyle", "mpadded", "menclose", "mspace", "mtable", "mtr", "mtd", "mfrac", "msqrt", "mroot")
)
_SCRIPTS = frozenset(("msub", "msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts", "mprescripts"))
_LENGTH = r"0|[0-9]{0,2}(\.[0-9]{1,4})?em"
_ATTRIBUTES = {
    name: re.compile(values)
    for name, values in {
        "stretchy|fence|accent|displaystyle|movablelimits|largeop|symmetric": "true|false",
        "form": "prefix|infix|postfix",
        "mathvariant": "normal|bold",
        "notation": "box",
        "columnalign": "(left|center|right)( (left|center|right)){0,20}",
        "linethickness|scriptlevel": "[0-2]",
        "width|lspace|rspace|minsize|maxsize": _LENGTH,
    }.items()
    for name in name.split("|")
}
_MACROS = re.compile(r"\\(?:re)?(?:newcommand|def|gdef|edef|let|newenvironment)\b")
_ALIGNED = re.compile(r"\\(begin|end)\{(?:aligned|align\*?|split|gathered|gather\*?|eqnarray\*?)\}")
_PROSE = re.compile(r"(?<![\\\w])[A-Za-z]{3,} [A-Za-z]{2,}\b")  # outside braces: "$9 a day, of US$"
_PERCENT = re.compile(r"\\.|%", re.DOTALL)  # or a command's first two characters, so that \\ does not escape the sign
_ESCAPED = re.compile(r"\\([%$#&_{}])")
_BREAK_BEFORE = frozenset("=<>≤≥≠≈≡∼→⇒⟹⇔⟺+−")


def require_latex2mathml() -> None:
    """Raise InputError if the optional extra `report` is not installed."""
    try:
        import latex2mathml.converter  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the report shows formulas with latex2mathml, which is not installed: pip install 'micota-fast[report]'"
        ) from error


def formulas(texts: Iterable[str], wholes: Iterable[str]) -> Iterator[tuple[str, list[Node]]]:
    """Yield each formula once, as it is written, with its pieces; a line may end between two pieces.

    Args:
        texts: each with any number of formulas in delimiters.
        wholes: each perhaps a formula without delimiters, as final answers are.
    """
    left, seen = _SOURCE_ROOM, set()
    for source in _sources(texts, wholes):
        if source in seen:
            continue
        seen.add(source)
        left -= len(source)
        if left < 0:
            return
        if pieces := convert(source):
            yield source, pieces


def _sources(texts: Iterable[str], wholes: Iterable[str]) -> Iterator[str]:
    yield from (whole for whole in wholes if re.search(r"[\\^_]", whole))
    for text in texts:
        yield from (match[0] for match in re.finditer(PATTERN, text))


def convert(source: str) -> list[Node] | None:
    """Convert a formula, with or without delimiters, to the pieces of its MathML; None: show it as it is written."""
    from latex2mathml.converter import convert_to_element

    if len(source) > _LONGEST or _MACROS.search(source):
        return None
    latex = source
    for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if source.startswith(start) and source.endswith(end) and len(source) > len(start + end):
            latex = source[len(start) : -len(end)]
            break
    if _PROSE.search(re.sub(r"\{[^{}]*\}", "{}", latex)):
        return None
    # A percent sign begins a comment in LaTeX, up to the end of the line; whoever wrote "50%" has not meant one.
    latex = _PERCENT.sub(lambda found: r"\%" if found[0] == "%" else found[0], latex)
    latex = _ALIGNED.sub(lambda found: rf"\{found[1]}{{array}}" + "{rl}" * (found[1] == "begin"), latex)
    try:
        (row,) = convert_to_element(latex)
        nodes = _nodes(row, 0, [_MOST_NODES])
    except Exception:  # whatever its parser meets; a RecursionError too
        return None
    return _pieces(nodes)


class _Refused(Exception):
    """The tree has what a page should not show."""


def _nodes(parent: Element, depth: int, left: list[int]) -> list[Node]:
    """List the children of an element; `left` is how many more the formula may have."""
    left[0] -= len(parent)
    if depth > _DEEPEST or left[0] < 0:
        raise _Refused
    return [_node(child, depth, left) for child in parent]


def _node(element: Element, depth: int, left: list[int]) -> Node:
    tag = element.tag
    text = html.unescape(element.text or "")
    if tag == "mtext":  # words come as they were written
        text = _ESCAPED.sub(r"\1", text)
    attributes = {
        name: value
        for name, value in element.attrib.items()
        if name in _ATTRIBUTES and _ATTRIBUTES[name].fullmatch(value)
    }
    if tag in _KINDS:
        # A command that is not known, or a sign that belongs to a structure which is not there.
        if text.startswith("\\") or (tag == "mi" and text in ("&", "{", "}")) or len(element):
            raise _Refused
        if not attributes:
            return _KINDS[tag] + text
        return _UNSTRETCHED + text if (tag, attributes) == ("mo", {"stretchy": "false"}) else [tag, attributes, text]
    if tag not in _ROWS | _SCRIPTS or text.strip() or (tag == "menclose" and not attributes):
        raise _Refused
    nodes = _nodes(element, depth + 1, left)
    if tag == "mrow" and len(nodes) == 1 and not attributes:
        return nodes[0]
    return [tag, attributes, *nodes] if attributes else [tag, *nodes]


def _pieces(nodes: list[Node]) -> list[Node]:
    """Cut a row before its relations, sums and differences; the sign keeps the space that it has within a row."""
    pieces: list[list[Node]] = [[]]
    for place, node in enumerate(nodes):
        if place and isinstance(node, str) and node[0] == "o" and node[1:] in _BREAK_BEFORE:
            pieces.append([["mo", {"form": "infix"}, node[1:]]])
        else:
            pieces[-1].append(node)
    return [piece[0] if len(piece) == 1 else ["mrow", *piece] for piece in pieces if piece]
