"""`micota compare RUN RUN`: two runs side by side: the options that differ, the arms and the training losses."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from micota_fast.common.files import reading, write_atomic
from micota_fast.common.schema import load
from micota_fast.errors import InputError
from micota_fast.pipeline.record import Done, made_for, read_done
from micota_fast.report.drawing import drawing_style, finish, require_matplotlib
from micota_fast.report.formats import to_html, to_markdown
from micota_fast.report.inputs import LossCurve, load_loss_curve
from micota_fast.report.losses import loss_pair
from micota_fast.report.page import document, figure_block
from micota_fast.report.summary import mean_curve, percent, points
from micota_fast.report.tables import ABSENT, Cell, Table, significant

CONTENT = "sha256:"
"""Opens a value of an identity that stands for what a file or folder contains."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the table reads the loss, as shares of the steps that both runs logged."""
_SHOWN = 60  # characters of an option's value
_SEED = re.compile(r"-seed\d+(?=$|-round\d+$)")


@dataclass(frozen=True)
class _Mean:
    """An accuracy in report.json, a fraction; `sd` over seeds, None for a single run."""

    mean: float
    sd: float | None


@dataclass(frozen=True)
class _Arm:
    average: _Mean
    benchmarks: dict[str, _Mean]


@dataclass(frozen=True)
class _Report:
    """What report.json says of the arms."""

    arm_order: tuple[str, ...]
    benchmark_order: tuple[str, ...]
    problems: dict[str, int]
    arms: dict[str, _Arm]


@dataclass(frozen=True)
class Run:
    """A run's folder as read.

    Attributes:
        folder: as the user wrote it.
        options: stage -> dotted option -> value; inputs made by the run itself are left out.
        report: None if the run has none yet.
        losses: training without its seed -> the curve of each seed.
    """

    folder: str
    options: dict[str, dict[str, Any]]
    report: _Report | None
    losses: dict[str, list[LossCurve]]


class Difference(NamedTuple):
    """An option with its value in the first run and in the second, and the stages where it differs so."""

    option: str
    values: tuple[str, str]
    stages: list[str]


def compare(first: str, second: str, out: str | None = None) -> None:
    """Print two runs side by side as Markdown.

    Args:
        first: folder of a run, finished or not.
        second: folder of another.
        out: HTML file that shows the same and draws the losses; None: none.

    Raises:
        InputError: a folder is not a run's or contains no stage, both are the same, a record is damaged, or matplotlib
            is needed and not installed.
    """
    if Path(first).resolve() == Path(second).resolve():
        raise InputError(f"{first} and {second} are the same folder; name two runs")
    if out is not None:
        require_matplotlib()
    runs = read_run(first), read_run(second)
    tables = [options_table(*runs), *filter(None, (arms_table(*runs), losses_table(*runs)))]
    title = f"{first} and {second}"
    print(f"# {title}\n\n" + "\n".join(map(to_markdown, tables)), end="")
    if out is not None:
        body = f"<h1>{escape(title)}</h1>\n" + "".join(to_html(table, {}) for table in tables)
        write_atomic(Path(out), [document(title, body + _loss_figure(*runs)).encode()])


def read_run(folder: str) -> Run:
    """Read what a run recorded of its stages; stages that were set aside are left out.

    Raises:
        InputError: the folder is not a run's, no stage of it has begun, or a record is damaged.
    """
    place = Path(folder)
    if not (place / "fingerprints.json").exists():
        raise InputError(f"{folder} is not the folder of a run: it contains no fingerprints.json")
    with reading(place):
        stages = dict(_stages(place))
    if not stages:
        raise InputError(f"{folder} contains no stage that has begun; start it with `micota run`")
    made = {fingerprint for _, done in stages.values() if done is not None for fingerprint in done.outputs.values()}
    options = {name: _options(identity, made) for name, (identity, _) in stages.items()}
    losses: dict[str, list[LossCurve]] = {}
    for name, (identity, _) in stages.items():
        metrics = place / name / "metrics.jsonl"
        if identity.get("verb") == "train" and metrics.exists() and metrics.stat().st_size:
            losses.setdefault(_SEED.sub("", name), []).append(load_loss_curve(metrics))
    report = place / "report" / "report.json"
    return Run(folder, options, load(_Report, report) if report.exists() else None, losses)


def _stages(folder: Path) -> Iterator[tuple[str, tuple[dict[str, Any], Done | None]]]:
    """Yield the name, identity and, if it is finished, the record of each stage."""
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.is_dir() and not path.name.startswith(".") and "~" not in path.relative_to(folder).as_posix():
            identity = made_for(path)
            if identity is not None:
                yield path.relative_to(folder).as_posix(), (identity, read_done(path))


def _options(identity: Mapping[str, Any], made: set[str]) -> dict[str, Any]:
    """The options and the files that a stage is given, by dotted keys."""
    given = {"": identity.get("options", {})}
    for name, text in identity.get("files", {}).items():
        given[f"{name}: "] = yaml.safe_load(text)
    leaves = {prefix + key: value for prefix, tree in given.items() for key, value in _leaves(tree)}
    return {key: value for key, value in leaves.items() if not _is_from_run(value, made)}


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not items:
        yield key, value
        return
    for inner, of in items:
        yield from _leaves(of, f"{key}.{inner}" if key else str(inner))


def _is_from_run(value: Any, made: set[str]) -> bool:
    return isinstance(value, str) and (value.startswith("RUN/") or value.removeprefix(CONTENT) in made)


