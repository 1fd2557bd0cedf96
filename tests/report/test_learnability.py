"""What the report tells of the corpora's learnability: the alignment's figures, their order, and what came of it."""

import csv
import dataclasses
import io
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from helpers.chromium import browsing
from helpers.report_runs import made, rows_of, tabulars, written
from micota_fast.config.report import ReportConfig
from micota_fast.report.learnability import LearnabilityRanking, agreement
from micota_fast.report.report import run

TABLE = "**How easy the corpora are to learn, by the student's own likelihood**"


class TestNumbers:
    def test_table_is_in_the_order_of_the_score_beside_the_arms(self, aligned: ReportConfig) -> None:
        markdown, numbers, html = made(aligned)
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
    def test_correlation_is_told_with_how_little_it_says(self, aligned: ReportConfig) -> None:
        markdown, _, html = made(aligned)
        told = "accuracy of the arms: 0.50 over 3 arms (short, mid, long), where 1.00 would mean that the easier"
        for text in (markdown, html):
            assert told in text
            assert "So few arms say little: 3 in an order by chance give 1.00 once in 6 times" in text
        two = dataclasses.replace(aligned, arms={name: aligned.arms[name] for name in ("short", "mid")})
        markdown, numbers, _ = made(two)
        assert (
            "No rank correlation of ease by the score with the accuracy of the arms: 2 arms have both, 3 are"
            in markdown
        )
        assert numbers["learnability"]["spearman"] is None
        level = dataclasses.replace(
            aligned, arms={**aligned.arms, "short": aligned.arms["mid"], "long": aligned.arms["mid"]}
        )
        assert "over 3 arms one of them is the same for all" in made(level)[0]

    def test_an_arm_of_another_name_than_its_corpus(self, aligned: ReportConfig) -> None:
        arms = {"mine": aligned.arms["mid"], "mid": aligned.arms["short"], "long": aligned.arms["long"]}
        numbers = made(dataclasses.replace(aligned, arms=arms, trained_on={"mine": "mid", "mid": "short"}))[1]
        assert numbers["learnability"]["arms"] == {"short": "mid", "mid": "mine", "long": "long"}

    def test_ten_arms_are_not_warned_of(self) -> None:
        names = tuple(f"arm{i}" for i in range(10))
        assert "So few" in agreement(LearnabilityRanking(names[:9], {}, names[:9], -1.0, {}))
        assert "So few" not in agreement(LearnabilityRanking(names, {}, names, -1.0, {}))
        assert ": 0.00 over 10" in agreement(LearnabilityRanking(names, {}, names, -0.001, {}))

    def test_csv_and_latex_have_them_too(self, aligned: ReportConfig) -> None:
        _, numbers, _ = made(aligned)
        out = Path(aligned.out)
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

    def test_files_of_earlier_versions(self, aligned: ReportConfig, tmp_path: Path) -> None:
        """Without a score, and without any of it."""
        path = Path(aligned.corpora["alien"]["alignment"])
        data = json.loads(path.read_text())
        del data["learnability"]
        path.write_text(json.dumps(data))
        markdown, numbers, _ = made(aligned)
        assert numbers["learnability"]["order"] == ["short", "mid", "long", "alien"], "what has no score stands last"
        rows = rows_of(markdown[markdown.index(TABLE) :])
        assert rows["alien"][1:7] == ["–", "–", "–", "30.0", "2.50", "–"]
        markdown, numbers, html = made(written(tmp_path / "old"))
        assert TABLE not in markdown
        assert numbers["learnability"] is None
        assert "easy" not in html

    def test_what_was_too_long_to_measure_is_told(self, aligned: ReportConfig) -> None:
        path = Path(aligned.corpora["mid"]["alignment"])
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dropped": 1234}))
        markdown, numbers, _ = made(aligned)
        assert "Left out of mid where the student measures it, as too long: 1,234 documents." in markdown
        assert numbers["corpora"]["mid"]["dropped"] == 1234
        assert "Left out of long" not in markdown


class TestInChromium:
    """On a phone and on a desk: nothing hangs over, the wide table scrolls by keyboard, and axe finds nothing."""

    def test_page(self, aligned: ReportConfig, tmp_path: Path) -> None:
        run(aligned)
        file = Path(aligned.out) / "report.html"
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
