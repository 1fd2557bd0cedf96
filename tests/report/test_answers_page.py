"""answers.html: what it holds is what the rows say, nothing in a row can act, and it is usable in a real Chromium."""

import base64
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from helpers.chromium import Tab, browsing
from helpers.report_runs import write_evaluation
from micota_fast.config.report import ReportConfig
from micota_fast.errors import InputError
from micota_fast.evaluation.results import OUTCOMES, GradedAnswer, ProtocolVerdict
from micota_fast.report import answers
from micota_fast.report.report import run

INJECTED = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "<!-- <script> \u2028 alert(3) \u2029",
    "]]></style><svg onload=alert(4)>",
    "\\u003cscript>alert(5)</script> &lt;b&gt; &amp;",
    "odd characters: \x00 and \x1b[31m, ‮backwards",
]
SIZES = {"AIME 2024": 6, "gsm/8k": 24}


def evaluated(folder: Path, right: dict[tuple[str, int], bool], texts: list[str], samples: int = 1) -> str:
    """Write an evaluation in which what is not in `right` is wrong, each ninth truncated."""
    rows: dict[str, list[GradedAnswer]] = {name: [] for name in SIZES}
    for name, size in SIZES.items():
        for place in range(size):
            for sample in range(samples):
                correct = right.get((name, place), False)
                outcome = "correct" if correct else "truncated" if place % 9 == 8 else "wrong"
                written = texts[(place + sample) % len(texts)]
                paper = correct if place else not correct  # on the first problem the rules differ
                row = GradedAnswer(
                    id=f"{name}-{place}",
                    sample=sample,
                    problem=f"What is {place} + 1?\n{INJECTED[place % len(INJECTED)] if place < 6 else ''}".strip(),
                    answer=str(place + 1),
                    completion=written,
                    finish_reason="length" if outcome == "truncated" else "stop",
                    prompt_tokens=7,
                    completion_tokens=1000 + place,
                    seed=None,
                    correct=correct,
                    outcome=outcome,
                    extracted=None if outcome == "truncated" else str(place + 1 if correct else place),
                    protocols={"strict": ProtocolVerdict(correct), "paper": ProtocolVerdict(paper)},
                )
                rows[name].append(row)
    return write_evaluation(folder, rows)


def written(folder: Path) -> ReportConfig:
    """Base right on 5 problems; mid, in two runs, on those and 4 more; wide answers several times."""
    easy = {("gsm/8k", place): True for place in range(1, 6)}
    more = easy | {("gsm/8k", place): True for place in range(10, 14)}
    return ReportConfig(
        title="A <test> & more",
        out=str(folder / "out"),
        base=evaluated(folder / "base", easy, INJECTED),
        arms={
            "mid": [evaluated(folder / f"mid{seed}", more, ["a needle in hay", "x" * 400]) for seed in (0, 1)],
            "wide": [evaluated(folder / "wide", {}, ["short", "long line " * 400], samples=2)],
        },
    )


