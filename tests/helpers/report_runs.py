"""Reports made of handmade results, what they are made of, and ways to look at them."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from micota_fast.alignment.learnability import distribution
from micota_fast.alignment.likelihood_profile import profile
from micota_fast.alignment.results import Alignment, Learnability, Markers, OwnOverlap
from micota_fast.common.records import benchmark_file, write_rows
from micota_fast.common.schema import to_json
from micota_fast.config.report import ReportConfig
from micota_fast.corpus.results import AcceptedTokens, CorpusCounts
from micota_fast.evaluation.results import BenchmarkResult, EvaluationResults, GradedAnswer
from micota_fast.report.report import run

Made = tuple[str, dict[str, Any], str]
N = {"gsm": 1000, "aime": 200}
Answers = dict[str, np.ndarray]  # benchmark -> correct or not [problems, samples]


def results(path: Path, correct: dict[str, int], n: dict[str, int] | None = None, **more: Any) -> str:
    """Write a results.json: `correct` answers of `n` on each benchmark; `more` goes to every benchmark's entry."""
    n = n or N
    benchmarks = {
        name: {"n": n[name], "correct": correct[name], "accuracy": correct[name] / n[name]} | more for name in correct
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"model": path.stem, "benchmarks": benchmarks, "average": 0.0}))
    return str(path)


def written(tmp_path: Path) -> ReportConfig:
    """Write inputs of a report. Base 40% and 20%; short slightly better, over two seeds; mid far better, over three."""
    answers = {"truncated": 4, "no_answer": 2, "timeout": 0, "mean_tokens": 50.0}
    scores = {
        "short": [{"gsm": 410, "aime": 40}, {"gsm": 430, "aime": 44}],
        "mid": [{"gsm": 700, "aime": 100}, {"gsm": 710, "aime": 102}, {"gsm": 720, "aime": 104}],
    }
    arms = {
        arm: [results(tmp_path / f"{arm}{seed}.json", row, **answers) for seed, row in enumerate(rows)]
        for arm, rows in scores.items()
    }
    training = {}
    for arm in scores:
        path = tmp_path / f"{arm}.jsonl"
        path.write_text("".join(json.dumps({"step": s, "loss": 2.0 / s, "lr": 1e-3}) + "\n" for s in range(1, 31)))
        training[arm] = [str(path), str(path)]
    corpora = {}
    for name, length, perplexity in (("long", 900, 5.0), ("mid", 300, 2.5)):
        counts = CorpusCounts(
            total=50,
            accepted=40,
            rejected={"wrong": 9, "too_long": 1},
            tokens=AcceptedTokens(mean=1.0, min=1, max=1, p1=1.0, p10=1.0, p25=1.0, p50=1.0, p75=1.0, p90=1.0, p99=1.0),
        )
        alignment = Alignment(
            perplexity=perplexity,
            nll=math.log(perplexity),
            document_nll=replace(distribution(np.linspace(0.4, 2.0, 9)), p10=0.5, p50=0.9, p90=1.9),
            tokens=replace(distribution(np.full(40, length), total=40 * length), p50=length + 0.5),
            lengths=tuple(length + 7 * i for i in range(40)),
        )
        (tmp_path / f"{name}.counts.json").write_text(json.dumps(to_json(counts)))
        (tmp_path / f"{name}.alignment.json").write_text(json.dumps(to_json(alignment)))
        corpora[name] = {kind: str(tmp_path / f"{name}.{kind}.json") for kind in ("counts", "alignment")}
    return ReportConfig(
        title="A <test> & more",
        out=str(tmp_path / "out"),
        base=results(tmp_path / "base.json", {"gsm": 400, "aime": 40}, **answers),
        arms=arms,
        corpora=corpora,
        training=training,
        notes=["First tried <b>x</b>.", "Then\n  y."],
        provenance={"torch": "2.13.0"},
    )


def made(config: ReportConfig) -> Made:
    """Make the report; returns table.md, report.json and report.html."""
    run(config)
    out = Path(config.out)
    return (
        (out / "table.md").read_text(),
        json.loads((out / "report.json").read_text()),
        (out / "report.html").read_text(),
    )


