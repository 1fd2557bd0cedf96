"""What the report refuses: by file, line and key, before anything is written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.report_runs import alignment, answered, contamination, graded
from micota_fast.config.report import ReportConfig
from micota_fast.errors import InputError
from micota_fast.report.inputs import load_loss_curve
from micota_fast.report.report import run


class TestErrors:
    def check(self, config: ReportConfig, *expected: str) -> None:
        with pytest.raises(InputError) as caught:
            run(config)
        for text in expected:
            assert text in str(caught.value)
        assert not Path(config.out).exists(), "nothing is written from bad inputs"

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda data: data["benchmarks"]["gsm"].pop("accuracy"), "'benchmarks.gsm.accuracy' (a number) is missing"),
            (lambda data: data["benchmarks"]["gsm"].pop("n"), "'benchmarks.gsm.n' (a whole number) is missing"),
            (lambda data: data.pop("benchmarks"), "'benchmarks' (an object) is missing"),
            (lambda data: data["benchmarks"]["gsm"].update(accuracy=41.0), "must be a number from 0 to 1, found 41.0"),
            (lambda data: data["benchmarks"]["gsm"].update(accuracy="0.4"), 'found "0.4"'),
            (lambda data: data["benchmarks"]["gsm"].update(correct=7), "7 correct of 1000 is 0.007"),
            (lambda data: data["benchmarks"]["gsm"].update(n=0), "a whole number of at least 1, found 0"),
            (lambda data: data["benchmarks"].pop("aime"), "evaluate both on the same problems"),
        ],
    )
    def test_results(self, config: ReportConfig, change: Any, expected: str) -> None:
        path = Path(config.arms["short"][1])
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        self.check(config, str(path), expected)

    def test_corpus_files(self, config: ReportConfig) -> None:
        counts, alignment = Path(config.corpora["mid"]["counts"]), Path(config.corpora["mid"]["alignment"])
        kept = alignment.read_text()
        alignment.write_text(json.dumps({key: of for key, of in json.loads(kept).items() if key != "perplexity"}))
        self.check(config, str(alignment), "'perplexity' (a number) is missing")
        alignment.write_text(kept.replace('"p50": 300.5', '"p51": 300.5'))
        self.check(config, str(alignment), "'tokens.p50'")
        alignment.write_text(kept)
        counts.write_text(json.dumps(json.loads(counts.read_text()) | {"total": 3, "accepted": 4}))
        self.check(config, str(counts), "'accepted' is 4, more than 'total', 3")
        self.check(dataclasses.replace(config, corpora={"mid": {}}), "corpora.mid: no file named")
        self.check(dataclasses.replace(config, corpora={"mid": {"count": "x"}}), "corpora.mid: unknown key 'count'")

    def test_metrics_name_the_line(self, config: ReportConfig) -> None:
        path = Path(config.training["mid"][0])
        path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2}\n')
        self.check(config, f"{path}:2", "'loss' (a number) is missing")
        path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo\n')
        self.check(config, f"{path}:2: not JSON")
        path.write_text("")
        self.check(config, f"{path}: no rows")

    def test_a_row_that_a_kill_has_torn_is_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
        assert load_loss_curve(path).steps == (1,)

    def test_files_and_arms(self, config: ReportConfig, tmp_path: Path) -> None:
        self.check(dataclasses.replace(config, base=str(tmp_path / "gone.json")), "gone.json: No such file")
        self.check(dataclasses.replace(config, arms={"mid": []}), "arms.mid: no results.json given")
        self.check(dataclasses.replace(config, arms={"base": config.arms["mid"]}), "arms.base")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows[:-1], "aime.jsonl holds 39 problems with 39 answers"),
        (lambda rows: [*rows, rows[-1]], "aime.jsonl:41: sample 0 of problem 'aime-39' occurs a second time"),
        (lambda rows: [rows[0] | {"id": "else"}, *rows[1:]], "problem 'aime-0' is among the rows of one of"),
        (
            lambda rows: [rows[0] | {"outcome": None}, *rows[1:]],
            "aime.jsonl:1: key 'outcome' (a string) is missing",
        ),
        (lambda rows: [rows[0] | {"id": 7}, *rows[1:]], "aime.jsonl:1: key 'id' must be a string, found 7"),
        (lambda rows: [row | {"outcome": "correct"} for row in rows], "40 of them correct, but"),
    ],
)
def test_rows_of_another_evaluation_are_refused(paired: ReportConfig, change: Any, expected: str) -> None:
    file = Path(paired.arms["mid"][1]).parent / "rows" / "aime.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    with pytest.raises(InputError) as caught:
        run(paired)
    assert expected in str(caught.value)
    assert not Path(paired.out).exists()


def test_unequal_numbers_of_samples_are_refused(paired: ReportConfig, tmp_path: Path) -> None:
    path = graded(tmp_path / "uneven", answered(5, 0.0, samples=2))
    file = tmp_path / "uneven" / "rows" / "aime.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1] |= {"id": "aime-39", "sample": 2}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"aime\.jsonl: problem 'aime-0' has 1 answers, others another number"):
        run(dataclasses.replace(paired, arms={"mid": [path]}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data["mid"].pop("benchmarks"), "key 'mid.benchmarks' (an object) is missing"),
        (
            lambda data: data["mid"]["benchmarks"].pop("aime"),
            "key 'mid.benchmarks.aime' is missing: the corpus was not compared",
        ),
        (
            lambda data: data["mid"]["benchmarks"]["gsm"].update(exact=3),
            "'mid.benchmarks.gsm.exact' must be a list",
        ),
        (lambda data: data["mid"]["benchmarks"]["gsm"].update(rows=-1), "must be a whole number of at least 0"),
    ],
)
def test_bad_contamination(config: ReportConfig, tmp_path: Path, change: Any, expected: str) -> None:
    path = Path(contamination(tmp_path / "contamination.json", mid={}))
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        run(dataclasses.replace(config, contamination=str(path)))
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"learnability": {"nats_per_answer": {"mean": 1.0}}}, "'learnability.nats_per_answer.sd' (a number) is"),
        ({"learnability": [1]}, "'learnability' must be an object, found [1]"),
        ({"unlikely": {"0.1": 1.5}}, "'unlikely.0.1' must be a number from 0 to 1, found 1.5"),
        ({"by_position": [0.5, "x"]}, "'by_position.1' must be a finite number of at least 0, found \"x\""),
        ({"by_position": 0.5}, "'by_position' must be a list, found 0.5"),
        ({"by_step": [{"nll": 1.0, "tokens": 1}, {"tokens": 3}]}, "'by_step.1.nll' (a number) is missing"),
        ({"by_step": {"nll": 1.0}}, "'by_step' must be a list, found {"),
        ({"markers": {"total": -1.0}}, "'markers.total' must be a finite number of at least 0, found -1.0"),
        ({"own_overlap": {"mean": "much"}}, "'own_overlap.mean' must be a number from 0 to 1, found \"much\""),
    ],
)
def test_bad_alignments(aligned: ReportConfig, tmp_path: Path, change: Any, expected: str) -> None:
    path = alignment(tmp_path / "mid.align.json", 1.0, **change)
    with pytest.raises(InputError) as caught:
        run(aligned)
    assert f"{path}: key {expected}" in str(caught.value)
    assert not Path(aligned.out).exists()