def data_of(page: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert len(found) == 1
    data: dict[str, Any] = json.loads(found[0])
    return data


def made(config: ReportConfig) -> str:
    run(config)
    return (Path(config.out) / "answers.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ReportConfig:
    config = written(tmp_path_factory.mktemp("answers"))
    run(config)
    return config


@pytest.fixture(scope="module")
def page(config: ReportConfig) -> str:
    return (Path(config.out) / "answers.html").read_text(encoding="utf-8")


class TestData:
    def test_is_what_the_rows_say(self, page: str) -> None:
        data = data_of(page)
        assert [arm["name"] for arm in data["arms"]] == ["base", "mid", "wide"]
        assert [arm["samples"] for arm in data["arms"]] == [1, 1, 2]
        assert data["arms"][1]["runs"] == ["../mid0/rows", "../mid1/rows"]
        assert data["benchmarks"][1] == {"name": "gsm/8k", "file": "gsm_8k.jsonl"}
        assert len(data["problems"]) == 30
        # Natural order: 10 after 9, not after 1.
        assert [problem[1] for problem in data["problems"][6:18]] == [f"gsm/8k-{place}" for place in range(12)]
        benchmark, name, prompt, gold, (base, mid, wide) = data["problems"][6 + 8]
        assert (benchmark, name, prompt, gold) == (1, "gsm/8k-8", "What is 8 + 1?", "9")
        names = [outcome["name"] for outcome in data["outcomes"]]
        run_, sample, outcome, extracted, tokens, finish, text, others = base[0]
        assert (run_, sample, names[outcome], extracted, tokens) == (0, 0, "truncated", None, 1008)
        assert (data["finishes"][finish], text, others) == ("hit the token limit", INJECTED[2], None)
        assert [answer[:2] for answer in mid] == [[0, 0], [1, 0]]
        assert [answer[:2] for answer in wide] == [[0, 0], [0, 1]]
        assert data["problems"][6][4][0][0][7] == {"paper": True}, "where another protocol sees it otherwise"

    def test_every_outcome_of_an_evaluation_has_a_name(self) -> None:
        assert tuple(answers.OUTCOMES) == OUTCOMES

    def test_nothing_in_a_row_ends_the_data(self, page: str) -> None:
        assert page.count("</script>") == 2
        assert page.count("<script") == 2
        assert "<img" not in page
        assert "\u2028" not in page
        texts = {answer[6] for problem in data_of(page)["problems"] for answer in problem[4][0]}
        assert texts == set(INJECTED)

    def test_only_our_script_and_style_are_allowed(self, page: str) -> None:
        policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
        assert policy is not None
        assert page.index("Content-Security-Policy") < page.index("<style")
        for tag in ("script", "style"):
            content = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
            assert len(content) == 1
            digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy[1]
        assert "default-src 'none'" in policy[1]
        assert "unsafe" not in policy[1]
        script = (files("micota_fast.report") / "answers.js").read_text()
        for sink in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval", "Function("):
            assert sink not in script

    def test_long_answers_are_cut_so_that_the_page_has_room(
        self, config: ReportConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(answers, "ROOM", 60_000)
        page = made(dataclasses.replace(config, out=str(tmp_path / "out")))
        cut = [a[6] for p in data_of(page)["problems"] for a in p[4][2] if isinstance(a[6], list)]
        assert len(cut) == 30, "each problem has one long answer, and the short ones stay whole"
        start, omitted, end = cut[0]
        assert len(start) == len(end)
        assert omitted == len("long line " * 400) - 2 * len(start)
        assert ("long line " * 400).startswith(start)
        assert ("long line " * 400).endswith(end)
        assert f"only the first and last {len(start):,} characters are in this page" in page
        script = page[page.index('id="data">') : page.index("<script>")]
        assert 0.6 * 60_000 < len(script.encode()) < 1.05 * 60_000, "the room is used, not exceeded"

    def test_same_bytes_from_rows_in_another_order(self, page: str, tmp_path: Path) -> None:
        again = written(tmp_path)
        for file in tmp_path.glob("*/rows/*.jsonl"):
            file.write_bytes(b"".join(sorted(file.read_bytes().splitlines(keepends=True), reverse=True)))
        assert made(again) == page

    def test_without_rows_it_says_so(self, tmp_path: Path) -> None:
        config = written(tmp_path)
        (tmp_path / "mid1" / "rows" / "gsm_8k.jsonl").unlink()
        page = made(config)
        assert "<li>mid: beside <code>../mid1/results.json</code></li>" in page
        assert all(len(problem[4][1]) == 1 for problem in data_of(page)["problems"])

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (
                {"outcome": "correct", "finish_reason": "odd"},
                "finish_reason' must be one of stop, length, abort, found",
            ),
            ({"outcome": "fine"}, "key 'outcome' must be one of correct, wrong,"),
            ({"extracted": 7}, "key 'extracted' must be a string, found 7"),
            ({"protocols": {"paper": True}}, "key 'protocols.paper' must be an object, found true"),
            ({"completion": None}, "key 'completion' (a string) is missing"),
            ({"answer": "else"}, "problem 'gsm/8k-7' or its gold answer differs"),
        ],
    )
    def test_bad_rows_are_named(self, change: dict[str, Any], expected: str, tmp_path: Path) -> None:
        config = written(tmp_path)
        file = tmp_path / "mid0" / "rows" / "gsm_8k.jsonl"
        rows = [json.loads(line) for line in file.read_bytes().splitlines()]
        changed = {"outcome": "wrong"} | change if "outcome" not in change else change
        rows[7] |= changed if changed["outcome"] != "correct" else changed | {"outcome": "wrong"}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(InputError) as caught:
            run(config)
        assert expected in str(caught.value)
        assert "gsm_8k.jsonl" in str(caught.value)
        assert not Path(config.out).exists(), "nothing is written from bad inputs"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("chromium") / "profile") as tab:
        yield tab


STATUS = "document.getElementById('status').textContent"
FOCUS = "(e => e.id || e.getAttribute('data-arm') || e.className || e.tagName)(document.activeElement)"


def titles(tab: Tab) -> list[str]:
    found: list[str] = tab.evaluate("[...document.querySelectorAll('#problems h3')].map(e => e.textContent)")
    return found


def tab_to(tab: Tab, expression: str) -> None:
    """Press Tab until the element has the focus."""
    for _ in range(60):
        if tab.evaluate(f"document.activeElement === {expression}"):
            return
        tab.press("Tab")
    raise AssertionError(f"Tab never reaches {expression}")


FORMULAS = [
    r"So $x^2 + 1 = 5$ and \[\frac{-b \pm \sqrt{b^2-4ac}}{2a}\] hence \boxed{\dfrac{3}{4}}.",
    r"It costs $5 and $6; $\href{javascript:alert(1)}{x}$ and $\def\a{\a\a}\a$, <b>bold</b> $\text{<img src=x>}$.",
    "an unclosed $x^2 " + "y" * 50_000,
    r"$" + "{" * 300 + "}" * 300 + "$ and " + r"\boxed{" * 5_000,
    r"\begin{array}{cc $\begin{array}$ $$\begin{aligned} a &= b \\ &= c \end{aligned}$$",
    r"$\begin{pmatrix} " + " & ".join(map(str, range(100, 160))) + r"\end{pmatrix}$",
]


@pytest.fixture
def answers_tab(tab: Tab, config: ReportConfig) -> Tab:
    tab.open(Path(config.out) / "answers.html")
    return tab


class TestInChromium:
    def test_opens_clean_and_alone(self, tab: Tab, config: ReportConfig) -> None:
        for name in ("report.html", "answers.html"):
            file = Path(config.out) / name
            tab.open(file)
            assert tab.complaints == []
            assert tab.requests == [file.as_uri()]

    @pytest.mark.parametrize("width", [390, 1280])
    @pytest.mark.parametrize("name", ["report.html", "answers.html"])
    def test_does_not_scroll_sideways(self, tab: Tab, config: ReportConfig, name: str, width: int) -> None:
        tab.open(Path(config.out) / name, width)
        assert tab.evaluate("innerWidth") == width
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        over = (
            "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, .skip') && "
            "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert tab.evaluate(over) == []

    def test_what_a_model_wrote_stays_text(self, answers_tab: Tab) -> None:
        assert answers_tab.evaluate("document.querySelectorAll('main img, main svg, #problems script').length") == 0
        shown = answers_tab.evaluate("[...document.querySelectorAll('#problems .arm-0 .text')].map(e => e.textContent)")
        expected = INJECTED
        assert shown[:6] == expected
        assert answers_tab.evaluate("document.scripts.length") == 2
        # And were it put in as markup, the policy would not let it run.
        answers_tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
        answers_tab.evaluate("new Promise(done => setTimeout(done, 200))")
        assert answers_tab.evaluate("typeof window.ran") == "undefined"
        refused = " ".join(answers_tab.complaints)
        assert "Executing inline event handler violates" in refused
        assert "/x' violates the following Content Security Policy directive" in refused, "nor load anything"

    @pytest.mark.parametrize("width", [390, 1280])
    def test_formulas_are_drawn_and_hostile_ones_stay_text(self, tab: Tab, tmp_path: Path, width: int) -> None:
        base = evaluated(tmp_path / "base", {}, FORMULAS)
        config = ReportConfig(title="Formulas", out=str(tmp_path / "out"), base=base, arms={"one": [base]})
        page = made(config)
        assert made(config) == page
        tab.open(tmp_path / "out" / "answers.html", width)
        assert tab.complaints == []
        texts = "[...document.querySelectorAll('#problems .arm-0 .text')]"
        titles = f"{texts}.slice(0, 6).map(e => [...e.querySelectorAll('.formula')].map(f => f.title))"
        assert tab.evaluate(titles) == [
            ["$x^2 + 1 = 5$", r"\[\frac{-b \pm \sqrt{b^2-4ac}}{2a}\]", r"\boxed{\dfrac{3}{4}}"],
            [r"$\href{javascript:alert(1)}{x}$", r"$\text{<img src=x>}$"],
            [],
            [],
            [r"$$\begin{aligned} a &= b \\ &= c \end{aligned}$$"],
            [FORMULAS[5]],
        ]
        shown = tab.evaluate(f"{texts}.slice(0, 6).map(e => e.textContent)")
        assert shown[1].startswith("It costs $5 and $6; x and ")
        assert shown[2:4] == FORMULAS[2:4], "whole, as they are written"
        drawn = (
            "(e => [e.getBoundingClientRect().height > 25, e.namespaceURI])(document.querySelector('#problems mfrac'))"
        )
        assert tab.evaluate(drawn) == [True, "http://www.w3.org/1998/Math/MathML"]
        assert tab.evaluate("document.querySelectorAll('#problems :is(img, b b, a, [href], [style])').length") == 0
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(f"{texts}[5].tabIndex") == 0, "what is too wide scrolls, by keyboard as well"

    def test_problems_come_a_page_at_a_time(self, answers_tab: Tab) -> None:
        tab = answers_tab
        assert tab.evaluate(STATUS) == "30 of 30 problems; showing 1 to 10"
        assert len(titles(tab)) == 10
        tab_to(tab, "document.querySelector('.pager .next')")
        tab.press("Enter")
        assert titles(tab)[0] == "gsm/8k: gsm/8k-4"
        assert tab.evaluate(STATUS) == "30 of 30 problems; showing 11 to 20"
        assert tab.evaluate(FOCUS) == "found", "the focus goes to the heading above the new problems"
        tab_to(tab, "document.querySelector('.pager .previous')")
        tab.press("Space")
        assert titles(tab)[0] == "AIME 2024: AIME 2024-0"

    def test_filters_by_keyboard_alone(self, answers_tab: Tab) -> None:
        tab = answers_tab
        tab.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        tab_to(tab, "document.getElementById('benchmark')")
        tab.press("ArrowDown", "ArrowDown")
        assert tab.evaluate(STATUS) == "24 of 30 problems; showing 1 to 10"
        order = []
        for _ in range(9):
            tab.press("Tab")
            order.append(tab.evaluate("document.activeElement.labels?.[0]?.innerText.split('\\n')[0].trim() ?? ''"))
        assert order == ["Text", "base", "mid", "wide", "base", "mid", "wide", "", ""]
        # Right under mid, not right under base: the last two steps went to Clear and to Next.
        tab.press(*["Shift+Tab"] * 7)
        assert tab.evaluate("document.activeElement.dataset.arm") == "0"
        tab.press(*"not")
        assert tab.evaluate("document.activeElement.selectedOptions[0].textContent") == "not right"
        tab.press("Tab")
        tab.press("ArrowDown")
        assert tab.evaluate("document.activeElement.selectedOptions[0].textContent") == "always right"
        assert tab.evaluate(STATUS) == "4 of 30 problems"
        assert titles(tab) == [f"gsm/8k: gsm/8k-{place}" for place in range(10, 14)]
        signs = tab.evaluate("[...document.querySelectorAll('.problem:first-child .verdict')].map(e => e.innerText)")
        assert signs[:2] == ["✗ wrong", "✓ right · runs 1, 2"]
        # An arm's column goes by its box, and the search waits for no key but the last.
        tab_to(tab, "document.querySelector('input[data-arm=\"2\"]')")
        tab.press("Space")
        assert tab.evaluate("document.querySelectorAll('.problem:first-child .arm').length") == 2
        tab.press(*["Shift+Tab"] * 6)
        assert tab.evaluate(FOCUS) == "text"
        tab.press(*"NEEDLE in")
        tab.press(*" hell")
        tab.wait_for(f"{STATUS} === 'No problem of 30 fits. Loosen or clear the filters.'")
        assert titles(tab) == []
        tab_to(tab, "document.querySelector('button[type=reset]')")
        tab.press("Enter")
        tab.wait_for(f"{STATUS} === '30 of 30 problems; showing 1 to 10'")
        assert tab.evaluate("document.querySelectorAll('.problem:first-child .arm').length") == 3

    def test_equal_answers_of_several_runs_stand_once(self, answers_tab: Tab) -> None:
        verdicts = "[...document.querySelectorAll('#problems .arm-1 .verdict')].map(e => e.innerText)"
        assert answers_tab.evaluate(verdicts)[0] == "✗ wrong · runs 1, 2"
        of_wide = "[...document.querySelectorAll('.problem:first-child .arm-2 .verdict')].map(e => e.innerText)"
        assert answers_tab.evaluate(of_wide) == ["✗ wrong · sample 1", "✗ wrong · sample 2"], "their texts differ"

    def test_the_address_holds_the_filters_and_brings_them_back(self, tab: Tab, config: ReportConfig) -> None:
        file = Path(config.out) / "answers.html"
        tab.open(file)
        tab.evaluate(
            "(e => { e.value = 'none'; e.dispatchEvent(new Event('input', {bubbles: true})) })"
            "(document.querySelector('select[data-arm=\"1\"]'))"
        )
        tab.evaluate("document.querySelector('input[data-arm=\"2\"]').click()")
        tab.evaluate("document.querySelector('.next').click()")
        assert tab.evaluate("location.hash") == "#outcome=none%3Amid&hidden=wide&page=2"
        told = tab.evaluate(STATUS), titles(tab)
        tab.evaluate("location.hash = ''")
        tab.wait_for(f"{STATUS} === '30 of 30 problems; showing 1 to 10'")
        tab.evaluate("location.hash = 'outcome=none%3Amid&hidden=wide&page=2'")
        tab.wait_for("document.querySelectorAll('.problem:first-child .arm').length === 2")
        assert (tab.evaluate(STATUS), titles(tab)) == told
        tab.evaluate("location.hash = 'benchmark=nowhere&outcome=none:nobody&page=99'")
        tab.wait_for(f"{STATUS} === '30 of 30 problems; showing 21 to 30'")
        assert tab.complaints == []

    def test_the_filters_stand_in_one_row(self, answers_tab: Tab) -> None:
        tops = "new Set([benchmark, text, ...document.querySelectorAll('legend')].map(e => Math.round("
        tops += "e.closest('div, fieldset').getBoundingClientRect().top))).size"
        assert answers_tab.evaluate(f"({tops})") == 1

    def test_the_count_is_announced(self, answers_tab: Tab) -> None:
        tab = answers_tab
        tree = tab.call("Accessibility.getFullAXTree")["nodes"]

        def having(role: str) -> list[dict[str, Any]]:
            return [node for node in tree if node.get("role", {}).get("value") == role and not node["ignored"]]

        (status,) = having("status")
        live = {of["name"]: of["value"]["value"] for of in status["properties"]}
        assert live["live"] == "polite"
        for landmark in ("banner", "main", "search"):
            assert len(having(landmark)) == 1, landmark
        assert len(having("navigation")) == 2
        assert {node["name"]["value"] for node in having("navigation")} == {
            "Pages, above the problems",
            "Pages, below the problems",
        }
        for role in ("combobox", "searchbox", "checkbox", "button", "article"):
            named = [node["name"]["value"] for node in having(role)]
            assert named, role
            assert all(named), role
        # Texts that scroll can be focused, others are no stops on the way.
        focusable = "(e.tabIndex === 0) === (e.scrollHeight > e.clientHeight + 1)"
        assert tab.evaluate(f"[...document.querySelectorAll('.text')].every(e => {focusable})")
        assert tab.evaluate("document.querySelectorAll('.text[tabindex]').length") > 0

    def test_all_that_is_filtered_is_printed(self, answers_tab: Tab) -> None:
        tab = answers_tab
        count = f"[document.querySelectorAll('h3').length, {STATUS}]"
        tab.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = {count} }})")
        tab.evaluate("(e => { e.value = '1'; e.dispatchEvent(new Event('input', {bubbles: true})) })(benchmark)")
        pdf = tab.printed()
        assert pdf.startswith(b"%PDF")
        assert tab.evaluate("window.printed") == [24, "24 of 30 problems"]
        assert len(titles(tab)) == 10, "back to a page at a time"
        tab.call("Emulation.setEmulatedMedia", media="print")
        hidden = "[...document.querySelectorAll('form, .pager, #files, .skip')].every(e => e.offsetParent === null)"
        assert tab.evaluate(hidden)
        assert tab.evaluate("[view.offsetParent !== null, view.textContent]") == [True, "Shown: gsm/8k."]
        assert tab.evaluate("getComputedStyle(document.querySelector('.text')).maxHeight") == "none"
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.call("Emulation.setEmulatedMedia", media="")

    def test_nothing_moves(self, answers_tab: Tab) -> None:
        moving = (
            "[...document.querySelectorAll('*')].filter(e => { const s = getComputedStyle(e); return "
            "s.animationName !== 'none' || s.transitionDuration !== '0s' || s.scrollBehavior !== 'auto' }).length"
        )
        assert answers_tab.evaluate(moving) == 0

    def test_without_javascript_it_says_where_the_rows_lie(self, tab: Tab, config: ReportConfig) -> None:
        tab.call("Emulation.setScriptExecutionDisabled", value=True)
        try:
            tab.open(Path(config.out) / "answers.html")
            tree = tab.call("Accessibility.getFullAXTree")["nodes"]
            text = " ".join(str(node.get("name", {}).get("value", "")) for node in tree if not node["ignored"])
            assert "JavaScript, which is switched off here" in text
            assert "../mid1/rows/" in text
            assert "Clear filters" not in text
        finally:
            tab.call("Emulation.setScriptExecutionDisabled", value=False)

    def test_without_any_rows(self, tab: Tab, tmp_path: Path) -> None:
        config = written(tmp_path)
        for file in tmp_path.glob("*/rows/gsm_8k.jsonl"):
            file.unlink()
        run(config)
        tab.open(Path(config.out) / "answers.html")
        assert tab.complaints == []
        assert tab.evaluate(STATUS) == "Nothing to show: no graded rows were at hand."

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("name", ["report.html", "answers.html"])
    def test_axe_finds_nothing(self, tab: Tab, config: ReportConfig, name: str, scheme: str) -> None:
        if not os.environ.get("MICOTA_REQUIRE_CHROMIUM"):
            pytest.importorskip("axe_core_python")
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        tab.open(Path(config.out) / name)
        tab.evaluate((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8") + "; 0")
        found = tab.evaluate(
            "axe.run().then(r => [r.violations.map(v => [v.id, v.nodes.map(n => n.html)]), r.passes.length])"
        )
        tab.call("Emulation.setEmulatedMedia", features=[])
        violations, passes = found
        assert violations == []
        assert passes > 15
