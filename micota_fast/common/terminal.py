"""What is printed cannot steer a terminal, and every terminal can show it."""

import contextlib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

# Controls but tab and newline, and what turns the direction of writing around.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """Return the text with its control characters, but tabs and newlines, as escapes such as \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return a text from outside, such as a server's message, with newlines as escapes too."""
    return escaped(text).replace("\n", "\\n")


@contextlib.contextmanager
def safe_output() -> Iterator[None]:
    """Print through `escaped` while the block runs; what the terminal's encoding lacks is escaped, too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    out, err = cast(TextIO, _Escaping(sys.stdout)), cast(TextIO, _Escaping(sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class _Escaping:
    """A text stream in front of another one, to which all but writing is left."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # A carriage return alone is ours: a progress line replaces the one before.
        return self._stream.write(text if text == "\r" else escaped(text))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
