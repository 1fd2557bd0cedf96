"""The text that explains the options of a dataclass, section by section; each is explained once."""

import textwrap
from collections.abc import Iterator, Mapping

from micota_fast.config.loader import describe

MOST_ROWS = 100  # that a verb's help explains

Row = tuple[str, str, str]


def sections(cls: type) -> dict[str, list[Row]]:
    """Return the rows of `describe` by the dotted key of the section that they lie in; "" is the top level."""
    found: dict[str, list[Row]] = {}
    for row in describe(cls):
        found.setdefault(row[0].rpartition(".")[0], []).append(row)
    return found


def option_lines(parts: Mapping[str, list[Row]]) -> Iterator[str]:
    """Yield the lines that explain sections; one whose options equal an earlier one's refers to that."""
    seen: dict[tuple[Row, ...], str] = {}
    for section, rows in parts.items():
        content = tuple((key.rpartition(".")[2], default, doc) for key, default, doc in rows)
        if section and (same := seen.setdefault(content, section)) != section:
            yield f"{section}.*: as {same}.*"
            continue
        if section:
            yield f"{section}.*:"
        for key, default, doc in rows:
            yield f"  {key} = {default}"
            yield f"      {doc}"


def help_lines(verb: str, cls: type) -> Iterator[str]:
    """Yield the part of a verb's help that explains its options; of very many, only what there is in each section."""
    parts = sections(cls)
    yield "options, with their defaults and, in brackets, where the default comes from:"
    if sum(map(len, parts.values())) <= MOST_ROWS:
        yield from option_lines(parts)
        return
    yield from option_lines({"": parts.pop("")})
    yield f"sections, which `micota options {verb}.SECTION` explains:"
    for section, rows in parts.items():
        names = ", ".join(key.rpartition(".")[2] for key, _, _ in rows)
        yield from textwrap.wrap(f"{section}: {names}", 118, initial_indent="  ", subsequent_indent="      ")
