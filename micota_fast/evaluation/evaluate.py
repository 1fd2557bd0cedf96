"""Accuracy of a checkpoint on each benchmark: greedy answers from the served model, graded, with an interval."""

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import micota_fast
from micota_fast.common.fingerprint import Fingerprints, of_file
from micota_fast.common.json_io import as_read_back, write_json
from micota_fast.common.records import Completion, benchmark_file, model_name, score_file, write_rows
from micota_fast.common.schema import ABSENT, Absent, load, to_json
from micota_fast.config.evaluation import BenchmarkConfig, EvaluateConfig
from micota_fast.errors import InputError
from micota_fast.evaluation.judge import ModelJudge
from micota_fast.evaluation.majority import Grade, majority_correct
from micota_fast.evaluation.results import (
    ABORTED,
    OUTCOMES,
    BenchmarkResult,
    BenchmarkScore,
    EvaluationResults,
    GradedAnswer,
    Judge,
    Outcome,
    ProtocolScore,
    ProtocolVerdict,
    Score,
)
from micota_fast.generation.generate import Generation
from micota_fast.generation.servers import named_urls, servers_for
from micota_fast.grading.answers import why_unreadable
from micota_fast.grading.choices import grade_choice, why_unreadable_as_choice
from micota_fast.grading.gold import WhyUnreadable, check_golds
from micota_fast.grading.grader import Grader, Verdict
from micota_fast.grading.paper_rules import (
    grade_by_string,
    grade_last_number,
    why_unreadable_as_number,
    why_unreadable_as_string,
)
from micota_fast.sources.completions import read_completions
from micota_fast.statistics.intervals import clustered_se, macro_average, mean_pass_at, wilson95

# What verdicts depend on besides our own code: prompts' tokens, and the comparison of answers.
PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy", "tokenizers")
PARSER, USUAL_PARSER = "antlr4-python3-runtime", "4.13.2"
"""Verdicts were compared under this runtime; under 4.11.0 math-verify calls 50 and 50 percent different."""
RULES: dict[str, tuple[Callable[[str, str], Verdict], WhyUnreadable]] = {  # how an answer is graded, a gold one read
    "box": (grade_by_string, why_unreadable_as_string),
    "box_zeros_trimmed": (partial(grade_by_string, trim_zeros=True), why_unreadable_as_string),
    "last_number": (grade_last_number, why_unreadable_as_number),
    "choice": (grade_choice, why_unreadable_as_choice),
}
DEFAULT_RULE = "box"


@dataclass(frozen=True)
class _Job:
    """One benchmark: how its problems are asked, their answers, and where the graded rows and their score go."""

    benchmark: BenchmarkConfig
    asked: EvaluateConfig
    answers: Generation
    rows: Path
    score: Path


@dataclass(frozen=True)
class _Graded:
    """A benchmark's answers, protocol -> their verdicts, and what these were made of.

    `majorities`: protocol -> of each problem, whether its most frequent answer is right; empty if each has one answer.
    """

    rows: list[Completion]
    verdicts: dict[str, list[Verdict]]
    majorities: dict[str, list[bool]]
    made_of: dict[str, Any]


