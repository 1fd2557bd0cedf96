"""Evaluation through a real server: counts, intervals, killed and started again, graded again."""

import hashlib
import json
import math
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from aiohttp import web

from helpers.paths import DATA
from helpers.schemas import check_schema
from helpers.servers import http_server
from helpers.waiting import rows_in
from micota_fast.chat.encoding import Chat
from micota_fast.common.fingerprint import Fingerprints
from micota_fast.common.records import Completion, Problem, encode_row, write_rows
from micota_fast.common.schema import to_json
from micota_fast.config import loader
from micota_fast.config.evaluation import BenchmarkConfig, EvaluateConfig, JudgeConfig, OwnSampling
from micota_fast.config.generation import ChatConfig, ServeConfig
from micota_fast.errors import InputError
from micota_fast.evaluation import evaluate
from micota_fast.evaluation.evaluate import run, score
from micota_fast.evaluation.results import OUTCOMES, EvaluationResults, read_graded
from micota_fast.generation.journal import Journal
from micota_fast.generation.model_identity import model_fingerprint
from micota_fast.grading.grader import Verdict
from micota_fast.sources.problems import read_problems
from micota_fast.statistics.intervals import wilson95


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
    assert {key: getattr(got, key) for key in OUTCOMES} == {
        "correct": 2, "wrong": 1, "no_answer": 1, "truncated": 2, "aborted": 1, "timeout": 1, "crashed": 1,
    }  # fmt: skip
    assert (got.n, got.accuracy, got.mean_tokens) == (9, 2 / 9, 220 / 9)
    assert got.wilson95 == wilson95(2 / 9, 9)


def test_samples_of_one_problem_do_not_narrow_the_interval() -> None:
    rows = [Completion(str(i), s, "?", "7", "", "stop", 1, 1, None) for i in range(10) for s in range(8)]
    verdicts = [Verdict("correct" if int(row.id) < 4 else "wrong", None) for row in rows]
    got = score(10, rows, verdicts)
    assert (got.n, got.problems, got.accuracy) == (80, 10, 0.4)
    assert got.wilson95 == wilson95(0.4, 10)


def test_several_samples_are_told_of_by_avg_and_pass_at_k() -> None:
    right = {"a": 4, "b": 1, "c": 0}  # of 4 answers each
    rows = [Completion(id_, s, "?", "7", "", "stop", 1, 1, None) for id_ in right for s in range(4)]
    verdicts = [Verdict("correct" if row.sample < right[row.id] else "wrong", None) for row in rows]
    got = score(3, rows, verdicts, [True, False, False])
    assert (got.samples, got.accuracy) == (4, 5 / 12)
    # the problems' means are 1, 1/4 and 0
    assert got.standard_error == pytest.approx(np.std([1, 1 / 4, 0], ddof=1) / math.sqrt(3))
    # b's one right answer is among 1, 2, 4 of 4 with chance 1/4, 1/2, 1
    assert got.pass_at == pytest.approx({"1": 5 / 12, "2": 1.5 / 3, "4": 2 / 3})
    assert (got.majority, got.majority95, got.pass95) == (1 / 3, wilson95(1 / 3, 3), wilson95(2 / 3, 3))
    alone = score(1, rows[4:8], [Verdict("wrong", None)] * 4, [False])
    assert (alone.standard_error, alone.pass_at) == (None, {"1": 0.0, "2": 0.0, "4": 0.0})
    once = score(3, rows[::4], [Verdict("correct", None)] * 3)
    assert not to_json(once).keys() & {"samples", "standard_error", "pass_at", "majority"}


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
    low, high = results["average95"]
    assert 0 <= low < results["average"] + 0.01 < high <= 1
    assert results["versions"].keys() == {"micota_fast", "math-verify", "latex2sympy2-extended", "sympy", "tokenizers"}
    assert all(results["versions"].values())
    assert [entry["grading"] for entry in results["benchmarks"].values()] == [{"rule": "box", "timeout_s": 10.0}] * 2
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


