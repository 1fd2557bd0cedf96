"""The report as one HTML file: no scripts, nothing loaded from elsewhere, fit for phones, dark themes and print."""

from collections.abc import Mapping, Sequence
from html import escape

from micota_fast.config.report import ReportConfig
from micota_fast.report.drawing import Plot, css_colour, figure_html, theme_variables
from micota_fast.report.formats import to_html
from micota_fast.report.inputs import Inputs
from micota_fast.report.plots import Drawn, Section
from micota_fast.report.summary import INTERVAL_METHOD, Summary, contamination_finding, headline
from micota_fast.report.tables import Table

_STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --wash: #f3f4f4; LIGHT }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #15191d; --wash: #1e2429; DARK } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 72rem; padding: 3.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, "Liberation Serif", serif; }
h1, h2, h3, .table, .plot, figcaption, dl {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
h1 { font-size: 1rem; font-weight: 600; margin: 0; color: var(--muted); letter-spacing: .01em; text-wrap: balance; }
h2 { font-size: 1.2rem; font-weight: 650; margin: 3rem 0 1rem; padding-top: 1.1rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; font-weight: 650; margin: 2.25rem 0 .5rem; }
.title { font-size: .9rem; font-weight: 600; line-height: 1.4; margin: 0 0 .15rem; overflow-wrap: anywhere; }
p { margin: 0 0 .9rem; max-width: 42rem; }
a { color: inherit; text-underline-offset: .15em; }
a:focus-visible { outline: 2px solid var(--series-blue); outline-offset: 2px; }
.finding { font-size: clamp(1.35rem, 1.05rem + 1.5vw, 1.9rem); line-height: 1.3; margin: .9rem 0 1rem; max-width: 50rem;
  text-wrap: pretty; letter-spacing: -.005em; }
.table { margin: 1.5rem 0 2rem; }
.scroll { overflow-x: auto; background:
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% local no-repeat,
  linear-gradient(to left, var(--rule), transparent) right / 1rem 100% scroll no-repeat; }
.scroll:focus-visible { outline: 2px solid var(--series-blue); outline-offset: 3px; }
table { border-collapse: separate; border-spacing: 0; min-width: 100%; font-size: .875rem; line-height: 1.35;
  font-variant-numeric: tabular-nums lining-nums; border-bottom: 1.5px solid var(--ink); }
.caption { font-weight: 650; font-size: .9375rem; line-height: 1.4; margin-bottom: .6rem; }
th, td { text-align: right; vertical-align: top; padding: .5rem 0 .5rem 1.1rem; white-space: nowrap; font-weight: 400; }
thead th { font-weight: 600; white-space: normal; min-width: 4.6rem; vertical-align: bottom;
  border-top: 1.5px solid var(--ink); border-bottom: 1px solid var(--ink); }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
th:first-child { text-align: left; padding-left: 0; padding-right: .6rem; position: sticky; left: 0; z-index: 1;
  background: var(--paper); }
thead th:first-child { z-index: 2; min-width: 0; }
tbody th { font-weight: 600; white-space: normal; overflow-wrap: anywhere; }
small { display: block; white-space: normal; font-size: .78rem; font-weight: 400; color: var(--muted); }
small > span { white-space: nowrap; }
td.muted > span { color: var(--muted); }
td b { font-weight: 700; }
.name { width: max-content; max-width: 13rem; display: flex; gap: .5rem; align-items: baseline; }
.dot { flex: none; width: .6rem; height: .6rem; border-radius: 50%;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.notes { margin-top: .6rem; font-size: .8125rem; line-height: 1.5; color: var(--muted); }
.notes p { margin: 0 0 .15rem; max-width: 48rem; }
figure { margin: 1.5rem 0 2rem; }
figcaption { font-size: .8125rem; line-height: 1.5; color: var(--muted); margin-top: .5rem; max-width: 48rem;
  text-wrap: pretty; }
figcaption b { color: var(--ink); font-weight: 650; }
.grid { display: grid; gap: 1.4rem 2rem; grid-template-columns: repeat(var(--columns), minmax(0, 26rem)); }
.pair { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  align-items: start; }
.plot { max-width: 32rem; min-width: 0; }
.plot svg { display: block; width: 100%; height: auto; overflow: visible;
  stroke-linejoin: round; stroke-linecap: butt; }
.plot svg text { font-family: inherit; font-variant-numeric: tabular-nums; }
.note { white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; font-size: .875rem; margin: 0 0 1.5rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (max-width: 56rem) { .grid { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); } }
@media (max-width: 36rem) {
  body { padding: 2rem 1.1rem 3rem; font-size: 1rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; }
  .name { max-width: 8rem; }
}
@media print {
  @page { margin: 15mm 14mm; }
  html { font-size: 11px; }
  body { max-width: none; padding: 0; background: none; }
  .scroll { overflow: visible; background: none; }
  th:first-child { position: static; background: none; }
  th, td { padding-left: .5rem; } thead th { min-width: 0; }
  h2, h3, .title, .caption { break-after: avoid; }
  figure, .table, .plot, tr, dl { break-inside: avoid; }
  small { font-size: .65rem; letter-spacing: -.01em; }
  .grid { grid-template-columns: repeat(var(--columns), 1fr); } .pair { grid-template-columns: 1fr 1fr; }
}
"""


def render(
    config: ReportConfig,
    inputs: Inputs,
    summary: Summary,
    tables: Mapping[str, Table],
    figures: Sequence[Drawn],
    colours: Mapping[str, str],
) -> str:
    """Render the whole page; the same inputs give the same bytes. `colours`: arm or corpus -> colour as drawn."""
    dots = {name: css_colour(colour) for name, colour in colours.items()}
    html = {name: to_html(table, dots) for name, table in tables.items()}
    finding, qualified = headline(summary)
    body = [
        f'<header>\n<h1>{escape(config.title)}</h1>\n<p class="finding">{escape(finding)}</p>\n',
        f"<p>{escape(qualified)}</p>\n" if qualified else "",
        "</header>\n<main>\n",
        html["accuracy"],
        _figures(figures, "tradeoff"),
        *(html.get(name, "") for name in ("preconditions", "deltas", "protocols", "samples")),
        _figures(figures, "accuracy"),
        _corpora(inputs, figures, html),
        _contamination(inputs, html),
        _training(figures),
        "<h2>Answers</h2>\n",
        html["answers"],
        '<p><a href="answers.html">Every problem with the answers of all arms side by side</a></p>\n',
        _making(config, inputs),
        "</main>\n",
    ]
    return document(config.title, "".join(body))


def document(title: str, body: str) -> str:
    """Format a page that stands alone, in the report's style, around what goes into its body."""
    light, dark = theme_variables()
    style = _STYLE.replace("LIGHT", light).replace("DARK", dark).strip()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}\n</style>\n</head>\n<body>\n" + body + "</body>\n</html>\n"
    )


