"""What a YAML file may hold is decided where it is read; every refusal names file and line, and comes at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.waiting import soon
from micota_fast.cli import main
from micota_fast.config.loader import build, load, option
from micota_fast.errors import InputError


@dataclass
class Options:
    """Of each type that options have."""

    count: int = option(1, doc="")
    rate: float = option(1.0, doc="")
    name: str = option("", doc="")
    names: list[str] = option([], doc="")
    tree: dict[str, Any] = option({}, doc="")
    limit: int | None = option(None, doc="")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
BOMB = "tree:\n  " + BOMB.replace("\n", "\n  ")
CASES = {
    "an alias bomb": (BOMB, r", line \d+: .* more than 100,000 values"),
    "an alias bomb by merge keys": (
        "tree:\n  a0: &a0 {x: 1, y: 2}\n"
        + "".join(f"  a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10)),
        r", line \d+: .* more than 100,000 values",
    ),
    "an alias in itself": ("count: 2\ntree: &t {a: [*t]}", r", line 2: .*nested more than 100 levels"),
    "a list in itself": ("names: &n [*n]", r", line 1: .*nested more than 100 levels"),
    "brackets": ("count: 2\ntree: {a: " + "[" * 5000 + "]" * 5000 + "}", r", line 2: .*nested more than 100 levels"),
    "mappings": ("tree: " + "{a: " * 150 + "1" + "}" * 150, r", line 1: .*nested more than 100 levels"),
    "dashes": ("tree:\n  a:\n    " + "- " * 5000 + "x", r", line 3: .*nested more than 100 levels"),
    "NUL": ("count: 2\nname: a\0b", r", line 2: .*#x0000"),
    "an escaped NUL": ('count: 2\nname: "a\\0b"', r", line 2: .*NUL"),
    "an escaped NUL in a tree": ('tree:\n  a: ["\\0"]', r", line 2: .*NUL"),
    "an escaped NUL in a key": ('tree:\n  "a\\0": 1', r", line 2: .*NUL"),
    "half a character": ('count: 2\nname: "\\ud800"', r", line 2: .*half a character"),
    "a control character": ("count: 2\nname: a\x1b[31m", r", line 2: .*#x001b"),
    "Latin-1": (b"count: 2\nname: \xe9", r", line 2: not UTF-8: byte 0xe9"),
    "an endless whole number": ("rate: 2\ncount: " + "1" * 5000, r", line 2: `count`: .*digits"),
    "a whole number of 70 bits": (f"rate: 2\ncount: {2**70}", r", line 2: `count`: must fit 64 bits"),
    "a whole number that is no float": (f"count: 2\nrate: 1{'0' * 400}", r", line 2: `rate`: must be a finite number"),
    "not a number": ("count: 2\nrate: .nan", r", line 2: `rate`: must be a finite number"),
    "an infinite number": ("count: 2\nrate: 1e999", r", line 2: `rate`: must be a finite number"),
    "a date that is none": ("count: 2\nname: 2001-99-99", r", line 2: `name`: .*month must be in 1\.\.12"),
    "a date in a tree": ("tree:\n  a: 2001-02-30", r", line 2: .*day is out of range"),
    "a tag of Python's": ("tree:\n  a: !!python/object/apply:os.system [true]", r", line 2: .*could not determine"),
    "a wrong tag": ("rate: 2\ncount: !!int x", r", line 2: .*invalid literal"),
    "a long text for a number": ("count: " + "x" * 10_000, r", line 1: `count`: must be int, not 'x+$"),
}


@pytest.mark.parametrize("override", [(), ("limit=3",), ("tree.more=1",)])
@pytest.mark.parametrize("case", CASES)
def test_hostile_yaml_is_refused_at_once(case: str, override: tuple[str, ...], tmp_path: Path) -> None:
    text, message = CASES[case]
    path = tmp_path / "options.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with soon(), pytest.raises(InputError, match=rf"^{path}{message}") as error:
        load(Options, path, override)
    assert len(str(error.value)) < 400


def test_hostile_overrides_are_refused() -> None:
    hostile = ("tree=" + "[" * 5000, "name=\udcff", "name=a\0b", 'name="\\0"', "count=" + "1" * 5000, "rate=.inf")
    for override in hostile:
        with pytest.raises(InputError, match=r"^--set "):
            load(Options, None, [override])


def test_names_of_files_that_are_no_text_are_refused() -> None:
    with pytest.raises(InputError, match=r"^made: .*half a character"):
        build(Options, {"name": "out\udcff"}, "made")


def test_aliases_and_deep_trees_within_reason_are_read(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    deep = "[" * 90 + "]" * 90
    path.write_text(f"\ufefftree: {{a: &a [x, y], b: *a, c: *a, deep: {deep}}}\nname: é \U0001f600\n")
    options = load(Options, path, ["tree.b=[1]"])
    assert (options.tree["a"], options.tree["b"], options.name) == (["x", "y"], [1], "é \U0001f600")


def test_a_file_that_is_endless_or_no_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, why in (("/dev/zero", "more than"), (str(tmp_path), "Is a directory"), ("n" * 300, "File name too long")):
        with pytest.raises(InputError, match=rf"{path}.*{why}"):
            load(Options, path)
    for verb in ("filter", "run", "plan"):
        assert main([verb, "n" * 300]) == 2
        assert "File name too long" in capsys.readouterr().err
