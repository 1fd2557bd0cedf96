"""Evaluation through a real server: counts, intervals, killed and started again, graded again."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from micota_fast import config as configuration
from micota_fast.errors import InputError
from micota_fast.evaluate import OUTCOMES, run, score
from micota_fast.grade import Verdict
from micota_fast.intervals import wilson95
from micota_fast.recipe import BenchmarkConfig, EvaluateConfig, ServeConfig
from micota_fast.records import Completion, Problem, write_rows


def test_wilson_interval_against_its_definition() -> None:
    # the bounds p are where |share - p| = z sqrt(p (1 - p) / n)
    for share, n in ((0.1, 30), (0.5, 40), (0.884, 500), (1 / 3, 675)):
        for p in wilson95(share, n):
            assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-6)
    assert wilson95(0, 30) == pytest.approx((0, 0.113513), abs=1e-6)  # z^2 / (n + z^2)
    assert wilson95(1, 30) == pytest.approx((0.886487, 1), abs=1e-6)


def test_score_keeps_each_kind_of_failure_apart() -> None:
    def row(finish: str, tokens: int, sample: int = 0) -> Completion:
        return Completion("p", sample, "?", "7", "", finish, 1, tokens, None)

    cases: list[tuple[Completion, Any]] = [
        (row("stop", 10), "correct"),
        (row("length", 50), "correct"),
        (row("stop", 20), "wrong"),
        (row("stop", 30), "no_answer"),
        (row("length", 50), "no_answer"),
        (row("length", 50), "wrong"),
        (row("abort", 0), "no_answer"),
        (row("stop", 5), "timeout"),
        (row("stop", 5), "crashed"),
    ]
    rows = [case[0] for case in cases]
    got = score(9, rows, [Verdict(case[1], None) for case in cases])
    assert {key: got[key] for key in OUTCOMES} == {
        "correct": 2, "wrong": 1, "no_answer": 1, "truncated": 2, "aborted": 1, "timeout": 1, "crashed": 1,
    }  # fmt: skip
    assert (got["n"], got["accuracy"], got["mean_tokens"]) == (9, 2 / 9, 220 / 9)
    assert got["wilson95"] == list(wilson95(2 / 9, 9))


def test_samples_of_one_problem_do_not_narrow_the_interval() -> None:
    rows = [Completion(str(i), s, "?", "7", "", "stop", 1, 1, None) for i in range(10) for s in range(8)]
    verdicts = [Verdict("correct" if int(row.id) < 4 else "wrong", None) for row in rows]
    got = score(10, rows, verdicts)
    assert (got["n"], got["problems"], got["accuracy"]) == (80, 10, 0.4)
    assert got["wilson95"] == list(wilson95(0.4, 10))


@pytest.fixture
def settings(qwen2_checkpoint: Path, tmp_path: Path) -> EvaluateConfig:
    benchmarks = []
    for name, n in (("small", 3), ("Large set", 6)):
        path = tmp_path / f"{name}.jsonl"
        write_rows(path, [Problem(f"{name}-{i}", f"What is {i} + {i}?", str(2 * i)) for i in range(n)])
        benchmarks.append(BenchmarkConfig(name=name, path=str(path)))
    benchmarks[1].prompt = "Q: {problem}\nA:"
    benchmarks[1].limit = 5
    return EvaluateConfig(
        model=str(qwen2_checkpoint),
        out=str(tmp_path / "out"),
        benchmarks=benchmarks,
        max_new_tokens=24,
        concurrency=2,
        serve=ServeConfig(dtype="float64", device="cpu", max_running=4),
        workers=1,
    )


def test_a_real_model_twice_and_graded_again(settings: EvaluateConfig) -> None:
    run(settings)
    out = Path(settings.out)
    results = json.loads((out / "results.json").read_text())
    assert list(results["benchmarks"]) == ["small", "Large set"]
    for (name, entry), n in zip(results["benchmarks"].items(), (3, 5), strict=True):
        rows = [
            json.loads(line) for line in (out / "rows" / f"{name.replace(' ', '_')}.jsonl").read_text().splitlines()
        ]
        assert [row["id"] for row in rows] == [f"{name}-{i}" for i in range(n)]
        outcomes = Counter(row["outcome"] for row in rows)
        assert all(outcomes[kind] == entry[kind] for kind in ("correct", "wrong", "no_answer", "truncated"))
        assert entry["n"] == n == sum(outcomes.values())
        assert entry["mean_tokens"] == sum(row["completion_tokens"] for row in rows) / n
    assert results["average"] == sum(e["accuracy"] for e in results["benchmarks"].values()) / 2
    prompts = [entry["made_by"]["prompt"]["prompt"] for entry in results["benchmarks"].values()]
    assert prompts == [settings.chat.prompt, "Q: {problem}\nA:"]

    first = (out / "results.json").read_bytes()
    log = (out / "server.log").stat().st_size
    (out / "results.json").unlink()
    run(settings)  # answers are there: no server starts
    assert (out / "results.json").read_bytes() == first
    assert (out / "server.log").stat().st_size == log

    # grading goes by what is in the rows: put the right answer there, and it counts
    file = out / "completions" / "small.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["completion"] = "It is \\boxed{2}."
    write_rows(file, rows)
    meta = file.with_name(f"{file.name}.meta.json")
    told = json.loads(meta.read_text())
    meta.write_text(json.dumps(told | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}))
    run(settings)
    assert json.loads((out / "results.json").read_text())["benchmarks"]["small"]["correct"] == 1


def test_killed_and_started_again(settings: EvaluateConfig, tmp_path: Path) -> None:
    settings.max_new_tokens = 200  # long enough to be killed in the middle
    out = Path(settings.out)
    whole = configuration.build(
        EvaluateConfig, configuration.plain(settings) | {"out": str(tmp_path / "whole")}, "test"
    )
    run(whole)
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(configuration.plain(settings)))
    code = (
        "import sys; from micota_fast import config, evaluate, recipe\n"
        "evaluate.run(config.load(recipe.EvaluateConfig, sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "evaluate.yaml")])
    parts = out / "completions" / "small.jsonl.parts"
    deadline = time.monotonic() + 120
    while process.poll() is None and not any(p.read_bytes() for p in parts.glob("0*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "results.json").exists(), "it ended before it could be killed: lengthen the answers"
    run(settings)
    assert (out / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()


def test_names_must_differ(settings: EvaluateConfig) -> None:
    settings.benchmarks[1].name = "small"
    with pytest.raises(InputError, match="same name"):
        run(settings)
    settings.benchmarks = []
    with pytest.raises(InputError, match="at least one benchmark"):
        run(settings)
