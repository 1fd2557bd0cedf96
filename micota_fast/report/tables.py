"""The report's tables, built once and written as Markdown and as HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from micota_fast.intervals import Estimate
from micota_fast.report.inputs import Corpus
from micota_fast.report.summary import BASE, Arm, Summary, percent, points

MARK = "†"
MARK_MEANING = f"{MARK} The 95% interval of Δ spans zero: not distinguishable from the untouched student."
ABSENT = "–"


@dataclass(frozen=True)
class Cell:
    """A number and, smaller, what qualifies it. `strong` and `muted` are how it is set."""

    text: str
    qualifier: str = ""
    strong: bool = False
    muted: bool = False


@dataclass(frozen=True)
class Table:
    """`columns` are the headings; the first cell of each row names the row; `notes` stand below the table."""

    caption: str
    columns: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def accuracy_table(summary: Summary) -> Table:
    """Arms by benchmarks, their average and Δ to the base. Only an arm apart from all others is set in bold."""
    columns = (
        Cell("Arm"),
        *(Cell(name, f"n = {n}") for name, n in summary.problems.items()),
        Cell("Average"),
        Cell("95% interval"),
        Cell("Δ vs base", "95% interval"),
    )
    rows = tuple(_accuracy_row(arm, strong=arm is summary.winner) for arm in summary.arms)
    spans = any(arm.delta and arm.delta.spans_zero for arm in summary.trained)
    notes = [
        "Mean ± standard deviation over seeds, in % of problems; of a single run the 95% interval.",
        *([MARK_MEANING] if spans else []),
    ]
    if summary.trained:
        notes.append(
            "Bold: an average whose difference to every other arm's has an interval clear of zero."
            if summary.winner
            else "No average is in bold: none is distinguishable from every other."
        )
    return Table("Accuracy of the student, by training corpus", columns, rows, tuple(notes))


def _accuracy_row(arm: Arm, strong: bool) -> tuple[Cell, ...]:
    average = arm.average
    runs = len(average.seeds)
    delta = Cell(ABSENT, muted=True)
    if arm.delta is not None:
        bounds = f"[{points(arm.delta.low)}, {points(arm.delta.high)}]"
        mark = f" {MARK}" if arm.delta.spans_zero else ""
        delta = Cell(points(arm.delta.value) + mark, bounds, strong, muted=arm.delta.spans_zero)
    return (
        Cell(arm.name, "untouched" if arm.name == BASE else f"{runs} seed{'s' if runs > 1 else ''}", strong),
        *(_accuracy(estimate) for estimate in arm.benchmarks.values()),
        Cell(percent(average.mean), "" if average.sd is None else f"± {percent(average.sd)}", strong),
        Cell(_bounds(average)),
        delta,
    )


def _bounds(estimate: Estimate) -> str:
    return f"[{percent(estimate.low)}, {percent(estimate.high)}]"


def _accuracy(estimate: Estimate) -> Cell:
    spread = _bounds(estimate) if estimate.sd is None else f"± {percent(estimate.sd)}"
    return Cell(percent(estimate.mean), spread)


def corpora_table(corpora: dict[str, Corpus]) -> Table:
    """What filtering kept of each corpus, how long it is and how likely the untrained student finds it."""
    columns = (
        Cell("Corpus"),
        Cell("Completions"),
        Cell("Accepted"),
        Cell("Acceptance"),
        Cell("Median length", "tokens"),
        Cell("Mean length", "tokens"),
        Cell("Perplexity", "untrained student"),
    )
    rows = tuple(
        (
            Cell(name),
            _known(corpus.total, "{:,}"),
            _known(corpus.accepted, "{:,}"),
            _known(
                100 * corpus.accepted / corpus.total if corpus.accepted is not None and corpus.total else None,
                "{:.1f}%",
            ),
            Cell(_thousands(corpus.median_tokens)),
            Cell(_thousands(corpus.mean_tokens)),
            Cell(ABSENT, muted=True) if corpus.perplexity is None else Cell(significant(corpus.perplexity)),
        )
        for name, corpus in corpora.items()
    )
    others = [name for name, corpus in corpora.items() if not corpus.student_tokens]
    notes = [
        "Lengths in tokens of the model that wrote the corpus."
        if len(others) == len(corpora)
        else "Lengths in supervised tokens of the student"
        + (f", except {', '.join(others)}: of its writer." if others else ".")
    ]
    notes += [
        f"Rejected from {name}: " + ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts) + "."
        for name, corpus in corpora.items()
        if (counts := [(reason, count) for reason, count in corpus.rejected.items() if count])
    ]
    return Table("Training corpora", columns, rows, tuple(notes))


def answers_table(arms: Sequence[Arm]) -> Table:
    """How long each arm's answers are and how many never reached one."""
    columns = (
        Cell("Arm"),
        Cell("Mean answer length", "tokens"),
        Cell("Truncated", "% of answers"),
        Cell("No final answer", "% of answers"),
        Cell("Grading timed out", "% of answers"),
    )
    rows = tuple(
        (
            Cell(arm.name),
            _tokens(arm.answers.mean_tokens, arm.answers.mean_tokens_sd),
            *(
                _known(None if share is None else 100 * share, "{:.1f}")
                for share in (arm.answers.truncated, arm.answers.no_answer, arm.answers.timeout)
            ),
        )
        for arm in arms
    )
    notes = ("Over all answers of all benchmarks and seeds; ± is the standard deviation over seeds.",)
    return Table("Length of the answers and how they end", columns, rows, notes)


