"""The report: its numbers are the inputs', its marks are honest, its page stands alone and is the same every time."""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.report_runs import Made, contents, made, results, rows_of, written
from micota_fast.config.report import ReportConfig
from micota_fast.errors import InputError
from micota_fast.report.drawing import log_ticks
from micota_fast.report.inputs import LossCurve
from micota_fast.report.plots import thinned
from micota_fast.report.report import run
from micota_fast.report.tables import CORRECTED_MARK, MARK
from micota_fast.statistics.intervals import difference, macro_average, student_t95, wilson95
from micota_fast.statistics.paired import holm, mcnemar_exact, paired_bootstrap, sign_flip


@pytest.fixture
def config(tmp_path: Path) -> ReportConfig:
    """Inputs of one's own, to change."""
    return written(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """table.md, report.json and report.html of the unchanged inputs."""
    return made(written(tmp_path_factory.mktemp("report")))


class TestIntervals:
    def test_wilson_by_hand(self) -> None:
        # 8 of 10: centre (0.8 + z²/20) / (1 + z²/10), as in any textbook: 0.4902 to 0.9433.
        assert wilson95(0.8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
        low, high = wilson95(0.0, 20)
        assert low == 0.0
        assert high == pytest.approx(1.959964**2 / (20 + 1.959964**2), abs=1e-7)

    def test_one_seed_and_benchmark_is_wilson(self) -> None:
        estimate = macro_average([[0.3]], [50])
        assert (estimate.low, estimate.high) == pytest.approx(wilson95(0.3, 50))
        assert estimate.sd is None

    def test_student_t(self) -> None:
        # Printed tables of the two-sided 95% point.
        for degrees, expected in ((1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (20, 2.086), (60, 2.000)):
            assert student_t95(degrees) == pytest.approx(expected, abs=1.1e-3)

    def test_seeds_widen_by_their_own_interval(self) -> None:
        estimate = macro_average([[0.50], [0.52], [0.54]], [400])
        low, high = wilson95(0.52, 400)
        of_seeds = 4.30265 * 0.02 / math.sqrt(3)
        assert estimate.sd == pytest.approx(0.02)
        assert estimate.mean - estimate.low == pytest.approx(math.hypot(0.52 - low, of_seeds))
        assert estimate.high - estimate.mean == pytest.approx(math.hypot(high - 0.52, of_seeds))

    def test_average_weights_benchmarks_alike(self) -> None:
        estimate = macro_average([[0.2, 0.6]], [30, 1000])
        halves = [(0.2 - wilson95(0.2, 30)[0]) / 2, (0.6 - wilson95(0.6, 1000)[0]) / 2]
        assert estimate.mean == pytest.approx(0.4)
        assert estimate.below == pytest.approx(math.hypot(*halves))

    def test_difference_is_newcombes(self) -> None:
        # Newcombe 1998, Table II, method 10 for 56/70 - 48/80: 0.0524 to 0.3339.
        gap = difference(macro_average([[56 / 70]], [70]), macro_average([[48 / 80]], [80]))
        assert (gap.value, gap.low, gap.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
        assert not gap.spans_zero


class TestNumbers:
    def test_main_table_equals_the_inputs(self, report: Made) -> None:
        markdown, _, _ = report
        rows = rows_of(markdown)
        assert rows["Arm"][1:3] == ["gsm (n = 1000)", "aime (n = 200)"]
        assert list(rows)[2:5] == ["base (untouched)", "short (2 seeds)", "**mid** (3 seeds)"]
        assert rows["base (untouched)"][1:5] == ["40.0 [37.0, 43.1]", "20.0 [15.0, 26.1]", "30.0", "[27.1, 33.4]"]
        assert rows["base (untouched)"][5] == "–"
        # 41.0 and 43.0: mean 42.0, sd 1.4; 20.0 and 22.0: mean 21.0; averages 30.5 and 32.5.
        assert rows["short (2 seeds)"][1:4] == ["42.0 ± 1.4", "21.0 ± 1.4", "31.5 ± 1.4"]
        # 70, 71, 72 and 50, 51, 52: averages 60, 61, 62.
        assert rows["**mid** (3 seeds)"][1:3] == ["71.0 ± 1.0", "51.0 ± 1.0"]

    def test_delta_spanning_zero_is_marked_and_the_clear_winner_is_bold(self, report: Made) -> None:
        markdown, numbers, html = report
        rows = rows_of(markdown)
        short, mid = rows["short (2 seeds)"], rows["**mid** (3 seeds)"]
        assert short[5].startswith(f"+1.5 {MARK} [−")
        assert MARK not in mid[5]
        assert f"{MARK} The 95% interval of Δ spans zero" in markdown
        assert numbers["arms"]["short"]["delta"]["spans_zero"] is True
        assert numbers["arms"]["mid"]["delta"]["spans_zero"] is False
        # Two seeds of sd 1.4 bound short's average to ±12.7 + Wilson, still 29.5 points below mid's.
        assert numbers["winner"] == "mid"
        assert "**61.0**" in mid[3]
        assert "**31.5**" not in markdown
        assert html.count("<b>61.0</b>") == 1

    def test_no_winner_is_bold_when_two_arms_are_level(self, config: ReportConfig, tmp_path: Path) -> None:
        level = [results(tmp_path / f"level{i}.json", {"gsm": 715 + i, "aime": 104}) for i in range(3)]
        markdown, numbers, html = made(dataclasses.replace(config, arms={**config.arms, "level": level}))
        assert numbers["winner"] is None
        table = markdown[markdown.index("| Arm") : markdown.index("**Difference to")]
        assert "**" not in table
        assert "No average is in bold" in table
        assert not re.search(r"<td[^>]*><span><b>", html)
        assert "not distinguishable from level" in numbers["headline_qualified"]

    def test_headline_follows_the_numbers(self, config: ReportConfig, report: Made, tmp_path: Path) -> None:
        _, numbers, html = report
        assert numbers["headline"].startswith(
            "The mid arm averages 61.0% over 2 benchmarks, 31.0 points above the untouched student's 30.0% "
        )
        assert numbers["headline"] in html.replace("&#x27;", "'")
        worse = [results(tmp_path / f"worse{i}.json", {"gsm": 100 + i, "aime": 2}) for i in range(3)]
        _, numbers, _ = made(dataclasses.replace(config, arms={"short": config.arms["short"], "mid": worse}))
        assert " points below the untouched student's 30.0% " in numbers["headline"]
        assert "The highest average is that of short, 31.5%" in numbers["headline_qualified"]
        _, numbers, _ = made(dataclasses.replace(config, arms={"mid": config.arms["short"]}))
        assert "+1.5 points to the untouched student's 30.0% is not distinguishable from zero" in numbers["headline"]

    def test_one_seed_says_what_its_interval_leaves_out(self, config: ReportConfig) -> None:
        markdown, numbers, _ = made(dataclasses.replace(config, arms={"mid": config.arms["mid"][:1]}))
        assert rows_of(markdown)["**mid** (1 seed)"][1] == "70.0 [67.1, 72.8]"
        assert numbers["arms"]["mid"]["average"]["sd"] is None
        assert "Arms trained once say nothing of training noise" in numbers["headline_qualified"]

    def test_corpora_and_answers(self, report: Made) -> None:
        markdown, numbers, _ = report
        corpora = rows_of(markdown[markdown.index("**Training corpora**") :])
        assert corpora["long"] == ["long", "50", "40", "80.0%", "900.5", "900", "5.00"]
        assert "Rejected from mid: 9 wrong, 1 too long." in markdown
        answers = rows_of(markdown[markdown.index("**Length of the answers") :])
        # 2 benchmarks of 1200 problems: 8 of 1200 truncated, 4 without an answer, for each seed.
        assert answers["mid"] == ["mid", "50.0 ± 0.0", "0.7", "0.3", "0.0"]
        assert numbers["training"]["mid"]["final_loss"] == pytest.approx([2 / 30, 2 / 30])

    def test_corpora_without_counts_or_without_alignment(self, config: ReportConfig) -> None:
        corpora = {"mix": {"alignment": config.corpora["mid"]["alignment"]}}
        corpora["raw"] = {"counts": config.corpora["long"]["counts"]}
        markdown, _, _ = made(dataclasses.replace(config, corpora=corpora))
        rows = rows_of(markdown[markdown.index("**Training corpora**") :])
        assert rows["mix"] == ["mix", "–", "–", "–", "300.5", "300", "2.50"]
        assert rows["raw"][4:] == ["1", "1", "–"]
        assert "except raw: of its writer" in markdown

    def test_optional_fields_may_be_absent(self, config: ReportConfig, tmp_path: Path) -> None:
        bare = results(tmp_path / "bare.json", {"gsm": 700, "aime": 100})
        markdown, _, _ = made(dataclasses.replace(config, arms={"mid": [bare]}))
        assert rows_of(markdown[markdown.index("**Length of the answers") :])["mid"] == ["mid", "–", "–", "–", "–"]

    def test_several_answers_a_problem_do_not_narrow_the_interval(self, config: ReportConfig, tmp_path: Path) -> None:
        """16 answers to each of 200 problems are 200 problems, in the interval and in the headings; shares are of
        answers."""
        n = {"aime": 200}
        base = results(tmp_path / "one.json", {"aime": 50}, n, problems=200, truncated=20)
        sampled = results(tmp_path / "avg.json", {"aime": 800}, {"aime": 3200}, problems=200, truncated=320)
        markdown, numbers, html = made(dataclasses.replace(config, base=base, arms={"mid": [sampled]}))
        assert numbers["arms"]["mid"]["benchmarks"]["aime"]["interval95"] == pytest.approx(wilson95(0.25, 200))
        assert numbers["problems"] == {"aime": 200}
        assert "aime (n = 200)" in markdown
        assert "3200" not in html
        assert numbers["arms"]["mid"]["answers"]["truncated"] == pytest.approx(0.1)
        results(tmp_path / "avg.json", {"aime": 50}, n, problems=201)
        with pytest.raises(InputError, match=r"avg\.json: key 'benchmarks\.aime\.problems' is 201, more than"):
            run(dataclasses.replace(config, base=base, arms={"mid": [sampled]}))

    def test_metrics_may_hold_more_than_the_loss(self, config: ReportConfig, report: Made, tmp_path: Path) -> None:
        training = {}
        for arm, paths in config.training.items():
            rows = [json.loads(line) for line in Path(paths[0]).read_text().splitlines()]
            path = tmp_path / f"timed-{arm}.jsonl"
            timed = [row | {"timing": {"step_s": 0.1, "tokens_per_s": 10.0, "mfu": None}} for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in timed))
            training[arm] = [str(path), str(path)]
        _, numbers, _ = made(dataclasses.replace(config, training=training))
        assert numbers["training"] == report[1]["training"]

    def test_a_diverged_run_is_shown_not_refused(self, config: ReportConfig, tmp_path: Path) -> None:
        path = tmp_path / "diverged.jsonl"
        path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n')
        _, numbers, html = made(dataclasses.replace(config, training={"mid": [str(path)]}))
        assert numbers["training"]["mid"]["final_loss"] == [None]
        assert "Training loss of the mid arm: diverged." in html

    def test_a_skipped_step_is_no_divergence(self, config: ReportConfig, tmp_path: Path) -> None:
        path = tmp_path / "skipped.jsonl"
        rows = [{"step": s, "loss": 2.0, "grad_norm": 1.0, "timing": {"phase_s": {}}} for s in range(1, 201)]
        rows[197] |= {"loss": None, "grad_norm": None, "skipped": True}  # as the trainer writes it
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        _, numbers, html = made(dataclasses.replace(config, training={"mid": [str(path)]}))
        assert numbers["training"]["mid"] == {"steps": [200], "final_loss": [2.0], "final_loss_mean": 2.0}
        assert "Training loss of the mid arm: ends at 2.000." in html

    def test_thinning_keeps_the_mean_and_the_last_step(self) -> None:
        curve = LossCurve(tuple(range(1, 1001)), tuple(float(i) for i in range(1000)))
        thin = thinned(curve, limit=60)
        assert len(thin.steps) <= 60
        assert thin.steps[-1] == 1000
        assert thin.losses[0] == pytest.approx(8.0)  # mean of 0 to 16


Answers = dict[str, np.ndarray]  # benchmark -> right or not [problems, samples]


def graded(folder: Path, answers: Answers) -> str:
    """What an evaluation leaves in its folder: results.json and the rows behind it."""
    benchmarks = {}
    for name, right_PS in answers.items():
        of_all = {"problem": "?", "answer": "1", "completion": "…", "finish_reason": "stop", "prompt_tokens": 1}
        of_all |= {"completion_tokens": 1, "seed": None}
        rows = [
            {"id": f"{name}-{p}", "sample": s, "outcome": "correct" if right_PS[p, s] else "wrong"} | of_all
            for p, s in np.ndindex(*right_PS.shape)
        ]
        (folder / "rows").mkdir(parents=True, exist_ok=True)
        (folder / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        correct = int(right_PS.sum())
        counts = {"problems": len(right_PS), "n": right_PS.size, "correct": correct}
        benchmarks[name] = counts | {"accuracy": correct / right_PS.size}
    (folder / "results.json").write_text(json.dumps({"model": folder.name, "benchmarks": benchmarks}))
    return str(folder / "results.json")


def answered(seed: int, lift: float, samples: int = 1) -> Answers:
    """Answers to the same problems, hard or easy for all; `lift` says how good the model is."""
    ease = np.random.default_rng(0).normal(0.0, 2.0, 160)[:, None]
    right_PS = np.random.default_rng(seed + 1).logistic(size=(160, samples)) < ease + lift
    return {"math": right_PS[:120], "aime": right_PS[120:]}


class TestPaired:
    @pytest.fixture
    def paired(self, tmp_path: Path) -> ReportConfig:
        return ReportConfig(
            title="t",
            out=str(tmp_path / "out"),
            base=graded(tmp_path / "base", answered(0, 0.0)),
            arms={
                "short": [graded(tmp_path / "short", answered(1, 0.2))],
                "mid": [graded(tmp_path / f"mid{i}", answered(2 + i, 1.0)) for i in (0, 1, 2)],
            },
        )

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
        assert table["short"][3].startswith(f"{rows_of(markdown)['short (1 seed)'][5]}, p = ")
        assert "over the 6 tests of this table" in markdown
        assert "Δ is paired on the problems: see the table of differences." in markdown
        assert "npaired" not in markdown
        assert "Difference to the untouched student" in html
        assert re.search(r"<small>\[[^]]*\]</small><small>p &lt; 0\.001</small>", html)
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
        assert "Unpaired (short): the graded rows of the arm or of the untouched student are not beside" in markdown
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
        assert rows_of(markdown)["mid (1 seed)"][4].startswith(f"+11.0 {CORRECTED_MARK} [")
        assert f"{CORRECTED_MARK} The 95% interval of Δ is clear of zero, but corrected" in markdown
        assert rows_of(markdown)["arm0 (1 seed)"][4].startswith(f"0.0 {MARK} [")
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
        assert rows["mid"][2] == f"{100 * mean:.1f} (avg@6, SE {100 * error:.1f}, pass@6 {100 * passed[6]:.1f})"
        assert rows["short"] == ["short", "–", "–"]
        assert "Several answers to a problem" in html
        assert "Several answers" not in made(paired)[0]

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
    def test_rows_of_another_evaluation_are_refused(self, paired: ReportConfig, change: Any, expected: str) -> None:
        file = Path(paired.arms["mid"][1]).parent / "rows" / "aime.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
        with pytest.raises(InputError) as caught:
            run(paired)
        assert expected in str(caught.value)
        assert not Path(paired.out).exists()

    def test_unequal_numbers_of_samples_are_refused(self, paired: ReportConfig, tmp_path: Path) -> None:
        path = graded(tmp_path / "uneven", answered(5, 0.0, samples=2))
        file = tmp_path / "uneven" / "rows" / "aime.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows[1] |= {"id": "aime-39", "sample": 2}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(InputError, match=r"aime\.jsonl: problem 'aime-0' has 1 answers, others another number"):
            run(dataclasses.replace(paired, arms={"mid": [path]}))


class _Page(HTMLParser):
    """Open tags, ids, addresses and the text, as an HTML parser sees them."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._attributes(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at line {self.getpos()[0]} closes another element"

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        self.attributes.update(names)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")


class TestPage:
    def test_is_self_contained_and_well_formed(self, report: Made) -> None:
        _, _, html = report
        page = _Page()
        page.feed(html)
        page.close()
        assert page.open == []
        assert "svg" in page.tags
        assert page.tags.isdisjoint({"script", "link", "iframe", "object", "img", "base"})
        assert len(page.ids) == len(set(page.ids)), "an id stands twice"
        assert page.references, "the plots reuse clip paths and markers by reference"
        assert page.references.count("answers.html") == 1
        for reference in set(page.references) - {"answers.html"}:
            assert reference.startswith("#"), reference
            assert reference[1:] in page.ids
        assert "http" not in html
        assert "@import" not in html

    def test_text_is_escaped_and_notes_stand_verbatim(self, report: Made) -> None:
        _, _, html = report
        assert "<title>A &lt;test&gt; &amp; more</title>" in html
        assert "First tried &lt;b&gt;x&lt;/b&gt;." in html
        assert "Then\n  y." in html
        assert "<dt>torch</dt><dd>2.13.0</dd>" in html

    def test_every_plot_follows_the_theme(self, report: Made) -> None:
        _, _, html = report
        plots = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
        assert len(plots) == 1 + 2 + 2 + 2  # average, benchmarks, corpora, losses
        for plot in plots:
            assert 'role="img"' in plot
            assert "<style" not in plot
            assert "var(--muted, #667079)" in plot
            fixed = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"var\([^)]*\)", "", plot)))
            assert not fixed, f"colours that do not follow the theme: {fixed}"
            assert "DejaVu" not in plot

    def test_same_bytes_twice_and_under_other_matplotlib_settings(self, config: ReportConfig, tmp_path: Path) -> None:
        run(config)
        first = contents(config.out)
        plots = ("average", "benchmark0-gsm", "benchmark1-aime", "lengths", "perplexity", "loss0-short", "loss1-mid")
        assert set(first) == {
            *("report.html", "answers.html", "report.json", "table.md", "table.tex"),
            *("table.csv", "answers.csv", "corpora.csv"),
            *(f"plots/{name}.{kind}" for name in plots for kind in ("svg", "png")),
        }
        again = dataclasses.replace(config, out=str(tmp_path / "again"))
        program = (
            "import json, sys, matplotlib; matplotlib.rcParams.update({'lines.linewidth': 9, 'font.size': 20,"
            " 'savefig.facecolor': 'red', 'axes.grid': True})\n"
            "from micota_fast.config.report import ReportConfig; from micota_fast.report.report import run\n"
            "run(ReportConfig(**json.loads(sys.argv[1])))"
        )
        subprocess.run([sys.executable, "-c", program, json.dumps(dataclasses.asdict(again))], check=True)
        assert contents(again.out) == first

    @pytest.mark.parametrize("name", ["<b>x", "--><script>alert(1)</script>", "\"' onload=x &amp;"])
    def test_names_are_text(self, name: str, config: ReportConfig, tmp_path: Path) -> None:
        n = {name: 100, "other": 50}
        config = dataclasses.replace(
            config,
            base=results(tmp_path / "b.json", {name: 10, "other": 5}, n),
            arms={name: [results(tmp_path / "x.json", {name: 20, "other": 5}, n)]},
            corpora={name: config.corpora["mid"]},
            training={name: config.training["mid"]},
            provenance={name: name},
        )
        _, _, html = made(config)
        page = _Page()
        page.feed(html)
        page.close()
        assert page.open == []
        assert page.tags.isdisjoint({"script"})
        assert "<b>x" not in html
        assert "--><" not in html
        assert "onload" not in page.attributes

    @pytest.mark.parametrize(
        ("low", "high"),
        [(0.95, 1.7), (0.93, 2.1), (1.02, 3.2), (1.4, 9.0), (480, 520), (501, 9999), (30, 40000), (1, 1e9), (0.01, 2)],
    )
    def test_labels_of_a_logarithmic_axis_have_room(self, low: float, high: float) -> None:
        ticks = log_ticks(low, high)
        assert 3 <= len(ticks) <= 8
        assert all(low <= tick <= high for tick in ticks)
        gaps = [math.log(b / a) / math.log(high / low) for a, b in itertools.pairwise(ticks)]
        assert min(gaps) > 0.12
        assert all(float(f"{tick:.2g}") == pytest.approx(tick) for tick in ticks), "not round"

    @pytest.mark.parametrize("benchmarks", [1, 8])
    def test_awkward_inputs(self, benchmarks: int, tmp_path: Path) -> None:
        n = {f"benchmark|{i} <with> $a_long$ name": 3 + i for i in range(benchmarks)}
        none = dict.fromkeys(n, 0)
        name = "mid-cot-from-a-dare-merged-teacher-assistant-$0.5$|x"
        config = ReportConfig(
            title="t",
            out=str(tmp_path / "deep" / "out"),
            base=results(tmp_path / "base.json", none, n),
            arms={
                name: [results(tmp_path / "a.json", none, n), results(tmp_path / "b.json", n, n)],
                **{f"arm{i}": [results(tmp_path / f"arm{i}.json", none, n)] for i in range(9)},
            },
        )
        markdown, numbers, html = made(config)
        page = _Page()
        page.feed(html)
        assert page.open == []
        assert numbers["arms"][name]["average"]["interval95"] == [0.0, 1.0]
        assert numbers["arms"]["arm0"]["average"]["interval95"][1] > 0.1, "0 of few is not certain"
        tables = [line for line in markdown.splitlines() if line.startswith("| ")][: 2 + 10]
        assert {len(re.split(r"(?<!\\)\|", line)) for line in tables} == {benchmarks + 6}


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
        path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
        self.check(config, f"{path}:2: not a JSON object")
        path.write_text("")
        self.check(config, f"{path}: no rows")

    def test_files_and_arms(self, config: ReportConfig, tmp_path: Path) -> None:
        self.check(dataclasses.replace(config, base=str(tmp_path / "gone.json")), "gone.json: cannot be read")
        self.check(dataclasses.replace(config, arms={"mid": []}), "arms.mid: no results.json given")
        self.check(dataclasses.replace(config, arms={"base": config.arms["mid"]}), "arms.base")

    def test_without_matplotlib(self, config: ReportConfig) -> None:
        program = (
            "import json, sys; sys.modules['matplotlib'] = None\n"
            "from micota_fast.errors import InputError; from micota_fast.config.report import ReportConfig\n"
            "from micota_fast.report.report import run\n"
            "try: run(ReportConfig(**json.loads(sys.argv[1])))\n"
            "except InputError as error: print(error)"
        )
        command = [sys.executable, "-c", program, json.dumps(dataclasses.asdict(config))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert "pip install 'micota-fast[report]'" in done.stdout
