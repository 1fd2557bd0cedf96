"""What the report reads: the files of the other stages, checked before anything is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from micota_fast.common.json_io import parse_json
from micota_fast.common.records import benchmark_file, read_lines
from micota_fast.common.schema import Count, from_json, load
from micota_fast.config.report import ReportConfig
from micota_fast.corpus.results import BenchmarkOverlap, Contamination
from micota_fast.errors import InputError
from micota_fast.evaluation.results import BenchmarkResult, EvaluationResults, read_graded
from micota_fast.report.corpora import Corpus, load_corpus


@dataclass(frozen=True)
class Graded:
    """How many of a problem's `samples` answers are correct, by the problems' ids in sorted order, and their tokens."""

    ids: tuple[str, ...]
    correct: tuple[int, ...]
    samples: int
    correct_tokens: tuple[tuple[int, ...], ...]

    def within(self, limit: int) -> "Graded":
        """Return what is correct if an answer may have at most `limit` tokens."""
        kept = tuple(tuple(n for n in tokens if n <= limit) for tokens in self.correct_tokens)
        return Graded(self.ids, tuple(map(len, kept)), self.samples, kept)


@dataclass(frozen=True)
class EvaluatedModel:
    """One results.json, and the rows next to it.

    `protocol` is the one whose verdicts count, None if the file does not say. `graded` is None if the rows/NAME.jsonl
    of a benchmark is missing.
    """

    path: Path
    model: str
    protocol: str | None
    benchmarks: dict[str, BenchmarkResult]
    graded: dict[str, Graded] | None


@dataclass(frozen=True)
class LossCurve:
    """Training loss (nats per supervised token) by optimizer step; a step that diverged holds NaN.

    `seconds` is the time that the processes of the training took, None if its rows do not say.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: float | None = None


@dataclass(frozen=True)
class Inputs:
    """Everything the report shows, in the order of the config."""

    base: EvaluatedModel
    arms: dict[str, list[EvaluatedModel]]
    corpora: dict[str, Corpus]
    training: dict[str, list[LossCurve]]
    overlaps: dict[str, dict[str, BenchmarkOverlap]]
    """Corpus -> benchmark -> what they share; empty if the config names no contamination.json."""
    chance: dict[str, float]
    """Benchmark -> accuracy of a guess, a fraction; without those where it is not known."""


def load_inputs(config: ReportConfig) -> Inputs:
    """Read and check every file the config names.

    Raises:
        InputError: a file is missing or malformed, a required key is missing or has the wrong type, an accuracy
            contradicts its counts or its rows, or an arm was not evaluated on the same problems as the base (averages
            over different benchmarks cannot be compared). Names the file and the key.
    """
    if "base" in config.arms:
        raise InputError("report config: arms.base: this name belongs to the untouched student; rename the arm")
    base = _load_model(Path(config.base))
    arms: dict[str, list[EvaluatedModel]] = {}
    for name, paths in config.arms.items():
        if not paths:
            raise InputError(f"report config: arms.{name}: no results.json given; leave the arm out or add a path")
        arms[name] = [_load_model(Path(path)) for path in paths]
        for model in arms[name]:
            _check_same_benchmarks(model, base)
            _check_same_protocol(model, base)
    _check_same_problems([base, *(model for models in arms.values() for model in models)])
    corpora = {name: load_corpus(name, files) for name, files in config.corpora.items()}
    training = {
        name: [load_loss_curve(Path(path)) for path in paths] for name, paths in config.training.items() if paths
    }
    for arm, seeds in config.earlier_rounds.items():
        if len(seeds) != len(training.get(arm, ())):
            raise InputError(f"report config: earlier_rounds.{arm}: expected one list for each seed in training.{arm}")
        earlier = [[load_loss_curve(Path(path)) for path in paths] for paths in seeds]
        training[arm] = [_joined([*of_seed, last]) for of_seed, last in zip(earlier, training[arm], strict=True)]
    overlaps = {} if config.contamination is None else _overlaps(Path(config.contamination), list(base.benchmarks))
    for arm in config.claims.deltas if config.claims is not None else ():
        if arm not in arms:
            raise InputError(f"report config: claims.deltas: no arm is named {arm!r}; there are {', '.join(arms)}")
    for name in config.chance:
        if name not in base.benchmarks:
            raise InputError(f"report config: chance.{name}: no such benchmark; there are {', '.join(base.benchmarks)}")
    chance = {name: config.chance[name] / 100 for name in base.benchmarks if name in config.chance}
    return Inputs(base, arms, corpora, training, overlaps, chance)


def _load_model(path: Path) -> EvaluatedModel:
    results = load(EvaluationResults, path)
    benchmarks = results.benchmarks
    if not benchmarks:
        raise InputError(f"{path}: key 'benchmarks' is empty; evaluate at least one benchmark")
    counting = sorted({result.protocol for result in benchmarks.values() if result.protocol is not None})
    if len(counting) > 1:
        raise InputError(f"{path}: benchmarks are graded by {' and '.join(counting)}; grade all by one protocol")
    files = {name: path.parent / "rows" / benchmark_file(name) for name in benchmarks}
    graded = None
    if all(file.exists() for file in files.values()):
        graded = {name: _count_correct(file, path, benchmarks[name]) for name, file in files.items()}
    return EvaluatedModel(path, results.model, counting[0] if counting else None, benchmarks, graded)


