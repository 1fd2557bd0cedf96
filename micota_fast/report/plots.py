"""The report's figures: what each shows and how it is drawn.

To add one, put its data into `summary` (or `corpora`), write a function here that draws it, add a row to FIGURES, and
test it. The page, the files in plots/ and the removal of former ones follow from the row.

Every plot is small and made for one column: the page sets several in a grid that becomes one column on a phone, where
the type keeps its size.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from micota_fast.alignment.results import STEPS
from micota_fast.report.budget import budget_figure
from micota_fast.report.drawing import (
    COLUMN,
    INK,
    MUTED,
    RULE,
    THEME,
    Drawing,
    Figure,
    Plot,
    finish,
    label_right,
    name_rows,
    new_figure,
    set_log_axis,
    spread_labels,
    wrapped,
)
from micota_fast.report.inputs import Inputs
from micota_fast.report.losses import loss_figure
from micota_fast.report.summary import BASE, Summary, percent
from micota_fast.report.tables import significant
from micota_fast.report.tradeoff import tradeoff_figure
from micota_fast.statistics.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MplFigure

_SERIES = [colour for colour, (variable, _) in THEME.items() if variable.startswith("--series")]
_KNOWN = dict(zip((BASE, "short", "long", "mix", "mid"), _SERIES, strict=False))


def series_colours(names: Iterable[str]) -> dict[str, str]:
    """Assign one colour per name: the usual arms and corpora always get the same, others the next free one."""
    names = list(dict.fromkeys(names))
    colours = {name: _KNOWN[name] for name in names if name in _KNOWN}
    free = [colour for colour in _SERIES[1:] if colour not in colours.values()] or _SERIES[1:]
    others = [name for name in names if name not in colours]
    return colours | {name: free[index % len(free)] for index, name in enumerate(others)}


def average_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Figure:
    """Draw the average accuracy of each arm: the mean, its interval, and the seeds."""
    rows = [(arm.name, arm.average) for arm in summary.arms]
    chance = summary.average_chance
    limits = _limits((estimate for _, estimate in rows), [] if chance is None else [chance])
    figure = _dots(rows, colours, "average accuracy, %", chance, limits)
    drawing = Drawing(figure, _accuracies("Average accuracy", rows))
    seeds = "small dots: seeds; " if any(len(arm.average.seeds) > 1 for arm in summary.arms) else ""
    caption = f"Large dot and line: mean and 95% interval; {seeds}dashed: the untouched student"
    caption += "." if chance is None else "; dotted: chance."
    return Figure("Average accuracy by arm.", caption, [drawing])


def benchmark_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Figure | None:
    """Draw the accuracy on each benchmark. None if there is one, whose plot is that of the average."""
    if len(summary.problems) == 1:
        return None
    drawings = []
    of_all = [estimate for arm in summary.arms for estimate in arm.benchmarks.values()]
    limits = _limits(of_all, summary.chance.values())
    for benchmark, n in summary.problems.items():
        rows = [(arm.name, arm.benchmarks[benchmark]) for arm in summary.arms]
        chance = summary.chance.get(benchmark)
        figure = _dots(rows, colours, f"accuracy, % of {n} problems", chance, limits, width=300)
        drawings.append(Drawing(figure, _accuracies(f"Accuracy on {benchmark}", rows), benchmark))
    partly = summary.chance and summary.average_chance is None  # so that the figure above does not say it
    caption = "Read as above; all have one scale" + ("; dotted: chance, where known." if partly else ".")
    return Figure("Accuracy by benchmark.", caption, drawings)


def _accuracies(what: str, rows: Sequence[tuple[str, Estimate]]) -> str:
    listed = (f"{name} {percent(row.mean)}% (from {percent(row.low)} to {percent(row.high)})" for name, row in rows)
    return f"{what}: {'; '.join(listed)}."


def _dots(
    rows: Sequence[tuple[str, Estimate]],
    colours: Mapping[str, str],
    xlabel: str,
    chance: float | None,
    limits: tuple[float, float],
    width: float = COLUMN,
) -> "MplFigure":
    figure, axes = new_figure(width, 62 + 25 * len(rows))
    axes.axvline(100 * rows[0][1].mean, color=MUTED, linewidth=0.8, dashes=(3, 3), zorder=0)
    for index, (series, estimate) in enumerate(rows):
        colour = colours[series]
        axes.plot([100 * estimate.low, 100 * estimate.high], [index, index], color=colour, linewidth=2.0)
        axes.plot(100 * estimate.mean, index, "o", color=colour, markersize=7)
        if len(estimate.seeds) > 1:  # below the line, where they hide neither the mean nor each other's row
            seeds = [100 * value for value in estimate.seeds]
            axes.plot(
                seeds, [index + 0.3] * len(seeds), "o", markersize=3.4, color=colour, alpha=0.55, markeredgewidth=0
            )
        label_right(axes, index, percent(estimate.mean))
    name_rows(axes, [series for series, _ in rows])
    if chance is not None:
        axes.axvline(100 * chance, color=MUTED, linewidth=1.0, dashes=(1, 2), zorder=0)
    axes.set_xlim(*limits)
    axes.set_xlabel(xlabel)
    return figure


def _limits(estimates: Iterable[Estimate], others: Iterable[float]) -> tuple[float, float]:
    """The ends of an axis, in %, that has room for these intervals and the other accuracies."""
    ends = [*others, *(end for estimate in estimates for end in (estimate.low, estimate.high))]
    low, high = min(ends), max(ends)
    pad = max(0.06 * (high - low), 0.001)
    return 100 * max(low - pad, -pad / 2), 100 * min(high + pad, 1 + pad / 2)


def length_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Figure | None:
    """Draw the density of the accepted completions' lengths, one ridge per corpus, on a logarithmic axis."""
    known = {name: corpus for name, corpus in inputs.corpora.items() if any(corpus.lengths)}
    if not known:
        return None
    figure, axes = new_figure(COLUMN, 62 + 58 * len(known))
    logs = {name: np.log(np.maximum(np.asarray(corpus.lengths, dtype=float), 1.0)) for name, corpus in known.items()}
    low, high = min(float(x.min()) for x in logs.values()), max(float(x.max()) for x in logs.values())
    pad = 0.05 * (high - low) + 0.05
    grid = np.linspace(low - pad, high + pad, 240)
    words = []
    for index, (name, x) in enumerate(logs.items()):
        density = _density(x, grid)
        ridge = index + 0.5 - 0.86 * density / density.max()
        axes.fill_between(np.exp(grid), index + 0.5, ridge, color=colours[name], alpha=0.25, linewidth=0)
        axes.plot(np.exp(grid), ridge, color=colours[name], linewidth=1.4)
        median = float(np.median(known[name].lengths))
        axes.plot([median, median], [index + 0.5, index - 0.36], color=colours[name], linewidth=1.4, dashes=(2, 1.5))
        label_right(axes, index + 0.32, f"{median:,.0f}")
        words.append(f"{name} {median:,.0f}")
    axes.text(1.03, -0.55, "median", transform=axes.get_yaxis_transform(), va="center", color=MUTED, fontsize=9)
    name_rows(axes, list(known), offset=0.32)
    axes.set_ylim(len(known) - 0.4, -0.62)
    set_log_axis(axes, "x", math.exp(low - pad), math.exp(high + pad))
    axes.set_xlabel("tokens per completion, logarithmic")
    description = f"Distribution of completion lengths; medians in tokens: {', '.join(words)}."
    caption = "Density over the documents of each corpus; dashed: the median."
    return Figure("How long the completions are.", caption, [Drawing(figure, description)])


