"""The report's tables, built once and written as Markdown and as HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from micota_fast.config.report import ClaimsConfig
from micota_fast.report.comparison import LEVEL, Comparison
from micota_fast.report.corpora import Corpus
from micota_fast.report.samples import Sampled
from micota_fast.report.summary import BASE, Arm, Summary, p_value, percent, points
from micota_fast.statistics.intervals import Estimate
from micota_fast.statistics.paired import RESAMPLES

MARK = "†"
MARK_MEANING = f"{MARK} The 95% interval of Δ spans zero: not distinguishable from the untouched student."
CORRECTED_MARK = "‡"
CORRECTED_MEANING = (
    f"{CORRECTED_MARK} The 95% interval of Δ is clear of zero, but corrected for the number of comparisons its p-value "
    f"is above {LEVEL:g}: not distinguishable from the untouched student."
)
ABSENT = "–"


@dataclass(frozen=True)
class Cell:
    """A number and, smaller, what qualifies it, first and second. `strong` and `muted` are how it is set."""

    text: str
    qualifier: str = ""
    second: str = ""
    strong: bool = False
    muted: bool = False


@dataclass(frozen=True)
class Table:
    """`columns` are the headings; the first cell of each row names the row; `notes` stand below the table."""

    caption: str
    columns: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def accuracy_table(summary: Summary, claims: ClaimsConfig | None) -> Table:
    """Arms by benchmarks, their average, Δ to the base and what is claimed of it. Only an arm apart from all others is
    set in bold."""
    columns = (
        Cell("Arm"),
        *(Cell(name, f"n = {n}") for name, n in summary.problems.items()),
        Cell("Average"),
        Cell("95% interval"),
        Cell("Δ vs base", "95% interval"),
    )
    claimed = claims.deltas if claims is not None else {}
    rows = tuple(_accuracy_row(arm, arm is summary.winner, claimed.get(arm.name)) for arm in summary.arms)
    deltas = [arm.delta for arm in summary.trained if arm.delta]
    notes = [
        "Mean ± standard deviation over seeds, in % of problems; of a single run the 95% interval.",
        *_mark_meanings(deltas),
    ]
    if summary.trained:
        unpaired = _unpaired(summary)
        except_for = f", except for {', '.join(unpaired)}" if unpaired else ""
        paired = "not paired" if len(unpaired) == len(summary.trained) else f"paired on the problems{except_for}"
        notes.append(f"Δ is {paired}: see the table of differences.")
        notes.append(
            "Bold: the highest average, where it is distinguishable from every other arm's: the interval of each "
            "difference is clear of zero, and its corrected p-value, where there is one, at most 0.05."
            if summary.winner
            else "No average is in bold: none is distinguishable from every other."
        )
    if claims is not None:
        notes.append(f"Published: the difference of the average in points according to {claims.source}.")
    return Table("Accuracy of the student, by training corpus", columns, rows, tuple(notes))


def _accuracy_row(arm: Arm, strong: bool, claimed: float | None) -> tuple[Cell, ...]:
    average = arm.average
    runs = len(average.seeds)
    delta = Cell(ABSENT, muted=True)
    if arm.delta is not None:
        delta = _delta(arm.delta, strong)
        if claimed is not None:
            delta = replace(delta, second=f"published: {claimed:+g}".replace("-", "−"))
    return (
        Cell(arm.name, "untouched" if arm.name == BASE else f"{runs} seed{'s' if runs > 1 else ''}", strong=strong),
        *(_accuracy(estimate) for estimate in arm.benchmarks.values()),
        Cell(percent(average.mean), "" if average.sd is None else f"± {percent(average.sd)}", strong=strong),
        Cell(_bounds(average)),
        delta,
    )


def _delta(delta: Comparison, strong: bool = False, tested: bool = False) -> Cell:
    mark = f" {MARK}" if delta.spans_zero else "" if delta.clear else f" {CORRECTED_MARK}"
    bounds = f"[{points(delta.low)}, {points(delta.high)}]"
    test = ("unpaired" if delta.p_holm is None else p_value(delta.p_holm)) if tested else ""
    return Cell(points(delta.value) + mark, bounds, test, strong, muted=not delta.clear)


def _mark_meanings(deltas: Sequence[Comparison]) -> list[str]:
    spans = [MARK_MEANING] if any(delta.spans_zero for delta in deltas) else []
    corrected = any(not delta.clear and not delta.spans_zero for delta in deltas)
    return [*spans, *([CORRECTED_MEANING] if corrected else [])]


def _unpaired(summary: Summary) -> list[str]:
    return [arm.name for arm in summary.trained if arm.delta and not arm.delta.paired]


def deltas_table(summary: Summary) -> Table:
    """Every trained arm's difference to the base, by benchmark and on average, with interval and p-value."""
    benchmarks = list(summary.problems) if len(summary.problems) > 1 else []
    rows, every = [], []
    for arm in summary.trained:
        assert arm.delta is not None  # a trained arm always has one
        deltas = [*(arm.deltas[name] for name in benchmarks), arm.delta]
        every += deltas
        rows.append((Cell(arm.name), *(_delta(delta, tested=True) for delta in deltas)))
    tests = sum(delta.p_holm is not None for delta in every)
    notes = _mark_meanings(every)
    if any(delta.paired for delta in every):
        notes += [
            f"In points. [ ]: 95% interval of the paired difference: percentiles of {RESAMPLES:,} bootstrap resamples "
            "of the problems within each benchmark, two pseudo-problems added to each (after Bonett & Price 2012), "
            "answers averaged over samples and seeds; Student's t over seeds added. Not corrected for the number of "
            "comparisons.",
            "p: two-sided, from the same pairs. On a benchmark where all differences are −1, 0 or 1 (one answer each), "
            f"McNemar's exact test; otherwise, and for the average, {RESAMPLES:,} random flips of the signs of the "
            f"problems' differences, which can tell no p below {tests / (RESAMPLES + 1):.4f} after Holm's correction "
            f"over the {tests} tests of this table (what stands at that is at most that). It is about the "
            "models at hand: what another training seed would change is in the interval only.",
        ]
    if unpaired := _unpaired(summary):
        notes.append(
            f"Unpaired ({', '.join(unpaired)}): the graded rows of the arm or of the untouched student are not beside "
            "its results.json. The interval treats the two as if they had answered different problems, which makes it "
            "wide; nothing is tested."
        )
    columns = (Cell("Arm"), *(Cell(name, f"n = {summary.problems[name]}") for name in benchmarks), Cell("Average"))
    return Table("Difference to the untouched student", columns, tuple(rows), tuple(notes))


