"""Requests and tokens per minute, kept below what an API allows."""

import time
from collections.abc import Callable

MINUTE_S = 60.0


class _Bucket:
    """What may be used: fills up in a minute, and may be overdrawn by what turns out to be more than was reserved."""

    def __init__(self, per_minute: float, most: float, now: float) -> None:
        self._per_s, self._most = per_minute / MINUTE_S, most
        self._there, self._then = most, now

    def missing_s(self, wanted: float, now: float) -> float:
        """Seconds until `wanted` (or all that fits) is there."""
        self._there = min(self._most, self._there + (now - self._then) * self._per_s)
        self._then = now
        return max(0.0, (min(wanted, self._most) - self._there) / self._per_s)

    def take(self, number: float) -> None:
        self._there -= number


class RateLimit:
    """Says when the next request may be sent.

    The tokens of a request are known when it is answered. Until then as many are reserved as the answers so far had in
    the mean; before the first one, as many as an answer may have at most.

    Args:
        requests: per minute, sent evenly; None: any number.
        tokens: of prompts and answers, per minute; None: any number.
        most_tokens: of one answer.
        clock: seconds.
    """

    def __init__(
        self,
        requests: float | None,
        tokens: float | None,
        most_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._most_tokens = clock, most_tokens
        now = clock()
        # A burst of one second's requests: an API that counts a minute's may look at shorter times, too.
        self._requests = None if requests is None else _Bucket(requests, max(1.0, requests / MINUTE_S), now)
        self._tokens = None if tokens is None else _Bucket(tokens, tokens, now)
        self._answers = self._answered_tokens = 0

    def wait_s(self) -> float:
        """Return the seconds until another request may be sent; 0: now."""
        now = self._clock()
        waits = [0.0]
        if self._requests is not None:
            waits.append(self._requests.missing_s(1, now))
        if self._tokens is not None:
            waits.append(self._tokens.missing_s(self._expected, now))
        return max(waits)

    def sent(self) -> float:
        """Note that a request is sent; returns the tokens that are reserved for it."""
        if self._requests is not None:
            self._requests.take(1)
        reserved = self._expected
        if self._tokens is not None:
            self._tokens.take(reserved)
        return reserved

    def ended(self, reserved: float, tokens: int | None) -> None:
        """Note that a request has its answer.

        Args:
            reserved: for it, by `sent`.
            tokens: of its prompt and answer; None: it has failed, and counts no tokens.
        """
        if tokens is not None:
            self._answers += 1
            self._answered_tokens += tokens
        if self._tokens is not None:
            self._tokens.take((tokens or 0) - reserved)

    @property
    def _expected(self) -> float:
        return self._answered_tokens / self._answers if self._answers else float(self._most_tokens)
