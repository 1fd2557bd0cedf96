"""Accuracy of a checkpoint on each benchmark: greedy answers from the served model, graded, with an interval."""

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import micota_fast
from micota_fast.errors import InputError
from micota_fast.generate import fingerprint, finished, generate_corpus, named_urls, open_problems, servers_for
from micota_fast.generation.problem_file import ProblemFile
from micota_fast.grade import Grader, Verdict
from micota_fast.grading.string_rule import grade_by_string, grade_last_number
from micota_fast.recipe import BenchmarkConfig, EvaluateConfig
from micota_fast.records import Completion, benchmark_file, model_name, read_completions, write_atomic, write_rows
from micota_fast.second_opinion import second_opinions
from micota_fast.statistics.intervals import wilson95

OUTCOMES = ("correct", "wrong", "no_answer", "truncated", "aborted", "timeout", "crashed")
RULES: dict[str, Callable[[str, str], Verdict]] = {
    "box": grade_by_string,
    "box_zeros_trimmed": partial(grade_by_string, trim_zeros=True),
    "last_number": grade_last_number,
}


_Graded = tuple[list[Completion], dict[str, list[Verdict]]]  # a benchmark's answers; protocol -> their verdicts


@dataclass(frozen=True)
class _Job:
    """One benchmark: its problems, how they are asked, where the answers lie."""

    benchmark: BenchmarkConfig
    problems: ProblemFile
    asked: EvaluateConfig
    answers: Path
    rows: Path


def run(config: EvaluateConfig) -> None:
    """Answer and grade every benchmark; write results.json, rows/NAME.jsonl and completions/NAME.jsonl in OUT.

    One server answers all benchmarks, and none is started where every answer is there already, so grading again is
    cheap. Interrupted, the next run takes up the answers that were given. Equal inputs give equal results.json; what
    depends on the clock stands in timing.json.

    Every answer is graded twice: `strict` by math-verify, `paper` by the benchmark's string rule (see `string_rule`).
    The verdicts of `config.protocol` count: for each benchmark results.json has of them `n` answers = `correct` +
    `wrong` + `no_answer` (no final answer found) + `truncated` (cut off at the token limit, and not right by then) +
    `aborted` (the server failed on it) + `timeout` + `crashed` (the comparison hit its limit), `accuracy` = correct /
    n, `wilson95` over the `problems`, `mean_tokens` of an answer; and of both protocols `correct` and `accuracy`, under
    `protocols`. `average` is the plain mean of the accuracies, as in the paper.

    Raises:
        InputError: as `micota_fast.generate`; or two benchmarks have one name, or a file holds another number of
            problems than its benchmark has.
    """
    named_urls(config)
    out = Path(config.out)
    jobs = _jobs(config, out)
    timing: dict[str, Any] = {"generation_s": {}, "grading_s": {}}
    _generate(config, jobs, out, timing["generation_s"])
    graded = _grade(config, jobs, timing["grading_s"])
    opinions: list[list[bool | None]] | None = None
    if config.judge is not None:
        opinions = second_opinions(config.judge, [(rows, of["paper"]) for rows, of in graded], out / "judge")
    benchmarks: dict[str, Any] = {}
    for i, (job, (rows, verdicts)) in enumerate(zip(jobs, graded, strict=True)):
        entry, graded_rows = _result(config.protocol, job, rows, verdicts, opinions[i] if opinions else None)
        write_rows(job.rows, graded_rows)
        benchmarks[job.benchmark.name] = entry
        print(_line(job.benchmark.name, entry), flush=True)
    average = math.fsum(entry["accuracy"] for entry in benchmarks.values()) / len(benchmarks)
    results = {
        "model": model_name(config.model),
        "average": average,
        "benchmarks": benchmarks,
        "versions": {"micota_fast": micota_fast.__version__},
    }
    write_atomic(out / "timing.json", [json.dumps(timing, indent=1).encode() + b"\n"])
    write_atomic(out / "results.json", [json.dumps(results, indent=1, ensure_ascii=False).encode() + b"\n"])
    print(f"average of {len(benchmarks)}: {100 * average:.2f}%")


def _generate(config: EvaluateConfig, jobs: Sequence[_Job], out: Path, seconds: dict[str, float]) -> None:
    """Have every benchmark answered."""
    with contextlib.ExitStack() as stack:
        # No request is sent where all is done, so no URL is needed.
        done = all(finished(job.problems, job.asked, job.answers) for job in jobs)
        urls = [] if done else stack.enter_context(servers_for(config, out / "server.log"))
        for job in jobs:
            started = time.monotonic()
            generate_corpus(job.problems, job.asked, urls, job.answers)
            seconds[job.benchmark.name] = round(time.monotonic() - started, 3)


