"""Accuracy of a checkpoint on each benchmark: greedy answers from the served model, graded, with an interval."""

import contextlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import micota_fast
from micota_fast.errors import InputError
from micota_fast.generate import fingerprint, finished, generate_corpus, named_urls, open_problems, servers_for
from micota_fast.grade import Grader, Verdict
from micota_fast.intervals import wilson95
from micota_fast.recipe import BenchmarkConfig, EvaluateConfig
from micota_fast.records import Completion, model_name, read_completions, write_atomic, write_rows

OUTCOMES = ("correct", "wrong", "no_answer", "truncated", "aborted", "timeout", "crashed")


def run(config: EvaluateConfig) -> None:
    """Answer and grade every benchmark; write results.json, rows/NAME.jsonl and completions/NAME.jsonl in OUT.

    One server answers all benchmarks, and none is started where every answer is there already, so grading again is
    cheap. Interrupted, the next run takes up the answers that were given. Equal inputs give equal results.json; what
    depends on the clock stands in timing.json.

    results.json: for each benchmark `n` answers = `correct` + `wrong` + `no_answer` (no complete box) + `truncated`
    (cut off at the token limit, and not right by then) + `aborted` (the server failed on it) + `timeout` + `crashed`
    (the comparison hit its limit), `accuracy` = correct / n, `wilson95` over the `problems`, `mean_tokens` of an
    answer; `average` is the plain mean of the accuracies, as in the paper.

    Raises:
        InputError: as `micota_fast.generate`; or two benchmarks have one name.
    """
    named_urls(config)
    out = Path(config.out)
    files = _file_names(config.benchmarks)
    jobs = []
    for benchmark in config.benchmarks:
        chat = config.chat if benchmark.prompt is None else replace(config.chat, prompt=benchmark.prompt)
        problems = open_problems(benchmark.path, benchmark.limit, out / "completions" / files[benchmark.name])
        jobs.append((benchmark.name, problems, replace(config, chat=chat)))
    timing: dict[str, Any] = {"generation_s": {}, "grading_s": {}}
    answers: dict[str, list[Completion]] = {}
    done = all(finished(problems, asked, out / "completions" / files[name]) for name, problems, asked in jobs)
    # No request is sent where all is done, so no URL is needed.
    with contextlib.ExitStack() as stack:
        urls = [] if done else stack.enter_context(servers_for(config, out / "server.log"))
        for name, problems, asked in jobs:
            started = time.monotonic()
            generate_corpus(problems, asked, urls, out / "completions" / files[name])
            answers[name] = read_completions(out / "completions" / files[name])
            timing["generation_s"][name] = round(time.monotonic() - started, 3)
    benchmarks: dict[str, Any] = {}
    with Grader(config.workers, config.timeout_s) as grader:
        for name, problems, asked in jobs:
            started = time.monotonic()
            rows = answers[name]
            verdicts = grader.grade([(row.completion, row.answer) for row in rows])
            timing["grading_s"][name] = round(time.monotonic() - started, 3)
            write_rows(out / "rows" / files[name], map(_graded_row, rows, verdicts))
            benchmarks[name] = {**score(len(problems), rows, verdicts), "made_by": fingerprint(problems, asked)}
            print(_line(name, benchmarks[name]), flush=True)
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


def _graded_row(row: Completion, verdict: Verdict) -> dict[str, Any]:
    judged = verdict.status not in ("timeout", "crashed")
    graded = replace(row, correct=verdict.status == "correct" if judged else None)
    return asdict(graded) | {"outcome": _outcome(row, verdict), "extracted": verdict.extracted}


def _file_names(benchmarks: Sequence[BenchmarkConfig]) -> dict[str, str]:
    """File of each benchmark: its name, with what a file name should not hold replaced."""
    names = {benchmark.name: re.sub(r"[^\w.-]", "_", benchmark.name) + ".jsonl" for benchmark in benchmarks}
    if not benchmarks or len(set(names.values())) != len(benchmarks):
        raise InputError("`benchmarks` must list at least one benchmark, and no two of the same name")
    return names


def _line(name: str, entry: dict[str, Any]) -> str:
    low, high = entry["wilson95"]
    apart = ", ".join(f"{entry[k]} {k}" for k in OUTCOMES[2:] if entry[k])
    return (
        f"{name}: {100 * entry['accuracy']:.2f}% [{100 * low:.2f}, {100 * high:.2f}] "
        f"({entry['correct']} of {entry['n']}{'; ' + apart if apart else ''})"
    )