def test_several_samples_through_a_real_server(settings: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    settings.samples, settings.temperature = 3, 1.0
    run(settings)
    entry = json.loads((Path(settings.out) / "results.json").read_text())["benchmarks"]["small"]
    assert (entry["n"], entry["problems"], entry["samples"]) == (9, 3, 3)
    assert list(entry["pass_at"]) == ["1", "2", "3"]
    assert entry["pass_at"]["1"] == pytest.approx(entry["accuracy"])
    check_schema(EvaluationResults, Path(settings.out) / "results.json")
    for protocol in ("strict", "paper"):
        assert entry["protocols"][protocol].keys() == {
            "correct", "accuracy", "standard_error", "majority", "pass_at",
        }  # fmt: skip
    told = capsys.readouterr().out
    assert "; avg@3, standard error 0.00 points; maj@3 0.00% [0.00, 56.15]; pass@3 0.00% [0.00, 56.15]" in told
    made_of = json.loads((Path(settings.out) / "scores" / "small.json").read_text())["made_of"]
    assert made_of["majority"] == "the first of equals"
    assert "average of 2: 0.00% [0.00, " in told


def test_one_benchmark_is_sampled_and_the_others_are_not(settings: EvaluateConfig) -> None:
    small, other = settings.benchmarks
    small.sampling = OwnSampling(samples=4, temperature=1.0, max_new_tokens=3)
    run(settings)
    entries = json.loads((Path(settings.out) / "results.json").read_text())["benchmarks"]
    assert (entries[small.name]["n"], entries[small.name]["mean_tokens"]) == (4 * entries[small.name]["problems"], 3)
    assert entries[other.name]["n"] == entries[other.name]["problems"]
    values = loader.plain(settings)
    for sampling, said in (
        ({"samples": 4}, r"sampling of small: .*needs `temperature` > 0"),
        ({"samples": "many"}, "samples"),
    ):
        values["benchmarks"][0]["sampling"] = sampling
        with pytest.raises(InputError, match=said):
            loader.build(EvaluateConfig, values, "x")


@pytest.mark.slow
def test_killed_and_started_again(settings: EvaluateConfig, tmp_path: Path) -> None:
    """As it is about to write down its second answer."""
    out = Path(settings.out)
    whole = loader.build(EvaluateConfig, loader.plain(settings) | {"out": str(tmp_path / "whole")}, "test")
    run(whole)
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(loader.plain(settings)))
    code = (
        "import sys; from helpers import moments\n"
        "from micota_fast.config import evaluation, loader; from micota_fast.evaluation import evaluate\n"
        "append = 'micota_fast.generation.journal:Journal.append'\n"
        "moments.at_call(None, append, moments.die, my_rank=0, nth=2)\n"
        "evaluate.run(loader.load(evaluation.EvaluateConfig, sys.argv[1]))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "evaluate.yaml")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert rows_in(out / "completions" / "small.jsonl.parts") == 1
    assert not (out / "results.json").exists()
    run(settings)
    assert (out / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()


def test_names_must_differ(settings: EvaluateConfig) -> None:
    settings.benchmarks[1].name = "small"
    with pytest.raises(InputError, match="same name"):
        run(settings)
    settings.benchmarks = []
    with pytest.raises(InputError, match="at least one benchmark"):
        run(settings)


# -- the shipped benchmarks ------------------------------------------------------------------------------------------

SHIPPED = {"aime2024": 30, "amc2023": 40, "olympiad": 675, "math500": 500, "gsm8k": 1319}


def answered(settings: EvaluateConfig, benchmark: BenchmarkConfig, text: Callable[[Problem], str]) -> dict[str, Any]:
    """results.json's entry where every problem was answered by `text`."""
    settings.benchmarks = [benchmark]
    out = Path(settings.out)
    [job] = evaluate._jobs(settings, out)
    rows = [
        Completion(p.id, 0, p.problem, p.answer, text(p), "stop", 1, 1, None) for p in read_problems(benchmark.path)
    ]
    with Journal(Path(f"{job.answers.out}.parts"), job.answers.fingerprint) as journal:
        for i, row in enumerate(rows):
            journal.append(i, 0, 0, 1, 1, asdict(row))
    run(settings)
    entry: dict[str, Any] = json.loads((out / "results.json").read_text())["benchmarks"][benchmark.name]
    return entry


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' files are not here")
@pytest.mark.parametrize("preset", SHIPPED)
def test_an_oracle_is_always_right_and_an_empty_answer_never(preset: str, settings: EvaluateConfig) -> None:
    out = settings.out

    def entry(name: str, text: Callable[[Problem], str]) -> dict[str, Any]:
        settings.out = f"{out}/{name}"
        benchmark = BenchmarkConfig(preset=preset)
        benchmark.path = str(DATA / benchmark.path)
        return answered(settings, benchmark, text)

    oracle = entry("oracle", lambda problem: f"So it is\nFinal Answer: \\boxed{{{problem.answer}}}")
    assert oracle["n"] == SHIPPED[preset]
    assert {p: s["accuracy"] for p, s in oracle["protocols"].items()} == {"strict": 1.0, "paper": 1.0}
    empty = entry("empty", lambda problem: "")
    assert empty["no_answer"] == SHIPPED[preset]
    assert {p: s["accuracy"] for p, s in empty["protocols"].items()} == {"strict": 0.0, "paper": 0.0}


@pytest.mark.slow
def test_the_protocols_differ_where_they_should(settings: EvaluateConfig, tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    write_rows(path, [Problem("a", "?", "\\frac{1}{4}"), Problem("b", "?", "12")])
    texts = {"a": "\\boxed{0.25}", "b": "\\boxed{12} apples in 3 bags"}
    last = BenchmarkConfig(name="last", path=str(path), rule="last_number")
    box = BenchmarkConfig(name="box", path=str(path))
    out = settings.out
    for benchmark, paper in ((box, 0.5), (last, 0.0)):
        for protocol in ("strict", "paper"):
            settings.out, settings.protocol = f"{out}/{benchmark.name}-{protocol}", protocol
            entry = answered(settings, benchmark, lambda problem: texts[problem.id])
            assert {p: s["accuracy"] for p, s in entry["protocols"].items()} == {"strict": 1.0, "paper": paper}
            assert entry["accuracy"] == entry["protocols"][protocol]["accuracy"]
            rows = [json.loads(line) for line in (Path(settings.out) / "rows" / f"{benchmark.name}.jsonl").open()]
            assert [row["correct"] for row in rows] == [row["protocols"][protocol]["correct"] for row in rows]


@pytest.mark.parametrize(
    ("gold", "rule", "unreadable"),
    [
        ("The answer is 5.", "box", ["strict", "paper"]),
        ("", "last_number", ["strict", "paper"]),
        ("3+2=5\n#### 5", "last_number", ["strict"]),  # whose rule takes what follows
        ("3+2=5\n#### 5", "box_zeros_trimmed", ["strict", "paper"]),
        ("$5$", "box", ["paper"]),
        (r"\frac{1}{2}", "last_number", ["paper"]),
        (r"\$5", "box", []),
    ],
)
def test_each_protocol_says_before_it_asks_which_gold_answers_it_cannot_read(
    settings: EvaluateConfig,
    gold: str,
    rule: Any,
    unreadable: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Asked(Exception):
        pass

    def ask(*_: object) -> None:
        raise Asked

    monkeypatch.setattr(evaluate, "servers_for", ask)
    settings.benchmarks = settings.benchmarks[:1]
    settings.benchmarks[0].rule = rule
    write_rows(Path(settings.benchmarks[0].path), [Problem("good", "2 + 3 =", "5"), Problem("bad", "2 + 3 =", gold)])
    with pytest.raises(Asked):
        run(settings)
    warnings = capsys.readouterr().err.splitlines()
    assert [re.search(r"1 of 2 gold .* by the (\w+) rule.*'bad'", line)[1] for line in warnings] == unreadable  # type: ignore[index]
    write_rows(Path(settings.benchmarks[0].path), [Problem("bad", "2 + 3 =", gold)])
    for protocol in ("strict", "paper"):
        settings.protocol = protocol  # type: ignore[assignment]
        with pytest.raises(InputError if protocol in unreadable else Asked):
            run(settings)


def test_a_set_of_the_wrong_size_is_refused(settings: EvaluateConfig, tmp_path: Path) -> None:
    path = tmp_path / "aime.jsonl"
    write_rows(path, [Problem(str(i), "?", "7") for i in range(29)])
    settings.benchmarks = [BenchmarkConfig(preset="aime2024", path=str(path))]
    with pytest.raises(InputError, match=r"aime\.jsonl has 29 problems; AIME 2024 has 30"):
        run(settings)


def test_a_shipped_definition_gives_what_is_not_given() -> None:
    known = BenchmarkConfig(preset="gsm8k", path="mine.jsonl", stop=["\n\n"])
    assert (known.name, known.path, known.stop, known.rule) == ("GSM8K", "mine.jsonl", ["\n\n"], "last_number")
    assert known.prompt == "{problem}"
    assert known.problems == [1319]
    choices = BenchmarkConfig(preset="gpqa_diamond")
    assert (choices.rule, choices.chance, choices.problems, choices.stop) == ("choice", 25, [198], [])
    with pytest.raises(InputError, match=r"`preset`: there is no 'aime'; known: aime2024, "):
        BenchmarkConfig(preset="aime")
    with pytest.raises(InputError, match="`path` is required"):
        BenchmarkConfig(name="mine")


def test_a_judge_is_asked_about_what_the_string_rule_rejects(settings: EvaluateConfig, tmp_path: Path) -> None:
    asked: list[str] = []

    async def handler(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        text = chat.decode(body["input_ids"], skip_special_tokens=False)
        asked.append(text)
        reply = "True" if "Answer: 0.25\n" in text else "False." if "Answer: 3\n" in text else "Perhaps"
        meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": 1, "completion_tokens": 1, "id": body["rid"]}
        return web.json_response({"text": reply, "output_ids": [1], "meta_info": meta})

    path = tmp_path / "four.jsonl"
    write_rows(path, [Problem(str(i), "?", "\\frac{1}{4}") for i in range(5)])
    texts = ["\\boxed{0.25}", "\\boxed{3}", "\\boxed{\\frac14}", "nothing", "\\boxed{4}"]
    chat = Chat.from_checkpoint(Path(settings.model), ChatConfig())
    with http_server(handler) as url:
        settings.judge = JudgeConfig(model=settings.model, url=url)
        settings.protocol = "paper"
        entry = answered(settings, BenchmarkConfig(name="four", path=str(path)), lambda problem: texts[int(problem.id)])
        run(settings)  # graded again, nothing is asked again
    assert entry["protocols"]["paper"] == {"correct": 1, "accuracy": 0.2}
    assert entry["protocols"]["judge"] == {"correct": 2, "accuracy": 0.4, "undecided": 1}
    assert len(asked) == 3
    assert all("Correct Answer: \\frac{1}{4}\nModel's Generated Answer: " in text for text in asked)
    rows = [
        json.loads(line)["protocols"]["judge"]["correct"] for line in (Path(settings.out) / "rows/four.jsonl").open()
    ]
    assert rows == [True, False, True, False, None]
    check_schema(EvaluationResults, Path(settings.out) / "results.json")
    graded = [encode_row(to_json(row)) for _, row in read_graded(Path(settings.out) / "rows/four.jsonl")]
    assert b"".join(graded) == (Path(settings.out) / "rows/four.jsonl").read_bytes()
    judge = json.loads((Path(settings.out) / "results.json").read_text())["judge"]
    assert judge["model"] == Path(settings.model).name
    assert judge["made_by"]["model"] == model_fingerprint(Path(settings.model), Fingerprints(None))
    assert judge["made_by"]["sampling"]["max_new_tokens"] == 20


@pytest.mark.slow
def test_a_judge_keeps_its_replies_when_benchmarks_are_added_and_changes_places(
    settings: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    async def handler(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        asked.append(body["rid"])
        meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": 1, "completion_tokens": 1, "id": body["rid"]}
        return web.json_response({"text": "True", "output_ids": [1], "meta_info": meta})

    benchmarks = []
    for name, size in (("one", 2), ("two", 3)):
        write_rows(tmp_path / f"{name}.jsonl", [Problem(f"{name}{i}", "?", "5") for i in range(size)])
        benchmarks.append(BenchmarkConfig(name=name, path=str(tmp_path / f"{name}.jsonl")))
    settings.protocol = "paper"
    with http_server(handler) as url:
        settings.judge = JudgeConfig(model=settings.model, url=url)
        answered(settings, benchmarks[0], lambda problem: "\\boxed{5.0}")
        assert len(asked) == 2
        settings.benchmarks = [benchmarks[1]]
        answered(settings, benchmarks[1], lambda problem: "\\boxed{five}")
        assert len(asked) == 5
        settings.benchmarks = benchmarks[::-1]
        capsys.readouterr()
        run(settings)
    assert len(asked) == 5
    entries = json.loads((Path(settings.out) / "results.json").read_text())["benchmarks"]
    assert {name: entry["protocols"]["judge"]["correct"] for name, entry in entries.items()} == {"one": 2, "two": 3}
    assert "by the judge 100.00%" in capsys.readouterr().out