def _figures(figures: Sequence[Drawn], section: Section) -> str:
    return "".join(
        figure_block(figure.title, figure.caption, figure.plots, figure.entry.several)
        for figure in figures
        if figure.entry.section == section
    )


def figure_block(title: str, caption: str, plots: Sequence[Plot], several: bool) -> str:
    """Format plots under one caption, `title` in bold; in a grid if the figure has `several`."""
    drawn = "".join(map(figure_html, plots))
    text = f"<b>{escape(title)}</b> {escape(caption)}".rstrip()
    layout = "grid" if several else ""
    # Four look better as two by two than as three and one.
    columns = f' style="--columns: {2 if len(plots) in (2, 4) else 3}"' if layout else ""
    return f'<figure>\n<div class="{layout}"{columns}>\n{drawn}</div>\n<figcaption>{text}</figcaption>\n</figure>\n'


def _corpora(inputs: Inputs, figures: Sequence[Drawn], html: Mapping[str, str]) -> str:
    if not inputs.corpora:
        return ""
    of_corpora, of_learnability = _figures(figures, "corpora"), _figures(figures, "learnability")
    return (
        f'<h2>Corpora</h2>\n{html["corpora"]}<div class="pair">\n{of_corpora}</div>\n{html.get("learnability", "")}'
        + (f'<div class="pair">\n{of_learnability}</div>\n' if of_learnability else "")
    )


def _contamination(inputs: Inputs, html: Mapping[str, str]) -> str:
    if not inputs.overlaps:
        return ""
    finding = escape(contamination_finding(inputs.overlaps))
    return f"<h2>Contamination</h2>\n<p>{finding}</p>\n{html['contamination']}"


def _training(figures: Sequence[Drawn]) -> str:
    of_training = _figures(figures, "training")
    return f"<h2>Training</h2>\n{of_training}" if of_training else ""


def _making(config: ReportConfig, inputs: Inputs) -> str:
    times = [curve.seconds for curves in inputs.training.values() for curve in curves]
    known = [seconds for seconds in times if seconds is not None]
    told = {"training time": f"{sum(known) / 3600:.2f} hours, {len(known)} trainings"} if known else {}
    lines = config.provenance | told
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>\n" for key, value in lines.items())
    notes = "".join(f'<p class="note">{escape(note)}</p>\n' for note in config.notes)
    return (
        "<h2>How it was made</h2>\n"
        + (f"<dl>\n{rows}</dl>\n" if rows else "")
        + f"<h3>Intervals</h3>\n<p>{escape(INTERVAL_METHOD)}</p>\n"
        + (f"<h3>Notes</h3>\n{notes}" if notes else "")
    )
