"""Arms are compared on the problems that both have answered; missing rows are named, what may be chance is marked."""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.report_runs import answered, contents, graded, made, rows_of
from micota_fast.config.report import ReportConfig
from micota_fast.report.report import run
from micota_fast.report.tables import CORRECTED_MARK, MARK
from micota_fast.statistics.intervals import difference, macro_average
from micota_fast.statistics.paired import holm, mcnemar_exact, paired_bootstrap, sign_flip


class TestPaired:
    def test_differences_are_those_of_the_rows(self, paired: ReportConfig) -> None:
        markdown, numbers, html = made(paired)
        base, short = answered(0, 0.0), answered(1, 0.2)
        mid = [answered(2 + i, 1.0) for i in (0, 1, 2)]
        names = ("math", "aime")
        # Rows are taken in the order of their ids.
        order = {name: sorted(range(len(base[name])), key=lambda p, name=name: f"{name}-{p}") for name in names}
        of_short = [(short[k].astype(float) - base[k])[order[k]] for k in names]
        of_mid = [(np.mean([of[k] for of in mid], axis=0) - base[k])[order[k]] for k in names]
        both = [np.concatenate(pair, axis=1) for pair in zip(of_short, of_mid, strict=True)]
        low, high = paired_bootstrap(both)
        flips = sign_flip(both)
        found = {
            arm: [*(numbers["arms"][arm]["deltas"][name] for name in names), numbers["arms"][arm]["delta"]]
            for arm in paired.arms
        }
        exact = [mcnemar_exact(int((d > 0).sum()), int((d < 0).sum())) for d in of_short]
        p_values = [*exact, flips[2, 0], *flips[:, 1]]
        assert [of["p"] for row in found.values() for of in row] == pytest.approx(p_values, abs=1e-12)
        assert [of["p_holm"] for row in found.values() for of in row] == pytest.approx(holm(p_values), abs=1e-12)
        for row in range(3):
            # One seed each: what the bootstrap says.
            assert found["short"][row]["interval95"] == pytest.approx([low[row, 0], high[row, 0]], abs=1e-8)
            # Three seeds: the t interval of their mean added.
            sd = np.std([np.mean([of[k].mean() for k in names[row : row + 1] or names]) for of in mid], ddof=1)
            value, t = found["mid"][row]["value"], 4.30265 * sd / math.sqrt(3)
            expected = [value - math.hypot(value - low[row, 1], t), value + math.hypot(high[row, 1] - value, t)]
            assert found["mid"][row]["interval95"] == pytest.approx(expected, abs=1e-6)
        assert all(of["paired"] for row in found.values() for of in row)
        table = rows_of(markdown[markdown.index("**Difference to") :])
        assert list(table)[2:4] == ["short", "mid"]
        assert table["Arm"] == ["Arm", "math (n = 120)", "aime (n = 40)", "Average"]
        assert table["short"][3].startswith(f"{rows_of(markdown)['short (1 seed)'][2]}, p = ")
        assert "over the 6 tests of this table" in markdown
        assert "Δ is paired on the problems: see the table of differences." in markdown
        assert "npaired" not in markdown
        assert "Difference to the untouched student" in html
        assert re.search(r"<small><span>\[[^]]*\],</span> <span>p &lt; 0\.001</span></small>", html)
        assert "after Holm&#x27;s correction" in html

    def test_pairing_narrows_the_interval_of_arms_that_find_the_same_problems_hard(self, paired: ReportConfig) -> None:
        def width(numbers: dict[str, Any]) -> float:
            low, high = numbers["arms"]["short"]["delta"]["interval95"]
            return high - low

        _, numbers, _ = made(paired)
        for file in Path(paired.base).parent.glob("rows/*"):
            file.unlink()
        assert width(numbers) < 0.8 * width(made(paired)[1])

    def test_missing_rows_are_said_and_leave_the_arm_unpaired(self, paired: ReportConfig) -> None:
        (Path(paired.arms["short"][0]).parent / "rows" / "aime.jsonl").unlink()
        markdown, numbers, html = made(paired)
        short, mid, base = (numbers["arms"][arm] for arm in ("short", "mid", "base"))
        assert (short["delta"]["paired"], short["delta"]["p_holm"], mid["delta"]["paired"]) == (False, None, True)
        a, b = (
            macro_average([[of["benchmarks"][k]["mean"] for k in ("math", "aime")]], [120, 40]) for of in (short, base)
        )
        gap = difference(a, b)
        assert short["delta"]["interval95"] == pytest.approx([gap.low, gap.high])
        assert all(not delta["paired"] for delta in short["deltas"].values())
        assert "Δ is paired on the problems, except for short: see" in markdown
        assert "Unpaired (short): the graded rows of the arm or of the untouched student are not next to" in markdown
        assert "Unpaired (short)" in html
        assert "over the 3 tests of this table" in markdown
        assert rows_of(markdown[markdown.index("**Difference to") :])["short"][3].endswith("], unpaired")
        # Between the trained arms too; they stay as they were.
        assert not numbers["average_differences"]["mid"]["short"]["paired"]
        for file in Path(paired.base).parent.glob("rows/*"):
            file.unlink()
        markdown, numbers, _ = made(paired)
        assert "Δ is not paired: see the table of differences." in markdown
        assert "Unpaired (short, mid)" in markdown
        assert "McNemar" not in markdown
        assert "Holm" not in numbers["headline"]

    def test_arms_are_paired_with_each_other_without_the_bases_rows(self, paired: ReportConfig) -> None:
        before = made(paired)[1]["average_differences"]
        for file in Path(paired.base).parent.glob("rows/*"):
            file.unlink()
        _, numbers, _ = made(paired)
        gap = numbers["average_differences"]["mid"]["short"]
        assert gap == before["mid"]["short"]
        assert gap["paired"]
        assert not numbers["average_differences"]["mid"]["base"]["paired"]
        back = numbers["average_differences"]["short"]["mid"]
        assert back["interval95"] == [-bound for bound in reversed(gap["interval95"])]

    def test_same_bytes_from_rows_in_another_order_and_more_threads(self, paired: ReportConfig, tmp_path: Path) -> None:
        run(paired)
        first = contents(paired.out)
        for arm in ("base", "mid0"):
            for file in (tmp_path / arm / "rows").iterdir():
                file.write_text("".join(sorted(file.read_text().splitlines(keepends=True), reverse=True)))
        results = tmp_path / "mid0" / "results.json"
        data = json.loads(results.read_text())
        data["benchmarks"] = dict(reversed(data["benchmarks"].items()))
        results.write_text(json.dumps(data))
        program = (
            "import json, sys; from micota_fast.config.report import ReportConfig\n"
            "from micota_fast.report.report import run\n"
            "run(ReportConfig(**json.loads(sys.argv[1])))"
        )
        again = dataclasses.replace(paired, out=str(tmp_path / "again"))
        threads = {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
        command = [sys.executable, "-c", program, json.dumps(dataclasses.asdict(again))]
        subprocess.run(command, check=True, env=os.environ | threads)
        assert contents(again.out) == first

    def test_an_interval_clear_of_zero_is_not_enough_among_many_comparisons(self, tmp_path: Path) -> None:
        """15 problems won and 4 lost: p = 0.019, 0.077 as one of four."""
        base = np.arange(100)[:, None] < 54
        won = base ^ ((np.arange(100) >= 85) | (np.arange(100) < 4))[:, None]
        arms = {"mid": [graded(tmp_path / "won", {"math": won})]}
        arms |= {f"arm{i}": [graded(tmp_path / f"same{i}", {"math": base})] for i in range(3)}
        config = ReportConfig(
            title="t", out=str(tmp_path / "out"), base=graded(tmp_path / "base", {"math": base}), arms=arms
        )
        markdown, numbers, _ = made(config)
        delta = numbers["arms"]["mid"]["delta"]
        assert (delta["p"], delta["p_holm"]) == pytest.approx((mcnemar_exact(15, 4), 4 * mcnemar_exact(15, 4)))
        assert delta["interval95"][0] > 0
        assert rows_of(markdown)["mid (1 seed)"][2].startswith(f"+11.0 {CORRECTED_MARK} [")
        assert f"{CORRECTED_MARK} The 95% interval of Δ is clear of zero, but corrected" in markdown
        assert rows_of(markdown)["arm0 (1 seed)"][2].startswith(f"0.0 {MARK} [")
        assert "is not distinguishable from zero (95% interval +" in numbers["headline"]
        assert "p = 0.077 after Holm's correction" in numbers["headline"]
        assert numbers["winner"] is None
        # Of one benchmark the average is the same comparison: not counted, not shown twice.
        table = rows_of(markdown[markdown.index("**Difference to") :])
        assert table["Arm"] == ["Arm", "Average"]
        assert table["mid"][1].endswith("p = 0.077")
        _, numbers, _ = made(dataclasses.replace(config, arms={"mid": arms["mid"]}))
        assert "points above the untouched student's 54.0% (95%" in numbers["headline"]
        assert numbers["winner"] == "mid"

    def test_samples_of_a_problem_are_averaged(self, paired: ReportConfig, tmp_path: Path) -> None:
        several = answered(9, 0.5, samples=4)
        _, numbers, _ = made(dataclasses.replace(paired, arms={"mid": [graded(tmp_path / "avg", several)]}))
        copies = {name: np.repeat(right_PS, 4, axis=1) for name, right_PS in answered(0, 0.0).items()}
        config = dataclasses.replace(
            paired, base=graded(tmp_path / "copies", copies), arms={"mid": [graded(tmp_path / "avg", several)]}
        )
        assert made(config)[1]["arms"]["mid"]["delta"] == numbers["arms"]["mid"]["delta"], "copies are no new answers"
        delta = numbers["arms"]["mid"]["delta"]
        assert delta["value"] == pytest.approx(
            np.mean([several[k].mean() - answered(0, 0.0)[k].mean() for k in ("math", "aime")])
        )

    def test_several_answers_a_problem_have_a_table(self, paired: ReportConfig, tmp_path: Path) -> None:
        seeds = [answered(seed, 0.5, samples=6) for seed in (9, 10)]
        arms = {"mid": [graded(tmp_path / f"avg{i}", of) for i, of in enumerate(seeds)], "short": paired.arms["short"]}
        for path, majority in zip(arms["mid"], (0.5, 0.6), strict=True):  # as an evaluation has found it
            results = json.loads(Path(path).read_text())
            results["benchmarks"]["aime"]["majority"] = majority
            Path(path).write_text(json.dumps(results))
        markdown, numbers, html = made(dataclasses.replace(paired, arms=arms))
        both_PS = np.concatenate([of["aime"] for of in seeds], axis=1).astype(float)
        found = numbers["arms"]["mid"]["sampled"]["aime"]
        assert found["standard_error"] == pytest.approx(both_PS.mean(axis=1).std(ddof=1) / math.sqrt(40))
        passed = {
            k: np.mean([any(chosen) for of in seeds for row in of["aime"] for chosen in itertools.combinations(row, k)])
            for k in (1, 2, 4, 6)
        }
        assert {int(k): value for k, value in found["pass_at"].items()} == pytest.approx(passed)
        assert numbers["arms"]["short"]["sampled"] == {}
        rows = rows_of(markdown[markdown.index("**Several answers to a problem**") :])
        mean, error = both_PS.mean(), found["standard_error"]
        of_pass = macro_average([[(of["aime"].any(axis=1)).mean()] for of in seeds], [40])
        of_majority = macro_average([[0.5], [0.6]], [40])
        assert found["pass95"] == pytest.approx([of_pass.low, of_pass.high])
        assert found["majority95"] == pytest.approx([of_majority.low, of_majority.high])
        maj, pass_ = (f"[{100 * of.low:.1f}, {100 * of.high:.1f}]" for of in (of_majority, of_pass))
        shares = f"maj@6 55.0 {maj}, pass@6 {100 * passed[6]:.1f} {pass_}"
        assert rows["mid"][2] == f"{100 * mean:.1f} (avg@6, SE {100 * error:.1f}, {shares})"
        assert numbers["arms"]["mid"]["sampled"]["math"]["majority"] is None  # of an earlier version's results
        assert "maj@" not in rows["mid"][1]
        assert rows["short"] == ["short", "–", "–"]
        assert "Several answers to a problem" in html
        assert "Several answers" not in made(paired)[0]
