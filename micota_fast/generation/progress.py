"""What a running generation shows: how far it is, how fast, what the servers say, what an accepted answer costs."""

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from micota_fast.generation.endpoint import Endpoint

BAR = 20  # characters
WINDOW_S = 60.0  # over which speeds are taken


class Meters:
    """Counts of this process's run; what an earlier one had done is in `done` and `accepted` alone.

    Args:
        done: answers that are there already.
        accepted: of these, accepted ones; None: nothing is judged.
        price: (prompt tokens, completion tokens) -> what they cost in dollars; None: that is not known.
    """

    def __init__(
        self, done: int, accepted: int | None, price: Callable[[int, int], float | None] | None = None
    ) -> None:
        self._price = price
        self.started = time.monotonic()
        self.done = self.done_before = done
        self.accepted = accepted
        self.accepted_before = accepted or 0
        self.judged = 0
        self.rejected: Counter[str] = Counter()  # by reason
        self.prompt_tokens = self.completion_tokens = 0
        self.failures = 0  # tries of requests that came to nothing
        self._window: deque[tuple[float, int, int, int]] = deque()

    def answer(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.done += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def judge(self, reason: str | None) -> None:
        """Count an answer that was judged: why it is rejected, or None."""
        self.judged += 1
        if reason is not None:
            self.rejected[reason] += 1
        elif self.accepted is not None:
            self.accepted += 1

    def line(self, expected: int, endpoints: Sequence[Endpoint]) -> str:
        """Format one line; speeds are those of the last minute."""
        now = time.monotonic()
        self._window.append((now, self.done, self.prompt_tokens, self.completion_tokens))
        while len(self._window) > 2 and now - self._window[0][0] > WINDOW_S:
            self._window.popleft()
        then, *before = self._window[0] if len(self._window) > 1 else (self.started, self.done_before, 0, 0)
        seconds = max(now - then, 1e-9)
        answers, read, written = (
            (a - b) / seconds
            for a, b in zip((self.done, self.prompt_tokens, self.completion_tokens), before, strict=True)
        )
        filled = BAR * min(self.done, expected) // max(expected, 1)
        parts = [f"[{'#' * filled:{BAR}}] {self.done:,} of {expected:,}"]
        if self.accepted is not None and self.judged:
            parts.append(f"{(self.accepted - self.accepted_before) / self.judged:.0%} accepted")
        parts.append(f"{written:,.0f} tok/s out, {read:,.0f} in")
        parts.append(_servers(endpoints))
        if (cost := self.gpu_seconds(endpoints)) is not None:
            parts.append(f"{cost:,.1f} GPU s {'an accepted answer' if self.accepted is not None else 'an answer'}")
        if (dollars := self.dollars) is not None:
            parts.append(f"${dollars:,.2f}")
        parts.append(f"{_clock((expected - self.done) / answers)} left" if answers > 0 else "? left")
        return "  ".join(parts)

    @property
    def dollars(self) -> float | None:
        """What this run's answers cost; None: no prices are known."""
        return None if self._price is None else self._price(self.prompt_tokens, self.completion_tokens)

    def gpu_seconds(self, endpoints: Sequence[Endpoint]) -> float | None:
        """Return GPU-seconds per accepted answer (per answer, if nothing is judged); None: no GPUs are known of."""
        gpus = [endpoint.info.gpus for endpoint in endpoints]
        got = self.done - self.done_before if self.accepted is None else self.accepted - self.accepted_before
        if None in gpus or got <= 0:
            return None
        return sum(number or 0 for number in gpus) * (time.monotonic() - self.started) / got

    def summary(self, endpoints: Sequence[Endpoint]) -> dict[str, Any]:
        """Return this run's figures, for OUT.meters.json."""
        seconds = time.monotonic() - self.started
        return {
            "seconds": round(seconds, 3),
            "answers": self.done - self.done_before,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "completion_tokens_per_s": round(self.completion_tokens / seconds, 1),
            "judged": self.judged,
            "accepted": None if self.accepted is None else self.accepted - self.accepted_before,
            "rejected": dict(sorted(self.rejected.items())),
            "failed_tries": self.failures,
            "gpu_seconds_per_answer": self.gpu_seconds(endpoints),
            **({} if (dollars := self.dollars) is None else {"dollars": round(dollars, 6)}),
            "answered_by": {endpoint.url: endpoint.answered for endpoint in endpoints},
        }


def _servers(endpoints: Sequence[Endpoint]) -> str:
    up = [endpoint for endpoint in endpoints if endpoint.down is None]
    loads = [endpoint.load for endpoint in up if endpoint.load is not None]
    text = f"{sum(endpoint.in_flight for endpoint in up)} in flight"
    if loads:
        text += f" ({sum(load.running for load in loads)} running, {sum(load.waiting for load in loads)} queued"
        usage = [load.usage for load in loads if load.usage is not None]
        text += f", KV {sum(usage) / len(usage):.0%})" if usage else ")"
    if len(endpoints) > 1:
        text += f" on {len(up)} of {len(endpoints)} servers"
    return text


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"


class Screen:
    """Where progress lines go: on a terminal they overwrite one another, in a log they follow."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._rewriting = stream.isatty()
        self._shown = 0

    def show(self, line: str) -> None:
        if self._rewriting:
            self._stream.write("\r")
            self._stream.write(f"{line:{self._shown}}")
            self._shown = len(line)
        else:
            self._stream.write(f"{line}\n")
        self._stream.flush()

    def end(self) -> None:
        """End the display; the last line stays."""
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()
            self._shown = 0