def _density(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density with Silverman's bandwidth (Silverman 1986, eq. 3.31), with a floor for equal lengths."""
    quartiles = np.percentile(x, [25, 75])
    spread = min(float(x.std()), float(quartiles[1] - quartiles[0]) / 1.34) or float(x.std())
    bandwidth = max(0.9 * spread * len(x) ** -0.2, 1.5 * float(grid[1] - grid[0]))
    values, counts = np.unique(x, return_counts=True)
    return np.exp(-0.5 * ((grid[:, None] - values) / bandwidth) ** 2) @ counts


def perplexity_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Figure | None:
    """Draw the perplexity of each corpus under the untrained student and its p10 to p90 over documents."""
    known = {name: corpus for name, corpus in inputs.corpora.items() if corpus.perplexity is not None}
    if not known:
        return None
    figure, axes = new_figure(COLUMN, 62 + 30 * len(known))
    words, extent = [], []
    for index, (name, corpus) in enumerate(known.items()):
        perplexity = corpus.perplexity
        assert perplexity is not None
        extent.append(perplexity)
        if corpus.document_nll is not None:
            low, high = math.exp(corpus.document_nll.p10), math.exp(corpus.document_nll.p90)
            axes.plot([low, high], [index, index], color=colours[name], linewidth=5, alpha=0.3, solid_capstyle="butt")
            extent += [low, high]
        axes.plot(perplexity, index, "o", color=colours[name], markersize=7)
        label_right(axes, index, significant(perplexity))
        words.append(f"{name} {significant(perplexity)}")
    name_rows(axes, list(known))
    ratio = 1.08 * (max(extent) / min(extent)) ** 0.04
    set_log_axis(axes, "x", min(extent) / ratio, max(extent) * ratio)
    axes.set_xlabel("perplexity under the untrained student, logarithmic")
    spread = any(corpus.document_nll for corpus in inputs.corpora.values())
    caption = "Dot: perplexity over all tokens" + ("; bar: 10th to 90th percentile of documents." if spread else ".")
    description = f"Perplexity under the untrained student: {', '.join(words)}."
    return Figure("How familiar they are to the student before training.", caption, [Drawing(figure, description)])


def position_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Figure | None:
    """Draw the negative log-likelihood by position in the answer, one line per corpus."""
    known = {name: corpus.by_position for name, corpus in inputs.corpora.items() if any(corpus.by_position)}
    if not known:
        return None
    # Each tenth at its middle.
    lines = {name: [(100 * (i + 0.5) / len(y), v) for i, v in enumerate(y)] for name, y in known.items()}
    figure, axes = _lines(lines, colours, "position in the answer, %")
    axes.set_xlim(0, 100)
    description = _ends("By position in the answer, from its first tenth to its last", lines)
    caption = "Mean negative log-likelihood of each tenth of the answers, every token counted once."
    return Figure("Where in the answer they are unlike the student.", caption, [Drawing(figure, description)])


def step_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Figure | None:
    """Draw the negative log-likelihood by line of the answer, one line per corpus. None if no corpus has two lines."""
    known = {name: corpus.by_step[: STEPS - 1] for name, corpus in inputs.corpora.items() if corpus.by_step}
    if max(map(len, known.values()), default=0) < 2:
        return None
    lines: _Lines = {name: list(enumerate(y, start=1)) for name, y in known.items()}
    figure, axes = _lines(lines, colours, "line of the answer")
    axes.locator_params(axis="x", integer=True)
    description = _ends("By line of the answer, from the first to the last", lines)
    caption = (
        f"Empty lines do not count; those from line {STEPS} on are left out. Only longer answers have the later "
        "lines, so the right end covers fewer answers."
    )
    return Figure("In which of its lines.", caption, [Drawing(figure, description)])


def _lines(lines: "_Lines", colours: Mapping[str, str], xlabel: str) -> "tuple[MplFigure, Axes]":
    """Draw a line for each name, and the name at its right end."""
    figure, axes = new_figure(COLUMN, 215)
    top = 1.06 * max(y for points in lines.values() for _, y in points if y is not None)
    ends = {}
    for name, points in lines.items():
        x, y = zip(*((x, math.nan if y is None else y) for x, y in points), strict=True)
        axes.plot(x, y, color=colours[name], linewidth=1.8, marker="o", markersize=3.4)
        ends[name] = next(value for value in reversed(y) if math.isfinite(value)) / top
    for name, height in spread_labels(ends).items():
        axes.plot([1.03, 1.075], [height] * 2, color=colours[name], lw=2.4, transform=axes.transAxes, clip_on=False)
        label = wrapped(name)
        axes.text(1.095, height, label, transform=axes.transAxes, va="center", color=INK, fontsize=10)
    axes.set_ylim(0, top)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("nats per token")
    return figure, axes


_Lines = Mapping[str, Sequence[tuple[float, float | None]]]
"""Points (x, y) of the line of each name."""


def _ends(what: str, lines: "_Lines") -> str:
    told = {name: [y for _, y in points if y is not None] for name, points in lines.items()}
    listed = (f"{name} {significant(y[0])} to {significant(y[-1])}" for name, y in told.items())
    return f"Negative log-likelihood under the untrained student, nats per token. {what}: {'; '.join(listed)}."


Section = Literal["tradeoff", "accuracy", "corpora", "learnability", "training"]


class Entry(NamedTuple):
    """A row of FIGURES. `draw` gets the colour of each arm and corpus; it returns None if there is no data."""

    name: str
    """Begins the names of its files, and of the ids in the page."""
    section: Section
    """Where the page shows it."""
    draw: Callable[[Inputs, Summary, Mapping[str, str]], Figure | None]
    several: bool = False
    """Whether it is a grid of plots, whose files are numbered."""


FIGURES = (
    Entry("tradeoff", "tradeoff", tradeoff_figure),
    Entry("budget", "tradeoff", budget_figure),
    Entry("average", "accuracy", average_figure),
    Entry("benchmark", "accuracy", benchmark_figure, several=True),
    Entry("lengths", "corpora", length_figure),
    Entry("perplexity", "corpora", perplexity_figure),
    Entry("position", "learnability", position_figure),
    Entry("step", "learnability", step_figure),
    Entry("loss", "training", loss_figure, several=True),
)
"""All figures, in the order of the page."""


@dataclass(frozen=True)
class Drawn:
    """A figure that is ready for the page."""

    entry: Entry
    title: str
    caption: str
    plots: list[Plot]


def draw(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> list[Drawn]:
    """Draw every figure that there is data for; call it within `drawing_style`."""
    drawn = []
    for entry in FIGURES:
        figure = entry.draw(inputs, summary, colours)
        if figure is not None:
            plots = [
                finish(
                    drawing.figure, f"{entry.name}{index if entry.several else ''}", drawing.description, drawing.title
                )
                for index, drawing in enumerate(figure.drawings)
            ]
            drawn.append(Drawn(entry, figure.title, figure.caption, plots))
    return drawn


def plot_files(figures: Iterable[Drawn]) -> dict[str, bytes]:
    """Return the files of all plots, name -> content: NAME-TITLE.svg, .pdf and .png, without a title NAME.svg ..."""
    files: dict[str, bytes] = {}
    for plot in (plot for figure in figures for plot in figure.plots):
        stem = "-".join(filter(None, (plot.name, re.sub(r"[^\w.-]", "_", plot.title)[:60])))
        files |= {f"{stem}.svg": plot.svg_file, f"{stem}.pdf": plot.pdf_file, f"{stem}.png": plot.png_file}
    return files


def is_plot_file(name: str) -> bool:
    """Return whether a file of this name can be from `plot_files`."""
    names = "|".join(entry.name + r"\d+" * entry.several for entry in FIGURES)
    return re.fullmatch(rf"({names})(-.*)?\.(svg|pdf|png)", name) is not None
