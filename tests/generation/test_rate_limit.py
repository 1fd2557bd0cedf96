"""Requests and tokens per minute, on a clock that the test turns; and what Retry-After says."""

from email.utils import formatdate

import pytest

from micota_fast.generation.rate_limit import RateLimit
from micota_fast.generation.retry_after import seconds_to_wait

NOW = 1_700_000_000.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def sent_in(minutes: float, clock: Clock, limit: RateLimit, tokens: int) -> int:
    """How many requests go out in that time, each answered at once with so many tokens."""
    end, number = clock.now + 60 * minutes, 0
    while (wait_s := limit.wait_s()) <= end - clock.now:
        clock.now += wait_s
        limit.ended(limit.sent(), tokens)
        number += 1
    clock.now = end
    return number


def test_no_more_requests_go_out_than_a_minute_allows_and_they_are_spread_over_it() -> None:
    clock = Clock()
    limit = RateLimit(120, None, 1000, clock)
    assert sent_in(0.5, clock, limit, 10) in (61, 62)  # with the first second's burst
    assert sent_in(1, clock, limit, 10) == 120


def test_no_more_tokens_are_used_than_a_minute_allows_though_they_are_known_only_afterwards() -> None:
    clock = Clock()
    limit = RateLimit(None, 10_000, 400, clock)
    assert sent_in(1, clock, limit, 1000) in (19, 20)  # what the first minute allows, and what was there before
    for _ in range(3):
        assert sent_in(1, clock, limit, 1000) == 10


def test_a_request_that_may_need_more_than_a_minute_allows_waits_for_a_whole_minute_and_goes() -> None:
    clock = Clock()
    limit = RateLimit(None, 1000, 5000, clock)
    assert limit.wait_s() == 0
    reserved = limit.sent()
    assert limit.wait_s() == pytest.approx(60 * 5000 / 1000)
    limit.ended(reserved, 100)
    clock.now += 6.1
    assert limit.wait_s() == 0


def test_a_request_that_failed_counts_no_tokens() -> None:
    clock = Clock()
    limit = RateLimit(None, 1000, 1000, clock)
    reserved = limit.sent()
    assert limit.wait_s() == pytest.approx(60)
    limit.ended(reserved, None)
    assert limit.wait_s() == 0


def test_without_limits_nothing_waits() -> None:
    limit = RateLimit(None, None, 1000, Clock())
    assert all(limit.wait_s() == 0 for _ in range(1000) if limit.sent() >= 0)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("7", 7),
        (" 0.5 ", 0.5),
        ("-7", 0),
        ("1e9", 0),
        ("99999999999999999999", 3600),
        ("soon", 0),
        ("nan", 0),
        ("²", 0),
        (formatdate(NOW + 90, usegmt=True), 90),
        (formatdate(NOW - 90, usegmt=True), 0),
        (formatdate(NOW + 1e6, usegmt=True), 3600),
        ("Thu, 99 Nov 2023 00:00:00 GMT", 0),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date_by_the_servers_clock(header: str | None, seconds: float) -> None:
    assert seconds_to_wait(header, formatdate(NOW, usegmt=True)) == seconds
