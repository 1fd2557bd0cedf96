"""What JSON may hold is decided once, where it is read; every refusal names file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from micota_fast.common.json_io import MAX_BYTES, MAX_DEPTH, encode_json, parse_json, read_json, write_json
from micota_fast.errors import InputError

BAD: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{\n,}", r":2: not JSON: Expecting property name .*\(.*column 1\)"),
    "cut off": (b'{"a": "', r":1: not JSON: the text ends within a string \(column 8\)"),
    "cut off before a line end": (b'{"a": "b\n', r":1: not JSON: the text ends within a string \(column 9\)"),
    "cut off behind a string": (b'\xef\xbb\xbf{"a": "b" \n', r":1: not JSON: the text ends too early \(column 10\)"),
    "cut off on a later line": (b'{"a":\n"b",\n"c"', r":3: not JSON: the text ends too early \(.*column 4\)"),
    "empty": (b"", r":1: not JSON: the text ends too early \(column 1\)"),
    "a bad name": (b'{"a": 1,\n b: 2}\n', r":2: not JSON: Expecting property name .*\(.*column 2\)"),
    "a bad character": (b'{"a": "\t"}\n', r":1: not JSON: Invalid control character \(column 8\)"),
    "two values": (b"{}\n{}", r":2: not JSON: Extra data"),
    "lists in lists": (b"{\n" + b'"a": ' + b"[" * 100_000, r":2: objects and lists are nested more than 100 levels"),
    "closed lists in lists": (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", r":1: .* nested more than 100 levels"),
    "objects in objects": (b'{"a":' * 101 + b"1" + b"}" * 101, r":1: .* nested more than 100 levels"),
    "brackets in text first": (b'{"[[": "' + b"[" * 999 + b'",\n"b":' + b"[" * 999, r":2: .* nested more than 100"),
    "a long whole number": (b'{"' + b"1" * 400 + b'":\n' + b"1" * 5000 + b"}", r":2: the whole number 1{20}\.\.\. has"),
    "half a character": (
        rb'{"a": "\\ud800 \ud83d\ude00",' + b"\n" + rb'"b": "\ud800"}',
        r":2: .*ud800 is half a charac",
    ),
    "half a character in a key": (rb'{"\uDC00": 1}', r":1: .*uDC00 is half a character"),
    "halves in the wrong order": (rb'{"a": "\ude00\ud83d"}', r":1: .*ude00 is half a character"),
    "half a character in UTF-8": (b'{\n"a": "\xed\xa0\x80"}', r":2: not UTF-8: byte 0xed"),
    "Latin-1": (b'{"a": 1,\n"b": "\xe9"}', r":2: not UTF-8: byte 0xe9: .* \(.*column 7\)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), r":1: not UTF-8: byte 0xff"),
    "NaN": (b'{"NaN":\nNaN}', r":2: NaN is not a number \(.*column 1\)"),
    "infinity": (b'{"a": 1,\n"b": -Infinity}', r":2: -Infinity is not a number"),
    "a large number": (b'{"a": "1e999",\n"b": 1e999}', r":2: the number 1e999 is too large"),
    "a key given twice": (
        b'{"a": {"b": "\\"b\\":"},\n"b": [{"a": 1}],\n"a": 2}',
        r":3: key 'a' is given twice in one object \(.*column 1\)",
    ),
    "a key given twice, spelt differently": (rb'{"id": 1, "x": {}, "i\u0064": 2}', r":1: key 'id' is given twice"),
    "a key given twice deep in it": (b'[{"a": 1},\n{"a": [{"c": 1, "c": 2}]}]', r":2: key 'c' is given twice"),
    "a list": (b"\n[1]", r":2: expected a JSON object, found '\[1\]'"),
    "a text": (b'"a"', r":1: expected a JSON object, found '\"a\"'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_would_do_harm_is_refused_by_file_and_line(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    path = tmp_path / "file.json"
    path.write_bytes(text)
    with pytest.raises(InputError, match=rf"^{path}{message}"):
        read_json(path)
    with pytest.raises(InputError, match=r"^rows:7: " + message.partition(": ")[2]):
        parse_json(text, "rows:7")


GOOD: list[Any] = [
    {"text": "\U0001f600 é \u2028 \\ud800", "digits": 10**MAX_DEPTH, "deep": [[[{}]]]},
    {"model_max_length": 1000000000000000019884624838656},
    [0.1, -1e308, None, True, "[" * 1000],
]


def test_a_value_of_several_lines_is_refused_with_the_line_in_it() -> None:
    with pytest.raises(InputError, match=r"^the body: not JSON: Expecting value \(line 2, column 5\)$"):
        parse_json('{"a": 1,\n"b":x}', "the body")


@pytest.mark.parametrize("value", GOOD)
def test_other_values_are_read_as_they_are(value: Any, tmp_path: Path) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), "\ufeff" + json.dumps(value, indent=1)):
        assert parse_json(text.encode(), "text", object) == value
        assert parse_json(text, "text", object) == value
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json", object) == value


def test_the_deepest_value_is_read() -> None:
    value = json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert parse_json(json.dumps(value), "text", list) == value


def test_numbers_that_are_not_finite_are_read_where_they_may_stand() -> None:
    assert str(parse_json(b"[NaN, -Infinity, 1e999]", "text", list, finite=False)) == "[nan, -inf, inf]"


def test_a_file_is_not_read_without_limit(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(1 << 40)
    for path in (tmp_path / "large.json", Path("/dev/zero")):
        with pytest.raises(InputError, match=rf"^{path}:1: more than {MAX_BYTES:,} bytes"):
            read_json(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, tmp_path / ("n" * 300)):
        with pytest.raises(InputError, match=rf"^cannot read {path}: "):
            read_json(path)


def test_what_is_no_text_is_not_written_as_another(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(InputError, match=r"not Unicode cannot be written: .*name\\udcff"):
        write_json(path, {"path": "name\udcff"})
    assert list(tmp_path.iterdir()) == []
    assert encode_json({"b": "é", "a": 1}) == '{"b": "é", "a": 1}'.encode()
    write_json(path, {"b": "é", "a": [1]}, sort_keys=True)
    assert path.read_bytes() == '{\n "a": [\n  1\n ],\n "b": "é"\n}\n'.encode()