def _grade(config: EvaluateConfig, jobs: Sequence[_Job], seconds: dict[str, float]) -> list[_Graded]:
    """Each benchmark's answers, and their verdicts by protocol."""
    graded = []
    with Grader(config.workers, config.timeout_s) as grader:
        for job in jobs:
            started = time.monotonic()
            rows = read_completions(job.answers)
            pairs = [(row.completion, row.answer) for row in rows]
            rule = RULES[job.benchmark.rule or "box"]
            graded.append((rows, {"strict": grader.grade(pairs), "paper": [rule(*pair) for pair in pairs]}))
            seconds[job.benchmark.name] = round(time.monotonic() - started, 3)
    return graded


def _result(
    protocol: str,
    job: _Job,
    rows: Sequence[Completion],
    verdicts: dict[str, list[Verdict]],
    opinions: Sequence[bool | None] | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The entry of results.json, and the graded rows."""
    scores = {name: score(len(job.problems), rows, of) for name, of in verdicts.items()}
    protocols = {name: {key: of[key] for key in ("correct", "accuracy")} for name, of in scores.items()}
    graded_rows = [_graded_row(protocol, *of) for of in zip(rows, verdicts["strict"], verdicts["paper"], strict=True)]
    if opinions is not None:
        for row, opinion in zip(graded_rows, opinions, strict=True):
            row["protocols"]["judge"] = {"correct": opinion}
        correct = sum(opinion is True for opinion in opinions)
        protocols["judge"] = {"correct": correct, "accuracy": correct / len(rows)}
        protocols["judge"]["undecided"] = sum(opinion is None for opinion in opinions)
    entry = {
        **scores[protocol],
        "protocol": protocol,
        "protocols": protocols,
        "made_by": fingerprint(job.problems, job.asked),
    }
    return entry, graded_rows


def _jobs(config: EvaluateConfig, out: Path) -> list[_Job]:
    jobs = []
    for benchmark, file in zip(config.benchmarks, _file_names(config.benchmarks), strict=True):
        prompt = config.chat.prompt if benchmark.prompt is None else benchmark.prompt
        asked = replace(config, chat=replace(config.chat, prompt=prompt), stop=[*config.stop, *benchmark.stop])
        answers = out / "completions" / file
        problems = open_problems(benchmark.path, benchmark.limit, answers)
        # A limit says that the rest is left out on purpose.
        if benchmark.problems and benchmark.limit is None and len(problems) not in benchmark.problems:
            raise InputError(
                f"{benchmark.path} holds {len(problems)} problems; {benchmark.name} has "
                f"{' or '.join(map(str, benchmark.problems))}"
            )
        jobs.append(_Job(benchmark, problems, asked, answers, out / "rows" / file))
    return jobs


def score(problems: int, rows: Sequence[Completion], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts, accuracy and interval of one benchmark of so many problems (see `run`).

    With several samples a problem, accuracy is the mean over all answers (avg@k), and the interval takes the problems
    for independent but the samples of one for copies of each other, so it is never too narrow for their number.
    """
    counts = Counter(map(_outcome, rows, verdicts))
    accuracy = counts["correct"] / len(rows)
    return {
        "problems": problems,
        "n": len(rows),
        **{outcome: counts[outcome] for outcome in OUTCOMES},
        "accuracy": accuracy,
        "wilson95": list(wilson95(accuracy, problems)),
        "mean_tokens": sum(row.completion_tokens for row in rows) / len(rows),
    }


def _outcome(row: Completion, verdict: Verdict) -> str:
    if row.finish_reason == "abort":
        return "aborted"
    if row.finish_reason != "stop" and verdict.status != "correct":
        return "truncated"
    return verdict.status


def _graded_row(protocol: str, row: Completion, strict: Verdict, paper: Verdict) -> dict[str, Any]:
    """The answer with the verdict that counts; what each protocol says and has read stands beside it."""
    verdicts = {"strict": strict, "paper": paper}
    counts = verdicts[protocol]
    graded = replace(row, correct=_correct(counts))
    return asdict(graded) | {
        "outcome": _outcome(row, counts),
        "extracted": counts.extracted,
        "protocols": {name: {"correct": _correct(of), "extracted": of.extracted} for name, of in verdicts.items()},
    }


def _correct(verdict: Verdict) -> bool | None:
    """None: the comparison came to no end."""
    return None if verdict.status in ("timeout", "crashed") else verdict.status == "correct"


def _file_names(benchmarks: Sequence[BenchmarkConfig]) -> list[str]:
    names = [benchmark_file(benchmark.name) for benchmark in benchmarks]
    if not names or len(set(names)) != len(names):
        raise InputError("`benchmarks` must list at least one benchmark, and no two of the same name")
    return names


def _line(name: str, entry: dict[str, Any]) -> str:
    low, high = entry["wilson95"]
    apart = ", ".join(f"{entry[k]} {k}" for k in OUTCOMES[2:] if entry[k])
    other = "paper" if entry["protocol"] == "strict" else "strict"
    return (
        f"{name}: {100 * entry['accuracy']:.2f}% [{100 * low:.2f}, {100 * high:.2f}] "
        f"({entry['correct']} of {entry['n']}{'; ' + apart if apart else ''}); "
        f"by the {other} rule {100 * entry['protocols'][other]['accuracy']:.2f}%"
    )
