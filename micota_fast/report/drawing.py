"""How plots look and how they are finished: as SVG inside the page, where colours follow the theme, and as files.

matplotlib draws with the colours of the light theme; in the page each is replaced by `var(--name, #colour)`, so that
one drawing serves light, dark and print. Text stays text (searchable, read aloud, in the page's own font).
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from micota_fast.errors import InputError
from micota_fast.report.labels import MARKER, Box, place_labels, place_on_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MplFigure
    from matplotlib.text import Text

INK, MUTED, RULE = "#1c2126", "#667079", "#d3d8dd"

THEME = {
    # colour as drawn: (CSS variable, colour in the dark theme)
    INK: ("--ink", "#e6e9ec"),
    MUTED: ("--muted", "#98a2ab"),
    RULE: ("--rule", "#3a424a"),
    # Okabe & Ito's palette, which colour-blind readers tell apart, lightened for the dark theme.
    "#5b646c": ("--series-base", "#aab4bd"),
    "#0072b2": ("--series-blue", "#5bb4ea"),
    "#d55e00": ("--series-vermillion", "#f5894a"),
    "#b0568d": ("--series-purple", "#e29ac5"),
    "#00835f": ("--series-green", "#35c99c"),
    "#a37200": ("--series-ochre", "#e6b33d"),
    "#3a8fb7": ("--series-sky", "#8fd0f0"),
    "#7a5195": ("--series-violet", "#b79bd6"),
}

_PNG_DPI = 300  # what journals ask of figures in print
_LABEL_SHARE = 0.13
"""Room for a tick's label (up to five digits) on the shortest horizontal axis, as a share of its length."""


COLUMN = 360.0
"""Width of a plot in points; the page shows it at 330 to 510 CSS pixels, so 10 points read as 9 to 14."""


class Drawing(NamedTuple):
    """One plot as drawn: what it shows in words, and its heading if the figure has several."""

    figure: "MplFigure"
    description: str
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """One or several plots under one caption, `title` in bold."""

    title: str
    caption: str
    drawings: list[Drawing]


@dataclass(frozen=True)
class Plot:
    """A drawing with what it shows in words for those who do not see it. `title` is its heading if there are several.

    `name` begins its files' names, `svg` is for the page; `svg_file`, `pdf_file` and `png_file` are what the files
    contain, on white.
    """

    name: str
    svg: str
    svg_file: bytes
    pdf_file: bytes
    png_file: bytes
    description: str
    title: str = ""


def require_matplotlib() -> None:
    """Raise InputError if the optional extra `report` is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the report draws with matplotlib, which is not installed: pip install 'micota-fast[report]'"
        ) from error


def drawing_style() -> AbstractContextManager[None]:
    """Apply matplotlib's defaults and our few changes, whatever the user's settings: the same bytes for everyone."""
    from matplotlib import RcParams, rc_context, rcParamsDefault

    changes: Any = {
        "svg.fonttype": "none",
        "pdf.fonttype": 42,  # TrueType: journals refuse the default, Type 3
        "svg.hashsalt": "micota-fast",
        "font.family": "DejaVu Sans",  # ships with matplotlib, so the layout is the same everywhere; pages set theirs
        "text.color": INK,
        "text.parse_math": False,  # a dollar sign in an arm's name is a dollar sign
    }
    defaults = {key: value for key, value in rcParamsDefault.items() if not key.startswith(("backend", "interactive"))}
    return rc_context(RcParams({**defaults, **changes}))


def theme_variables() -> tuple[str, str]:
    """Return the CSS that gives the theme's variables their colours: light, dark."""
    light = " ".join(f"{variable}: {colour};" for colour, (variable, _) in THEME.items())
    dark = " ".join(f"{variable}: {colour};" for variable, colour in THEME.values())
    return light, dark


def css_colour(colour: str) -> str:
    """Return the colour as the page's CSS refers to it."""
    return f"var({THEME[colour][0]}, {colour})"


def new_figure(width: float, height: float) -> "tuple[MplFigure, Axes]":
    """Make a figure of this size in points, with one bare pair of axes."""
    from matplotlib.figure import Figure as MplFigure

    figure = MplFigure(figsize=(width / 72, height / 72), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=9, length=3, width=0.8)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.yaxis.label.set(color=MUTED, fontsize=9)
    axes.locator_params(axis="x", nbins=6)
    return figure, axes


def name_rows(axes: "Axes", names: Sequence[str], offset: float = 0.0) -> None:
    """Put names in place of a vertical axis, first on top, long ones broken into lines."""
    labels = [wrapped(name) for name in names]
    axes.set_yticks([index + offset for index in range(len(names))], labels, color=INK, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color=RULE, linewidth=0.5, zorder=-1)
    axes.set_axisbelow(True)


def wrapped(name: str) -> str:
    """Break a name into lines of 18 characters, and shorten a long one in the middle: names often differ at the end."""
    return textwrap.fill(name if len(name) <= 32 else f"{name[:17]}…{name[-14:]}", 18)


def label_right(axes: "Axes", row: float, text: str) -> None:
    """Write a number at the right edge, where it is clear of every interval and reads like a table's column."""
    axes.text(1.03, row, text, transform=axes.get_yaxis_transform(), va="center", color=INK, fontsize=10)


