"""Plots as files and in the page: they show what the inputs say, follow the theme, and are made by a row of FIGURES."""

import itertools
import json
import math
import re
import struct
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.report_runs import Made, alignment, contents, made
from micota_fast.alignment.results import STEPS
from micota_fast.config.report import ReportConfig
from micota_fast.report import plots
from micota_fast.report.drawing import Drawing, Figure, log_ticks, name_rows, new_figure, spread_labels
from micota_fast.report.inputs import Inputs, LossCurve
from micota_fast.report.losses import thinned
from micota_fast.report.report import run
from micota_fast.report.summary import Summary


class TestFiles:
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
            # 300 pixels to the inch of 72 points.
            assert struct.unpack(">II", png[16:24]) == pytest.approx([side * 300 / 72 for side in points], abs=1)
            assert b"Software" not in png
            pdf = svg.with_suffix(".pdf").read_bytes()
            assert pdf.startswith(b"%PDF")
            assert not re.search(rb"/(CreationDate|Producer|Creator|Type3)\b", pdf)

    def test_accuracies_by_benchmark_share_one_scale(self, config: ReportConfig) -> None:
        run(config)
        ticks = []
        for name in ("benchmark0-gsm", "benchmark1-aime"):
            svg = (Path(config.out) / "plots" / f"{name}.svg").read_text()
            axis = svg[svg.index('id="matplotlib.axis_1"') : svg.index('id="matplotlib.axis_2"')]
            ticks.append(re.findall(r">(\d+)</text>", axis))
        assert ticks[0] == ticks[1] == ["20", "40", "60"]


class TestFigures:
    def test_a_row_of_figures_is_all_that_a_new_figure_needs(
        self, config: ReportConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def truncated_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Figure:
            figure, axes = new_figure(300, 100)
            for row, arm in enumerate(summary.arms):
                axes.plot(arm.answers.truncated, row, "o", color=colours[arm.name])
            name_rows(axes, [arm.name for arm in summary.arms])
            return Figure("How many are cut off.", "Dot: share.", [Drawing(figure, "Cut off: few.")])

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


def points(svg: str, colour: str) -> list[tuple[float, float]]:
    """The longest line of a colour, in the drawing's own coordinates."""
    lines = re.findall(r'<path d="(M [^"]*)"[^>]*style="fill: none; stroke: (#\w{6})', svg)
    drawn = [d for d, stroke in lines if stroke == colour]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", max(drawn, key=len))]


class TestLikelihood:
    def test_lines_are_the_alignments(self, aligned: ReportConfig, tmp_path: Path) -> None:
        falling = [1.0 - 0.1 * i for i in range(10)]
        steps = [{"nll": 0.1 * (i % 4 + 1), "tokens": 9} for i in range(STEPS)]
        alignment(tmp_path / "long.align.json", 400.0, by_position=[*falling[:4], None, *falling[5:]], by_step=steps)
        run(aligned)
        plots = Path(aligned.out) / "plots"
        vermillion = "#d55e00"  # long's
        of_position = points((plots / "position.svg").read_text(), vermillion)
        assert len(of_position) == 9, "a tenth that no answer has is a gap"
        heights = np.array([y for _, y in of_position])
        assert np.diff(heights) == pytest.approx(np.where(np.arange(8) == 3, 2, 1) * np.diff(heights)[0], rel=1e-3)
        assert len(points((plots / "step.svg").read_text(), vermillion)) == STEPS - 1, "the last is of all lines after"
        _, _, html = made(aligned)
        assert "from its first tenth to its last: long 1.00 to 0.100; alien" in html
        assert f"those from line {STEPS} on are left out" in html
        assert (plots / "position.png").read_bytes().startswith(b"\x89PNG")

    def test_not_drawn_without_them(self, aligned: ReportConfig, tmp_path: Path) -> None:
        for name in aligned.corpora:
            alignment(
                tmp_path / f"{name}.align.json", 1.0, by_position=[None] * 10, by_step=[{"nll": 1.0, "tokens": 1}]
            )
        run(aligned)
        assert not {"plots/position.svg", "plots/step.svg"} & contents(aligned.out).keys()

    def test_same_bytes_twice(self, aligned: ReportConfig) -> None:
        run(aligned)
        first = contents(aligned.out)
        run(aligned)
        assert contents(aligned.out) == first
        assert {"plots/position.png", "plots/step.png"} <= first.keys()
        assert not math.isnan(json.loads(first["report.json"])["learnability"]["spearman"])


def test_every_plot_follows_the_theme(report: Made) -> None:
    _, _, html = report
    plots = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(plots) == 2 + 2 + 2 + 2  # lengths and average, benchmarks, corpora, losses
    for plot in plots:
        assert 'role="img"' in plot
        assert "<style" not in plot
        assert "var(--muted, #667079)" in plot
        fixed = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"var\([^)]*\)", "", plot)))
        assert not fixed, f"colours that do not follow the theme: {fixed}"
        assert "DejaVu" not in plot


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.95, 1.7), (0.93, 2.1), (1.02, 3.2), (1.4, 9.0), (480, 520), (501, 9999), (30, 40000), (1, 1e9), (0.01, 2)],
)
def test_labels_of_a_logarithmic_axis_have_room(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    gaps = [math.log(b / a) / math.log(high / low) for a, b in itertools.pairwise(ticks)]
    assert min(gaps) > 0.12
    assert all(float(f"{tick:.2g}") == pytest.approx(tick) for tick in ticks), "not round"


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=9))
def test_labels_stand_apart_in_the_order_of_the_lines(heights: list[float]) -> None:
    named = {f"name{i}": height for i, height in enumerate(heights)}
    placed = spread_labels(named)
    order = sorted(named, key=lambda name: named[name])
    gaps = np.diff([placed[name] for name in order])
    assert (gaps > 0.99 * min(0.13, 1 / len(order))).all()
    assert all(-0.001 <= height <= 1.0 for height in placed.values())


def test_thinning_keeps_the_mean_and_the_last_step() -> None:
    curve = LossCurve(tuple(range(1, 1001)), tuple(float(i) for i in range(1000)))
    thin = thinned(curve, limit=60)
    assert len(thin.steps) <= 60
    assert thin.steps[-1] == 1000
    assert thin.losses[0] == pytest.approx(8.0)  # mean of 0 to 16
