"""Multiple choice: options shuffled the same everywhere."""

from collections import Counter

import pytest

from micota_fast.errors import InputError
from micota_fast.evaluation.options import with_options


def test_options_are_listed_in_an_order_that_only_the_seed_and_the_texts_decide() -> None:
    text, letter = with_options("Which?", "five", ["one", "two", "three"], 0)
    assert (text, letter) == ("Which?\n\nA) two\nB) three\nC) one\nD) five", "D")
    assert with_options("Which?", "five", ["three", "one", "two"], 0) == (text, letter)
    assert with_options("Which?", "five", ["one", "two", "three"], 1)[0] != text


def test_the_right_option_is_under_each_letter_equally_often() -> None:
    found = Counter(with_options(f"{i}?", "right", ["a", "b", "c"], 0)[1] for i in range(2000))
    assert sorted(found) == list("ABCD")
    assert min(found.values()) > 430  # 500 expected, of standard deviation 19


def test_options_that_leave_no_one_right_are_refused() -> None:
    with pytest.raises(InputError, match="the right option is among the wrong ones: '5'"):
        with_options("?", "5", ["4", "5"], 0)
    with pytest.raises(InputError, match="27 options are more than there are letters"):
        with_options("?", "x", [str(i) for i in range(26)], 0)