def label_points(
    axes: "Axes",
    points: Mapping[str, tuple[float, float]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    levels: Mapping[str, float],
) -> None:
    """Write each point's name next to it, clear of the other names, points and lines; call it last.

    Args:
        axes: with their limits, scales and labels.
        points: name -> data coordinates of its marker.
        lines: the ends of what else is drawn, horizontal or vertical, in data coordinates.
        levels: name of a horizontal line, which is written on it near one of its ends -> its height.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = axes.get_figure(root=True)
    assert figure is not None  # the axes are part of one
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # the layout, and with it where the data lie
    scale = 72 / figure.dpi

    def on_paper(point: tuple[float, float]) -> tuple[float, float]:
        x, y = axes.transData.transform(point) * scale
        return float(x), float(y)

    def on_axes(x: float, y: float) -> tuple[float, float]:
        return (x - left) / (right - left), (y - bottom) / (top - bottom)

    def written(text: str, colour: str) -> "tuple[Text, tuple[float, float]]":
        artist = axes.text(0, 0, text, transform=axes.transAxes, fontsize=10, color=colour, va="bottom")
        artist.set_in_layout(False)  # which would move the points from under their labels
        extent = artist.get_window_extent(canvas.get_renderer())
        return artist, (extent.width * scale, extent.height * scale)

    left, bottom, right, top = (float(end) * scale for end in axes.get_window_extent().extents)
    frame = Box(left + 4, bottom + 2, right, top)  # clear of the axes' lines
    taken = []
    for line in lines:
        (x0, y0), (x1, y1) = map(on_paper, line)
        wide = MARKER if x0 == x1 else 0  # an interval has caps
        taken.append(Box(min(x0, x1) - wide, min(y0, y1) - 1.5, max(x0, x1) + wide, max(y0, y1) + 1.5))
    markers = {name: on_paper(point) for name, point in points.items()}
    for name, level in levels.items():
        artist, size = written(name, MUTED)
        taken.append(place_on_line(on_paper((axes.get_xlim()[0], level))[1], size, markers.values(), taken, frame))
        artist.set_position(on_axes(*taken[-1][:2]))
    artists = {name: written(wrapped(name), INK) for name in points}
    placed = place_labels(markers, {name: size for name, (_, size) in artists.items()}, taken, frame)
    for name, place in placed.items():
        artists[name][0].set_position(on_axes(*place.box[:2]))
        if place.leader is not None:
            xs, ys = zip(on_axes(*markers[name]), on_axes(*place.leader), strict=True)
            axes.plot(xs, ys, color=MUTED, linewidth=0.7, transform=axes.transAxes, zorder=0.5)


def set_log_axis(axes: "Axes", which: Literal["x", "y"], low: float, high: float) -> None:
    """Make an axis logarithmic, with plain numbers at round values."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"))


def log_ticks(low: float, high: float) -> list[float]:
    """Choose round values from `low` to `high`: the densest of several scales whose labels fit next to each other.

    1, 2, 5 (or fewer, or more) per decade, or whole decades if there are many; evenly spaced values if the range is so
    narrow that the axis is nearly linear.
    """
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    scales = [[10.0**decade for decade in decades if decade % every == 0] for every in (1, 2, 3, 5, 10)]
    per_decade = ((1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
    scales += [[step * 10.0**decade for decade in decades for step in steps] for steps in per_decade]
    scales += [list(map(float, MaxNLocator(bins, steps=[1, 2, 5, 10]).tick_values(low, high))) for bins in (6, 5, 4, 3)]
    inside = [[tick for tick in scale if low <= tick <= high] for scale in scales]
    room = _LABEL_SHARE * math.log(high / low)
    fitting = [s for s in inside if all(math.log(b / a) >= room for a, b in itertools.pairwise(s))]
    return max(fitting, key=len)


def spread_labels(heights: Mapping[str, float]) -> dict[str, float]:
    """Move heights (shares of an axis) as little as is needed for a label of one or two lines at each."""
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


def finish(figure: "MplFigure", name: str, description: str, title: str = "") -> Plot:
    """Turn a figure into a plot; the figure cannot be used afterwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    png, pdf, svg = io.BytesIO(), io.BytesIO(), io.StringIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    # Without the time and matplotlib's version the bytes depend on the drawing alone.
    FigureCanvasPdf(figure).print_pdf(pdf, metadata={"CreationDate": None, "Creator": None, "Producer": None})
    figure.set_dpi(_PNG_DPI)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    figure.clear()
    drawn = svg.getvalue()
    return Plot(name, _for_page(drawn, name), drawn.encode(), pdf.getvalue(), png.getvalue(), description, title)


def _for_page(svg: str, name: str) -> str:
    """SVG to stand inside HTML: no prolog, no metadata, ids of its own, colours by variable."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    # Its style sheet would hold for the whole page; the page's own says the same of the plots.
    svg = re.sub(r"\s*<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None  # matplotlib always writes one
    # The page's background shows through: matplotlib's white sheets would not follow the theme.
    rest = re.sub(r'\s*<g id="patch_[12]">\s*<path [^>]*style="fill: #ffffff[^>]*/>\s*</g>', "", rest)
    rest = re.sub(
        r"font(-family)?: ([\d.]+px )?[^;\"]*'DejaVu Sans'[^;\"]*", lambda m: f"font-size: {m[2]}" if m[2] else "", rest
    )
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r"url\(#", f"url(#{name}-", rest)
    rest = re.sub(r'xlink:href="#', f'href="#{name}-', rest)
    for colour, (variable, _) in THEME.items():
        rest = rest.replace(f": {colour}", f": var({variable}, {colour})")
    return f"<svg {box[0]}>{rest}".strip()


def figure_html(plot: Plot) -> str:
    """Format the plot as an image with its description, under its title if it has one."""
    svg = plot.svg.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.description)}" ', 1)
    head = f'<p class="title">{escape(plot.title)}</p>\n' if plot.title else ""
    return f'<div class="plot">{head}{svg}</div>\n'
