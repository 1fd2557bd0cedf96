"""The report's plots.

Every plot is small and made for one column: the page sets several in a grid that becomes one column on a phone, where
the type keeps its size.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from micota_fast.alignment.results import STEPS
from micota_fast.report.corpora import Corpus
from micota_fast.report.drawing import INK, MUTED, RULE, THEME, Plot, finish
from micota_fast.report.inputs import Inputs, LossCurve
from micota_fast.report.summary import BASE, Summary, mean_curve, percent
from micota_fast.report.tables import significant
from micota_fast.statistics.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES = [colour for colour, (variable, _) in THEME.items() if variable.startswith("--series")]
_KNOWN = dict(zip((BASE, "short", "long", "mix", "mid"), _SERIES, strict=False))

_COLUMN = 360.0
"""Width of a plot in points; the page shows it at 330 to 510 CSS pixels, so 10 points read as 9 to 14."""


_LABEL_SHARE = 0.13
"""Room for a tick's label (up to five digits) on the shortest horizontal axis, as a share of its length."""


def series_colours(names: Iterable[str]) -> dict[str, str]:
    """One colour a name: the usual arms and corpora always get the same, others the next free one."""
    names = list(dict.fromkeys(names))
    colours = {name: _KNOWN[name] for name in names if name in _KNOWN}
    free = [colour for colour in _SERIES[1:] if colour not in colours.values()] or _SERIES[1:]
    others = [name for name in names if name not in colours]
    return colours | {name: free[index % len(free)] for index, name in enumerate(others)}


@dataclass(frozen=True)
class Plots:
    """All plots of a report; what there is no data for is None or empty."""

    average: Plot
    benchmarks: list[Plot]
    lengths: Plot | None
    perplexity: Plot | None
    by_position: Plot | None
    by_step: Plot | None
    losses: list[Plot]

    @property
    def every(self) -> list[Plot]:
        several = [self.average, *self.benchmarks, self.lengths, self.perplexity]
        several += [self.by_position, self.by_step, *self.losses]
        return [plot for plot in several if plot is not None]


