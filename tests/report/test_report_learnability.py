"""What the report tells of the corpora's learnability: the alignment's figures, their order, and what came of it."""

import csv
import dataclasses
import io
import json
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpers.chromium import browsing
from helpers.report_runs import contents, made, results, rows_of, tabulars, written
from micota_fast.alignment.learnability import distribution
from micota_fast.alignment.likelihood_profile import profile
from micota_fast.alignment.results import STEPS, Alignment, Learnability, Markers, OwnOverlap
from micota_fast.common.schema import to_json
from micota_fast.config.report import ReportConfig
from micota_fast.errors import InputError
from micota_fast.report.drawing import spread_labels
from micota_fast.report.learnability import LearnabilityRanking, agreement
from micota_fast.report.report import run
from micota_fast.statistics.ranks import spearman

TABLE = "**How easy the corpora are to learn, by the student's own likelihood**"


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


@pytest.fixture
def config(tmp_path: Path) -> ReportConfig:
    """Four corpora in the order of nobody's learnability; short averages 31.5%, mid 61%, long 15%; alien has no arm."""
    config = written(tmp_path)
    nats = {"long": 400.0, "alien": 20.0, "mid": 90.0, "short": 30.0}
    corpora = {name: {"alignment": alignment(tmp_path / f"{name}.align.json", of)} for name, of in nats.items()}
    alignment(tmp_path / "mid.align.json", nats["mid"], own=0.25)
    long = [results(tmp_path / "long0.json", {"gsm": 200, "aime": 20})]
    return dataclasses.replace(config, corpora=corpora, arms={**config.arms, "long": long})


class TestSpearman:
    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=12))
    def test_is_scipys(self, pairs: list[tuple[int, int]]) -> None:
        x, y = ([float(value) for value in side] for side in zip(*pairs, strict=True))
        found = spearman(x, y)
        if len(set(x)) == 1 or len(set(y)) == 1:
            assert found is None
        else:
            assert found == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)

    def test_by_hand(self) -> None:
        # Ranks 1, 2, 3, 4 against 2, 1, 4, 3: 1 - 6 * 4 / (4 * 15).
        assert spearman([1.0, 5.0, 7.0, 100.0], [0.2, 0.1, 0.9, 0.8]) == pytest.approx(0.6)