def differing(first: Run, second: Run) -> list[Difference]:
    """Return the options that differ in stages that both runs have; the same difference of several stages is one."""
    found: dict[tuple[str, tuple[str, str]], list[str]] = {}
    for stage in first.options.keys() & second.options.keys():
        one, other = first.options[stage], second.options[stage]
        for option in {**one, **other}:
            if option not in one or option not in other or one[option] != other[option]:
                values = tuple(_shown(of[option]) if option in of else ABSENT for of in (one, other))
                found.setdefault((option, (values[0], values[1])), []).append(stage)
    return [Difference(*key, sorted(stages)) for key, stages in sorted(found.items())]


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith(CONTENT):
        return f"content {value.removeprefix(CONTENT)[:10]}"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def options_table(first: Run, second: Run) -> Table:
    """Tabulate the options that differ and name the stages that only one run has."""
    rows = tuple(
        (Cell(of.option), *map(Cell, of.values), Cell(_listed(of.stages))) for of in differing(first, second)
    ) or ((Cell("none"), *[Cell(ABSENT, muted=True)] * 3),)
    notes = ["Content: the first digits of the sha256 of a file or folder that the run was given."]
    for one, other in ((first, second), (second, first)):
        if only := sorted(one.options.keys() - other.options.keys()):
            notes.append(f"Only in {one.folder}: {_listed(only)}.")
    columns = (Cell("Option"), Cell(first.folder), Cell(second.folder), Cell("Stages"))
    return Table("Options that differ", columns, rows, tuple(notes))


def _listed(stages: Sequence[str]) -> str:
    """List stages, the seeds of a training as one."""
    counts: dict[str, int] = {}
    for stage in stages:
        counts[_SEED.sub("", stage)] = counts.get(_SEED.sub("", stage), 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count} seeds)" for name, count in counts.items())


def arms_table(first: Run, second: Run) -> Table | None:
    """Tabulate the accuracies of both runs by arm, the average first; None if a run has no report yet."""
    one, other = first.report, second.report
    if one is None or other is None:
        return None
    arms = dict.fromkeys((*one.arm_order, *other.arm_order))
    benchmarks = dict.fromkeys((*one.benchmark_order, *other.benchmark_order))
    rows = []
    for name in arms:
        pair = one.arms.get(name), other.arms.get(name)
        average = [None if arm is None else arm.average for arm in pair]
        of = [[None if arm is None else arm.benchmarks.get(benchmark) for arm in pair] for benchmark in benchmarks]
        rows.append((Cell(name), *map(_accuracy, average), *(_change(*both) for both in (average, *of))))
    notes = [
        "In % of problems, ± the standard deviation over seeds; differences, second run less first, in points. They "
        "are not tested: the runs may differ in their seeds as well as in their options."
    ]
    for name in benchmarks:
        sizes = one.problems.get(name), other.problems.get(name)
        if None not in sizes and sizes[0] != sizes[1]:
            notes.append(f"{name} has {sizes[0]} problems in the first run and {sizes[1]} in the second.")
    columns = (
        Cell("Arm"),
        *(Cell("Average", run.folder) for run in (first, second)),
        Cell("Difference", "average"),
        *(Cell(name, "difference") for name in benchmarks),
    )
    return Table("Arms", columns, tuple(rows), tuple(notes))


def _accuracy(of: _Mean | None) -> Cell:
    if of is None:
        return Cell(ABSENT, muted=True)
    return Cell(percent(of.mean), "" if of.sd is None else f"± {percent(of.sd)}")


def _change(before: _Mean | None, after: _Mean | None) -> Cell:
    if before is None or after is None:
        return Cell(ABSENT, muted=True)
    return Cell(points(after.mean - before.mean))


def losses_table(first: Run, second: Run) -> Table | None:
    """Tabulate the losses of the trainings that both runs have, at the quarters of their steps; None without any."""
    both = [name for name in first.losses if name in second.losses]
    if not both:
        return None
    rows = []
    for name in both:
        curves = [mean_curve(run.losses[name]) for run in (first, second)]
        shared = _at_shared_steps(*curves)
        cells = [Cell(" → ".join(_at(curve, share) for curve in shared)) for share in SHARES]
        steps = " → ".join(f"{curve.steps[-1]:,}" if curve.steps else ABSENT for curve in curves)
        rows.append((Cell(name), Cell(steps), *cells))
    heads = (f"{share:.0%} of steps" for share in SHARES)
    columns = (Cell("Training"), Cell("Steps"), *map(Cell, heads))
    notes = (
        "First run → second run: nats per supervised token, mean over seeds, at the same steps: shares are of those "
        "that both logged.",
    )
    return Table("Training loss", columns, tuple(rows), notes)


def _at_shared_steps(first: LossCurve, second: LossCurve) -> list[LossCurve]:
    """Leave out the steps that only one of two runs logged, such as those after the other one's end."""
    steps = tuple(sorted({*first.steps} & {*second.steps}))
    losses = (dict(zip(curve.steps, curve.losses, strict=True)) for curve in (first, second))
    return [LossCurve(steps, tuple(of[step] for step in steps)) for of in losses]


def _at(curve: LossCurve, share: float) -> str:
    if not curve.losses:
        return ABSENT
    loss = curve.losses[int(share * (len(curve.losses) - 1))]
    return significant(loss) if math.isfinite(loss) else "diverged"


def _loss_figure(first: Run, second: Run) -> str:
    pairs = {name: (first.losses[name], second.losses[name]) for name in first.losses if name in second.losses}
    with drawing_style():
        drawings = loss_pair(pairs)
        plots = [finish(of.figure, f"loss{i}", of.description, of.title) for i, of in enumerate(drawings)]
    caption = f"Thin: seeds; bold: their mean. Blue: {first.folder}; orange: {second.folder}."
    return figure_block("Training loss.", caption, plots, several=True) if plots else ""
