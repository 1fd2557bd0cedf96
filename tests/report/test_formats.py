"""Tables as LaTeX that is well-formed and Markdown that is text; CSV that is report.json's numbers."""

import csv
import dataclasses
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.report_runs import contamination, made, tabulars
from micota_fast.config.report import ClaimsConfig, ReportConfig
from micota_fast.report.formats import latex_text, to_latex
from micota_fast.report.report import run
from micota_fast.report.tables import Cell, Table


class TestLatex:
    def test_holds_every_table(self, config: ReportConfig) -> None:
        markdown, _, _ = made(config)
        tex = (Path(config.out) / "table.tex").read_text()
        tables = tabulars(tex)
        captions = re.findall(r"\\caption\{(.*)\}", tex)
        assert captions == [caption.replace("-", "{-}") for caption in re.findall(r"(?m)^\*\*(.*)\*\*$", markdown)]
        assert len(tables) == len(captions) >= 4
        heads, sizes, base, of_base = tables[0][:4]
        assert heads == ["Arm", "Average", r"$\Delta$ vs base", "gsm", "aime"]
        assert sizes[3] == r"{\tiny n = 1000}"
        assert base[:5] == ["base", "30.0", "--", "40.0", "20.0"]
        assert of_base[3] == r"{\tiny {[}37.0, 43.1]}"
        assert any(row[0] == r"\textbf{mid}" and row[1] == r"\textbf{61.0}" for row in tables[0])

    @given(st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126)).filter(str.strip), min_size=1))
    def test_any_text_is_text(self, texts: list[str]) -> None:
        cells = tuple(Cell(text, text[::-1], strong=bool(place % 2)) for place, text in enumerate(texts))
        tables = tabulars(to_latex(Table("c", cells, (cells, cells), tuple(texts))))
        assert [len(table) for table in tables] == [6]

    def test_the_compact_table_has_an_arm_a_column(self, config: ReportConfig) -> None:
        run(config)
        tex = (Path(config.out) / "table-compact.tex").read_text()
        ((heads, *rows),) = tabulars(re.sub(r"\$_\{([\d.]+)\}\$", r" (\1)", tex))
        assert heads == ["", "base", "short", "mid"]
        assert [row[0] for row in rows] == ["gsm", "aime", "Average", r"$\Delta$"]
        assert rows[2] == ["Average", "30.0", "31.5 (1.4)", "61.0 (1.0)"]
        assert rows[3] == [r"$\Delta$", "--", "+1.5", "+31.0"]

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

    @pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # the plots are drawn along with it
    @pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@sum", "\t=1", "＝1"])
    def test_a_name_is_never_a_formula_and_a_number_stays_one(self, config: ReportConfig, name: str) -> None:
        run(dataclasses.replace(config, arms={name: config.arms["mid"]}, corpora={name: config.corpora["long"]}))
        for file in ("table.csv", "answers.csv", "corpora.csv"):
            rows = list(csv.reader(io.StringIO((Path(config.out) / file).read_text())))
            assert f"'{name}" in [row[0] for row in rows]
            assert all(cell.lstrip("-").replace(".", "").isdigit() for row in rows for cell in row if cell[:1] == "-")


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