def draw(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Plots:
    """Draw everything; to be called within `drawing_style`. Of one benchmark the average is the same plot."""
    return Plots(
        average_plot(summary, colours),
        benchmark_plots(summary, colours) if len(summary.problems) > 1 else [],
        length_plot(inputs.corpora, colours),
        perplexity_plot(inputs.corpora, colours),
        position_plot(inputs.corpora, colours),
        step_plot(inputs.corpora, colours),
        loss_plots(inputs.training, colours),
    )


def average_plot(summary: Summary, colours: Mapping[str, str]) -> Plot:
    """Average accuracy of each arm: the mean, its interval, and the seeds."""
    rows = [(arm.name, arm.average) for arm in summary.arms]
    figure = _dots(rows, colours, "average accuracy, %")
    return finish(figure, "average", _accuracies("Average accuracy", rows))


def benchmark_plots(summary: Summary, colours: Mapping[str, str]) -> list[Plot]:
    """The same for each benchmark."""
    plots = []
    for index, (benchmark, n) in enumerate(summary.problems.items()):
        rows = [(arm.name, arm.benchmarks[benchmark]) for arm in summary.arms]
        figure = _dots(rows, colours, f"accuracy, % of {n} problems", width=300)
        plots.append(finish(figure, f"benchmark{index}", _accuracies(f"Accuracy on {benchmark}", rows), benchmark))
    return plots


def _accuracies(what: str, rows: Sequence[tuple[str, Estimate]]) -> str:
    listed = (f"{name} {percent(row.mean)}% (from {percent(row.low)} to {percent(row.high)})" for name, row in rows)
    return f"{what}: {'; '.join(listed)}."


def _dots(
    rows: Sequence[tuple[str, Estimate]], colours: Mapping[str, str], xlabel: str, width: float = _COLUMN
) -> "Figure":
    figure, axes = _figure(width, 62 + 25 * len(rows))
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
        # A column of numbers at the right edge: read like a table, and clear of every interval.
        axes.text(
            1.03,
            index,
            percent(estimate.mean),
            transform=axes.get_yaxis_transform(),
            va="center",
            color=INK,
            fontsize=10,
        )
    _name_rows(axes, [series for series, _ in rows])
    low, high = min(row.low for _, row in rows), max(row.high for _, row in rows)
    pad = max(0.06 * (high - low), 0.001)
    axes.set_xlim(100 * max(low - pad, -pad / 2), 100 * min(high + pad, 1 + pad / 2))
    axes.set_xlabel(xlabel)
    return figure


def length_plot(corpora: Mapping[str, Corpus], colours: Mapping[str, str]) -> Plot | None:
    """Density of the accepted completions' lengths, one ridge a corpus, on a logarithmic axis. None without lengths."""
    known = {name: corpus for name, corpus in corpora.items() if any(corpus.lengths)}
    if not known:
        return None
    figure, axes = _figure(_COLUMN, 62 + 58 * len(known))
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
        axes.text(
            1.03,
            index + 0.32,
            f"{median:,.0f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            color=INK,
            fontsize=10,
        )
        words.append(f"{name} {median:,.0f}")
    axes.text(1.03, -0.55, "median", transform=axes.get_yaxis_transform(), va="center", color=MUTED, fontsize=9)
    _name_rows(axes, list(known), offset=0.32)
    axes.set_ylim(len(known) - 0.4, -0.62)
    _log_axis(axes, "x", math.exp(low - pad), math.exp(high + pad))
    axes.set_xlabel("tokens per completion, logarithmic")
    return finish(figure, "lengths", f"Distribution of completion lengths; medians in tokens: {', '.join(words)}.")


def _density(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density with Silverman's bandwidth (Silverman 1986, eq. 3.31), with a floor for equal lengths."""
    quartiles = np.percentile(x, [25, 75])
    spread = min(float(x.std()), float(quartiles[1] - quartiles[0]) / 1.34) or float(x.std())
    bandwidth = max(0.9 * spread * len(x) ** -0.2, 1.5 * float(grid[1] - grid[0]))
    values, counts = np.unique(x, return_counts=True)
    return np.exp(-0.5 * ((grid[:, None] - values) / bandwidth) ** 2) @ counts


def perplexity_plot(corpora: Mapping[str, Corpus], colours: Mapping[str, str]) -> Plot | None:
    """Perplexity of each corpus under the untrained student and its p10 to p90 over documents. None without any."""
    known = {name: corpus for name, corpus in corpora.items() if corpus.perplexity is not None}
    if not known:
        return None
    figure, axes = _figure(_COLUMN, 62 + 30 * len(known))
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
        axes.text(
            1.03,
            index,
            significant(perplexity),
            transform=axes.get_yaxis_transform(),
            va="center",
            color=INK,
            fontsize=10,
        )
        words.append(f"{name} {significant(perplexity)}")
    _name_rows(axes, list(known))
    ratio = 1.08 * (max(extent) / min(extent)) ** 0.04
    _log_axis(axes, "x", min(extent) / ratio, max(extent) * ratio)
    axes.set_xlabel("perplexity under the untrained student, logarithmic")
    return finish(figure, "perplexity", f"Perplexity under the untrained student: {', '.join(words)}.")


def position_plot(corpora: Mapping[str, Corpus], colours: Mapping[str, str]) -> Plot | None:
    """Negative log-likelihood by position in the answer, a line a corpus. None without any."""
    known = {name: corpus.by_position for name, corpus in corpora.items() if any(corpus.by_position)}
    if not known:
        return None
    # Each tenth at its middle.
    lines = {name: [(100 * (i + 0.5) / len(y), v) for i, v in enumerate(y)] for name, y in known.items()}
    figure, axes = _lines(lines, colours, "position in the answer, %")
    axes.set_xlim(0, 100)
    return finish(figure, "position", _ends("By position in the answer, from its first tenth to its last", lines))


def step_plot(corpora: Mapping[str, Corpus], colours: Mapping[str, str]) -> Plot | None:
    """Negative log-likelihood by line of the answer, a line a corpus. None where no corpus has two lines."""
    known = {name: corpus.by_step[: STEPS - 1] for name, corpus in corpora.items() if corpus.by_step}
    if max(map(len, known.values()), default=0) < 2:
        return None
    lines: _Lines = {name: list(enumerate(y, start=1)) for name, y in known.items()}
    figure, axes = _lines(lines, colours, "line of the answer")
    axes.locator_params(axis="x", integer=True)
    return finish(figure, "step", _ends("By line of the answer, from the first to the last", lines))


def _lines(lines: "_Lines", colours: Mapping[str, str], xlabel: str) -> "tuple[Figure, Axes]":
    """A line for each name, with its name at the right, at the height where it ends."""
    figure, axes = _figure(_COLUMN, 215)
    top = 1.06 * max(y for points in lines.values() for _, y in points if y is not None)
    ends = {}
    for name, points in lines.items():
        x, y = zip(*((x, math.nan if y is None else y) for x, y in points), strict=True)
        axes.plot(x, y, color=colours[name], linewidth=1.8, marker="o", markersize=3.4)
        ends[name] = next(value for value in reversed(y) if math.isfinite(value)) / top
    for name, height in _apart(ends).items():
        axes.plot([1.03, 1.075], [height] * 2, color=colours[name], lw=2.4, transform=axes.transAxes, clip_on=False)
        label = textwrap.fill(_short(name), 18)
        axes.text(1.095, height, label, transform=axes.transAxes, va="center", color=INK, fontsize=10)
    axes.set_ylim(0, top)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("nats per token")
    return figure, axes


_Lines = Mapping[str, Sequence[tuple[float, float | None]]]
"""Points (x, y) of the line of each name."""


def _apart(heights: Mapping[str, float]) -> dict[str, float]:
    """Heights (shares of an axis) moved as little as need be for a label of one or two lines at each."""
    order = sorted(heights, key=lambda name: heights[name])
    room = min(0.13, 1 / len(order))
    placed: dict[str, float] = {}
    for name in order:  # upwards, each clear of the one below
        placed[name] = max(heights[name], max(placed.values(), default=-1.0) + room)
    ceiling = 1.0
    for name in reversed(order):  # and down again from the top
        placed[name] = min(placed[name], ceiling)
        ceiling = placed[name] - room
    return placed


def _ends(what: str, lines: "_Lines") -> str:
    told = {name: [y for _, y in points if y is not None] for name, points in lines.items()}
    listed = (f"{name} {significant(y[0])} to {significant(y[-1])}" for name, y in told.items())
    return f"Negative log-likelihood under the untrained student, nats per token. {what}: {'; '.join(listed)}."


def loss_plots(training: Mapping[str, Sequence[LossCurve]], colours: Mapping[str, str]) -> list[Plot]:
    """Training loss, one panel an arm on common axes: seeds thin, their mean bold and smoother, the
    other arms' means in grey."""
    seeds = {name: [_thinned(curve) for curve in curves] for name, curves in training.items()}
    means = {name: _thinned(mean_curve(curves), limit=60) for name, curves in training.items()}
    finite = [loss for curves in seeds.values() for curve in curves for loss in curve.losses if math.isfinite(loss)]
    if not finite:
        return []
    last = max(curve.steps[-1] for curves in training.values() for curve in curves)
    plots = []
    for index, (name, mean) in enumerate(means.items()):
        end = mean.losses[-1] if mean.losses else math.nan
        figure, axes = _figure(300, 190)
        for other, curve in means.items():
            if other != name:
                axes.plot(curve.steps, curve.losses, color=RULE, linewidth=1.0)
        for curve in seeds[name]:
            axes.plot(curve.steps, curve.losses, color=colours[name], linewidth=0.6, alpha=0.5)
        axes.plot(mean.steps, mean.losses, color=colours[name], linewidth=1.9)
        positive = min(finite) > 0
        if positive and max(finite) / min(finite) > 8:
            _log_axis(axes, "y", min(finite) / 1.12, max(finite) * 1.12)
        else:
            pad = 0.05 * (max(finite) - min(finite)) or 0.1
            axes.set_ylim(min(finite) - pad, max(finite) + pad)
        axes.set_xlim(0, last * 1.02)
        axes.grid(axis="y", color=RULE, linewidth=0.5)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss, nats per token")
        words = f"ends at {end:.3f}" if math.isfinite(end) else "diverged"
        plots.append(finish(figure, f"loss{index}", f"Training loss of the {name} arm: {words}.", name))
    return plots


def _thinned(curve: LossCurve, limit: int = 240) -> LossCurve:
    """At most about `limit` points, each the mean of as many consecutive steps: a line has no room for more."""
    width = -(-len(curve.steps) // limit)
    if width <= 1:
        return curve
    # The last window takes the remainder too, so that no point is noisier than the others. A point stands at its
    # window's end: the last one is the last step.
    bounds = [*range(0, len(curve.steps) - width + 1, width), len(curve.steps)]
    windows = list(itertools.pairwise(bounds))
    # A step that was skipped has no loss; the others of its window do.
    finite = ([loss for loss in curve.losses[start:end] if math.isfinite(loss)] for start, end in windows)
    losses = tuple(float(np.mean(part)) if part else math.nan for part in finite)
    return LossCurve(tuple(curve.steps[end - 1] for _, end in windows), losses)


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure of this size in points, with one bare pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=9, length=3, width=0.8)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.yaxis.label.set(color=MUTED, fontsize=9)
    axes.locator_params(axis="x", nbins=6)
    return figure, axes


def _name_rows(axes: "Axes", names: Sequence[str], offset: float = 0.0) -> None:
    """Names in place of a vertical axis, first on top, long ones broken into lines."""
    labels = [textwrap.fill(_short(name), 18) for name in names]
    axes.set_yticks([index + offset for index in range(len(names))], labels, color=INK, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color=RULE, linewidth=0.5, zorder=-1)
    axes.set_axisbelow(True)


def _short(name: str) -> str:
    """What tells two long names apart is often their end, so an ellipsis goes in the middle."""
    return name if len(name) <= 32 else f"{name[:17]}…{name[-14:]}"


def _log_axis(axes: "Axes", which: str, low: float, high: float) -> None:
    """A logarithmic axis with plain numbers at round values."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"))


def log_ticks(low: float, high: float) -> list[float]:
    """Round values from `low` to `high`: of several scales of them the densest whose labels have room side by side.

    1, 2, 5 (or fewer, or more) a decade, or whole decades where there are many; in a range so narrow that the axis is
    nearly linear, evenly spaced values.
    """
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    scales = [[10.0**decade for decade in decades if decade % every == 0] for every in (1, 2, 3, 5, 10)]
    a_decade = ((1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
    scales += [[step * 10.0**decade for decade in decades for step in steps] for steps in a_decade]
    scales += [list(map(float, MaxNLocator(bins, steps=[1, 2, 5, 10]).tick_values(low, high))) for bins in (6, 5, 4, 3)]
    inside = [[tick for tick in scale if low <= tick <= high] for scale in scales]
    room = _LABEL_SHARE * math.log(high / low)
    fitting = [s for s in inside if all(math.log(b / a) >= room for a, b in itertools.pairwise(s))]
    return max(fitting, key=len)
