"""What the report reads: the files of the other stages, checked key by key before anything is drawn."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from micota_fast.common.records import benchmark_file, parse_line, read_lines
from micota_fast.config.report import ReportConfig
from micota_fast.errors import InputError
from micota_fast.report.corpora import Corpus, load_corpus
from micota_fast.report.node import Node, parse, read


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark of one model: `n` answers to `problems` problems, more than one each where answers were sampled.

    `accuracy` is a fraction of the answers; the optional counts, of answers too, are None where the file has none.
    `protocols` has the accuracy by each protocol that graded them.
    """

    problems: int
    n: int
    accuracy: float
    truncated: int | None
    no_answer: int | None
    timeout: int | None
    mean_tokens: float | None
    protocols: dict[str, float]


@dataclass(frozen=True)
class Graded:
    """Of each problem, by id in sorted order, how many of its `samples` answers are right."""

    ids: tuple[str, ...]
    correct: tuple[int, ...]
    samples: int


@dataclass(frozen=True)
class Results:
    """One evaluated model. `graded` is None where a benchmark's rows/NAME.jsonl is not beside results.json; `protocol`,
    by which it was graded, where the file does not say."""

    path: Path
    model: str
    protocol: str | None
    benchmarks: dict[str, BenchmarkResult]
    graded: dict[str, Graded] | None


