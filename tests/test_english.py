"""Phrases that an English reader stumbles over do not come back."""

import re

from helpers.paths import ROOT

# By phrase, what is written instead.
INSTEAD = {
    "so many": "N, or a number of",
    " a line a": "one line per",
    "goes on": "continues, or resumes",
    "hangs on": "depends on",
    "is told": "is given, or is called with",
    "bears the": "has the",
    "cannot be had": "is not available",
    "counted round": "continuing with the first after the last",
    "is found out": "is detected",
    "put to the model": "the model's prompt",
    "swapped for": "replaced by",
    "takes the place of": "replaces",
    "what becomes of": "what happens to, or the treatment of",
}
READ = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "examples/*", "bench/*.md", "tests/*.md")
READ += ("micota_fast/**/*.py", "micota_fast/**/*.yaml", "micota_fast/**/*.md", "kernels/*.py", "scripts/*")


def test_no_text_has_a_phrase_of_the_list() -> None:
    files = {file for pattern in READ for file in ROOT.glob(pattern) if file.is_file()}
    assert len(files) > 200
    found = []
    for file in sorted(files):
        # A sentence may break anywhere, also in a comment.
        text = re.sub(r"\s*\n\s*(#\s*)?", " ", file.read_text(encoding="utf-8", errors="replace")).lower()
        found += [
            f"{file.relative_to(ROOT)}: ...{text[max(0, at.start() - 30) : at.end() + 30]}...: write {better}"
            for phrase, better in INSTEAD.items()
            for at in re.finditer(phrase, text)
        ]
    assert not found, "\n".join(found)
