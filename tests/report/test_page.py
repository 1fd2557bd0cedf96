"""The page stands alone, is well-formed, and shows what is text as text."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.report_runs import Made, made, results
from micota_fast.config.report import ReportConfig


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

    def test_the_time_of_the_trainings_counts_what_was_before_each_resumption(
        self, config: ReportConfig, tmp_path: Path
    ) -> None:
        seconds = [1800.0, 3600.0, 900.0, 3600.0]  # resumed after the second row
        rows = ({"step": step, "loss": 1.0, "timing": {"seconds": of}} for step, of in enumerate(seconds, 1))
        path = tmp_path / "timed.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        _, _, html = made(dataclasses.replace(config, training={"mid": [str(path), str(path)]}))
        assert "<dt>training time</dt><dd>4.00 hours, 2 trainings</dd>" in html

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
        assert {len(re.split(r"(?<!\\)\|", line)) for line in tables} == {benchmarks + 5}
