"""Benchmark problems that lie in a training corpus are found; others are not."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.paths import DATA
from helpers.schemas import check_schema
from helpers.waiting import soon
from micota_fast.common.records import Problem, write_rows
from micota_fast.config.evaluation import BenchmarkConfig, ContaminationConfig
from micota_fast.corpus.contamination import GRAM, _Table, run
from micota_fast.corpus.results import Contamination
from micota_fast.errors import InputError

LONG = "Find the number of ordered pairs (a, b) of integers with 1 < a < b < 100 such that $a^2 + b^2$ is prime."
SHORT = "Compute $\\sin 60^\\circ$."
OTHER = "A bag holds three red and five blue marbles; two are drawn, and neither is put back. How likely is blue?"


def report(tmp_path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    write_rows(tmp_path / "corpus.jsonl", rows)
    write_rows(tmp_path / "set.jsonl", [Problem("long", LONG, "1"), Problem("short", SHORT, "2")])
    write_rows(tmp_path / "clean.jsonl", [Problem("other", OTHER, "3")])
    benchmarks = [BenchmarkConfig(name=n, path=str(tmp_path / f"{n}.jsonl")) for n in ("set", "clean")]
    corpora = {"c": str(tmp_path / "corpus.jsonl")}
    run(ContaminationConfig(corpora=corpora, benchmarks=benchmarks, out=str(tmp_path / "out")))
    check_schema(Contamination, tmp_path / "out" / "contamination.json")
    found: dict[str, Any] = json.loads((tmp_path / "out" / "contamination.json").read_text())
    return found["c"]


def test_what_is_found_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = LONG[LONG.index("number") : LONG.index(" such")]
    assert len(re.findall(r"\w+", words)) == GRAM
    rows = [
        {"id": "0", "problem": "What is 3 + 4?", "answer": "7", "completion": "7"},
        {"id": "1", "problem": f"  {LONG.upper()}  ", "answer": "7", "completion": "7"},
        {"messages": [{"role": "user", "content": f"Solve: {LONG} Show your work."}]},
        {"id": "3", "problem": "compute sin 60 circ", "answer": "7", "completion": "7"},
        {"id": "4", "problem": "x", "answer": "7", "completion": f"I recall: {words}, and so on"},
        {"id": "5", "problem": "x", "answer": "7", "completion": f"{words.rpartition(' ')[0]} something else"},
        {"id": "6", "problem": f"Please {SHORT}", "answer": "7", "completion": "too short to be told from chance"},
    ]
    found = report(tmp_path, rows)
    assert found["rows"] == 7
    assert found["benchmarks"]["set"] == {
        "problems": 2,
        "exact": ["long", "short"],
        "gram13": ["long"],
        "rows": 4,
        "examples": [[2, "long"], [3, "long"], [4, "short"], [5, "long"]],
    }
    assert found["benchmarks"]["clean"]["rows"] == 0
    told = capsys.readouterr().out
    assert "c: 4 of 7 rows share text with set: 2 of its 2 problems word for word, 1 in 13 words or more" in told


def test_a_clean_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(tmp_path, [{"id": "0", "problem": "What is 3 + 4?", "answer": "7", "completion": "7"}])
    assert all(not entry["rows"] and not entry["examples"] for entry in found["benchmarks"].values())
    assert "no text of 3 benchmark problems found in c" in capsys.readouterr().out


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"corpus\.jsonl: no rows"):
        report(tmp_path, [])
    (tmp_path / "bad.jsonl").write_text('{"a": "b"}\nnot json\n')
    benchmarks = [BenchmarkConfig(name="set", path=str(tmp_path / "set.jsonl"))]
    corpora = {"c": str(tmp_path / "bad.jsonl")}
    with pytest.raises(InputError, match=r"bad\.jsonl:2: not JSON"):
        run(ContaminationConfig(corpora=corpora, benchmarks=benchmarks, out=str(tmp_path / "out")))


def test_a_row_counts_whether_or_not_it_holds_a_string(tmp_path: Path) -> None:
    benchmark, corpus = tmp_path / "b.jsonl", tmp_path / "corpus.jsonl"
    benchmark.write_text(json.dumps({"id": "odd", "problem": LONG, "answer": "1"}) + "\n")
    corpus.write_text(json.dumps({"text": LONG}) + '\n{"count": 3}\n')
    benchmarks = [BenchmarkConfig(name="set", path=str(benchmark))]
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"count": 3}\n{"count": [4]}\n')
    corpora = {"c": str(corpus), "n": str(numbers)}
    run(ContaminationConfig(corpora=corpora, benchmarks=benchmarks, out=str(tmp_path)))
    found = json.loads((tmp_path / "contamination.json").read_text())
    assert [found[name]["rows"] for name in corpora] == [2, 2]
    assert found["c"]["benchmarks"]["set"]["gram13"] == ["odd"]
    assert found["n"]["benchmarks"]["set"]["rows"] == 0


def test_two_benchmarks_of_one_name_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "set.jsonl", [Problem("a", LONG, "1")])
    write_rows(tmp_path / "other.jsonl", [Problem("b", OTHER, "1")])
    benchmarks = [BenchmarkConfig(name="set", path=str(tmp_path / f"{file}.jsonl")) for file in ("set", "other")]
    corpora = {"c": str(tmp_path / "set.jsonl")}
    with pytest.raises(InputError, match="`benchmarks` names 'set' twice"):
        run(ContaminationConfig(corpora=corpora, benchmarks=benchmarks, out=str(tmp_path)))


def test_killed_it_leaves_nothing_half_written_and_starts_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "set.jsonl", [Problem("a", LONG, "1")])
    os.mkfifo(tmp_path / "corpus.jsonl")  # as a corpus that takes long to read
    config = {
        "corpora": {"c": str(tmp_path / "corpus.jsonl")},
        "benchmarks": [{"name": "set", "path": str(tmp_path / "set.jsonl")}],
        "out": str(tmp_path / "out"),
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "micota_fast", "contamination", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command)
    with (tmp_path / "corpus.jsonl").open("w") as corpus:  # opens once it reads
        corpus.write(json.dumps({"text": LONG}) + "\n")
        corpus.flush()
        process.kill()
        process.wait()
    assert not (tmp_path / "out").exists()
    (tmp_path / "corpus.jsonl").unlink()
    write_rows(tmp_path / "corpus.jsonl", [{"text": LONG}])
    subprocess.run(command, check=True)
    found = json.loads((tmp_path / "out" / "contamination.json").read_text())
    assert found["c"]["benchmarks"]["set"]["exact"] == ["a"]


def test_another_sign_is_another_problem(tmp_path: Path) -> None:
    asked = "Solve 3x - 7 = 22 for x, where $a+b=5$"
    table = _Table([asked])
    same = [asked, "solve $3x-7 = 22$ for x where a + b = 5.", "Solve 3x -- 7 = 22, for x; where a+b = 5"]
    others = [
        "Solve 3x + 7 = 22 for x, where a+b=5",
        "Solve 3x - 7 = 22 for x, where a-b=5",
        "Solve 3x 7 22 for x where a b 5",
    ]
    assert [text for text, _, exact in table.hits([text.encode() for text in same + others]) if exact] == [0, 1, 2]


words_ = st.lists(
    st.sampled_from(["a", "b", "-b", "dd", "-dd", "fff", "1", "+1", "-1", "=22", "22"]), min_size=0, max_size=40
)


@given(words_, st.lists(words_, min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_against_the_definition(problem: list[str], texts: list[list[str]]) -> None:
    def grams(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}

    spaced = [" , ".join(words).encode() for words in texts]
    found = set(_Table([" ".join(problem)]).hits(spaced))
    problem, *texts = ([word.replace("-dd", "dd") for word in words] for words in (problem, *texts))
    expected = {(i, 0, True) for i, words in enumerate(texts) if words and words == problem}
    expected |= {(i, 0, False) for i, words in enumerate(texts) if grams(words) & grams(problem)}
    assert found == expected


def test_it_reads_fast_enough_for_long_chains_of_thought() -> None:
    letters = random.Random(0)
    vocabulary = ["".join(letters.choices("abcdefghij", k=5)) for _ in range(5000)]
    text = " ".join(letters.choices(vocabulary, k=500_000)).encode()
    table = _Table([" ".join(letters.choices(vocabulary, k=60)) for _ in range(2000)])
    list(table.hits([b"compiled now"]))
    with soon():  # 3 MB; 0.1 s on a quiet core
        list(table.hits([text]))


@pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' files are not here")
def test_every_problem_of_the_real_sets_finds_itself(tmp_path: Path) -> None:
    names = ("aime2024", "amc23", "olympiadbench", "math500", "gsm8k_test")
    benchmarks = [BenchmarkConfig(name=n, path=str(DATA / f"{n}.jsonl")) for n in names]
    corpora = {n: str(DATA / f"{n}.jsonl") for n in names}
    run(ContaminationConfig(corpora=corpora, benchmarks=benchmarks, out=str(tmp_path)))
    found = json.loads((tmp_path / "contamination.json").read_text())
    for name in names:
        assert len(found[name]["benchmarks"][name]["exact"]) == found[name]["rows"]
