"""How long and how right a merge's answers are at each weight, and the merge whose answers have a wanted length.

The weight of the merge is the lever of mid-CoT distillation (arXiv 2507.01887): at 0 the assistant thinks as briefly
as its base, at 1 as long as the teacher that its other parent learned from. Merging and sampling are the stages `merge`
and `generate`, run as processes of their own.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import micota_fast
from micota_fast.common import processes
from micota_fast.common.files import remove_whole, write_atomic, writing
from micota_fast.common.fingerprint import Fingerprints, of_json
from micota_fast.common.lock import RUN_ENDS_S, locked
from micota_fast.common.records import Completion, encode_row, read_completions, read_problems
from micota_fast.config import loader
from micota_fast.config.generation import GenerateConfig
from micota_fast.config.merge import REFINEMENTS, LengthSweepConfig
from micota_fast.errors import InputError
from micota_fast.grading.grader import Grader
from micota_fast.length_sweep.curve import Point, bend, weight_of
from micota_fast.merge.mergekit import MergePlan, read_mergekit
from micota_fast.report.drawing import INK, MUTED, RULE, drawing_style, require_matplotlib
from micota_fast.statistics.intervals import median95, wilson95

QUANTILES = (10, 25, 50, 75, 90)
TAIL_BYTES = 2000
DEFINITIONS = (
    "Tokens are of all answers but aborted ones; an answer that was cut off counts at the limit. Brackets are 95% "
    "intervals: of the median by order statistics, of the accuracy Wilson's, both taking the problems for independent. "
    "Knee (elbow): the measured weight farthest above (below) the chord from the first point to the last, where the "
    "chord passes outside of the median's interval (Satopaa et al. 2011)."
)


def run(config: LengthSweepConfig) -> None:
    """Measure every weight; write OUT/sweep.md, sweep.svg, sweep.png and, last, sweep.json.

    With `target_median_tokens`, up to 3 further weights are measured, each where the length is interpolated to be the
    wanted one, until that lies in the 95% interval of the median there. OUT/model is the merge at that weight, or else
    at the one whose measured median is nearest.

    One model is on the disk at a time (unless `keep_models`), and the wanted one. Each weight has a folder
    weight-W~FINGERPRINT with its answers, `completions.jsonl`, and the log of its merge and its sampling; the
    fingerprint is of all that the answers depend on, so a sweep that was killed goes on, one with more weights takes up
    those that are there, and none is taken for another's. Equal inputs give equal files as far as `generate` does.

    Raises:
        InputError: no sweep can be made of the file (see `MergePlan.with_weight`); another sweep uses OUT; a merge or a
            sampling failed, with the end of its log; or no weight measured reaches the wanted length, which is said
            after all else is written.
    """
    require_matplotlib()
    plan = read_mergekit(config.config)
    plans = {weight: plan.with_weight(weight) for weight in sorted(config.weights)}
    problems = read_problems(config.problems, config.limit)
    out = Path(config.out).absolute()
    if (out / "model").exists() and not (out / "model" / "merge.json").is_file():
        raise InputError(f"{out / 'model'} is no merge; remove it or choose another place")
    with (
        writing(out),
        locked(out / ".lock", "length sweep", RUN_ENDS_S, print) as lock,
        Grader(config.workers, config.timeout_s) as grader,
    ):
        digest = hashlib.sha256(b"".join(map(encode_row, problems))).hexdigest()
        sweep = _Sweep(config, out, digest, lock.fileno())

        def at(weight: float) -> dict[str, Any]:
            rows = sweep.answers(plan.with_weight(weight), weight)
            verdicts = grader.grade([(row.completion, row.answer) for row in rows])
            correct = sum(verdict.status == "correct" for verdict in verdicts)
            measured = measure(weight, len(problems), rows, correct)
            median, accuracy = _median(measured), _accuracy(measured)
            print(f"weight {weight:g}: median {median} tokens, accuracy {accuracy}", flush=True)
            return measured

        measured = [at(weight) for weight in plans]
        weight, problem = None, None
        if config.target_median_tokens is not None:
            try:
                weight = _approach(config.target_median_tokens, measured, at)
            except InputError as error:
                problem = error
        _finish(sweep, plan, measured, weight, problem)


def _approach(wanted: int, measured: list[dict[str, Any]], at: Callable[[float], dict[str, Any]]) -> float:
    """The weight that `run` describes; what is measured on the way to it is added to `measured`.

    Raises:
        InputError: see `weight_of`.
    """
    for _ in range(REFINEMENTS):
        weight = weight_of(wanted, _points(measured))
        if all(m["weight"] != weight for m in measured):
            measured.append(at(weight))
            measured.sort(key=lambda m: m["weight"])
        interval = next(m["median95"] for m in measured if m["weight"] == weight)
        if interval is not None and interval[0] <= wanted <= interval[1]:
            return weight
    nearest: float = min(measured, key=lambda m: (abs(m["tokens"]["p50"] - wanted), m["weight"]))["weight"]
    return nearest


def _points(measured: Sequence[dict[str, Any]]) -> list[Point]:
    return [Point(m["weight"], m["tokens"]["p50"], m["median95"], m["median_is_cut"]) for m in measured]


def measure(weight: float, problems: int, rows: Sequence[Completion], correct: int) -> dict[str, Any]:
    """What sweep.json says of a weight.

    `finished`, `truncated` and `aborted` are shares of the answers, `accuracy` the share that is right, also among
    those cut off. `median_is_cut`: at least half of the answers ended at the limit.

    Raises:
        InputError: every answer was aborted.
    """
    n = len(rows)
    share = {reason: sum(row.finish_reason == reason for row in rows) / n for reason in ("stop", "length", "abort")}
    lengths = np.array([row.completion_tokens for row in rows if row.finish_reason != "abort"])
    if not lengths.size:
        raise InputError(f"weight {weight:g}: the server aborted every answer")
    accuracy = correct / n
    return {
        "weight": weight,
        "problems": problems,
        "answers": n,
        "finished": share["stop"],
        "truncated": share["length"],
        "aborted": share["abort"],
        "tokens": {"mean": float(lengths.mean())} | {f"p{q}": float(np.quantile(lengths, q / 100)) for q in QUANTILES},
        "median95": median95(lengths.tolist(), problems),
        "median_is_cut": 2 * share["length"] * n >= lengths.size,
        "correct": correct,
        "accuracy": accuracy,
        "wilson95": wilson95(accuracy, problems),
    }


class _Sweep:
    """Models and answers in one folder."""

    def __init__(self, config: LengthSweepConfig, out: Path, problems: str, lock: int) -> None:
        self.config, self.out, self._problems, self._lock = config, out, problems, lock
        self._fingerprints = Fingerprints(out / "fingerprints.json")

    def answers(self, plan: MergePlan, weight: float) -> list[Completion]:
        """The completions of a weight, made if they are not there whole."""
        made_by = {
            "merge": self.merge_identity(plan),
            "problems": self._problems,
            "generate": loader.identity(self.config.generate),
        }
        folder = self.out / f"weight-{weight:.15g}~{of_json(made_by)[:10]}"
        folder.mkdir(exist_ok=True)
        completions, done = folder / "completions.jsonl", folder / "done.json"
        is_done = done.is_file() and json.loads(done.read_bytes()).get("sha256") == _sha256(completions)
        if not is_done:
            print(f"weight {weight:g}: merging and sampling; log: {folder / 'log.txt'}", flush=True)
        if not is_done or self.config.keep_models:
            self.merge(weight, folder / "model", folder / "log.txt")
        if not is_done:
            sampling = {f.name: getattr(self.config.generate, f.name) for f in dataclasses.fields(self.config.generate)}
            settings = GenerateConfig(
                **sampling,
                model=str(folder / "model"),
                problems=str(Path(self.config.problems).absolute()),
                limit=self.config.limit,
                out=str(completions),
            )
            write_atomic(folder / "generate.yaml", [loader.dump(settings).encode()])
            self._run(["generate", str(folder / "generate.yaml")], folder / "log.txt")
            record = {"made_by": made_by, "sha256": _sha256(completions)}
            write_atomic(done, [json.dumps(record, indent=1).encode() + b"\n"])
        if not self.config.keep_models:
            remove_whole(folder / "model")
        return read_completions(completions)

    def merge_identity(self, plan: MergePlan) -> dict[str, Any]:
        """What a merge depends on, free of where things lie."""
        inputs = [{"model": self._content(entry.model)} for entry in plan.inputs]
        return {"plan": plan.describe(self._content(plan.base), inputs), "seed": self.config.seed}

    def merge(self, weight: float, model: Path, log: Path) -> None:
        """The merge at a weight as the folder `model`, unless that is there: it appears whole or not at all."""
        aside = model.with_name("merging")
        if model.exists():
            with contextlib.suppress(FileNotFoundError):
                aside.rmdir()  # a sweep that was killed may have left it empty
            return
        arguments = [str(Path(self.config.config).absolute()), str(aside), "--seed", str(self.config.seed)]
        self._run(["merge", *arguments, "--weights", repr(weight)], log)
        (merged,) = aside.iterdir()
        merged.rename(model)
        aside.rmdir()

    def _content(self, model: str) -> str:
        folder = Path(model)
        content = f"sha256:{self._fingerprints.of(folder)}" if folder.is_dir() else f"hub:{model}"
        self._fingerprints.save()
        return content

    def _run(self, arguments: list[str], log_path: Path) -> None:
        """`micota ...` as a process whose output is added to a file; it ends with us, however we end."""
        command = [sys.executable, "-m", "micota_fast", *arguments]
        with log_path.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            start = log.tell()
            env = os.environ | {"PYTHONUNBUFFERED": "1"}
            process = processes.spawn(command, env=env, stdout=log, stderr=subprocess.STDOUT, pass_fds=(self._lock,))
            try:
                status = process.wait()
            finally:
                processes.stop(process)
        if status:
            tail = log_path.read_bytes()[start:][-TAIL_BYTES:].decode("utf-8", "replace").strip()
            raise InputError(
                f"`micota {arguments[0]}` failed with status {status}; the end of its log {log_path}:\n{tail}"
            )


def _finish(
    sweep: _Sweep,
    plan: MergePlan,
    measured: list[dict[str, Any]],
    weight: float | None,
    problem: InputError | None,
) -> None:
    """The files; the wanted merge before sweep.json, so that this is there only when all is."""
    config, out = sweep.config, sweep.out
    knee, elbow = bend(_points(measured), "knee"), bend(_points(measured), "elbow")
    wanted = config.target_median_tokens
    result = {
        "method": plan.method,
        "seed": config.seed,
        "points": measured,
        "knee": knee and knee.weight,
        "elbow": elbow and elbow.weight,
        "target": wanted and {"median_tokens": wanted, "weight": weight, "problem": problem and str(problem)},
        "model": None if weight is None else of_json(sweep.merge_identity(plan.with_weight(weight))),
        "versions": {"micota_fast": micota_fast.__version__},
    }
    sentences = _sentences(result)
    table = _table(measured)
    write_atomic(out / "sweep.md", ["\n\n".join([table, *sentences, DEFINITIONS]).encode() + b"\n"])
    for name, content in _plots(measured, result).items():
        write_atomic(out / name, [content])
    if weight is not None:
        former = out / "sweep.json"
        if not former.is_file() or json.loads(former.read_bytes()).get("model") != result["model"]:
            remove_whole(out / "model")
        sweep.merge(weight, out / "model", out / "model-log.txt")
    write_atomic(out / "sweep.json", [json.dumps(result, indent=1).encode() + b"\n"])
    print("\n".join([table, *sentences]))
    if problem is not None:
        raise problem


def _median(m: dict[str, Any]) -> str:
    interval = "" if m["median95"] is None else f" [{m['median95'][0]:g}, {m['median95'][1]:g}]"
    return f"{'≥ ' if m['median_is_cut'] else ''}{m['tokens']['p50']:g}{interval}"


def _accuracy(m: dict[str, Any]) -> str:
    low, high = m["wilson95"]
    return f"{100 * m['accuracy']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _table(measured: Sequence[dict[str, Any]]) -> str:
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
            f"{m['weight']:g}",
            _median(m),
            *(f"{m['tokens'][key]:.0f}" for key in ("p10", "p25", "p75", "p90", "mean")),
            _accuracy(m),
            f"{100 * m['finished']:.1f}%",
            f"{100 * m['truncated']:.1f}%",
            str(m["answers"]),
        ]
        for m in measured
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---:"] * len(head), *rows))


def _sentences(result: dict[str, Any]) -> list[str]:
    by_weight = {m["weight"]: m for m in result["points"]}

    def at(weight: float | None) -> str:
        return "none" if weight is None else f"weight {weight:g}, {_median(by_weight[weight])} tokens"

    elbow, knee = at(result["elbow"]), at(result["knee"])
    said = [f"Elbow, where the length begins to rise: {elbow}. Knee, where it levels off: {knee}."]
    if result["target"]:
        target = result["target"]
        found = target["problem"] or f"OUT/model is the merge at {at(target['weight'])}"
        said.append(f"Wanted, a median of {target['median_tokens']} tokens: {found}.")
    return said


def _plots(measured: Sequence[dict[str, Any]], result: dict[str, Any]) -> dict[str, bytes]:
    """File name -> contents; length above, accuracy below, over one axis of weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    weights = [m["weight"] for m in measured]
    with drawing_style():
        figure = Figure(figsize=(6, 5.4), dpi=150, layout="constrained")
        length, accuracy = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        tokens = {key: [m["tokens"][key] for m in measured] for key in ("p25", "p50", "p75")}
        length.fill_between(weights, tokens["p25"], tokens["p75"], color="#0072b2", alpha=0.2, linewidth=0)
        bars = [_distances(m["tokens"]["p50"], m["median95"] or (m["tokens"]["p50"],) * 2) for m in measured]
        length.errorbar(weights, tokens["p50"], np.transpose(bars), color="#0072b2", marker="o", capsize=3)
        _title(length, "Tokens an answer: the median with its 95% interval; shaded, the middle half")
        bars = [_distances(m["accuracy"], m["wilson95"]) for m in measured]
        shares = [100 * m["accuracy"] for m in measured]
        accuracy.errorbar(weights, shares, 100 * np.transpose(bars), color="#00835f", marker="o", capsize=3)
        accuracy.set_ylim(-4, 104)
        _title(accuracy, "Accuracy with its 95% interval, %")
        accuracy.set_xlabel("merge weight")
        marks = [(name, result[name]) for name in ("elbow", "knee")]
        if result["target"]:
            length.axhline(result["target"]["median_tokens"], color=MUTED, linewidth=0.8, dashes=(4, 2))
            marks.append(("wanted length", result["target"]["weight"]))
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


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
