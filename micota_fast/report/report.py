"""Write the report: pages, tables, numbers and plots in the directory that the config names."""

import json
import math
import re
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from micota_fast.common.files import write_atomic
from micota_fast.config.report import ReportConfig
from micota_fast.report.answers import render_answers
from micota_fast.report.comparison import Comparison
from micota_fast.report.drawing import Plot, drawing_style, require_matplotlib
from micota_fast.report.inputs import Inputs, load
from micota_fast.report.latex import to_latex
from micota_fast.report.learnability import Learnability, learnability, learnability_table
from micota_fast.report.numbers_csv import accuracy_csv, answers_csv, contamination_csv, corpora_csv
from micota_fast.report.overlap import contamination_table, found_text
from micota_fast.report.page import render
from micota_fast.report.plots import draw, series_colours
from micota_fast.report.protocols import protocols_table
from micota_fast.report.summary import INTERVAL_METHOD, Arm, Summary, headline, mean_curve, summarise
from micota_fast.report.tables import (
    Table,
    accuracy_table,
    answers_table,
    corpora_table,
    deltas_table,
    markdown_text,
    samples_table,
    to_markdown,
)
from micota_fast.statistics.intervals import Estimate

_SOMETIMES = ("corpora.csv", "contamination.csv")  # written where there is something to put in them
_PLOT_FILE = re.compile(r"(average|benchmark\d+|lengths|perplexity|position|step|loss\d+)(-.*)?\.(svg|png)")


def run(config: ReportConfig) -> None:
    """Make the report. The same inputs give the same bytes.

    Raises:
        InputError: an input is missing or malformed (see `inputs.load`), or matplotlib is not installed.
    """
    require_matplotlib()
    inputs = load(config)
    summary = summarise(inputs)
    found = learnability(inputs.corpora, config.trained_on, summary)
    colours = series_colours([*(arm.name for arm in summary.arms), *inputs.corpora, *inputs.training])
    numbers = _numbers(config, inputs, summary, found)
    with drawing_style():
        plots = draw(inputs, summary, colours)
    tables = _tables(config, inputs, summary, found)
    claims = config.claims.deltas if config.claims is not None else {}
    texts = {
        "table.md": _markdown(config, inputs, summary, tables),
        "table.tex": "% Needs \\usepackage{booktabs}.\n" + "\n".join(map(to_latex, tables)),
        "table.csv": accuracy_csv(summary, claims),
        "answers.csv": answers_csv(summary.arms),
        "report.json": json.dumps(numbers, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n",
    }
    if inputs.corpora:
        texts["corpora.csv"] = corpora_csv(inputs.corpora, found.trained if found else {})
    if inputs.overlaps:
        texts["contamination.csv"] = contamination_csv(inputs.overlaps)
    files = {name: text.encode() for name, text in texts.items()}
    for plot in plots.every:
        files |= {f"plots/{_stem(plot)}.svg": plot.svg_file, f"plots/{_stem(plot)}.png": plot.png_file}
    files["answers.html"] = render_answers(config, inputs, colours)
    page = render(config, inputs, summary, found, plots, colours)
    files["report.html"] = page.encode()  # last: it is there, so all is
    _remove_former(Path(config.out), files)
    for name, content in files.items():
        write_atomic(Path(config.out) / name, [content])


def _remove_former(out: Path, files: Collection[str]) -> None:
    """What a former report wrote here and this one does not, such as plots of arms that are gone; nobody else's."""
    ours = [path for path in (out / "plots").glob("*") if _PLOT_FILE.fullmatch(path.name)]
    for path in [*ours, *(out / name for name in _SOMETIMES)]:
        if path.relative_to(out).as_posix() not in files:
            path.unlink(missing_ok=True)


def _stem(plot: Plot) -> str:
    """The name of a plot's files: numbered, so different for all, and with what it is of."""
    return "-".join(filter(None, (plot.name, re.sub(r"[^\w.-]", "_", plot.title)[:60])))


def _tables(config: ReportConfig, inputs: Inputs, summary: Summary, found: Learnability | None) -> list[Table]:
    tables = [accuracy_table(summary, config.claims)]
    if summary.trained:
        tables.append(deltas_table(summary))
    if by_protocol := protocols_table(inputs):
        tables.append(by_protocol)
    if of_samples := samples_table(summary):
        tables.append(of_samples)
    if inputs.corpora:
        tables.append(corpora_table(inputs.corpora))
    if found:
        tables.append(learnability_table(found, inputs.corpora))
    if inputs.overlaps:
        tables.append(contamination_table(inputs.overlaps))
    return [*tables, answers_table(summary.arms)]


def _markdown(config: ReportConfig, inputs: Inputs, summary: Summary, tables: list[Table]) -> str:
    parts = [f"# {markdown_text(config.title)}", markdown_text(" ".join(headline(summary)))]
    parts += [to_markdown(table).rstrip() for table in tables]
    found = [markdown_text(found_text(inputs.overlaps))] if inputs.overlaps else []
    return "\n\n".join([*parts, *found, INTERVAL_METHOD]) + "\n"


def _numbers(config: ReportConfig, inputs: Inputs, summary: Summary, found: Learnability | None) -> dict[str, Any]:
    """Everything the page shows, unrounded; fractions, not percent. Orders that sorted keys lose are lists of names."""
    finding, qualified = headline(summary)
    return {
        "title": config.title,
        "headline": finding,
        "headline_qualified": qualified,
        "method": INTERVAL_METHOD,
        "protocol": inputs.base.protocol,
        "problems": summary.problems,
        "benchmark_order": list(summary.problems),
        "arm_order": [arm.name for arm in summary.arms],
        "arms": {arm.name: _arm(arm) for arm in summary.arms},
        "average_differences": {
            a.name: {b.name: _difference(summary.gap(a, b)) for b in summary.arms if b is not a} for a in summary.arms
        },
        "winner": summary.winner.name if summary.winner else None,
        "corpora": {
            name: {key: value for key, value in asdict(corpus).items() if key != "lengths"}
            for name, corpus in inputs.corpora.items()
        },
        "learnability": {
            "order": found.order,
            "arms": {name: arm.name for name, arm in found.trained.items()},
            "compared": found.compared,
            "spearman": found.rho,
        }
        if found
        else None,
        "contamination": {
            corpus: {name: asdict(overlap) for name, overlap in of_corpus.items()}
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
        "models": {"base": inputs.base.model} | {name: [r.model for r in runs] for name, runs in inputs.arms.items()},
        "provenance": config.provenance,
        "notes": config.notes,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
