"""How a plot is finished: as SVG inside the page, where its colours follow the theme, and as SVG and PNG files.

matplotlib draws with the colours of the light theme; in the page each is replaced by `var(--name, #colour)`, so that
one drawing serves light, dark and print. Text stays text (searchable, read aloud, in the page's own font).
"""

import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from micota_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

_PNG_DPI = 2 * 96  # twice the pixels of a plain screen


@dataclass(frozen=True)
class Plot:
    """A drawing with what it shows in words for those who do not see it. `title` heads it where several stand together.

    `name` is its files' name without suffix, `svg` stands in the page; `svg_file` and `png_file` are files' contents,
    on white.
    """

    name: str
    svg: str
    svg_file: bytes
    png_file: bytes
    description: str
    title: str = ""


def require_matplotlib() -> None:
    """Raise InputError where the optional extra `report` is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "the report draws with matplotlib, which is not installed: pip install 'micota-fast[report]'"
        ) from error


def drawing_style() -> AbstractContextManager[None]:
    """matplotlib's defaults and our few changes, whatever the user's own settings: the same bytes for everyone."""
    from matplotlib import RcParams, rc_context, rcParamsDefault

    changes: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "micota-fast",
        "font.family": "DejaVu Sans",  # ships with matplotlib, so the layout is the same everywhere; pages set theirs
        "text.color": INK,
        "text.parse_math": False,  # a dollar sign in an arm's name is a dollar sign
    }
    defaults = {key: value for key, value in rcParamsDefault.items() if not key.startswith(("backend", "interactive"))}
    return rc_context(RcParams({**defaults, **changes}))


def theme_variables() -> tuple[str, str]:
    """CSS that gives the theme's variables their colours: light, dark."""
    light = " ".join(f"{variable}: {colour};" for colour, (variable, _) in THEME.items())
    dark = " ".join(f"{variable}: {colour};" for variable, colour in THEME.values())
    return light, dark


def css_colour(colour: str) -> str:
    """The colour as the page's CSS refers to it."""
    return f"var({THEME[colour][0]}, {colour})"


def finish(figure: "Figure", name: str, description: str, title: str = "") -> Plot:
    """Turn a figure into a plot; the figure is of no use after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    png, svg = io.BytesIO(), io.StringIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    figure.set_dpi(_PNG_DPI)
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    figure.clear()
    drawn = svg.getvalue()
    return Plot(name, _for_page(drawn, name), drawn.encode(), png.getvalue(), description, title)


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
    """The plot as an image with its description, headed by its title if it has one."""
    svg = plot.svg.replace("<svg ", f'<svg role="img" aria-label="{escape(plot.description)}" ', 1)
    head = f'<p class="title">{escape(plot.title)}</p>\n' if plot.title else ""
    return f'<div class="plot">{head}{svg}</div>\n'
