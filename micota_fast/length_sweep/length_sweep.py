"""How long and how accurate a merge's answers are at each weight, and the merge whose answers have a wanted length.

The weight of the merge is the lever of mid-CoT distillation (arXiv 2507.01887): at 0 the assistant thinks as briefly
as its base, at 1 as long as the teacher that its other parent learned from. Merging and sampling are the stages `merge`
and `generate`, run as separate processes.
"""

import contextlib
import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import micota_fast
from micota_fast.chat.template import chat_identity
from micota_fast.common import processes
from micota_fast.common.files import remove_whole, write_atomic, writing
from micota_fast.common.fingerprint import Fingerprints, of_file, of_json
from micota_fast.common.json_io import read_json_if_there, write_json
from micota_fast.common.lock import RUN_ENDS_S, locked
from micota_fast.common.records import Completion, encode_row
from micota_fast.common.schema import load, to_json
from micota_fast.config import loader
from micota_fast.config.generation import GenerateConfig
from micota_fast.config.merge import REFINEMENTS, LengthSweepConfig
from micota_fast.errors import InputError
from micota_fast.grading.gold import check_golds
from micota_fast.grading.grader import Grader
from micota_fast.length_sweep.curve import bend, measure, points_of, weight_of
from micota_fast.length_sweep.render import DEFINITIONS, accuracy_text, findings, markdown_table, median_text, plots
from micota_fast.length_sweep.results import Measurement, Sweep, Target
from micota_fast.merge.mergekit import MergePlan, read_mergekit
from micota_fast.report.drawing import require_matplotlib
from micota_fast.sources.completions import read_completions
from micota_fast.sources.hub import absolute
from micota_fast.sources.problems import read_problems

TAIL_BYTES = 2000


def run(config: LengthSweepConfig) -> None:
    """Measure every weight; write OUT/sweep.md, sweep.svg, sweep.png and, last, sweep.json.

    With `target_median_tokens`, up to REFINEMENTS further weights are measured, each where the length is interpolated
    to be the wanted one, until that lies in the 95% interval of the median there. OUT/model is the merge at that
    weight, or else at the one whose measured median is nearest.

    One model is on the disk at a time (unless `keep_models`), besides the wanted one. Each weight has a folder
    weight-W~FINGERPRINT with its answers, `completions.jsonl`, and the log of its merge and its sampling. The
    fingerprint is of all that the answers depend on: a sweep that was killed resumes, a sweep with more weights uses
    the answers that exist, and none is mistaken for another's. Equal inputs give equal files as far as `generate` does.

    Raises:
        InputError: the file cannot be swept (see `MergePlan.with_weight`); another sweep uses OUT; a merge or a
            sampling failed, with the end of its log; or no measured weight reaches the wanted length, which is reported
            after everything else is written.
    """
    require_matplotlib()
    plan = read_mergekit(config.config)
    plans = {weight: plan.with_weight(weight) for weight in sorted(config.weights)}
    problems = read_problems(config.problems, config.limit, config.columns)
    check_golds(((p.id, p.answer) for p in problems), config.problems, required=False)  # lengths need none
    out = Path(config.out).absolute()
    if (out / "model").exists() and not (out / "model" / "merge.json").is_file():
        raise InputError(f"{out / 'model'} is not a merge; remove it or choose another place")
    with (
        writing(out),
        locked(out / ".lock", "length sweep", RUN_ENDS_S, print) as lock,
        Grader(config.workers, config.timeout_s) as grader,
    ):
        digest = hashlib.sha256(b"".join(map(encode_row, problems))).hexdigest()
        sweep = _Sweep(config, out, digest, lock.fileno())

        def at(weight: float) -> Measurement:
            rows = sweep.answers(plan.with_weight(weight), weight)
            verdicts = grader.grade([(row.completion, row.answer) for row in rows])
            correct = sum(verdict.status == "correct" for verdict in verdicts)
            measured = measure(weight, len(problems), rows, correct)
            median, accuracy = median_text(measured), accuracy_text(measured)
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


