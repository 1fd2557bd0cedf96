"""Options of `report`."""

import math
from dataclasses import dataclass

from micota_fast.config.generation import COLUMNS
from micota_fast.config.loader import option
from micota_fast.errors import InputError

STUDENT = "student"
PARTS = ("long", "mid", "short", STUDENT)
"""Whose answers to the training problems the method's preconditions compare."""


@dataclass(kw_only=True)
class ClaimsConfig:
    """Published figures, to compare ours with."""

    source: str = option(doc="where they are published")
    deltas: dict[str, float] = option(doc="arm -> difference of its average to the untouched student's, points")

    def __post_init__(self) -> None:
        for arm, delta in self.deltas.items():
            if not math.isfinite(delta):
                raise InputError(f"`deltas.{arm}` must be a number of points, not {delta}")


@dataclass(kw_only=True)
class TrainingAnswersConfig:
    """Models' answers to the training problems: what the method's preconditions are measured on."""

    answers: dict[str, str] = option(
        doc="long, mid, short (answers of the model that wrote this corpus) and student (untrained) -> JSONL of the "
        "answers that the filter accepted; FILE.rejects.jsonl holds the others"
    )
    problems: str | None = option(None, doc="the training problems, whose `level` is used; null: levels are not used")
    columns: dict[str, str] = option({}, doc=COLUMNS)

    def __post_init__(self) -> None:
        for part in self.answers:
            if part not in PARTS:
                raise InputError(f"`answers` names {part!r}; known: {', '.join(PARTS)}")


@dataclass(kw_only=True)
class ReportConfig:
    """`micota report`: tables, plots and two self-contained pages."""

    title: str = option(doc="heading of the page")
    out: str = option(
        doc="folder: report.html, answers.html, report.json, table.md, table.tex, table-compact.tex, CSV files, "
        "plots/ (SVG, PDF and PNG)"
    )
    base: str = option(doc="results.json of the untouched student")
    arms: dict[str, list[str]] = option(doc="arm -> results.json of each seed, in the table's order")
    corpora: dict[str, dict[str, str]] = option({}, doc="corpus -> {counts: FILE, alignment: FILE}")
    trained_on: dict[str, str] = option({}, doc="arm -> its corpus, if the corpus has another name")
    training: dict[str, list[str]] = option({}, doc="arm -> metrics.jsonl of each seed")
    earlier_rounds: dict[str, list[list[str]]] = option(
        {},
        doc="arm trained in rounds -> for each seed, metrics.jsonl of the rounds before the one in `training`",
        newer=True,
    )
    contamination: str | None = option(None, doc="contamination.json of the training corpora; null: not reported")
    claims: ClaimsConfig | None = option(None, doc="published differences, printed next to the measured ones")
    chance: dict[str, float] = option(
        {}, doc="benchmark -> accuracy of a guess, in %, if it is known; shown in tables and plots", newer=True
    )
    training_answers: TrainingAnswersConfig | None = option(
        None, doc="answers to the training problems, for the method's preconditions; null: there are none", newer=True
    )
    notes: list[str] = option([], doc="paragraphs printed as they are: what was tried, what is unusual")
    provenance: dict[str, str] = option({}, doc="versions and machine, printed as they are", operational=True)
