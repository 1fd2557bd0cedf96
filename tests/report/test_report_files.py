"""Beside the page: LaTeX that is well-formed, CSV that is report.json's numbers, plots as files, and what they say of
contamination and of published figures."""

import csv
import dataclasses
import io
import json
import re
import struct
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.paths import RECIPES
from helpers.report_runs import contents, made, rows_of, tabulars, written
from micota_fast.config import loader
from micota_fast.config.recipe import Recipe
from micota_fast.config.report import ClaimsConfig, ReportConfig
from micota_fast.errors import InputError
from micota_fast.report import plots
from micota_fast.report.drawing import name_rows, new_figure
from micota_fast.report.formats import latex_text, to_latex
from micota_fast.report.inputs import Inputs
from micota_fast.report.report import run
from micota_fast.report.summary import Summary
from micota_fast.report.tables import Cell, Table


@pytest.fixture
def config(tmp_path: Path) -> ReportConfig:
    return written(tmp_path)


class TestLatex:
    def test_holds_every_table(self, config: ReportConfig) -> None:
        markdown, _, _ = made(config)
        tex = (Path(config.out) / "table.tex").read_text()
        tables = tabulars(tex)
        captions = re.findall(r"\\caption\{(.*)\}", tex)
        assert captions == [caption.replace("-", "{-}") for caption in re.findall(r"(?m)^\*\*(.*)\*\*$", markdown)]
        assert len(tables) == len(captions) >= 4
        heads, sizes, base, of_base = tables[0][:4]
        assert heads == ["Arm", "gsm", "aime", "Average", r"95\% interval", r"$\Delta$ vs base"]
        assert sizes[1] == r"{\tiny n = 1000}"
        assert base[:4] == ["base", "40.0", "20.0", "30.0"]
        assert of_base[1] == r"{\tiny {[}37.0, 43.1]}"
        assert any(row[0] == r"\textbf{mid}" and row[3] == r"\textbf{61.0}" for row in tables[0])

    @given(st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126)).filter(str.strip), min_size=1))
    def test_any_text_is_text(self, texts: list[str]) -> None:
        cells = tuple(Cell(text, text[::-1], strong=bool(place % 2)) for place, text in enumerate(texts))
        tables = tabulars(to_latex(Table("c", cells, (cells, cells), tuple(texts))))
        assert [len(table) for table in tables] == [6]

    def test_specials(self) -> None:
        assert latex_text(r"50% of a_b & {c} #1 $x^2$ ~\d") == (
            r"50\% of a\_b \& \{c\} \#1 \$x\textasciicircum{}2\$ \textasciitilde{}\textbackslash{}d"
        )


class TestCsv:
    def test_is_report_json_in_rows(self, config: ReportConfig) -> None:
        config = dataclasses.replace(config, claims=ClaimsConfig(source="s", deltas={"mid": 3.47}))
        _, numbers, _ = made(config)
        rows = list(csv.DictReader(io.StringIO((Path(config.out) / "table.csv").read_text())))
        assert [(row["arm"], row["benchmark"]) for row in rows] == [
            (arm, name) for arm in ("base", "short", "mid") for name in ("gsm", "aime", "Average")
        ]
        for row in rows:
            arm, average = numbers["arms"][row["arm"]], row["benchmark"] == "Average"
            estimate = arm["average"] if average else arm["benchmarks"][row["benchmark"]]
            assert float(row["accuracy"]) == estimate["mean"], "unrounded"
            assert [float(row["low95"]), float(row["high95"])] == estimate["interval95"]
            assert row["sd_over_seeds"] == ("" if estimate["sd"] is None else repr(estimate["sd"]))
            assert row["problems"] == ("" if average else str(numbers["problems"][row["benchmark"]]))
            delta = arm["delta"] if average else arm["deltas"].get(row["benchmark"])
            if delta is None:
                assert row["delta"] == row["paired"] == row["p"] == ""
            else:
                assert float(row["delta"]) == delta["value"]
                assert [float(row["delta_low95"]), float(row["delta_high95"])] == delta["interval95"]
                assert (row["paired"], row["p_holm"]) == (str(delta["paired"]), "")
        claimed = [(row["arm"], row["benchmark"], float(row["delta_claimed"])) for row in rows if row["delta_claimed"]]
        assert claimed == [("mid", "Average", pytest.approx(0.0347))]

    def test_others(self, config: ReportConfig) -> None:
        run(config)
        rows = list(csv.DictReader(io.StringIO((Path(config.out) / "corpora.csv").read_text())))
        assert (rows[0]["corpus"], rows[0]["accepted"], rows[0]["perplexity"]) == ("long", "40", "5.0")
        rows = list(csv.DictReader(io.StringIO((Path(config.out) / "answers.csv").read_text())))
        assert [row["arm"] for row in rows] == ["base", "short", "mid"]
        assert float(rows[2]["truncated"]) == pytest.approx(8 / 1200)