class TestNumbers:
    def test_table_is_in_the_order_of_the_score_beside_the_arms(self, config: ReportConfig) -> None:
        markdown, numbers, html = made(config)
        rows = rows_of(markdown[markdown.index(TABLE) :].split("\n\n")[1])
        assert list(rows)[2:] == ["alien", "short", "mid", "long"]
        heads = ["Corpus", "Nats (an answer)", "Accuracy of its arm (average, %)", "Departures (tokens an answer)"]
        heads += ["Length (tokens, mean)", "Perplexity", "Rank-surprisal ratio", r"p \< 0.1 (% of tokens)"]
        heads += [r"p \< 0.01 (% of tokens)", "Reflection markers (per 1,000 tokens)"]
        assert rows["Corpus"] == [*heads, "In own answers (% of 4-word runs)"]
        # A fifth of the tokens has 3 nats, p = 0.0498.
        of_mid = ["mid", "90.0", "61.0 ± 1.0", "6.00", "30.0", "2.50", "1.75", "20.0", "0", "12.5", "25.0"]
        assert rows["mid"] == of_mid
        assert (rows["alien"][2], rows["alien"][-1]) == ("–", "–")
        assert html.count("How easy the corpora are to learn") == 2, "the caption and the region's label"
        assert numbers["learnability"] == {
            "order": ["alien", "short", "mid", "long"],
            "arms": {"short": "short", "mid": "mid", "long": "long"},
            "compared": ["short", "mid", "long"],
            "spearman": pytest.approx(0.5),
        }
        assert numbers["corpora"]["mid"]["nats_per_answer"]["mean"] == pytest.approx(90.0)
        assert numbers["corpora"]["mid"]["by_step"][0] == pytest.approx(np.mean([3.0, 0.5, 0.2, 0.1, 0.05]))

    @pytest.mark.slow
    def test_correlation_is_told_with_how_little_it_says(self, config: ReportConfig) -> None:
        markdown, _, html = made(config)
        told = "accuracy of the arms: 0.50 over 3 arms (short, mid, long), where 1.00 would mean that the easier"
        for text in (markdown, html):
            assert told in text
            assert "So few arms say little: 3 in an order by chance give 1.00 once in 6 times" in text
        two = dataclasses.replace(config, arms={name: config.arms[name] for name in ("short", "mid")})
        markdown, numbers, _ = made(two)
        assert (
            "No rank correlation of ease by the score with the accuracy of the arms: 2 arms have both, 3 are"
            in markdown
        )
        assert numbers["learnability"]["spearman"] is None
        level = dataclasses.replace(
            config, arms={**config.arms, "short": config.arms["mid"], "long": config.arms["mid"]}
        )
        assert "over 3 arms one of them is the same for all" in made(level)[0]

    def test_an_arm_of_another_name_than_its_corpus(self, config: ReportConfig) -> None:
        arms = {"mine": config.arms["mid"], "mid": config.arms["short"], "long": config.arms["long"]}
        numbers = made(dataclasses.replace(config, arms=arms, trained_on={"mine": "mid", "mid": "short"}))[1]
        assert numbers["learnability"]["arms"] == {"short": "mid", "mid": "mine", "long": "long"}

    def test_ten_arms_are_not_warned_of(self) -> None:
        names = tuple(f"arm{i}" for i in range(10))
        assert "So few" in agreement(LearnabilityRanking(names[:9], {}, names[:9], -1.0, {}))
        assert "So few" not in agreement(LearnabilityRanking(names, {}, names, -1.0, {}))
        assert ": 0.00 over 10" in agreement(LearnabilityRanking(names, {}, names, -0.001, {}))

    def test_csv_and_latex_have_them_too(self, config: ReportConfig) -> None:
        _, numbers, _ = made(config)
        out = Path(config.out)
        rows = {row["corpus"]: row for row in csv.DictReader(io.StringIO((out / "corpora.csv").read_text()))}
        assert list(rows) == ["long", "alien", "mid", "short"]
        of_mid = numbers["corpora"]["mid"]
        assert {key: float(rows["mid"][f"nats_per_answer_{key}"]) for key in of_mid["nats_per_answer"]} == of_mid[
            "nats_per_answer"
        ]
        assert float(rows["mid"]["tokens_below_p_0.1"]) == of_mid["unlikely"]["0.1"] == pytest.approx(0.2)
        assert float(rows["mid"]["arm_accuracy"]) == numbers["arms"]["mid"]["average"]["mean"]
        assert rows["alien"]["arm_accuracy"] == rows["alien"]["own_overlap"] == ""
        tex = (out / "table.tex").read_text()
        (table,) = [cells for cells in tabulars(tex) if cells[0][:2] == ["Corpus", "Nats"]]
        assert [row[0] for row in table[2:] if row[0]] == ["alien", "short", "mid", "long"]

    def test_files_of_earlier_versions(self, config: ReportConfig, tmp_path: Path) -> None:
        """Without a score, and without any of it."""
        path = Path(config.corpora["alien"]["alignment"])
        data = json.loads(path.read_text())
        del data["learnability"]
        path.write_text(json.dumps(data))
        markdown, numbers, _ = made(config)
        assert numbers["learnability"]["order"] == ["short", "mid", "long", "alien"], "what has no score stands last"
        rows = rows_of(markdown[markdown.index(TABLE) :])
        assert rows["alien"][1:7] == ["–", "–", "–", "30.0", "2.50", "–"]
        markdown, numbers, html = made(written(tmp_path / "old"))
        assert TABLE not in markdown
        assert numbers["learnability"] is None
        assert "easy" not in html

    def test_what_was_too_long_to_measure_is_told(self, config: ReportConfig) -> None:
        path = Path(config.corpora["mid"]["alignment"])
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dropped": 1234}))
        markdown, numbers, _ = made(config)
        assert "Left out of mid where the student measures it, as too long: 1,234 documents." in markdown
        assert numbers["corpora"]["mid"]["dropped"] == 1234
        assert "Left out of long" not in markdown

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
    def test_bad_files_name_the_key(self, config: ReportConfig, tmp_path: Path, change: Any, expected: str) -> None:
        path = alignment(tmp_path / "mid.align.json", 1.0, **change)
        with pytest.raises(InputError) as caught:
            run(config)
        assert f"{path}: key {expected}" in str(caught.value)
        assert not Path(config.out).exists()