def samples_table(summary: Summary) -> Table | None:
    """avg@k and pass@k of the benchmarks with several answers to each problem; None where there are none."""
    names = [name for name in summary.problems if any(name in arm.sampled for arm in summary.arms)]
    if not names:
        return None
    rows = tuple((Cell(arm.name), *(_sampled(arm.sampled.get(name)) for name in names)) for arm in summary.arms)
    notes = (
        "avg@k: the mean over k answers to each problem (and over seeds), in %. SE: its standard error, the answers to "
        "a problem taken as one cluster (Miller 2024, arXiv 2411.00640); it covers the sample of problems, not "
        "training. pass@k: the unbiased estimate (Chen et al. 2021, arXiv 2107.03374), mean over problems and seeds.",
    )
    columns = (Cell("Arm"), *(Cell(name, f"n = {summary.problems[name]}") for name in names))
    return Table("Several answers to a problem", columns, rows, notes)


def _sampled(one: Sampled | None) -> Cell:
    if one is None:
        return Cell(ABSENT, muted=True)
    error = "" if one.standard_error is None else f", SE {percent(one.standard_error)}"
    k = one.samples
    return Cell(percent(one.accuracy), f"avg@{k}{error}", f"pass@{k} {percent(one.pass_at[k])}")


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
        f"Left out of {name} where the student measures it, as too long: {corpus.dropped:,} "
        f"document{'s' if corpus.dropped > 1 else ''}."
        for name, corpus in corpora.items()
        if corpus.dropped
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
    """Three significant digits in plain notation, of whole numbers all: 0.0123, 1.23, 45.6, 1,235."""
    if value >= 100 or value <= 0:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}"


def to_markdown(table: Table) -> str:
    """A GitHub-flavoured table under its caption."""
    lines = [f"**{markdown_text(table.caption)}**", ""]
    lines.append("| " + " | ".join(_markdown_cell(cell, heading=True) for cell in table.columns) + " |")
    lines.append("|" + "|".join([" :-- ", *[" --: "] * (len(table.columns) - 1)]) + "|")
    lines += ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in table.rows]
    for note in table.notes:
        lines += ["", markdown_text(note)]
    return "\n".join(lines) + "\n"


def _markdown_cell(cell: Cell, heading: bool = False) -> str:
    text = markdown_text(cell.text)
    text = f"**{text}**" if cell.strong else text
    if not cell.qualifier:
        return text
    qualifier = markdown_text(", ".join(filter(None, (cell.qualifier, cell.second))))
    plain = cell.qualifier.startswith(("±", "[")) and not heading
    return f"{text} {qualifier}" if plain else f"{text} ({qualifier})"


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it stands: no emphasis, markup, entity or formula, and no link."""
    for special in "\\|*_<`&$~":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.replace("](", "]\\(").split())


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
    qualifiers = "".join(f"<small>{escape(one)}</small>" for one in (cell.qualifier, cell.second) if one)
    return f"<span>{text}{qualifiers}</span>"
