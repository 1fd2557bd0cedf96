"""README and docs: links lead somewhere, and the first page stays short."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from helpers.markdown import PAGES, anchors, count_words, links
from helpers.paths import ROOT

LINKED = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "tests/README.md"))]
LINKED += sorted((ROOT / "micota_fast").rglob("*.md"))


def dead(page: Path) -> list[str]:
    found = []
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_anchors_lead_somewhere(page: Path) -> None:
    assert dead(page) == []


def test_dead_links_and_anchors_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `heading`, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](other.md) [b](other.md#a-heading-here) [c](#top) [d](https://example.org/x) `[e](code.md)`\n"
        "[f](gone.md) [g](other.md#gone) [h](#gone)\n```bash\n[i](in-code.md)\n```\n"
    )
    assert dead(page) == ["gone.md", "other.md#gone", "#gone"]


def test_pages_named_in_code_and_examples_exist() -> None:
    read = [ROOT / "pyproject.toml"]
    for pattern in ("micota_fast/**/*.py", "micota_fast/**/*.yaml", "kernels/*.py", "examples/*", "scripts/*"):
        read += ROOT.glob(pattern)
    named = {
        (str(file.relative_to(ROOT)), name)
        for file in read
        if file.is_file()
        for name in re.findall(r"\bdocs/[\w-]+\.\w+", file.read_text(encoding="utf-8"))
    }
    assert len(named) >= 2
    assert not [(file, name) for file, name in sorted(named) if not (ROOT / name).exists()]


def test_readme_has_1000_to_1200_words() -> None:
    assert 1000 <= count_words(ROOT / "README.md") <= 1200


def test_every_page_is_on_the_first_page_of_the_docs_and_begins_with_a_task() -> None:
    listed = links(ROOT / "docs" / "index.md")
    for page in PAGES:
        if page.name not in ("README.md", "index.md"):
            assert page.name in listed
            assert "**The task: " in page.read_text(encoding="utf-8")[:400], page.name


SHORT = [page for page in PAGES if page.name not in ("README.md", "distillation.md")]  # the latter is still to be split


@pytest.mark.parametrize("page", SHORT, ids=lambda page: page.name)
def test_a_page_of_the_docs_stays_short(page: Path) -> None:
    assert count_words(page) <= 1000, "split it, or cut what nobody needs"