def _tokens(mean: float | None, sd: float | None) -> Cell:
    if mean is None:
        return Cell(ABSENT, muted=True)
    return Cell(f"{mean:,.1f}", "" if sd is None else f"± {sd:,.1f}")


def _known(value: float | None, form: str) -> Cell:
    return Cell(ABSENT, muted=True) if value is None else Cell(form.format(value))


def _thousands(value: float) -> str:
    """Whole numbers as they are, others to one decimal: 12,000 and 613.5."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def significant(value: float) -> str:
    """Three significant digits in plain notation: 1.23, 45.6, 1,235."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def to_markdown(table: Table) -> str:
    """A GitHub-flavoured table under its caption."""
    lines = [f"**{_markdown(table.caption)}**", ""]
    lines.append("| " + " | ".join(_markdown_cell(cell, heading=True) for cell in table.columns) + " |")
    lines.append("|" + "|".join([" :-- ", *[" --: "] * (len(table.columns) - 1)]) + "|")
    lines += ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in table.rows]
    for note in table.notes:
        lines += ["", _markdown(note)]
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell, heading: bool = False) -> str:
    text = _markdown(cell.text)
    text = f"**{text}**" if cell.strong else text
    if not cell.qualifier:
        return text
    qualifier = _markdown(cell.qualifier)
    plain = cell.qualifier.startswith(("±", "[")) and not heading
    return f"{text} {qualifier}" if plain else f"{text} ({qualifier})"


def _markdown(text: str) -> str:
    for special in "\\|*_<`":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def to_html(table: Table, colours: dict[str, str]) -> str:
    """A table that scrolls sideways on its own where the page is narrow.

    Args:
        table: what to set.
        colours: name of a row -> CSS colour of the dot beside it, the same as in the plots.
    """
    head = "".join(f'<th scope="col">{_html_cell(cell)}</th>' for cell in table.columns)
    body = ""
    for row in table.rows:
        dot = f'<i class="dot" style="background:{colours[row[0].text]}"></i>' if row[0].text in colours else ""
        body += f'<tr><th scope="row"><span class="name">{dot}{_html_cell(row[0])}</span></th>'
        body += "".join(f"<td{' class=muted' if cell.muted else ''}>{_html_cell(cell)}</td>" for cell in row[1:])
        body += "</tr>\n"
    label = escape(table.caption)
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    return (
        f'<div class="table"><p class="caption">{label}</p>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n"
        f'<div class="notes">{notes}</div></div>\n'
    )


def _html_cell(cell: Cell) -> str:
    text = escape(cell.text)
    text = f"<b>{text}</b>" if cell.strong else text
    qualifier = f"<small>{escape(cell.qualifier)}</small>" if cell.qualifier else ""
    return f"<span>{text}{qualifier}</span>"