def run(config: EvaluateConfig) -> None:
    """Answer and grade every benchmark; write results.json, rows/NAME.jsonl and completions/NAME.jsonl in OUT.

    One server answers all benchmarks, and none is started if every answer is there already. Each benchmark is graded
    and its score printed as soon as it is answered. What was answered and graded before, by an interrupted run or for
    other benchmarks, is used as it is: scores/NAME.json says what a score was made of, and a score is computed again
    if the answers, the options of grading or the versions differ. Equal inputs give equal results.json; what depends
    on the clock stands in timing.json.

    Every answer is graded twice: `strict` by math-verify, `paper` by the benchmark's string rule (see `string_rule`).
    The verdicts of `config.protocol` count; the score by each protocol stands next to them. The files' keys are
    described by `evaluation.results`.

    Raises:
        InputError: as `generation.generate`; or two benchmarks have one name, or a file holds another number of
            problems than its benchmark has, or none of its gold answers can be read by `config.protocol`.
    """
    named_urls(config)
    out = Path(config.out)
    jobs = _jobs(config, out)
    for job in jobs:
        _check_golds(config, job)
    judge = None if config.judge is None else ModelJudge(config.judge, out / "judge", config.wait_for_server_s)
    described = ABSENT if judge is None else judge.describe()
    versions = {"micota_fast": micota_fast.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
    if (parser := importlib.metadata.version(PARSER)) != USUAL_PARSER:
        versions[PARSER] = parser
    timing: dict[str, Any] = {"generation_s": {}, "grading_s": {}}
    benchmarks: dict[str, BenchmarkResult] = {}
    pending: dict[str, tuple[_Job, _Graded]] = {}  # wait for the judge, which is served when the model is not any more

    def keep(job: _Job, graded: _Graded, opinions: Sequence[bool | None] | None) -> None:
        entry, rows = _result(config, job, graded, opinions)
        write_rows(job.rows, map(to_json, rows))
        record = BenchmarkScore(made_of=graded.made_of, rows=of_file(job.rows), result=entry)
        write_json(job.score, to_json(record))
        benchmarks[job.benchmark.name] = entry
        print(_line(job.benchmark.name, entry), flush=True)

    with Grader(config.workers, config.timeout_s) as grader, _servers(config, jobs, out) as urls:
        for job in jobs:
            name, started = job.benchmark.name, time.monotonic()
            job.answers.run(urls)
            answered = time.monotonic()
            timing["generation_s"][name] = round(answered - started, 3)
            made_of = _made_of(config, job, versions, described)
            if (entry := _kept(job, made_of)) is not None:
                benchmarks[name] = entry
                print(_line(name, entry), flush=True)
                continue
            graded = _grade(job, grader, made_of)
            timing["grading_s"][name] = round(time.monotonic() - answered, 3)
            if judge is None:
                keep(job, graded, None)
            else:
                pending[job.rows.name] = job, graded
                print(_line(name, _result(config, job, graded, None)[0]), flush=True)
    if judge is not None and pending:
        opinions = judge.verdicts({file: (of.rows, of.verdicts["paper"]) for file, (_, of) in pending.items()})
        for file, (job, graded) in pending.items():
            keep(job, graded, opinions[file])
    benchmarks = {job.benchmark.name: benchmarks[job.benchmark.name] for job in jobs}
    entries = benchmarks.values()
    average = macro_average([[entry.accuracy for entry in entries]], [entry.size for entry in entries])
    results = EvaluationResults(
        model=model_name(config.model),
        average=average.mean,
        average95=(average.low, average.high),
        benchmarks=benchmarks,
        versions=versions,
        judge=described,
    )
    write_json(out / "timing.json", timing)
    write_json(out / "results.json", to_json(results))
    print(
        f"average of {len(benchmarks)}: {100 * average.mean:.2f}% [{100 * average.low:.2f}, {100 * average.high:.2f}]"
    )


def _check_golds(config: EvaluateConfig, job: _Job) -> None:
    """Warn of gold answers that a protocol cannot read; each has its own rule."""
    _, by_string = RULES[job.benchmark.rule or DEFAULT_RULE]
    for protocol, why in {"strict": why_unreadable, "paper": by_string}.items():
        golds = ((problem.id, problem.answer) for problem in job.answers.problems)
        check_golds(golds, job.benchmark.path, why, protocol, required=protocol == config.protocol)


@contextlib.contextmanager
def _servers(config: EvaluateConfig, jobs: Sequence[_Job], out: Path) -> Iterator[list[str]]:
    """Yield the URLs of servers that answer all benchmarks; none if no request will be sent."""
    if all(job.answers.is_finished() for job in jobs):
        yield []
        return
    # A server that samples for one of them must be seeded.
    hottest = replace(config, temperature=max(job.asked.temperature for job in jobs))
    with servers_for(hottest, out / "server.log") as urls:
        yield urls


def _grade(job: _Job, grader: Grader, made_of: dict[str, Any]) -> _Graded:
    rows = read_completions(job.answers.out)
    pairs = [(row.completion, row.answer) for row in rows]
    rule, _ = RULES[job.benchmark.rule or DEFAULT_RULE]
    grades: dict[str, Grade] = {"strict": grader.grade, "paper": lambda pairs: [rule(*pair) for pair in pairs]}
    verdicts = {name: grade(pairs) for name, grade in grades.items()}
    samples, majorities = job.asked.samples, {}
    if samples > 1:
        majorities = {name: majority_correct(rows, of, samples, grades[name]) for name, of in verdicts.items()}
    return _Graded(rows, verdicts, majorities, made_of)


def _made_of(config: EvaluateConfig, job: _Job, versions: dict[str, str], judge: Judge | Absent) -> dict[str, Any]:
    """Return all that a benchmark's score and its graded rows depend on."""
    made_of = {
        "answers": of_file(job.answers.out),
        "made_by": job.answers.fingerprint,
        "protocol": config.protocol,
        "rule": job.benchmark.rule,
        "timeout_s": config.timeout_s,
        "versions": versions,
        "judge": None if isinstance(judge, Absent) else to_json(judge),
    }
    if job.asked.samples > 1:  # scores of earlier versions have no majority
        made_of["majority"] = "the first of equals"
    return dict(as_read_back(made_of))


def _kept(job: _Job, made_of: dict[str, Any]) -> BenchmarkResult | None:
    """Return the score that was computed before of the same answers in the same way; None if there is none."""
    try:
        kept = load(BenchmarkScore, job.score)
        return kept.result if kept.made_of == made_of and kept.rows == of_file(job.rows) else None
    except (InputError, OSError):  # not there, or damaged: grading again is cheap
        return None


def _result(
    config: EvaluateConfig,
    job: _Job,
    graded: _Graded,
    opinions: Sequence[bool | None] | None,
) -> tuple[BenchmarkResult, list[GradedAnswer]]:
    """The entry of results.json, and the graded rows."""
    rows, verdicts = graded.rows, graded.verdicts
    problems = len(job.answers.problems)
    scores = {name: score(problems, rows, of, graded.majorities.get(name, ())) for name, of in verdicts.items()}
    protocols = {
        name: ProtocolScore(
            correct=of.correct,
            accuracy=of.accuracy,
            standard_error=of.standard_error,
            majority=of.majority,
            pass_at=of.pass_at,
        )
        for name, of in scores.items()
    }
    graded_rows = [
        _graded_row(config.protocol, *of) for of in zip(rows, verdicts["strict"], verdicts["paper"], strict=True)
    ]
    if opinions is not None:
        graded_rows = [
            replace(row, protocols={**row.protocols, "judge": ProtocolVerdict(opinion)})
            for row, opinion in zip(graded_rows, opinions, strict=True)
        ]
        correct = sum(opinion is True for opinion in opinions)
        undecided = sum(opinion is None for opinion in opinions)
        protocols["judge"] = ProtocolScore(correct=correct, accuracy=correct / len(rows), undecided=undecided)
    entry = BenchmarkResult(
        **vars(scores[config.protocol]),
        protocol=config.protocol,
        protocols=protocols,
        made_by=job.answers.fingerprint,
        grading={"rule": job.benchmark.rule, "timeout_s": config.timeout_s},
    )
    return entry, graded_rows


def _jobs(config: EvaluateConfig, out: Path) -> list[_Job]:
    jobs, hashes = [], Fingerprints(None)
    for benchmark, file in zip(config.benchmarks, _file_names(config.benchmarks), strict=True):
        prompt = config.chat.prompt if benchmark.prompt is None else benchmark.prompt
        own = config.of(benchmark)
        asked = replace(own, chat=replace(config.chat, prompt=prompt), stop=[*config.stop, *benchmark.stop])
        place = out / "completions" / file
        answers = Generation(benchmark.path, asked, place, benchmark.limit, hashes, benchmark.columns)
        if benchmark.limit is None:  # a limit says that the rest is left out on purpose
            benchmark.check_number(len(answers.problems), benchmark.path)
        jobs.append(_Job(benchmark, asked, answers, out / "rows" / file, out / "scores" / score_file(benchmark.name)))
    return jobs


def score(
    problems: int, rows: Sequence[Completion], verdicts: Sequence[Verdict], majority: Sequence[bool] = ()
) -> Score:
    """Compute the counts, the accuracy and the interval of one benchmark.

    With several samples per problem, accuracy is the mean over all answers (avg@k), and the interval takes the problems
    for independent but the samples of one for copies of each other, so it is never too narrow for their number. There
    are also a standard error (`intervals.clustered_se`), pass@k (`intervals.mean_pass_at`) and maj@k.

    Args:
        problems: how many.
        rows: the answers, problem by problem, the same number to each.
        verdicts: of the rows.
        majority: of each problem, whether its most frequent answer is right; used if there are several.
    """
    outcomes = list(map(_outcome, rows, verdicts))
    counts: dict[str, Any] = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
    accuracy = counts["correct"] / len(rows)
    scored = Score(
        problems=problems,
        n=len(rows),
        **counts,
        accuracy=accuracy,
        wilson95=wilson95(accuracy, problems),
        mean_tokens=sum(row.completion_tokens for row in rows) / len(rows),
    )
    samples = len(rows) // problems
    if samples == 1:
        return scored
    correct_PS = np.array([outcome == "correct" for outcome in outcomes], np.float64).reshape(problems, samples)
    pass_at = mean_pass_at(correct_PS.sum(axis=1).astype(int).tolist(), samples, samples)
    share = sum(majority) / problems
    return replace(
        scored,
        samples=samples,
        standard_error=clustered_se(correct_PS) if problems > 1 else None,
        majority=share,
        majority95=wilson95(share, problems),
        pass_at={str(k): value for k, value in pass_at.items()},
        pass95=wilson95(pass_at[samples], problems),
    )


def _outcome(row: Completion, verdict: Verdict) -> Outcome:
    if row.finish_reason in ABORTED:
        return "aborted"
    if row.finish_reason != "stop" and verdict.status != "correct":
        return "truncated"
    return verdict.status


def _graded_row(protocol: str, row: Completion, strict: Verdict, paper: Verdict) -> GradedAnswer:
    """The answer with the verdict that counts, and what each protocol says and has read."""
    verdicts = {"strict": strict, "paper": paper}
    counts = verdicts[protocol]
    return GradedAnswer(
        **vars(replace(row, correct=_correct(counts))),
        outcome=_outcome(row, counts),
        extracted=counts.extracted,
        protocols={name: ProtocolVerdict(_correct(of), of.extracted) for name, of in verdicts.items()},
    )


def _correct(verdict: Verdict) -> bool | None:
    """None: the comparison came to no end."""
    return None if verdict.status in ("timeout", "crashed") else verdict.status == "correct"


def _file_names(benchmarks: Sequence[BenchmarkConfig]) -> list[str]:
    names = [benchmark_file(benchmark.name) for benchmark in benchmarks]
    if not names or len(set(names)) != len(names):
        raise InputError("`benchmarks` must list at least one benchmark, and no two of the same name")
    return names


def _line(name: str, entry: BenchmarkResult) -> str:
    low, high = wilson95(entry.accuracy, entry.size)
    counts = ", ".join(f"{number} {outcome}" for outcome in OUTCOMES[2:] if (number := getattr(entry, outcome)))
    parts = [f"{entry.correct} of {entry.n}{'; ' + counts if counts else ''})"]
    if entry.samples and entry.pass_at:
        error = f"{100 * entry.standard_error:.2f} points" if isinstance(entry.standard_error, float) else "unknown"
        parts.append(f"avg@{entry.samples}, standard error {error}")
        several = {"maj": (entry.majority, entry.majority95)}
        several["pass"] = entry.pass_at[str(entry.samples)], entry.pass95
        for of, (share, interval) in several.items():
            if not isinstance(share, Absent) and not isinstance(interval, Absent):
                bounds = ", ".join(f"{100 * bound:.2f}" for bound in interval)
                parts.append(f"{of}@{entry.samples} {100 * share:.2f}% [{bounds}]")
    others = {of: scored for of, scored in entry.protocols.items() if of != entry.protocol}
    named = {"strict": "the strict rule", "paper": "the paper rule", "judge": "the judge"}
    parts += [f"by {named[of]} {100 * scored.accuracy:.2f}%" for of, scored in others.items()]
    if "judge" in others and others["judge"].undecided:
        parts[-1] += f", which said neither True nor False of {others['judge'].undecided}"
    return f"{name}: {100 * entry.accuracy:.2f}% [{100 * low:.2f}, {100 * high:.2f}] ({'; '.join(parts)}"
