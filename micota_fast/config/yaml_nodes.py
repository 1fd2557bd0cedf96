"""YAML text -> nodes that know their file and line, within limits."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from micota_fast.common.files import reading
from micota_fast.common.json_io import MAX_DEPTH
from micota_fast.errors import InputError

MAX_BYTES = 1 << 20  # of a file of options
MAX_VALUES = 100_000  # that a file holds, each alias counted with all it stands for
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class Lineless(str):
    """Name of a source whose line numbers mean nothing to the user: an override, or values made by the program."""


@dataclass(frozen=True)
class Where:
    """A place in a config: the file (or command-line override), the line and the dotted key."""

    source: str
    key: str

    def error(self, node: yaml.Node | None, message: str) -> InputError:
        """Return an error that names the node's file and line, and this key."""
        return InputError(self.message(node, message))

    def message(self, node: yaml.Node | None, text: str) -> str:
        """Return `text` after the node's file and line, and this key."""
        mark = node.start_mark if node is not None else None
        place = self.source if mark is None else _place(mark.name, mark.line)
        return f"{place}: {f'`{self.key}`: ' if self.key else ''}{text}"

    def child(self, name: str) -> "Where":
        """Return the place of a key inside this one."""
        return Where(self.source, f"{self.key}.{name}" if self.key else name)


def read_text(path: Path) -> str:
    """Return the text of a file of options.

    Raises:
        InputError: it cannot be read, has more than MAX_BYTES bytes or is not UTF-8.
    """
    with reading(path), path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: more than {MAX_BYTES:,} bytes, too many for a file of options")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place(str(path), content.count(b"\n", 0, error.start))
        raise InputError(f"{place}: not UTF-8: byte {content[error.start]:#04x}: {error.reason}") from None


def compose(text: str, source: str) -> yaml.Node | None:
    """Parse a text and check, before anything is built of it, that it stays within MAX_DEPTH and MAX_VALUES.

    Returns:
        None if the text is empty.

    Raises:
        InputError: the text is not YAML or breaks a limit; the message begins with `source` and the line.
    """
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        raise InputError(f"{_place(source, line)}: not valid YAML: character #x{error.character:04x}") from None
    loader.name = source
    try:
        node: yaml.Node | None = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        place = source if mark is None else _place(source, mark.line)
        raise InputError(f"{place}: not valid YAML: {problem}") from None
    except RecursionError:
        raise InputError(f"{_place(source, loader.line)}: nested more than {MAX_DEPTH} levels deep") from None
    finally:
        loader.dispose()
    if node is not None:
        _check_size(node)
    return node


def _place(source: str, line: int) -> str:
    """A source and, where lines mean something to the user, the line (from 0) in it."""
    return source if isinstance(source, Lineless) else f"{source}, line {line + 1}"


def _check_size(root: yaml.Node) -> None:
    """Aliases make a short text a large tree, or one without end: count its nodes where they are reached."""
    nodes, count = [(root, 0)], 0
    while nodes:
        node, depth = nodes.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise Where("", "").error(node, f"nested more than {MAX_DEPTH} levels deep")
        if count > MAX_VALUES:
            raise Where("", "").error(node, f"with its aliases, this holds more than {MAX_VALUES:,} values")
        if isinstance(node, yaml.MappingNode):
            nodes += [(child, depth + 1) for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += [(child, depth + 1) for child in node.value]
        elif _NO_TEXT.search(node.value):
            raise Where("", "").error(node, f"{node.value[:40]!r} holds NUL or half a character, which no text can")
