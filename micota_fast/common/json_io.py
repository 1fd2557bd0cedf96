"""The one reader of JSON from outside, which refuses what would do harm later, and the one writer of JSON files."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from micota_fast.common.files import reading, write_atomic
from micota_fast.errors import InputError

MAX_BYTES = 1 << 27  # of a value's text: far more than any row or file of ours, and it can still be held
MAX_DEPTH = 100  # objects and lists in one another: what reads them afterwards may be recursive
MAX_DIGITS = 300  # of a whole number, so that it fits a float
_NAMES: dict[type, str] = {dict: "a JSON object", list: "a JSON list"}
_STRING = r'"(?:[^"\\]|\\.)*"'  # what follows it in a pattern is looked for outside of strings
_BRACKET = re.compile(rf"{_STRING}|([\[{{])|([\]}}])", re.DOTALL)
_KEY = re.compile(rf"(?P<text>{_STRING})(?P<key>[ \t\r\n]*:)?|(?P<open>[\[{{])|[\]}}]", re.DOTALL)
_LONE_SURROGATE = re.compile(  # pairs, and other escapes, are passed over
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.DOTALL
)


class _Fault(Exception):
    """What is wrong with a text, and at which character; None: with all of it."""

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.message, self.position = message, position

    def message_in(self, text: bytes | str, *, with_line: bool) -> str:
        """Return the message with the column, and if wanted the line after the first, of the text that it is of."""
        if self.position is None:
            return self.message
        line, column = _line_and_column(text, self.position)
        return f"{self.message} ({f'line {line}, ' if with_line and line > 1 else ''}column {column})"


def parse_json(text: bytes | str, where: str, kind: type = dict, *, finite: bool = True) -> Any:
    """Decode one JSON value.

    Args:
        text: UTF-8, at most MAX_BYTES.
        where: opens every message: a file and line, or who has sent it; "": the caller says that. The column at which
            the text is at fault ends it.
        kind: dict or list: what the value must be; object: anything.
        finite: refuse NaN and infinities, which Python's JSON has and the standard does not.

    Raises:
        InputError: it is not JSON, not of this kind, or nested more than MAX_DEPTH levels deep; or it holds a lone
            surrogate (half a character, which UTF-8 cannot hold), a whole number of more than MAX_DIGITS digits, a
            number that is not finite, or an object with a key given twice, of which readers take different ones.
    """
    try:
        return _parse(text, kind, finite)
    except _Fault as fault:
        message = fault.message_in(text, with_line=True)
        raise InputError(f"{where}: {message}" if where else message) from None


def read_json(path: Path, kind: type = dict, *, finite: bool = True) -> Any:
    """Read a file of one JSON value; see `parse_json`. Messages name file, line and column.

    Raises:
        InputError: as `parse_json`; or the file cannot be read, or is larger than MAX_BYTES.
    """
    with reading(path), path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    try:
        return _parse(text, kind, finite)
    except _Fault as fault:
        line, _ = _line_and_column(text, fault.position or 0)
        raise InputError(f"{path}:{line}: {fault.message_in(text, with_line=False)}") from None


def read_json_if_there(path: Path, kind: type = dict) -> Any:
    """Read a file as `read_json` does; returns None if there is no such file."""
    return read_json(path, kind) if os.path.lexists(path) else None


def encode_json(value: Any, indent: int | None = None, *, sort_keys: bool = False, finite: bool = True) -> bytes:
    """Encode a JSON value as UTF-8, on one line or indented, without a newline at its end.

    Raises:
        InputError: a text in it is not Unicode, such as a file name in another encoding; or, with `finite`, a number
            is NaN or infinite.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys, allow_nan=not finite)
    except ValueError as error:
        raise InputError(f"cannot be written as JSON: {error}") from None
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 40, 0) : error.end + 40]
        raise InputError(f"text that is not Unicode cannot be written: {around!r}") from None


def write_json(path: Path, value: Any, indent: int = 1, *, sort_keys: bool = False, finite: bool = True) -> None:
    """Write a file of one JSON value with `write_atomic`.

    Raises:
        InputError: as `encode_json`; or the directory cannot be written or the disk is full.
    """
    try:
        text = encode_json(value, indent, sort_keys=sort_keys, finite=finite)
    except InputError as error:
        raise InputError(f"cannot write {path}: {error}") from None
    write_atomic(path, [text, b"\n"])


def as_read_back(value: Any) -> Any:
    """Return a copy of a JSON value with the types that it is read back with, such as lists for tuples."""
    return json.loads(json.dumps(value))