def _approach(wanted: int, measured: list[Measurement], at: Callable[[float], Measurement]) -> float:
    """Find the weight that `run` describes; what is measured on the way to it is added to `measured`.

    Raises:
        InputError: see `weight_of`.
    """
    for _ in range(REFINEMENTS):
        weight = weight_of(wanted, points_of(measured))
        if all(m.weight != weight for m in measured):
            measured.append(at(weight))
            measured.sort(key=lambda m: m.weight)
        interval = next(m.median95 for m in measured if m.weight == weight)
        if interval is not None and interval[0] <= wanted <= interval[1]:
            return weight
    return min(measured, key=lambda m: (abs(m.tokens.p50 - wanted), m.weight)).weight


class _Sweep:
    """Models and answers in one folder."""

    def __init__(self, config: LengthSweepConfig, out: Path, problems: str, lock: int) -> None:
        self.config, self.out, self._problems, self._lock = config, out, problems, lock
        self._fingerprints = Fingerprints(out / "fingerprints.json")

    def answers(self, plan: MergePlan, weight: float) -> list[Completion]:
        """Return the completions of a weight; they are made unless they are there and whole."""
        made_by = {
            "merge": self.merge_identity(plan),
            "problems": self._problems,
            "generate": loader.identity(self.config.generate) | {"chat": chat_identity(self.config.generate.chat)},
        }
        folder = self.out / f"weight-{weight:.15g}~{of_json(made_by)[:10]}"
        folder.mkdir(exist_ok=True)
        completions, done = folder / "completions.jsonl", folder / "done.json"
        is_done = completions.is_file() and (read_json_if_there(done) or {}).get("sha256") == of_file(completions)
        if not is_done:
            print(f"weight {weight:g}: merging and sampling; log: {folder / 'log.txt'}", flush=True)
        if not is_done or self.config.keep_models:
            self.merge(weight, folder / "model", folder / "log.txt")
        if not is_done:
            sampling = {f.name: getattr(self.config.generate, f.name) for f in dataclasses.fields(self.config.generate)}
            settings = GenerateConfig(
                **sampling,
                model=str(folder / "model"),
                problems=absolute(self.config.problems),
                columns=self.config.columns,
                limit=self.config.limit,
                out=str(completions),
            )
            write_atomic(folder / "generate.yaml", [loader.dump(settings).encode()])
            self._run(["generate", str(folder / "generate.yaml")], folder / "log.txt")
            write_json(done, {"made_by": made_by, "sha256": of_file(completions)})
        if not self.config.keep_models:
            remove_whole(folder / "model")
        return read_completions(completions)

    def merge_identity(self, plan: MergePlan) -> dict[str, Any]:
        """Describe what a merge depends on, without any paths."""
        inputs = [{"model": self._content(entry.model)} for entry in plan.inputs]
        return {"plan": plan.describe(self._content(plan.base), inputs), "seed": self.config.seed}

    def merge(self, weight: float, model: Path, log: Path) -> None:
        """Make the merge at a weight as the folder `model`, unless that exists: it appears whole or not at all."""
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
        """Run `micota ...` as a process whose output is appended to a file; it ends with us, however we end."""
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
    measured: list[Measurement],
    weight: float | None,
    problem: InputError | None,
) -> None:
    """Write the files, sweep.json last: when it is there, so are the others and the wanted merge."""
    config, out = sweep.config, sweep.out
    knee, elbow = bend(points_of(measured), "knee"), bend(points_of(measured), "elbow")
    target = None
    if config.target_median_tokens is not None:
        said = None if problem is None else str(problem)
        target = Target(median_tokens=config.target_median_tokens, weight=weight, problem=said)
    result = Sweep(
        method=plan.method,
        seed=config.seed,
        points=tuple(measured),
        knee=None if knee is None else knee.weight,
        elbow=None if elbow is None else elbow.weight,
        target=target,
        model=None if weight is None else of_json(sweep.merge_identity(plan.with_weight(weight))),
        versions={"micota_fast": micota_fast.__version__},
    )
    sentences = findings(result)
    table = markdown_table(measured)
    write_atomic(out / "sweep.md", ["\n\n".join([table, *sentences, DEFINITIONS]).encode() + b"\n"])
    for name, content in plots(result).items():
        write_atomic(out / name, [content])
    if weight is not None:
        try:
            current = load(Sweep, out / "sweep.json").model == result.model
        except InputError:  # no sweep has ended here, or its file is damaged
            current = False
        if not current:
            remove_whole(out / "model")
        sweep.merge(weight, out / "model", out / "model-log.txt")
    write_json(out / "sweep.json", to_json(result))
    print("\n".join([table, *sentences]))
    if problem is not None:
        raise problem
