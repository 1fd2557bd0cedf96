"""The report's tables as LaTeX: `table` environments that need the package booktabs and nothing else."""

from collections.abc import Sequence

from micota_fast.report.tables import Cell, Table

_CHARACTERS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "-": "{-}",  # two in a row would become a dash
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "·": r"$\cdot$",
    "…": r"\ldots{}",
    "’": "'",
    # After \\ and \midrule these would begin an argument.
    "[": "{[}",
    "*": "{*}",
}


def to_latex(table: Table) -> str:
    """One `table` environment; what qualifies a number stands below it in small type, in rows of its own."""
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(table.caption)}}}",
        r"\footnotesize\setlength{\tabcolsep}{3pt}",
        r"\makebox[\linewidth]{%",  # one that is too wide for the page stands out on both sides alike
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        *_rows(table.columns),
        r"\midrule",
    ]
    for place, row in enumerate(table.rows):
        lines += [r"\addlinespace", *_rows(row)] if place else _rows(row)
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if table.notes:
        notes = [rf"{latex_text(note)}\par" for note in table.notes]
        lines += ["", r"\smallskip", r"\begin{minipage}{\linewidth}\footnotesize", *notes, r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _rows(cells: Sequence[Cell]) -> list[str]:
    first = [rf"\textbf{{{latex_text(cell.text)}}}" if cell.strong else latex_text(cell.text) for cell in cells]
    qualifiers = [[cell.qualifier for cell in cells], [cell.second for cell in cells]]
    small = [[rf"{{\tiny {latex_text(one)}}}" if one else "" for one in line] for line in qualifiers if any(line)]
    return [" & ".join(line) + r" \\" for line in [first, *small]]


def latex_text(text: str) -> str:
    """Text that LaTeX sets as it stands; of characters beyond ASCII only those of our own tables are translated."""
    return "".join(_CHARACTERS.get(character, character) for character in " ".join(text.split()))
