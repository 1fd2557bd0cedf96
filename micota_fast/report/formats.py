"""How the report is written: its tables as Markdown, HTML and LaTeX, its numbers as CSV and JSON.

Numbers in CSV and JSON are unrounded: fractions if the tables show percent, empty or null if there is none.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from micota_fast.alignment.results import Distribution
from micota_fast.config.report import ReportConfig
from micota_fast.corpus.results import BenchmarkOverlap
from micota_fast.report.comparison import Comparison
from micota_fast.report.corpora import Corpus
from micota_fast.report.inputs import Inputs
from micota_fast.report.learnability import PARTS_BELOW, LearnabilityRanking
from micota_fast.report.summary import INTERVAL_METHOD, Arm, Summary, headline, mean_curve, percent, points
from micota_fast.report.tables import Cell, Table
from micota_fast.statistics.intervals import Estimate

AVERAGE = "Average"
_QUANTILES = ("p10", "p50", "p90")
_SPREAD = ("mean", "sd", *_QUANTILES)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_LATEX_CHARACTERS = {
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
    "×": r"$\times$",
    "…": r"\ldots{}",
    "’": "'",
    # After \\ and \midrule these would begin an argument.
    "[": "{[}",
    "*": "{*}",
}


def to_markdown(table: Table) -> str:
    """Format a GitHub-flavoured table under its caption."""
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
    """Escape text so that Markdown shows it as it is: no emphasis, markup, entity or formula, and no link."""
    for special in "\\|*_<`&$~":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.replace("](", "]\\(").split())


def to_html(table: Table, colours: dict[str, str]) -> str:
    """Format a table that scrolls sideways by itself if the page is narrow.

    Args:
        table: what to set.
        colours: name of a row -> CSS colour of the dot next to it, the same as in the plots.
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
    parts = [escape(one) for one in (cell.qualifier, cell.second) if one]
    # On one line where there is room for it; a break goes between the two, never into one.
    small = " ".join(f"<span>{part}{',' * (part is not parts[-1])}</span>" for part in parts)
    return f"<span>{text}<small>{small}</small></span>" if small else f"<span>{text}</span>"