def contents(out: str) -> dict[str, bytes]:
    """Read every file below a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def rows_of(markdown: str) -> dict[str, list[str]]:
    """First row of that name in the file -> its cells."""
    found: dict[str, list[str]] = {}
    for line in markdown.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(cells[0], cells)
    return found


def tabulars(tex: str) -> list[list[list[str]]]:
    """The cells of every tabular, read as LaTeX reads them: by &, \\\\ and braces that must match.

    Fails on what LaTeX would stop at: an environment or brace that is not closed, a character that needs an escape, a
    row longer than its columns, an optional argument where none is meant.
    """
    tex = re.sub(r"(?<!\\)%.*", "", tex)
    assert tex.isascii(), sorted({character for character in tex if not character.isascii()})
    open_: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", tex):
        if kind == "begin":
            open_.append(name)
        else:
            assert open_.pop() == name
    assert open_ == []
    depth = 0
    for token in re.findall(r"\\.|[{}]", tex):
        depth += {"{": 1, "}": -1}.get(token, 0)
        assert depth >= 0
    assert depth == 0
    assert not re.search(r"(?<!\\)[#^~_]", tex)
    assert tex.replace(r"\$", "").count("$") % 2 == 0
    assert not re.search(r"(\\\\|\\midrule|\\toprule|\\addlinespace)\s*[\[*]", tex)
    found = []
    for columns, body in re.findall(r"\\begin\{tabular\}\{(lr*)\}(.*?)\\end\{tabular\}", tex, flags=re.DOTALL):
        body = re.sub(r"\\(toprule|midrule|bottomrule|addlinespace)\b", "", body)
        rows = [re.split(r"(?<!\\)&", row) for row in re.split(r"\\\\", body) if row.strip()]
        assert {len(row) for row in rows} == {len(columns)}
        found.append([[cell.strip() for cell in row] for row in rows])
    return found


def write_evaluation(folder: Path, rows: dict[str, list[GradedAnswer]]) -> str:
    """Write what an evaluation leaves: results.json and rows/NAME.jsonl; benchmark -> its rows. Returns the former."""
    benchmarks = {}
    for name, answers in rows.items():
        write_rows(folder / "rows" / benchmark_file(name), map(to_json, answers))
        correct = sum(answer.outcome == "correct" for answer in answers)
        problems = len({answer.id for answer in answers})
        benchmarks[name] = BenchmarkResult(
            problems=problems, n=len(answers), correct=correct, accuracy=correct / len(answers)
        )
    path = folder / "results.json"
    path.write_text(json.dumps(to_json(EvaluationResults(model=folder.name, benchmarks=benchmarks))))
    return str(path)


def graded(folder: Path, answers: Answers) -> str:
    """Write an evaluation whose answers are correct or wrong as these arrays say."""
    asked: Any = {"problem": "?", "answer": "1", "completion": "…", "finish_reason": "stop"}
    asked |= {"prompt_tokens": 1, "completion_tokens": 1, "seed": None}
    rows = {
        name: [
            GradedAnswer(id=f"{name}-{p}", sample=s, outcome="correct" if correct_PS[p, s] else "wrong", **asked)
            for p, s in np.ndindex(*correct_PS.shape)
        ]
        for name, correct_PS in answers.items()
    }
    return write_evaluation(folder, rows)


def answered(seed: int, lift: float, samples: int = 1) -> Answers:
    """Answers to the same problems, hard or easy for all; `lift` says how good the model is."""
    ease = np.random.default_rng(0).normal(0.0, 2.0, 160)[:, None]
    correct_PS = np.random.default_rng(seed + 1).logistic(size=(160, samples)) < ease + lift
    return {"math": correct_PS[:120], "aime": correct_PS[120:]}


def contamination(path: Path, **found: dict[str, Any]) -> str:
    """What the contamination stage writes of two benchmarks."""
    none = {"exact": [], "gram13": [], "rows": 0, "examples": []}
    data = {
        corpus: {
            "rows": 40,
            "benchmarks": {
                name: none | {"problems": size} | of.get(name, {}) for name, size in (("gsm", 1000), ("aime", 200))
            },
        }
        for corpus, of in found.items()
    }
    path.write_text(json.dumps(data))
    return str(path)


def alignment(path: Path, nats: float, own: float | None = None, **more: Any) -> str:
    """What `micota align` writes of a corpus whose answers take `nats` on average."""
    nll_N = np.tile(np.array([3.0, 0.5, 0.2, 0.1, 0.05], dtype=np.float32), 60)
    counts_D = np.full(10, 30)
    scores_D = np.linspace(0.5 * nats, 1.5 * nats, 10)
    found = Alignment(
        perplexity=2.5,
        nll=math.log(2.5),
        document_nll=distribution(np.linspace(0.5, 1.9, 10)),
        tokens=distribution(counts_D, total=300),
        lengths=tuple(counts_D.tolist()),
        dropped=0,
        learnability=Learnability(
            nats_per_answer=distribution(scores_D),
            departures_per_answer=distribution(np.full(10, 6)),
            rank_surprisal_ratio=1.75,
        ),
        **profile(nll_N, counts_D, np.tile(np.array([False, False, False, False, True]), 60))._asdict(),
        markers=Markers(total=12.5, by_phrase={"wait": 12.5}),
        own_overlap=None if own is None else OwnOverlap(mean=own, answers=9),
    )
    path.write_text(json.dumps(to_json(found) | more))
    return str(path)
