"""Write the report: pages, tables, numbers and plots in the directory that the config names."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from micota_fast.common.files import write_atomic
from micota_fast.common.json_io import encode_json
from micota_fast.config.report import ReportConfig
from micota_fast.report.answers import render_answers
from micota_fast.report.drawing import drawing_style, require_matplotlib
from micota_fast.report.formats import (
    accuracy_csv,
    answers_csv,
    contamination_csv,
    corpora_csv,
    markdown_text,
    report_json,
    to_compact_latex,
    to_latex,
    to_markdown,
)
from micota_fast.report.inputs import Inputs, load_inputs
from micota_fast.report.learnability import LearnabilityRanking, learnability_table, rank_by_learnability
from micota_fast.report.mathematics import require_latex2mathml
from micota_fast.report.page import render
from micota_fast.report.plots import Drawn, draw, is_plot_file, plot_files, series_colours
from micota_fast.report.preconditions import Condition, measure, preconditions_json, preconditions_table
from micota_fast.report.summary import INTERVAL_METHOD, Summary, contamination_finding, headline, summarise
from micota_fast.report.tables import (
    Table,
    accuracy_table,
    answers_table,
    contamination_table,
    corpora_table,
    deltas_table,
    protocols_table,
    samples_table,
)
from micota_fast.report.tradeoff import TRADEOFF

_OPTIONAL = ("corpora.csv", "contamination.csv")  # written if there is something to put in them


def run(config: ReportConfig) -> None:
    """Make the report. The same inputs give the same bytes.

    Raises:
        InputError: an input is missing or malformed (see `load_inputs`), or the extra `report` is not installed.
    """
    require_matplotlib()
    require_latex2mathml()
    inputs = load_inputs(config)
    summary = summarise(inputs)
    ranking = rank_by_learnability(inputs.corpora, config.trained_on, summary)
    colours = series_colours([*(arm.name for arm in summary.arms), *inputs.corpora, *inputs.training])
    conditions = measure(config.training_answers, inputs, summary)
    numbers = report_json(config, inputs, summary, ranking) | {"preconditions": preconditions_json(conditions)}
    with drawing_style():
        figures = draw(inputs, summary, colours)
    tables = _tables(config, inputs, summary, ranking, conditions)
    claims = config.claims.deltas if config.claims is not None else {}
    texts = {
        "table.md": _markdown(config, inputs, summary, tables, figures),
        "table.tex": "% Needs \\usepackage{booktabs}.\n" + "\n".join(map(to_latex, tables.values())),
        "table-compact.tex": to_compact_latex(summary),
        "table.csv": accuracy_csv(summary, claims),
        "answers.csv": answers_csv(summary.arms),
        "report.json": encode_json(numbers, 1, sort_keys=True).decode() + "\n",
    }
    if inputs.corpora:
        texts["corpora.csv"] = corpora_csv(inputs.corpora, ranking.trained if ranking else {})
    if inputs.overlaps:
        texts["contamination.csv"] = contamination_csv(inputs.overlaps)
    files = {name: text.encode() for name, text in texts.items()}
    files |= {f"plots/{name}": content for name, content in plot_files(figures).items()}
    files["answers.html"] = render_answers(config, inputs, colours)
    page = render(config, inputs, summary, tables, figures, colours)
    files["report.html"] = page.encode()  # last: when it is there, so are the others
    _remove_former(Path(config.out), files)
    for name, content in files.items():
        write_atomic(Path(config.out) / name, [content])


def _remove_former(out: Path, files: Collection[str]) -> None:
    """Delete what a former report wrote here and this one does not, such as plots of arms that are gone."""
    ours = [path for path in (out / "plots").glob("*") if is_plot_file(path.name)]
    for path in [*ours, *(out / name for name in _OPTIONAL)]:
        if path.relative_to(out).as_posix() not in files:
            path.unlink(missing_ok=True)


def _tables(
    config: ReportConfig,
    inputs: Inputs,
    summary: Summary,
    ranking: LearnabilityRanking | None,
    conditions: Sequence[Condition],
) -> dict[str, Table]:
    """The tables that there is data for, in the order of the files."""
    tables = {
        "accuracy": accuracy_table(summary, config.claims),
        "preconditions": preconditions_table(conditions),
        "deltas": deltas_table(summary) if summary.trained else None,
        "protocols": protocols_table(inputs),
        "samples": samples_table(summary),
        "corpora": corpora_table(inputs.corpora) if inputs.corpora else None,
        "learnability": learnability_table(ranking, inputs.corpora) if ranking else None,
        "contamination": contamination_table(inputs.overlaps) if inputs.overlaps else None,
        "answers": answers_table(summary.arms),
    }
    return {name: table for name, table in tables.items() if table is not None}


def _markdown(
    config: ReportConfig, inputs: Inputs, summary: Summary, tables: Mapping[str, Table], figures: Sequence[Drawn]
) -> str:
    first, *others = [to_markdown(table).rstrip() for table in tables.values()]
    shown = [f"![{TRADEOFF}](plots/tradeoff.png)"] if any(of.title == TRADEOFF for of in figures) else []
    parts = [f"# {markdown_text(config.title)}", markdown_text(" ".join(headline(summary))), first, *shown, *others]
    found = [markdown_text(contamination_finding(inputs.overlaps))] if inputs.overlaps else []
    return "\n\n".join([*parts, *found, INTERVAL_METHOD]) + "\n"