class TestInChromium:
    """On a phone and on a desk: nothing hangs over, the wide table scrolls by keyboard, and axe finds nothing."""

    def test_page(self, config: ReportConfig, tmp_path: Path) -> None:
        run(config)
        file = Path(config.out) / "report.html"
        with browsing(tmp_path / "profile") as tab:
            for width in (390, 1280):
                tab.open(file, width)
                assert tab.complaints == []
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.open(file, 390)
            region = "document.querySelector('[aria-label^=\"How easy\"]')"
            assert tab.evaluate(f"{region}.scrollWidth > {region}.clientWidth")
            tab.evaluate(f"{region}.focus()")
            tab.press("ArrowRight", "ArrowRight")
            tab.wait_for(f"{region}.scrollLeft > 0")
            name = f"{region}.querySelector('tbody th').getBoundingClientRect()"
            assert tab.evaluate(f"{name}.left >= 0 && {name}.right < innerWidth"), "the corpus's name stays in sight"
            pytest.importorskip("axe_core_python")
            tab.evaluate((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8") + "; 0")
            assert tab.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))") == []


def points(svg: str, colour: str) -> list[tuple[float, float]]:
    """The longest line of a colour, in the drawing's own coordinates."""
    lines = re.findall(r'<path d="(M [^"]*)"[^>]*style="fill: none; stroke: (#\w{6})', svg)
    drawn = [d for d, stroke in lines if stroke == colour]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", max(drawn, key=len))]


class TestPlots:
    def test_lines_are_the_alignments(self, config: ReportConfig, tmp_path: Path) -> None:
        falling = [1.0 - 0.1 * i for i in range(10)]
        steps = [{"nll": 0.1 * (i % 4 + 1), "tokens": 9} for i in range(STEPS)]
        alignment(tmp_path / "long.align.json", 400.0, by_position=[*falling[:4], None, *falling[5:]], by_step=steps)
        run(config)
        plots = Path(config.out) / "plots"
        vermillion = "#d55e00"  # long's
        of_position = points((plots / "position.svg").read_text(), vermillion)
        assert len(of_position) == 9, "a tenth that no answer has is a gap"
        heights = np.array([y for _, y in of_position])
        assert np.diff(heights) == pytest.approx(np.where(np.arange(8) == 3, 2, 1) * np.diff(heights)[0], rel=1e-3)
        assert len(points((plots / "step.svg").read_text(), vermillion)) == STEPS - 1, "the last is of all lines after"
        _, _, html = made(config)
        assert "from its first tenth to its last: long 1.00 to 0.100; alien" in html
        assert f"those from line {STEPS} on are left out" in html
        assert (plots / "position.png").read_bytes().startswith(b"\x89PNG")

    def test_not_drawn_without_them(self, config: ReportConfig, tmp_path: Path) -> None:
        for name in config.corpora:
            alignment(
                tmp_path / f"{name}.align.json", 1.0, by_position=[None] * 10, by_step=[{"nll": 1.0, "tokens": 1}]
            )
        run(config)
        assert not {"plots/position.svg", "plots/step.svg"} & contents(config.out).keys()

    @settings(deadline=None)
    @given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9))
    def test_labels_stand_apart_in_the_order_of_the_lines(self, heights: list[float]) -> None:
        named = {f"name{i}": height for i, height in enumerate(heights)}
        placed = spread_labels(named)
        order = sorted(named, key=lambda name: named[name])
        gaps = np.diff([placed[name] for name in order])
        assert (gaps > 0.99 * min(0.13, 1 / len(order))).all()
        assert all(-0.001 <= height <= 1.0 for height in placed.values())

    def test_same_bytes_twice(self, config: ReportConfig) -> None:
        run(config)
        first = contents(config.out)
        run(config)
        assert contents(config.out) == first
        assert {"plots/position.png", "plots/step.png"} <= first.keys()
        assert not math.isnan(json.loads(first["report.json"])["learnability"]["spearman"])