class TestPlots:
    def test_files_stand_alone(self, config: ReportConfig) -> None:
        run(config)
        for svg in (Path(config.out) / "plots").glob("*.svg"):
            root = ET.fromstring(svg.read_bytes())
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert "var(--" not in svg.read_text(), "no page gives variables here"
            assert "<dc:date>" not in svg.read_text()
            points = [float(root.attrib[side].removesuffix("pt")) for side in ("width", "height")]
            png = svg.with_suffix(".png").read_bytes()
            assert png.startswith(b"\x89PNG")
            # Twice 96 pixels to the inch of 72 points.
            assert struct.unpack(">II", png[16:24]) == pytest.approx([side * 192 / 72 for side in points], abs=1)
            assert b"Software" not in png


class TestFigures:
    def test_a_row_of_figures_is_all_that_a_new_figure_needs(
        self, config: ReportConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def truncated_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> plots.Figure:
            figure, axes = new_figure(300, 100)
            for row, arm in enumerate(summary.arms):
                axes.plot(arm.answers.truncated, row, "o", color=colours[arm.name])
            name_rows(axes, [arm.name for arm in summary.arms])
            return plots.Figure("How many are cut off.", "Dot: share.", [plots.Drawing(figure, "Cut off: few.")])

        with monkeypatch.context() as patch:
            patch.setattr(plots, "FIGURES", (plots.Entry("truncated", "accuracy", truncated_figure), *plots.FIGURES))
            _, _, html = made(config)
            assert "<b>How many are cut off.</b> Dot: share.</figcaption>" in html
            assert 'aria-label="Cut off: few."' in html
            assert "plots/truncated.svg" in contents(config.out)
            assert "plots/truncated.png" in contents(config.out)
            patch.setattr(plots, "FIGURES", (plots.Entry("truncated", "accuracy", lambda *_: None), *plots.FIGURES[1:]))
            made(config)
            assert "plots/truncated.svg" not in contents(config.out), "without data it is not drawn, and the file goes"


class TestFormerFiles:
    def test_those_of_a_former_report_go_and_others_stay(self, config: ReportConfig, tmp_path: Path) -> None:
        found = contamination(tmp_path / "contamination.json", long={}, mid={})
        run(dataclasses.replace(config, contamination=found))
        out = Path(config.out)
        others = [out / "plots" / "mine.svg", out / "plots" / "average.pdf", out / "notes.csv"]
        for file in others:
            file.write_text("mine")
        assert (out / "plots" / "loss1-mid.svg").exists()
        fewer = dataclasses.replace(config, arms={"mid": config.arms["mid"]}, training={}, corpora={})
        run(fewer)
        assert all(file.read_text() == "mine" for file in others)
        kept = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file() and file not in others}
        run(dataclasses.replace(fewer, out=str(tmp_path / "fresh")))
        fresh = tmp_path / "fresh"
        assert kept == {str(file.relative_to(fresh)) for file in fresh.rglob("*") if file.is_file()}


class TestMarkdown:
    @pytest.mark.parametrize(
        ("name", "written"),
        [
            ("a_b*c", r"a\_b\*c"),
            ("<b>x", r"\<b>x"),
            ("[x](y)", r"[x]\(y)"),
            ("&lt; $1$ ~2~", r"\&lt; \$1\$ \~2\~"),
        ],
    )
    def test_names_are_text_everywhere(self, name: str, written: str, config: ReportConfig, tmp_path: Path) -> None:
        found = contamination(tmp_path / "contamination.json", **{name: {"gsm": {"exact": ["a"], "rows": 1}}})
        arms = {name: config.arms["mid"]}
        markdown, _, _ = made(
            dataclasses.replace(config, title=f"On {name}", arms=arms, training={}, contamination=found)
        )
        assert markdown.startswith(f"# On {written}\n\nThe {written} arm averages 61.0%")
        assert f"Text of benchmarks was found in {written} (gsm)" in markdown
        assert name not in markdown.replace(written, "")


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


