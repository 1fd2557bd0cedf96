"""A hook of mkdocs (mkdocs.yml): files of the repository that pages link to become part of the site, as plain text."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
_OUTWARDS = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add each file that a page links to with `../`."""
    linked = {match[1] for page in files.documentation_pages() for match in _OUTWARDS.finditer(page.content_string)}
    for path in sorted(linked):
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, f"source/{path}.txt", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn the links to them into links inside the site."""
    return _OUTWARDS.sub(r"](source/\1.txt)", markdown)