@dataclass(frozen=True)
class LossCurve:
    """Training loss (nats per supervised token) by optimizer step; a step that diverged holds NaN."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Overlap:
    """One corpus and one benchmark: of its `problems`, how many a row holds word for word (`exact`) and with how many a
    row shares 13 words in a run (`shared`); and how many `rows` of the corpus do either."""

    problems: int
    exact: int
    shared: int
    rows: int


@dataclass(frozen=True)
class Inputs:
    """Everything the report shows, in the order of the config."""

    base: Results
    arms: dict[str, list[Results]]
    corpora: dict[str, Corpus]
    training: dict[str, list[LossCurve]]
    overlaps: dict[str, dict[str, Overlap]]
    """Corpus -> benchmark -> what they share; empty where the config names no contamination.json."""


def load(config: ReportConfig) -> Inputs:
    """Read and check every file the config names.

    Raises:
        InputError: a file is absent or malformed, a required key is missing or has the wrong type, an accuracy
            contradicts its counts or its rows, or an arm was not evaluated on the same problems as the base (averages
            over different benchmarks cannot be compared). Names the file and the key.
    """
    if "base" in config.arms:
        raise InputError("report config: arms.base: this name belongs to the untouched student; rename the arm")
    base = _results(Path(config.base))
    arms: dict[str, list[Results]] = {}
    for name, paths in config.arms.items():
        if not paths:
            raise InputError(f"report config: arms.{name}: no results.json given; leave the arm out or add a path")
        arms[name] = [_results(Path(path)) for path in paths]
        for results in arms[name]:
            _same_benchmarks(results, base)
            _same_protocol(results, base)
    _same_problems([base, *(results for runs in arms.values() for results in runs)])
    corpora = {name: load_corpus(name, files) for name, files in config.corpora.items()}
    training = {name: [_loss_curve(Path(path)) for path in paths] for name, paths in config.training.items() if paths}
    overlaps = {} if config.contamination is None else _overlaps(Path(config.contamination), list(base.benchmarks))
    for arm in config.claims.deltas if config.claims is not None else ():
        if arm not in arms:
            raise InputError(f"report config: claims.deltas: no arm is named {arm!r}; there are {', '.join(arms)}")
    return Inputs(base, arms, corpora, training, overlaps)


def _results(path: Path) -> Results:
    node = parse(read(path), str(path))
    listed = node.child("benchmarks")
    if not listed.data:
        raise InputError(f"{path}: key 'benchmarks' is empty; evaluate at least one benchmark")
    benchmarks, counting = {}, set()
    for name in listed.data:
        entry = listed.child(name)
        protocols = entry.optional_child("protocols")
        if protocols is not None:
            counting.add(entry.text("protocol"))
        n, accuracy = entry.count("n", low=1), entry.number("accuracy", 0.0, 1.0)
        problems = entry.optional_count("problems", low=1) or n
        if problems > n:
            raise InputError(f"{path}: key 'benchmarks.{name}.problems' is {problems}, more than 'n', {n} answers")
        correct = entry.optional_count("correct")
        if correct is not None and abs(correct / n - accuracy) > 1e-6:
            raise InputError(
                f"{path}: key 'benchmarks.{name}.accuracy' is {accuracy}, but {correct} correct of {n} is "
                f"{correct / n:.6f}"
            )
        benchmarks[name] = BenchmarkResult(
            problems=problems,
            n=n,
            accuracy=accuracy,
            truncated=entry.optional_count("truncated"),
            no_answer=entry.optional_count("no_answer"),
            timeout=entry.optional_count("timeout"),
            mean_tokens=entry.optional_number("mean_tokens", 0.0),
            protocols={of: protocols.child(of).number("accuracy", 0.0, 1.0) for of in protocols.data}
            if protocols
            else {},
        )
    if len(counting) > 1:
        raise InputError(
            f"{path}: benchmarks are graded by {' and '.join(sorted(counting))}; grade all by one protocol"
        )
    rows = {name: path.parent / "rows" / benchmark_file(name) for name in benchmarks}
    graded = None
    if all(file.exists() for file in rows.values()):
        graded = {name: _graded(file, path, benchmarks[name]) for name, file in rows.items()}
    return Results(path, str(node.data.get("model") or ""), next(iter(counting), None), benchmarks, graded)


def _graded(file: Path, results: Path, expected: BenchmarkResult) -> Graded:
    right: dict[str, dict[int, bool]] = {}
    for where, line in read_lines(file):
        row = Node(parse_line(line, where), where)
        problem, sample = right.setdefault(row.text("id"), {}), row.count("sample")
        if sample in problem:
            raise InputError(f"{where}: sample {sample} of problem {row.text('id')!r} occurs a second time")
        problem[sample] = row.text("outcome") == "correct"
    ids = sorted(right)
    counts = tuple(sum(right[problem].values()) for problem in ids)
    answers = sum(map(len, right.values()))
    found = (len(ids), answers, sum(counts))
    named = (expected.problems, expected.n, round(expected.accuracy * expected.n))
    if found != named:
        of = "{} problems with {} answers, {} of them correct".format
        raise InputError(f"{file} holds {of(*found)}, but {results} says {of(*named)}; evaluate again")
    samples = answers // len(ids)
    uneven = next((problem for problem in ids if len(right[problem]) != samples), None)
    if uneven is not None:
        raise InputError(
            f"{file}: problem {uneven!r} has {len(right[uneven])} answers, others another number; evaluate again"
        )
    return Graded(tuple(ids), counts, samples)


def _same_problems(every: Sequence[Results]) -> None:
    first, *others = [(of.path, of.graded) for of in every if of.graded is not None] or [(Path(), {})]
    for path, graded in others:
        for name, of_name in graded.items():
            odd = sorted(set(of_name.ids) ^ set(first[1][name].ids))
            if odd:
                raise InputError(
                    f"benchmark {name!r}: problem {odd[0]!r} is among the rows of one of {first[0]} and {path} but not "
                    "of the other; evaluate both on the same problems"
                )


def _same_benchmarks(results: Results, base: Results) -> None:
    mine = {name: result.problems for name, result in results.benchmarks.items()}
    theirs = {name: result.problems for name, result in base.benchmarks.items()}
    if mine != theirs:
        raise InputError(
            f"{results.path}: key 'benchmarks' holds {mine} (problems each) but the base, {base.path}, holds {theirs}; "
            "evaluate both on the same problems"
        )


def _same_protocol(results: Results, base: Results) -> None:
    if results.protocol != base.protocol:
        raise InputError(
            f"{results.path} is graded by the protocol {results.protocol or 'of an earlier version'} and the base, "
            f"{base.path}, by {base.protocol or 'that of an earlier version'}; grade both by the same"
        )


def _overlaps(path: Path, benchmarks: Sequence[str]) -> dict[str, dict[str, Overlap]]:
    node = parse(read(path), str(path))
    overlaps: dict[str, dict[str, Overlap]] = {}
    for corpus in node.data:
        named = node.child(corpus).child("benchmarks")
        entries = {name: named.child(name) for name in benchmarks}
        overlaps[corpus] = {
            name: Overlap(
                entry.count("problems", low=1), entry.length("exact"), entry.length("gram13"), entry.count("rows")
            )
            for name, entry in entries.items()
        }
    return overlaps


def _rows(path: Path) -> Iterator[Node]:
    for number, line in enumerate(read(path).splitlines(), start=1):
        if line.strip():
            yield parse(line, f"{path}:{number}")


def _loss_curve(path: Path) -> LossCurve:
    by_step: dict[int, float] = {}
    for row in _rows(path):
        loss = row.data.get("loss")
        # A loss that is not finite (null: a step that was skipped for it) is a result to show, not a malformed file;
        # after a resume the later row of a step holds.
        diverged = ("loss" in row.data and loss is None) or (isinstance(loss, float) and not math.isfinite(loss))
        by_step[row.count("step")] = math.nan if diverged else row.number("loss")
    if not by_step:
        raise InputError(f"{path}: no rows; rerun the training that writes it")
    steps = tuple(sorted(by_step))
    return LossCurve(steps, tuple(by_step[step] for step in steps))