class TestContamination:
    def test_without_it_nothing_is_said(self, config: ReportConfig) -> None:
        markdown, numbers, html = made(config)
        assert "ontamination" not in html + markdown
        assert numbers["contamination"] == {}
        assert not (Path(config.out) / "contamination.csv").exists()

    def test_what_was_found_is_told(self, config: ReportConfig, tmp_path: Path) -> None:
        hit = {"gsm": {"exact": ["a"], "gram13": ["a", "b", "c"], "rows": 4}}
        path = contamination(tmp_path / "contamination.json", long={}, mid=hit)
        markdown, numbers, html = made(dataclasses.replace(config, contamination=path))
        finding = "Text of benchmarks was found in mid (gsm): accuracy there may be memory."
        assert finding in markdown
        assert f"<h2>Contamination</h2>\n<p>{finding}</p>" in html
        rows = rows_of(markdown[markdown.index("**Benchmark problems in the training corpora**") :])
        assert rows["Corpus"] == ["Corpus", "gsm (n = 1000)", "aime (n = 200)"]
        assert rows["long"] == ["long", "0 / 0", "0 / 0"]
        assert rows["mid"] == ["mid", "1 / 3 (4 rows)", "0 / 0"]
        assert numbers["contamination"]["mid"]["gsm"] == {"problems": 1000, "exact": 1, "shared": 3, "rows": 4}
        text = (Path(config.out) / "contamination.csv").read_text()
        assert text.splitlines()[3] == "mid,gsm,1000,1,3,4"
        assert "1 / 3" in (Path(config.out) / "table.tex").read_text()

    def test_nothing_found_is_told_too(self, config: ReportConfig, tmp_path: Path) -> None:
        path = contamination(tmp_path / "contamination.json", long={}, mid={})
        markdown, _, html = made(dataclasses.replace(config, contamination=path))
        assert "No text of a benchmark was found in the training corpora." in markdown
        assert "No text of a benchmark was found in the training corpora." in html

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
    def test_bad_files(self, config: ReportConfig, tmp_path: Path, change: Any, expected: str) -> None:
        path = Path(contamination(tmp_path / "contamination.json", mid={}))
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(InputError) as caught:
            run(dataclasses.replace(config, contamination=str(path)))
        assert str(path) in str(caught.value)
        assert expected in str(caught.value)
        assert not Path(config.out).exists()


class TestClaims:
    def test_stand_beside_what_was_measured(self, config: ReportConfig) -> None:
        claims = ClaimsConfig(source="a paper", deltas={"mid": 3.47, "short": -0.5})
        markdown, numbers, html = made(dataclasses.replace(config, claims=claims))
        assert re.search(r"^\| \*\*mid\*\* .* \*\*\+31\.0\*\* \[[^]]*\], published: \+3\.47 \|$", markdown, flags=re.M)
        assert "published: −0.5" in markdown
        assert "<small>published: +3.47</small>" in html
        assert "Published: the difference of the average in points according to a paper." in markdown
        assert numbers["claims"] == {"source": "a paper", "deltas": {"mid": 3.47, "short": -0.5}}
        plain, _, _ = made(dataclasses.replace(config, claims=None))
        assert "ublished" not in plain

    def test_of_an_arm_that_is_not_there(self, config: ReportConfig) -> None:
        with pytest.raises(InputError, match=r"claims\.deltas: no arm is named 'else'; there are short, mid"):
            run(dataclasses.replace(config, claims=ClaimsConfig(source="s", deltas={"else": 1.0})))

    def test_recipes_have_the_abstracts(self) -> None:
        recipes = RECIPES
        found = {size: loader.load(Recipe, recipes / f"micota-qwen2.5-{size}.yaml").claims for size in ("3b", "7b")}
        source = "MiCoTA (arXiv 2507.01887), abstract"
        assert found == {
            "3b": ClaimsConfig(source=source, deltas={"mid": 3.93}),
            "7b": ClaimsConfig(source=source, deltas={"mid": 3.47}),
        }
        with pytest.raises(InputError, match=r"claims\.deltas.*'else'"):
            loader.load(Recipe, recipes / "micota-qwen2.5-3b.yaml", ["claims.deltas={else: 1.0}"])


def test_the_answers_by_each_protocol(tmp_path: Path) -> None:
    config = written(tmp_path)
    for number, path in enumerate([config.base, *(path for paths in config.arms.values() for path in paths)]):
        data = json.loads(Path(path).read_text())
        for entry in data["benchmarks"].values():
            paper = {"correct": 0, "accuracy": number / 10}
            entry |= {"protocol": "strict", "protocols": {"strict": {"accuracy": entry["accuracy"]}, "paper": paper}}
        Path(path).write_text(json.dumps(data))
    run(config)
    markdown = (Path(config.out) / "table.md").read_text()
    rows = markdown[markdown.index("**The answers by each protocol**") :].split("\n\n")[1].splitlines()
    assert rows[0] == "| Arm | strict (counts in all other tables) | paper |"
    assert rows[2].endswith("| 0.0 |")  # base
    assert rows[3].endswith("| 15.0 |")  # short: 0.1 and 0.2
    assert "math-verify" in markdown
    assert json.loads((Path(config.out) / "report.json").read_text())["protocol"] == "strict"
    data["benchmarks"]["gsm"]["protocol"] = "paper"
    Path(path).write_text(json.dumps(data))
    with pytest.raises(InputError, match="graded by paper and strict; grade all by one protocol"):
        run(config)
