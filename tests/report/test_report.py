"""The report: its numbers are the inputs', its marks are honest, its page stands alone and is the same every time."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import RECIPES
from helpers.report_runs import Made, contamination, contents, made, results, rows_of, written
from micota_fast.config import loader
from micota_fast.config.recipe import Recipe
from micota_fast.config.report import ClaimsConfig, ReportConfig
from micota_fast.errors import InputError
from micota_fast.report.inputs import LossCurve, load_inputs
from micota_fast.report.report import run
from micota_fast.report.tables import MARK
from micota_fast.statistics.intervals import wilson95


class TestNumbers:
    def test_main_table_equals_the_inputs(self, report: Made) -> None:
        markdown, _, _ = report
        rows = rows_of(markdown)
        assert rows["Arm"][1:] == [
            "Average (95% interval)",
            "Δ vs base (95% interval)",
            "gsm (n = 1000)",
            "aime (n = 200)",
        ]
        assert list(rows)[2:5] == ["base (untouched)", "short (2 seeds)", "**mid** (3 seeds)"]
        assert rows["base (untouched)"][1:] == ["30.0 [27.1, 33.4]", "–", "40.0 [37.0, 43.1]", "20.0 [15.0, 26.1]"]
        # 41.0 and 43.0: mean 42.0, sd 1.4; 20.0 and 22.0: mean 21.0; averages 30.5 and 32.5.
        assert rows["short (2 seeds)"][1].startswith("31.5 ± 1.4, [")
        assert rows["short (2 seeds)"][3:] == ["42.0 ± 1.4", "21.0 ± 1.4"]
        # 70, 71, 72 and 50, 51, 52: averages 60, 61, 62.
        assert rows["**mid** (3 seeds)"][3:] == ["71.0 ± 1.0", "51.0 ± 1.0"]

    def test_delta_spanning_zero_is_marked_and_the_clear_winner_is_bold(self, report: Made) -> None:
        markdown, numbers, html = report
        rows = rows_of(markdown)
        short, mid = rows["short (2 seeds)"], rows["**mid** (3 seeds)"]
        assert short[2].startswith(f"+1.5 {MARK} [−")
        assert MARK not in mid[2]
        assert f"{MARK} The 95% interval of Δ spans zero" in markdown
        assert numbers["arms"]["short"]["delta"]["spans_zero"] is True
        assert numbers["arms"]["mid"]["delta"]["spans_zero"] is False
        # Two seeds of sd 1.4 bound short's average to ±12.7 + Wilson, still 29.5 points below mid's.
        assert numbers["winner"] == "mid"
        assert "**61.0**" in mid[1]
        assert "**31.5**" not in markdown
        assert html.count("<b>61.0</b>") == 1

    def test_no_winner_is_bold_when_two_arms_are_level(self, config: ReportConfig, tmp_path: Path) -> None:
        level = [results(tmp_path / f"level{i}.json", {"gsm": 715 + i, "aime": 104}) for i in range(3)]
        markdown, numbers, html = made(dataclasses.replace(config, arms={**config.arms, "level": level}))
        assert numbers["winner"] is None
        table = markdown[markdown.index("| Arm") : markdown.index("**What the method")]
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
        assert rows_of(markdown)["**mid** (1 seed)"][3] == "70.0 [67.1, 72.8]"
        assert numbers["arms"]["mid"]["average"]["sd"] is None
        assert "Arms trained once say nothing about training noise" in numbers["headline_qualified"]

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

    def test_rounds_stand_one_after_another(self, config: ReportConfig, tmp_path: Path) -> None:
        first, last = tmp_path / "first.jsonl", tmp_path / "last.jsonl"
        first.write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "loss": 3.0}\n')
        last.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "loss": 1.0}\n')
        changed = dataclasses.replace(config, training={"mid": [str(last)]}, earlier_rounds={"mid": [[str(first)] * 2]})
        assert load_inputs(changed).training["mid"] == [
            LossCurve((1, 2, 3, 4, 5, 6, 7), (4.0, 3.0, 4.0, 3.0, 2.0, 1.5, 1.0))
        ]
        two_seeds = dataclasses.replace(changed, earlier_rounds={"mid": [[str(first)], [str(first)]]})
        with pytest.raises(InputError, match=r"earlier_rounds\.mid: expected one list for each seed in training\.mid"):
            load_inputs(two_seeds)


class TestChance:
    def test_it_stands_under_the_table_and_in_the_plots(self, config: ReportConfig) -> None:
        markdown, numbers, html = made(dataclasses.replace(config, chance={"gsm": 10.0, "aime": 20.0}))
        assert "Chance: 10.0 on gsm, 20.0 on aime, 15.0 on average." in markdown
        assert numbers["chance"] == {"gsm": 0.1, "aime": 0.2}
        assert html.count("dotted: chance.") == 2, "of the averages and of the lengths; benchmarks are read as these"
        assert "; chance 15.0%." in html, "the plot in words"

    def test_the_same_on_every_benchmark_is_said_once(self, config: ReportConfig) -> None:
        markdown, _, _ = made(dataclasses.replace(config, chance={"gsm": 25.0, "aime": 25.0}))
        assert "Chance: 25.0 on each benchmark, and so on average." in markdown

    def test_where_it_is_not_known_nothing_is_drawn(self, config: ReportConfig, report: Made) -> None:
        markdown, numbers, html = report
        assert numbers["chance"] == {}
        assert "hance" not in markdown.replace("is shown without a verdict", "").replace("Floor: chance", "").replace(
            "none at chance", ""
        )
        assert "dotted" not in html
        markdown, _, html = made(dataclasses.replace(config, chance={"gsm": 10.0}))
        assert "Chance: 10.0 on gsm; not known elsewhere." in markdown
        assert "all have one scale; dotted: chance, where known." in html
        assert html.count("dotted: chance") == 1

    def test_of_no_benchmark_of_the_report(self, config: ReportConfig) -> None:
        with pytest.raises(InputError, match=r"chance\.math: no such benchmark; there are gsm, aime"):
            run(dataclasses.replace(config, chance={"math": 10.0}))


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


class TestClaims:
    def test_stand_beside_what_was_measured(self, config: ReportConfig) -> None:
        claims = ClaimsConfig(source="a paper", deltas={"mid": 3.47, "short": -0.5})
        markdown, numbers, html = made(dataclasses.replace(config, claims=claims))
        assert re.search(
            r"^\| \*\*mid\*\* .* \*\*\+31\.0\*\* \[[^]]*\], published: \+3\.47 \| 71\.0", markdown, flags=re.M
        )
        assert "published: −0.5" in markdown
        assert "<span>published: +3.47</span></small>" in html
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


class TestFormerFiles:
    def test_those_of_a_former_report_go_and_others_stay(self, config: ReportConfig, tmp_path: Path) -> None:
        found = contamination(tmp_path / "contamination.json", long={}, mid={})
        run(dataclasses.replace(config, contamination=found))
        out = Path(config.out)
        others = [out / "plots" / "mine.svg", out / "plots" / "average.eps", out / "notes.csv"]
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


def test_same_bytes_twice_and_under_other_matplotlib_settings(config: ReportConfig, tmp_path: Path) -> None:
    run(config)
    first = contents(config.out)
    plots = (
        "tradeoff",
        "average",
        "benchmark0-gsm",
        "benchmark1-aime",
        "lengths",
        "perplexity",
        "loss0-short",
        "loss1-mid",
    )
    assert set(first) == {
        *("report.html", "answers.html", "report.json", "table.md", "table.tex", "table-compact.tex"),
        *("table.csv", "answers.csv", "corpora.csv"),
        *(f"plots/{name}.{kind}" for name in plots for kind in ("svg", "pdf", "png")),
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


@pytest.mark.parametrize("package", ["matplotlib", "latex2mathml"])
def test_without_a_package_of_the_extra(config: ReportConfig, package: str) -> None:
    program = (
        f"import json, sys; sys.modules['{package}'] = None\n"
        "from micota_fast.errors import InputError; from micota_fast.config.report import ReportConfig\n"
        "from micota_fast.report.report import run\n"
        "try: run(ReportConfig(**json.loads(sys.argv[1])))\n"
        "except InputError as error: print(error)"
    )
    command = [sys.executable, "-c", program, json.dumps(dataclasses.asdict(config))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "pip install 'micota-fast[report]'" in done.stdout
