"""Formulas: found by their delimiters (money is not), of known elements only, and hostile ones stay text at once."""

import json
import re
from typing import Any

import pytest

from micota_fast.report import mathematics
from micota_fast.report.mathematics import PATTERN, convert, formulas


def found(text: str) -> list[str]:
    return [match[0] for match in re.finditer(PATTERN, text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so $x=5$, and \(y^2\).", ["$x=5$", r"\(y^2\)"]),
        ("$$\na\n$$ then \\[b \\\\[2pt] c\\]", ["$$\na\n$$", "\\[b \\\\[2pt] c\\]"]),
        (r"It is \boxed{\sqrt{\frac{1}{2}}}.", [r"\boxed{\sqrt{\frac{1}{2}}}"]),
        ("It costs $5 and $6, or $7-$8, in all $26.", []),
        (r"\$5 and \$6, then $\$5+x$", [r"$\$5+x$"]),
        ("unclosed $x^2 + 1\nand on", []),
        (r"unclosed \(x and \boxed{y", []),
    ],
)
def test_formulas_are_found_by_their_delimiters(text: str, expected: list[str]) -> None:
    assert found(text) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (r"\frac{3}{4}", [["mfrac", "n3", "n4"]]),
        (r"$x^2$", [["msup", "ix", "n2"]]),
        (r"\(90^\circ\)", [["msup", "n90", "o∘"]]),
        (r"\boxed{7}", [["menclose", {"notation": "box"}, "n7"]]),
        (
            "$a+b=c$",
            ["ia", ["mrow", ["mo", {"form": "infix"}, "+"], "ib"], ["mrow", ["mo", {"form": "infix"}, "="], "ic"]],
        ),
        (r"$f(x)$", [["mrow", "if", "p(", "ix", "p)"]]),
        (r"$\text{<b>}$", ["t<b>"]),
        (
            r"a\not=b",
            [
                ["mrow", "ia", ["mpadded", {"width": "0"}, "t⧸"]],
                ["mrow", ["mo", {"form": "infix"}, "="], "ib"],
            ],
        ),
    ],
)
def test_a_formula_becomes_pieces_between_which_a_line_may_end(source: str, expected: list[Any]) -> None:
    assert convert(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        r"\boxed{50%}",
        "$10%+5$",
        r"$10\%+5$",
        r"\(x = 20% = \frac{1}{5}\)",
        "$$7% \n + 8%$$",
        r"$\begin{array}{c}1\\%2\end{array}$",
        r"\frac{3%}{4}",
        r"$\text{50% of }8$",
        r"$\text{50\% of }8\textbf{ \& 1%}$",
        r"5\not=6%",
    ],
)
def test_each_digit_and_percent_sign_of_a_formula_is_in_what_is_shown(source: str) -> None:
    shown = json.dumps([_without_attributes(piece) for piece in convert(source) or []], ensure_ascii=False)
    assert "\\" not in shown
    assert re.findall(r"[0-9%]", shown) == re.findall(r"[0-9%]", source)


def _without_attributes(node: Any) -> Any:
    return (
        [_without_attributes(each) for each in node if not isinstance(each, dict)] if isinstance(node, list) else node
    )


def test_aligned_lines_become_a_table() -> None:
    (table,) = convert(r"$$\begin{align*} a &= b \\ &= c \end{align*}$$") or []
    assert isinstance(table, list)
    assert (table[0], len(table)) == ("mtable", 3)


@pytest.mark.parametrize(
    "source",
    [
        "$" + "x" * 600 + "$",
        "$" + "{" * 200 + "x" + "}" * 200 + "$",
        "$" + r"\sqrt" * 95 + "{x}$",
        r"$\def\a{\a\a}\a$",
        r"$\newcommand{\a}{xx}\newcommand{\b}{\a\a}\newcommand{\c}{\b\b}\c\c$",
        r"$\begin{array}$",
        r"$\begin{array}{c}" + "&" * 400 + "$",
        r"$\frac$",
        r"$\nosuchcommand{x}$",
        r"$x & y$",
        r"$\cancel{x}$",
        r"$\phantom{wrong}$",
        "$9 a day for the first week$",
    ],
    ids=range(13),
)
def test_what_does_not_convert_stays_as_it_is_written(source: str) -> None:
    assert convert(source) is None


@pytest.mark.parametrize(
    "source",
    [
        r"\href{javascript:alert(1)}{x}",
        r"\style{background:url(//x)}{x} + \class{a}{b}",
        r"\textcolor{url(x)}{y}",
        r"\hspace{9999999em}x\kern-99em y",
        r"<script>alert(1)</script>",
    ],
)
def test_of_a_formula_only_known_attributes_are_kept(source: str) -> None:
    pieces = convert(source)
    assert pieces
    assert not re.search(r"href|style=|\"style\"|class|color|url|999", json.dumps(pieces).replace("mstyle", ""))


@pytest.mark.parametrize(
    "unit",
    ["$", "$a", r"\(", r"\[a", r"\boxed{", r"\boxed{{{a}{", "$$ ", r"\boxed{\boxed{\boxed{a}", "$x{$", r"\\(", "$\\"],
)
def test_long_texts_of_nothing_but_delimiters_are_searched_in_linear_time(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))  # in quadratic time: hours
    assert len(list(formulas([text], []))) <= 2


def test_the_characters_converted_for_a_page_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "_SOURCE_ROOM", 10)
    assert [source for source, _ in formulas(["$x_1$ $x_1$ $x_2$ $x_3$"], [])] == ["$x_1$", "$x_2$"]
    monkeypatch.undo()
    assert [source for source, _ in formulas(["words"], [r"\frac12", "12", "a b"])] == [r"\frac12"]
