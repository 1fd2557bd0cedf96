"""What README and docs consist of: blocks of code with their marks, links, headings and words."""

import re
from dataclasses import dataclass
from pathlib import Path

from helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_MARK = re.compile(r"<!-- ([a-z ]+): ([^>]+?) -->\n\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        language: as the fence names it; "": none.
        mark: kind and value of the HTML comment on the line before, such as ("needs", "gpu"); None: there is none.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: tuple[str, str] | None

    @property
    def place(self) -> str:
        """Where it stands, for a message."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        mark = _MARK.search(before)
        found.append(Block(page, before.count("\n") + 1, fence[1], fence[2], (mark[1], mark[2]) if mark else None))
    return found


def prose(page: Path) -> str:
    """Return a page's text without code blocks and comments."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def count_words(page: Path) -> int:
    """Count what a person reads as words: everything between blanks that has a letter or a digit.

    Code blocks, tables, pictures, comments and the targets of links do not count.
    """
    lines = [line for line in prose(page).splitlines() if not line.startswith(("|", "!["))]
    return sum(bool(re.search(r"\w", word)) for word in re.sub(r"\]\([^)]*\)", "]", "\n".join(lines)).split())


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures, code left out."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(slug)
    return found
