"""Write the report: `table.md`, `report.json` and `report.html` in the directory that the config names."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from micota_fast.intervals import Estimate
from micota_fast.recipe import ReportConfig
from micota_fast.records import write_atomic
from micota_fast.report.comparison import Comparison
from micota_fast.report.inputs import Inputs, load
from micota_fast.report.page import render
from micota_fast.report.plots import drawing_style, require_matplotlib
from micota_fast.report.summary import INTERVAL_METHOD, Arm, Summary, headline, mean_curve, summarise
from micota_fast.report.tables import (
    accuracy_table,
    answers_table,
    corpora_table,
    deltas_table,
    samples_table,
    to_markdown,
)


def run(config: ReportConfig) -> None:
    """Make the report. The same inputs give the same bytes.

    Raises:
        InputError: an input is missing or malformed (see `inputs.load`), or matplotlib is not installed.
    """
    require_matplotlib()
    inputs = load(config)
    summary = summarise(inputs)
    out = Path(config.out)
    numbers = _numbers(config, inputs, summary)
    with drawing_style():
        page = render(config, inputs, summary)
    files = {
        "table.md": _markdown(config, inputs, summary),
        "report.json": json.dumps(numbers, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": page,
    }
    for name, text in files.items():
        write_atomic(out / name, [text.encode()])


def _markdown(config: ReportConfig, inputs: Inputs, summary: Summary) -> str:
    tables = [accuracy_table(summary)]
    if summary.trained:
        tables.append(deltas_table(summary))
    if of_samples := samples_table(summary):
        tables.append(of_samples)
    if inputs.corpora:
        tables.append(corpora_table(inputs.corpora))
    tables.append(answers_table(summary.arms))
    parts = [f"# {' '.join(config.title.split())}", " ".join(filter(None, headline(summary)))]
    parts += [to_markdown(table).rstrip() for table in tables]
    return "\n\n".join([*parts, INTERVAL_METHOD]) + "\n"


def _numbers(config: ReportConfig, inputs: Inputs, summary: Summary) -> dict[str, Any]:
    """Everything the page shows, unrounded; fractions, not percent. Orders that sorted keys lose are lists of names."""
    finding, qualified = headline(summary)
    return {
        "title": config.title,
        "headline": finding,
        "headline_qualified": qualified,
        "method": INTERVAL_METHOD,
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