def syntax_fault(error: json.JSONDecodeError) -> tuple[str, int]:
    """Return what is wrong with the text that an error is of, and at which of its characters.

    Of a text that is cut off, Python's own message names the beginning of its last string, or the line after its last.
    """
    cut = error.msg.startswith("Unterminated string")
    if cut or not error.doc[error.pos :].strip():
        inside = "within a string" if cut or error.msg.startswith("Invalid control character") else "too early"
        return f"the text ends {inside}", len(error.doc.rstrip())
    return error.msg.removesuffix(" at"), error.pos


def _parse(text: bytes | str, kind: type, finite: bool) -> Any:
    if len(text) > MAX_BYTES:
        raise _Fault(f"more than {MAX_BYTES:,} bytes, which is too much to read as JSON")
    encoded = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    try:
        text = encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        position = len(encoded[: error.start].decode("utf-8-sig"))
        raise _Fault(f"not UTF-8: byte {encoded[error.start]:#04x}: {error.reason}", position) from None
    try:
        value = (_FINITE if finite else _ANY).decode(text)
    except json.JSONDecodeError as error:
        message, position = syntax_fault(error)
        raise _Fault(f"not JSON: {message}", position) from None
    except _BadNumberError as error:
        raise _Fault(str(error), _position(re.escape(error.token), text)) from None
    except _RepeatedKeyError as error:
        raise _Fault(f"key {error.key[:80]!r} is given twice in one object", _second_key(text, error.key)) from None
    except RecursionError:
        raise _too_deep(text) from None
    if not isinstance(value, kind):
        raise _Fault(f"expected {_NAMES[kind]}, found {text.strip()[:40]!r}", len(text) - len(text.lstrip()))
    if _is_deep(value):
        raise _too_deep(text)
    if "\\u" in text and ("\\ud" in text or "\\uD" in text):
        _refuse_lone_surrogates(text)
    return value


def _line_and_column(text: bytes | str, position: int) -> tuple[int, int]:
    """Line and column, from 1, of a character of a text; a byte order mark before it does not count."""
    read = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    before = read.removeprefix("\ufeff")[:position]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _is_deep(value: Any) -> bool:
    level: list[Any] = [[value]]  # the objects and lists that are this deep
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for holder in level
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _too_deep(text: str) -> _Fault:
    depth = position = 0
    for found in _BRACKET.finditer(text):
        depth += (found[1] is not None) - (found[2] is not None)
        if depth > MAX_DEPTH:
            position = found.start()
            break
    return _Fault(f"objects and lists are nested more than {MAX_DEPTH} levels deep", position)


def _refuse_lone_surrogates(text: str) -> None:
    for found in _LONE_SURROGATE.finditer(text):
        if found[1] is not None:
            message = f"{found[1]} is half a character (a lone surrogate), which no text can hold"
            raise _Fault(message, found.start())


def _position(pattern: str, text: str) -> int:
    """Where the pattern is found first outside of strings."""
    found = (match.start(1) for match in re.finditer(f"{_STRING}|({pattern})", text, re.DOTALL) if match[1] is not None)
    return next(found, 0)


class _BadNumberError(Exception):
    """Of a number in a text: `token`, as it stands there."""

    def __init__(self, message: str, token: str) -> None:
        super().__init__(message)
        self.token = token


class _RepeatedKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        last = {key: place for place, (key, _) in enumerate(pairs)}
        raise _RepeatedKeyError(next(key for place, (key, _) in enumerate(pairs) if last[key] != place))
    return made


def _second_key(text: str, key: str) -> int:
    """Where one object holds the key for the second time."""
    holders: list[set[str]] = [set()]
    for found in _KEY.finditer(text):
        if found["key"]:
            if json.loads(found["text"]) == key:
                if key in holders[-1]:
                    return found.start()
                holders[-1].add(key)
        elif found["open"]:
            holders.append(set())
        elif not found["text"] and len(holders) > 1:
            holders.pop()
    return 0


def _int(token: str) -> int:
    if len(token) > MAX_DIGITS:
        raise _BadNumberError(f"the whole number {token[:20]}... has {len(token)} digits", token)
    return int(token)


def _finite_float(token: str) -> float:
    number = float(token)
    if not math.isfinite(number):
        raise _BadNumberError(f"the number {token} is too large", token)
    return number


def _no_constant(token: str) -> NoReturn:
    raise _BadNumberError(f"{token} is not a number", token)


_ANY = json.JSONDecoder(object_pairs_hook=_object, parse_int=_int)
_FINITE = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_int, parse_float=_finite_float, parse_constant=_no_constant
)
