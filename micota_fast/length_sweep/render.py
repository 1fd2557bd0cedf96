"""A sweep in words, as a table and as plots: sweep.md, sweep.svg and sweep.png."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from micota_fast.length_sweep.results import Measurement, Sweep
from micota_fast.report.drawing import INK, MUTED, RULE, drawing_style

DEFINITIONS = (
    "Tokens are of all answers but aborted ones; an answer that was cut off counts at the limit. Brackets are 95% "
    "intervals: of the median by order statistics, of the accuracy Wilson's, both taking the problems for independent. "
    "Knee (elbow): the measured weight farthest above (below) the chord from the first point to the last, where the "
    "chord passes outside of the median's interval (Satopaa et al. 2011)."
)


def median_text(m: Measurement) -> str:
    """Format the median length with its interval: '51.5 [40, 60]'; '≥ 64' if it was cut off."""
    interval = "" if m.median95 is None else f" [{m.median95[0]:g}, {m.median95[1]:g}]"
    return f"{'≥ ' if m.median_is_cut else ''}{m.tokens.p50:g}{interval}"


def accuracy_text(m: Measurement) -> str:
    """Format the accuracy with its interval: '80.0% [49.0, 94.3]'."""
    low, high = m.wilson95
    return f"{100 * m.accuracy:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def markdown_table(points: Sequence[Measurement]) -> str:
    """Format what was measured as a Markdown table, one row per weight."""
    head = (
        "weight",
        "median tokens",
        "p10",
        "p25",
        "p75",
        "p90",
        "mean",
        "accuracy",
        "finished",
        "truncated",
        "answers",
    )
    rows = [
        [
            f"{m.weight:g}",
            median_text(m),
            *(f"{value:.0f}" for value in (m.tokens.p10, m.tokens.p25, m.tokens.p75, m.tokens.p90, m.tokens.mean)),
            accuracy_text(m),
            f"{100 * m.finished:.1f}%",
            f"{100 * m.truncated:.1f}%",
            str(m.answers),
        ]
        for m in points
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *rows))


def findings(sweep: Sweep) -> list[str]:
    """Say where the curve bends, and which weight gives the wanted length."""
    by_weight = {m.weight: m for m in sweep.points}

    def at(weight: float | None) -> str:
        return "none" if weight is None else f"weight {weight:g}, {median_text(by_weight[weight])} tokens"

    elbow, knee = at(sweep.elbow), at(sweep.knee)
    said = [f"Elbow, where the length begins to rise: {elbow}. Knee, where it levels off: {knee}."]
    if sweep.target:
        found = sweep.target.problem or f"OUT/model is the merge at {at(sweep.target.weight)}"
        said.append(f"Wanted, a median of {sweep.target.median_tokens} tokens: {found}.")
    return said


def plots(sweep: Sweep) -> dict[str, bytes]:
    """Draw length above and accuracy below over one axis of weights; returns file name -> contents."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    weights = [m.weight for m in sweep.points]
    with drawing_style():
        figure = Figure(figsize=(6, 5.4), dpi=150, layout="constrained")
        length, accuracy = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        tokens = [m.tokens for m in sweep.points]
        quartiles = [t.p25 for t in tokens], [t.p75 for t in tokens]
        length.fill_between(weights, *quartiles, color="#0072b2", alpha=0.2, linewidth=0)
        bars = [_distances(m.tokens.p50, m.median95 or (m.tokens.p50,) * 2) for m in sweep.points]
        length.errorbar(weights, [t.p50 for t in tokens], np.transpose(bars), color="#0072b2", marker="o", capsize=3)
        _title(length, "Tokens an answer: the median with its 95% interval; shaded, the middle half")
        bars = [_distances(m.accuracy, m.wilson95) for m in sweep.points]
        shares = [100 * m.accuracy for m in sweep.points]
        accuracy.errorbar(weights, shares, 100 * np.transpose(bars), color="#00835f", marker="o", capsize=3)
        accuracy.set_ylim(-4, 104)
        _title(accuracy, "Accuracy with its 95% interval, %")
        accuracy.set_xlabel("merge weight")
        marks = [("elbow", sweep.elbow), ("knee", sweep.knee)]
        if sweep.target:
            length.axhline(sweep.target.median_tokens, color=MUTED, linewidth=0.8, dashes=(4, 2))
            marks.append(("wanted length", sweep.target.weight))
        for name, weight in marks:
            if weight is not None:
                for axes in (length, accuracy):
                    axes.axvline(weight, color=MUTED, linewidth=0.8, linestyle=":")
                length.annotate(
                    f" {name}", (weight, 1), xycoords=("data", "axes fraction"), va="top", rotation=90, color=INK
                )
        for axes in (length, accuracy):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=RULE, linewidth=0.5)
        svg, png = io.BytesIO(), io.BytesIO()
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    return {"sweep.svg": svg.getvalue(), "sweep.png": png.getvalue()}


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9, color=MUTED)


def _distances(value: float, interval: Sequence[float]) -> tuple[float, float]:
    return max(0.0, value - interval[0]), max(0.0, interval[1] - value)  # not below 0 by rounding