def _count_correct(file: Path, results: Path, expected: BenchmarkResult) -> Graded:
    correct: dict[str, dict[int, int | None]] = {}  # tokens of a correct answer, None for another
    for where, row in read_graded(file):
        of_problem = correct.setdefault(row.id, {})
        if row.sample in of_problem:
            raise InputError(f"{where}: sample {row.sample} of problem {row.id!r} occurs a second time")
        of_problem[row.sample] = row.completion_tokens if row.outcome == "correct" else None
    ids = sorted(correct)
    tokens = tuple(tuple(n for n in correct[problem].values() if n is not None) for problem in ids)
    counts = tuple(map(len, tokens))
    answers = sum(map(len, correct.values()))
    found = (len(ids), answers, sum(counts))
    named = (expected.size, expected.n, round(expected.accuracy * expected.n))
    if found != named:
        of = "{} problems with {} answers, {} of them correct".format
        raise InputError(f"{file} holds {of(*found)}, but {results} says {of(*named)}; evaluate again")
    samples = answers // len(ids)
    uneven = next((problem for problem in ids if len(correct[problem]) != samples), None)
    if uneven is not None:
        raise InputError(
            f"{file}: problem {uneven!r} has {len(correct[uneven])} answers, others another number; evaluate again"
        )
    return Graded(tuple(ids), counts, samples, tokens)


def _check_same_problems(every: Sequence[EvaluatedModel]) -> None:
    first, *others = [(of.path, of.graded) for of in every if of.graded is not None] or [(Path(), {})]
    for path, graded in others:
        for name, of_name in graded.items():
            odd = sorted(set(of_name.ids) ^ set(first[1][name].ids))
            if odd:
                raise InputError(
                    f"benchmark {name!r}: problem {odd[0]!r} is among the rows of one of {first[0]} and {path} but not "
                    "of the other; evaluate both on the same problems"
                )


def _check_same_benchmarks(model: EvaluatedModel, base: EvaluatedModel) -> None:
    mine = {name: result.size for name, result in model.benchmarks.items()}
    theirs = {name: result.size for name, result in base.benchmarks.items()}
    if mine != theirs:
        raise InputError(
            f"{model.path}: key 'benchmarks' holds {mine} (problems each) but the base, {base.path}, holds {theirs}; "
            "evaluate both on the same problems"
        )


def _check_same_protocol(model: EvaluatedModel, base: EvaluatedModel) -> None:
    if model.protocol != base.protocol:
        raise InputError(
            f"{model.path} is graded by the protocol {model.protocol or 'of an earlier version'} and the base, "
            f"{base.path}, by {base.protocol or 'that of an earlier version'}; grade both by the same"
        )


def _overlaps(path: Path, benchmarks: Sequence[str]) -> dict[str, dict[str, BenchmarkOverlap]]:
    overlaps: dict[str, dict[str, BenchmarkOverlap]] = {}
    for corpus, found in load(Contamination, path).items():
        for name in benchmarks:
            if name not in found.benchmarks:
                raise InputError(
                    f"{path}: key '{corpus}.benchmarks.{name}' is missing: the corpus was not compared with this "
                    "benchmark; run `micota contamination` with every benchmark of the report"
                )
        overlaps[corpus] = {name: found.benchmarks[name] for name in benchmarks}
    return overlaps


@dataclass(frozen=True)
class _Timing:
    """When a step was reported: seconds since its process began; None in metrics of other versions."""

    seconds: float | None = None


@dataclass(frozen=True)
class _LoggedStep:
    """A row of metrics.jsonl. `loss` is None if the step was skipped because its loss was not finite."""

    step: Count
    loss: float | None
    timing: _Timing | None = None


def _joined(rounds: Sequence[LossCurve]) -> LossCurve:
    """Put the curves of rounds one after another; steps go on from round to round."""
    steps: list[int] = []
    for curve in rounds:
        before = steps[-1] if steps else 0
        steps += [before + step for step in curve.steps]
    seconds = [curve.seconds for curve in rounds]
    losses = tuple(loss for curve in rounds for loss in curve.losses)
    return LossCurve(tuple(steps), losses, None if None in seconds else math.fsum(filter(None, seconds)))


def load_loss_curve(path: Path) -> LossCurve:
    """Read a metrics.jsonl.

    Raises:
        InputError: it cannot be read, has no rows, or a row is malformed; names the line.
    """
    by_step: dict[int, float] = {}
    ended, seconds = 0.0, 0.0  # of the processes before the row's own, and its own until now
    for where, line in read_lines(path):
        try:
            row = parse_json(line, where, finite=False)
        except InputError:
            if line.endswith(b"\n"):
                raise
            break  # the last line, which a kill has torn, or which is being written
        # A loss that is not finite is a result to show, not a malformed file.
        if isinstance(row.get("loss"), float) and not math.isfinite(row["loss"]):
            row["loss"] = None
        logged = from_json(_LoggedStep, row, where)
        # After a resume the later row of a step holds.
        by_step[logged.step] = math.nan if logged.loss is None else logged.loss
        if logged.timing is not None and logged.timing.seconds is not None:
            if logged.timing.seconds < seconds:  # a process that resumed begins at 0
                ended += seconds
            seconds = logged.timing.seconds
    if not by_step:
        raise InputError(f"{path}: no rows; rerun the training that writes it")
    steps = tuple(sorted(by_step))
    return LossCurve(steps, tuple(by_step[step] for step in steps), ended + seconds or None)
