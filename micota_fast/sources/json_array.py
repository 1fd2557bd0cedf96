"""The items of a JSON list, one at a time, each as one line."""

import codecs
import io
import json
import re
from collections.abc import Iterator

from micota_fast.common.json_io import MAX_BYTES, MAX_DEPTH, syntax_fault
from micota_fast.errors import InputError

_BLOCK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
# Finds where an item ends; what it holds is read by `parse_json`, with its limits.
_DECODER = json.JSONDecoder(object_pairs_hook=len, parse_int=len, parse_float=len, parse_constant=len)


def array_items(file: io.BufferedReader, name: str) -> Iterator[bytes]:
    """Yield each item of the one list that a file holds. Holds one item and a block.

    Raises:
        InputError: it is not one JSON list, or an item has more than MAX_BYTES; names the item.
    """
    buffer = _Buffer(file, name)
    buffer.take("[")
    if buffer.look() == "]":
        buffer.take("]")
    else:
        mark = ","
        while mark == ",":
            yield buffer.item()
            mark = buffer.take(",]")
    if buffer.look():
        raise InputError(f"{name}: text follows the end of the list: {buffer.rest()!r}")


class _Buffer:
    """The text of a file from a place on; `items` of them were taken."""

    def __init__(self, file: io.BufferedReader, name: str) -> None:
        self._file, self._name = file, name
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at, self._ended, self._items = "", 0, False, 0

    def _more(self) -> None:
        """Read as much as is held, so that an item that is looked at again and again takes linear time."""
        held = self._text[self._at :]
        if len(held) > MAX_BYTES:
            raise self._wrong(f"more than {MAX_BYTES:,} bytes, which is too much for a row")
        block = self._file.read(max(_BLOCK, len(held)))
        self._ended = not block
        try:
            self._text, self._at = held + self._decoder.decode(block, final=self._ended), 0
        except UnicodeDecodeError as error:
            raise self._wrong(f"not UTF-8: byte {error.object[error.start]:#04x}: {error.reason}") from None

    def _wrong(self, what: str) -> InputError:
        return InputError(f"{self._name}, row {self._items + 1}: {what}")

    def look(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            self._at = self._end_of_space(self._at)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def take(self, allowed: str) -> str:
        """Return the next character, which must be one of these."""
        found = self.look()
        if not found or found not in allowed:
            got = f"found {self.rest()!r}" if found else "the file ends within the list"
            raise InputError(f"{self._name}: expected {' or '.join(allowed)} after row {self._items}; {got}")
        self._at += 1
        return found

    def item(self) -> bytes:
        """Return the text of the next value, as one line."""
        self.look()
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
                # A number could continue in the next block.
                if self._end_of_space(end) < len(self._text) or self._ended:
                    break
            except json.JSONDecodeError as error:
                if self._ended:
                    message, position = syntax_fault(error)
                    place = f"character {position - self._at + 1} of the row"
                    raise self._wrong(f"not JSON: {message} ({place})") from None
            except RecursionError:
                raise self._wrong(f"objects and lists are nested more than {MAX_DEPTH} levels deep") from None
            self._more()
        # Line ends stand between an item's tokens; within its strings the decoder refuses them.
        text = self._text[self._at : end].replace("\r", " ").replace("\n", " ").encode()
        self._at = end
        self._items += 1
        if len(text) > MAX_BYTES:
            raise self._wrong(f"more than {MAX_BYTES:,} bytes, which is too much for a row")
        return text

    def rest(self) -> str:
        """Return a little of what follows, for a message."""
        return self._text[self._at : self._at + 20]

    def _end_of_space(self, start: int) -> int:
        found = _SPACE.match(self._text, start)
        assert found is not None  # it matches the empty text
        return found.end()
