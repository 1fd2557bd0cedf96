"""Results as dataclasses: what is written is read back equal, and what is wrong is refused by file and key."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from micota_fast.common.schema import (
    ABSENT,
    Absent,
    Count,
    InvalidValueError,
    NonNegative,
    PositiveCount,
    Share,
    from_json,
    load,
    to_json,
)
from micota_fast.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Part:
    share: Share
    nats: NonNegative | None = None


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str
    kind: Literal["big", "small"] = "big"
    sure: bool = True
    n: PositiveCount
    found: Count | None
    spread: tuple[float, float] | None = None
    lengths: tuple[Count, ...] = ()
    tenths: list[NonNegative | None] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)
    listed: tuple[Part, ...] = ()
    made_by: dict[str, Any] = field(default_factory=dict)
    samples: PositiveCount | Absent | None = ABSENT

    def __post_init__(self) -> None:
        if (self.found or 0) > self.n:
            raise InvalidValueError("found", f"is {self.found}, more than 'n', {self.n}")


LEAST = {"name": "x", "n": 3, "found": None}
numbers = st.floats(0, 1e9)
parts = st.builds(Part, share=st.floats(0, 1), nats=st.none() | numbers)
wholes = st.builds(
    Whole,
    name=st.text(),
    kind=st.sampled_from(["big", "small"]),
    n=st.integers(9, 99),
    found=st.none() | st.integers(0, 9),
    spread=st.none() | st.tuples(numbers, numbers),
    lengths=st.lists(st.integers(0)).map(tuple),
    tenths=st.lists(st.none() | numbers),
    parts=st.dictionaries(st.text(), parts),
    listed=st.lists(parts).map(tuple),
    made_by=st.dictionaries(st.text(), st.none() | st.lists(st.booleans())),
    samples=st.sampled_from([ABSENT, None, 4]),
)


@given(wholes)
def test_what_is_written_is_read_back_equal(whole: Whole) -> None:
    assert from_json(Whole, json.loads(json.dumps(to_json(whole))), "f") == whole


def test_keys_are_the_fields_in_their_order_and_absent_is_not_null() -> None:
    whole = Whole(name="x", n=3, found=None, parts={"a": Part(share=1.0)})
    assert list(to_json(whole)) == [*list(Whole.__dataclass_fields__)[:-1]]
    assert to_json(whole)["found"] is None
    assert to_json(whole)["parts"] == {"a": {"share": 1.0, "nats": None}}
    assert to_json(Whole(name="x", n=3, found=None, samples=None))["samples"] is None


def test_defaults_stand_for_keys_that_are_not_there_and_unknown_keys_are_ignored() -> None:
    read = from_json(Whole, LEAST | {"later": [1], "lengths": None}, "f")
    assert read == Whole(name="x", n=3, found=None)
    assert read.samples is ABSENT


def test_a_dictionary_of_dataclasses_is_read_too() -> None:
    assert from_json(dict[str, Part], {"a": {"share": 1}}, "f") == {"a": Part(share=1.0)}
    with pytest.raises(InputError, match=r"^f: key 'a\.share' must be a number from 0 to 1, found 2$"):
        from_json(dict[str, Part], {"a": {"share": 2}}, "f")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": None}, "key 'n' (a whole number) is missing; found name, n, found"),
        ({"n": 0}, "key 'n' must be a whole number of at least 1, found 0"),
        ({"n": True}, "key 'n' must be a whole number of at least 1, found true"),
        ({"n": 3.0}, "key 'n' must be a whole number of at least 1, found 3.0"),
        ({"found": 4}, "key 'found' is 4, more than 'n', 3"),
        ({"found": -1}, "key 'found' must be a whole number of at least 0, found -1"),
        ({"name": 7}, "key 'name' must be a string, found 7"),
        ({"kind": "fine"}, "key 'kind' must be one of big, small, found \"fine\""),
        ({"kind": ["big"]}, "key 'kind' must be one of big, small, found [\"big\"]"),
        ({"sure": 1}, "key 'sure' must be true or false, found 1"),
        ({"spread": [0.5]}, "key 'spread' must be a list of 2, found [0.5]"),
        ({"spread": [0.5, float("nan")]}, "key 'spread.1' must be a finite number, found NaN"),
        ({"spread": [0.5, float("-inf")]}, "key 'spread.1' must be a finite number, found -Infinity"),
        ({"spread": [0.5, 10**400]}, "key 'spread.1' must be a finite number, found 1000"),
        ({"lengths": {"a": 1}}, "key 'lengths' must be a list, found {"),
        ({"lengths": [1, None]}, "key 'lengths.1' must be a whole number of at least 0, found null"),
        ({"tenths": [None, -1]}, "key 'tenths.1' must be a finite number of at least 0, found -1"),
        ({"parts": [1]}, "key 'parts' must be an object, found [1]"),
        ({"parts": {"a": {}}}, "key 'parts.a.share' (a number) is missing; found no keys at all"),
        ({"parts": {"a": None}}, "key 'parts.a' must be an object, found null"),
        ({"listed": [{"share": 1}, {"share": 1.5}]}, "key 'listed.1.share' must be a number from 0 to 1, found 1.5"),
        ({"made_by": "x"}, "key 'made_by' must be an object, found \"x\""),
        ({"samples": 0}, "key 'samples' must be a whole number of at least 1, found 0"),
    ],
)
def test_a_wrong_value_is_named_by_file_and_key(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        from_json(Whole, LEAST | change, "rows.jsonl:3")
    assert str(caught.value).startswith(f"rows.jsonl:3: {said}")


def test_a_key_that_may_be_null_must_be_there() -> None:
    with pytest.raises(InputError, match=r"key 'found' \(a whole number\) is missing"):
        from_json(Whole, {"name": "x", "n": 3}, "f")


def test_files_that_hold_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    with pytest.raises(InputError, match=r"cannot read .*whole\.json"):
        load(Whole, path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"whole\.json:1: not JSON"):
        load(Whole, path)
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"whole\.json: expected an object, found \[1\]"):
        load(Whole, path)
    path.write_text(json.dumps(LEAST))
    assert load(Whole, path).n == 3


def test_a_type_that_json_cannot_have_is_a_fault_of_the_class() -> None:
    @dataclass(frozen=True)
    class Odd:
        path: Path

    with pytest.raises(TypeError, match="is not a type of a result's field"):
        from_json(Odd, {"path": "x"}, "f")