def to_latex(table: Table) -> str:
    """Format a `table` environment, which needs the package booktabs and no other.

    What qualifies a number stands below it in small type, in a row of its own.
    """
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_text(table.caption)}}}",
        r"\footnotesize\setlength{\tabcolsep}{3pt}",
        r"\makebox[\linewidth]{%",  # one that is too wide for the page stands out on both sides alike
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        *_latex_rows(table.columns),
        r"\midrule",
    ]
    for place, row in enumerate(table.rows):
        lines += [r"\addlinespace", *_latex_rows(row)] if place else _latex_rows(row)
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if table.notes:
        notes = [rf"{latex_text(note)}\par" for note in table.notes]
        lines += ["", r"\smallskip", r"\begin{minipage}{\linewidth}\footnotesize", *notes, r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _latex_rows(cells: Sequence[Cell]) -> list[str]:
    first = [rf"\textbf{{{latex_text(cell.text)}}}" if cell.strong else latex_text(cell.text) for cell in cells]
    qualifiers = [", ".join(filter(None, (cell.qualifier, cell.second))) for cell in cells]
    small = [rf"{{\tiny {latex_text(one)}}}" if one else "" for one in qualifiers]
    return [" & ".join(line) + r" \\" for line in ([first, small] if any(small) else [first])]


def to_compact_latex(summary: Summary) -> str:
    """Format the accuracies as a `table` that fits a column of a two-column paper; needs booktabs and no other package.

    Benchmarks are rows and arms columns: means in %, with the standard deviation over seeds as a subscript.
    """
    arms = summary.arms
    benchmarks = [(name, [arm.benchmarks[name] for arm in arms]) for name in summary.problems]
    rows = [[latex_text(name), *map(_with_deviation, of)] for name, of in benchmarks]
    average = [AVERAGE, *(_with_deviation(arm.average) for arm in arms)]
    delta = [r"$\Delta$", *(latex_text(points(arm.delta.value)) if arm.delta else "--" for arm in arms)]
    body = [*rows, None, average, delta]
    seeds = "Means in % of problems; subscripts: standard deviation over seeds; "
    note = seeds * any(arm.average.sd is not None for arm in arms) or "In % of problems; "
    lines = [
        "% Needs \\usepackage{booktabs}.",
        r"\begin{table}",
        r"\centering\scriptsize\setlength{\tabcolsep}{2.5pt}",
        rf"\caption{{Accuracy. {latex_text(note)} $\Delta$: average less that of the untouched student.}}",
        rf"\begin{{tabular}}{{l{'r' * len(arms)}}}",
        r"\toprule",
        " & ".join(["", *(latex_text(arm.name) for arm in arms)]) + r" \\",
        r"\midrule",
        *(r"\midrule" if row is None else " & ".join(row) + r" \\" for row in body),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _with_deviation(estimate: Estimate) -> str:
    deviation = "" if estimate.sd is None else rf"$_{{{percent(estimate.sd)}}}$"
    return latex_text(percent(estimate.mean)) + deviation


def latex_text(text: str) -> str:
    """Escape text so that LaTeX sets it as it is; beyond ASCII only the characters of our tables are translated."""
    return "".join(_LATEX_CHARACTERS.get(character, character) for character in " ".join(text.split()))


def accuracy_csv(summary: Summary, claims: Mapping[str, float]) -> str:
    """List one row per arm and benchmark, and one per arm for the average. `claims`: arm -> claimed Δ, in points."""
    rows: list[list[Any]] = []
    for arm in summary.arms:
        every = [*arm.benchmarks.items(), (AVERAGE, arm.average)]
        for name, estimate in every:
            average = name is AVERAGE
            delta = arm.delta if average else arm.deltas.get(name)
            row: list[Any] = [arm.name, name, None if average else summary.problems[name], len(estimate.seeds)]
            row += [estimate.mean, estimate.sd, estimate.low, estimate.high]
            if delta is None:
                row += [None] * 6
            else:
                row += [delta.value, delta.low, delta.high, delta.paired, delta.p, delta.p_holm]
            claim = claims.get(arm.name) if average else None
            rows.append([*row, None if claim is None else claim / 100])
    heads = ["arm", "benchmark", "problems", "seeds", "accuracy", "sd_over_seeds", "low95", "high95", "delta"]
    return _csv([*heads, "delta_low95", "delta_high95", "paired", "p", "p_holm", "delta_claimed"], rows)


def corpora_csv(corpora: Mapping[str, Corpus], arms: Mapping[str, Arm]) -> str:
    """List one row per corpus.

    Tokens are the student's if `student_tokens`, else the writer's; NLL is in nats per token; shares and accuracy are
    fractions. `arms`: corpus -> the arm that was trained on it.
    """
    rows = []
    for name, corpus in corpora.items():
        row: list[Any] = [name, corpus.total, corpus.accepted, corpus.median_tokens, corpus.mean_tokens]
        row += [corpus.student_tokens, corpus.perplexity, *_values(corpus.document_nll, _QUANTILES), corpus.dropped]
        for spread in (corpus.nats_per_answer, corpus.departures_per_answer):
            row += _values(spread, _SPREAD)
        row += [corpus.rank_surprisal_ratio, corpus.top1, *(corpus.unlikely.get(p) for p in PARTS_BELOW)]
        row += [corpus.markers_per_1k, corpus.own_overlap, arms[name].average.mean if name in arms else None]
        rows.append(row)
    heads = ["corpus", "completions", "accepted", "median_tokens", "mean_tokens", "student_tokens", "perplexity"]
    heads += [*(f"document_nll_{key}" for key in _QUANTILES), "documents_too_long_to_measure"]
    for what in ("nats", "departures"):
        heads += [f"{what}_per_answer_{key}" for key in _SPREAD]
    heads += ["rank_surprisal_ratio", "top1", *(f"tokens_below_p_{p}" for p in PARTS_BELOW)]
    return _csv([*heads, "reflection_markers_per_1k", "own_overlap", "arm_accuracy"], rows)


def contamination_csv(overlaps: Mapping[str, Mapping[str, BenchmarkOverlap]]) -> str:
    """List one row per corpus and benchmark."""
    rows = [
        [corpus, name, overlap.problems, len(overlap.exact), len(overlap.gram13), overlap.rows]
        for corpus, of_corpus in overlaps.items()
        for name, overlap in of_corpus.items()
    ]
    return _csv(["corpus", "benchmark", "problems", "word_for_word", "sharing_13_words", "corpus_rows"], rows)


def answers_csv(arms: Sequence[Arm]) -> str:
    """List one row per arm: how its answers look."""
    heads = ["arm", "mean_tokens", "mean_tokens_sd_over_seeds", "truncated", "no_answer", "timeout"]
    answers = [(arm.name, arm.answers) for arm in arms]
    rows = [[name, of.mean_tokens, of.mean_tokens_sd, of.truncated, of.no_answer, of.timeout] for name, of in answers]
    return _csv(heads, rows)


def _csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Keep a name from being a formula in a spreadsheet, as OWASP says ("CSV Injection"); numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def report_json(
    config: ReportConfig, inputs: Inputs, summary: Summary, ranking: LearnabilityRanking | None
) -> dict[str, Any]:
    """Collect everything the page shows. Keys are written sorted, so what has an order also has a list of names."""
    finding, qualified = headline(summary)
    return {
        "title": config.title,
        "headline": finding,
        "headline_qualified": qualified,
        "method": INTERVAL_METHOD,
        "protocol": inputs.base.protocol,
        "problems": summary.problems,
        "chance": summary.chance,
        "benchmark_order": list(summary.problems),
        "arm_order": [arm.name for arm in summary.arms],
        "arms": {arm.name: _arm(arm) for arm in summary.arms},
        "average_differences": {
            a.name: {b.name: _difference(summary.gap(a, b)) for b in summary.arms if b is not a} for a in summary.arms
        },
        "winner": summary.winner.name if summary.winner else None,
        "corpora": {name: _corpus(corpus) for name, corpus in inputs.corpora.items()},
        "learnability": {
            "order": ranking.order,
            "arms": {name: arm.name for name, arm in ranking.trained.items()},
            "compared": ranking.compared,
            "spearman": ranking.rho,
        }
        if ranking
        else None,
        "contamination": {
            corpus: {
                name: {
                    "problems": overlap.problems,
                    "exact": len(overlap.exact),
                    "shared": len(overlap.gram13),
                    "rows": overlap.rows,
                }
                for name, overlap in of_corpus.items()
            }
            for corpus, of_corpus in inputs.overlaps.items()
        },
        "claims": None if config.claims is None else asdict(config.claims),
        "training": {
            name: {
                "steps": [curve.steps[-1] for curve in curves],
                "final_loss": [_finite(curve.losses[-1]) for curve in curves],
                "final_loss_mean": _finite(mean_curve(curves).losses[-1]) if mean_curve(curves).losses else None,
            }
            for name, curves in inputs.training.items()
        },
        "models": {"base": inputs.base.model}
        | {name: [of.model for of in models] for name, models in inputs.arms.items()},
        "provenance": config.provenance,
        "notes": config.notes,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _corpus(corpus: Corpus) -> dict[str, Any]:
    spreads = {key: getattr(corpus, key) for key in ("nats_per_answer", "departures_per_answer")}
    return {key: value for key, value in vars(corpus).items() if key != "lengths"} | {
        "document_nll": _values(corpus.document_nll, _QUANTILES) if corpus.document_nll else None,
        **{key: dict(zip(_SPREAD, _values(of, _SPREAD), strict=True)) if of else None for key, of in spreads.items()},
    }


def _values(distribution: Distribution | None, keys: Sequence[str]) -> list[float | None]:
    return [None if distribution is None else getattr(distribution, key) for key in keys]


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "benchmarks": {name: _estimate(estimate) for name, estimate in arm.benchmarks.items()},
        "average": _estimate(arm.average),
        "delta": _difference(arm.delta) if arm.delta else None,
        "deltas": {name: _difference(delta) for name, delta in arm.deltas.items()},
        "sampled": {name: asdict(sampled) for name, sampled in arm.sampled.items()},
        "answers": asdict(arm.answers),
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "mean": estimate.mean,
        "sd": estimate.sd,
        "interval95": [estimate.low, estimate.high],
        "seeds": list(estimate.seeds),
    }


def _difference(gap: Comparison) -> dict[str, Any]:
    return {
        "value": gap.value,
        "interval95": [gap.low, gap.high],
        "spans_zero": gap.spans_zero,
        "paired": gap.paired,
        "p": gap.p,
        "p_holm": gap.p_holm,
    }
