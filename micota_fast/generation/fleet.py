"""The servers of a run: brought in as they come up, watched while they work, and given up when none is left.

Each is asked every MODEL_CHECK_S, and when the run ends or fails, which model it serves. If one turns out to serve
another model, the run ends with an error, and what was written since that server was last seen to serve the right one
is to be thrown away (`suspect_from`): of those rows nobody can say which model wrote them. A server that says nothing
of its model is taken on trust. So are the last answers of one that is lost and does not return before the end, and
those that a run stopped or killed within MODEL_CHECK_S of the change has left behind.
"""

import asyncio
import math
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import aiohttp

from micota_fast.config.generation import SamplingSettings
from micota_fast.errors import InputError
from micota_fast.generation.api import Api
from micota_fast.generation.endpoint import NOT_ASKED, Endpoint, RetryableError, client_session
from micota_fast.generation.journal import Journal

BACKOFF_S = 0.25, 15.0  # first and longest pause between two tries of a request, or of a server that is down or fails
# How long nothing may be answered before the run gives up: a server elsewhere may be restarted, ours will not.
PATIENCE_OWN_S, PATIENCE_URL_S = 20.0, 600.0
SILENT_S = 60.0  # after which a server that answers not even a GET is taken for lost
POLL_S = 1.0
REMOTE_POLL_S = 20.0  # of one that says nothing of its load, and may count every request
MODEL_CHECK_S = 5.0
SAID_EVERY_S = 5.0


class Fleet:
    """One or several servers of one model. An async context manager; `watch` runs during the work for each of them.

    Args:
        api: that they speak.
        urls: without a slash at the end.
        config: its limits and times.
        journal: where the answers go.
        changed: called whenever a server may have become free.

    Attributes:
        endpoints: the servers.
        suspect_from: rows of the journal that were there when a server that now serves another model was last seen to
            serve the right one; what follows them is suspect. None: no server is known to have changed its model.
    """

    def __init__(
        self,
        api: Api,
        urls: Sequence[str],
        config: SamplingSettings,
        journal: Journal,
        changed: Callable[[], None],
    ) -> None:
        self.endpoints = [api.endpoint(url, config.concurrency) for url in urls]
        self.suspect_from: int | None = None
        self._api, self._journal, self._changed = api, journal, changed
        ours = config.url is None
        self._patience_s = PATIENCE_OWN_S if ours else PATIENCE_URL_S
        self._first_patience_s = PATIENCE_OWN_S if ours else config.wait_for_server_s
        self._all_down_since: float | None = time.monotonic()
        self._said_failing, self._said_at = False, -math.inf

    async def __aenter__(self) -> "Fleet":
        # What a server sends unasked must not pass from one kind of request to the other: questions about the server
        # have connections of their own, one each.
        self._probing = client_session(aiohttp.TCPConnector(force_close=True))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._probing.close()

    # -- coming up ---------------------------------------------------------------------------------------------------

    async def first_up(self) -> list[Endpoint]:
        """Wait for the first server, and a moment for others that are as quick; returns those that are up.

        Raises:
            InputError: none has replied in its time.
        """
        started = time.monotonic()
        while all(endpoint.down is not None for endpoint in self.endpoints):
            if not self._heard and time.monotonic() - started > self.patience_s:
                raise self._never_heard()
            await asyncio.sleep(0.005)
        for _ in range(100):
            if all(endpoint.down != NOT_ASKED for endpoint in self.endpoints):
                break
            await asyncio.sleep(0.01)
        return [endpoint for endpoint in self.endpoints if endpoint.down is None]

    async def _examine(self, endpoint: Endpoint) -> None:
        """See that a server that is not up answers and serves the model asked for, with room for our prompts."""
        served = await self._check_model(endpoint)
        if served is None and not endpoint.answered:
            what = "does not say which model it serves: `model` is taken on trust"
            print(f"{endpoint.url} {what}", file=sys.stderr, flush=True)
        await self._api.read_settings(endpoint, self._probing)

    # -- at work -----------------------------------------------------------------------------------------------------

    async def watch(self, endpoint: Endpoint) -> None:
        """Bring a server in while it is down; ask it how it fares, and what it serves, while it is up.

        Raises:
            InputError: it serves another model, or has less room than the others; or no server has been there for
                longer than the patience.
        """
        pause, longest_pause = BACKOFF_S
        heard = checked = time.monotonic()
        while True:
            try:
                now = time.monotonic()
                if endpoint.down is not None:
                    await self._examine(endpoint)
                    checked = now
                elif now - checked >= MODEL_CHECK_S:
                    await self._check_model(endpoint)
                    checked = now
                load = await self._api.probe_load(endpoint, self._probing)
                if endpoint.down is not None:
                    endpoint.up()
                    self._all_down_since = None
                    pause = BACKOFF_S[0]
                endpoint.adapt(load)
                heard = time.monotonic()
                self._changed()
            except RetryableError as error:
                if endpoint.down is not None:
                    self.is_down(endpoint, str(error))
                elif time.monotonic() - heard > SILENT_S:
                    self.is_down(endpoint, f"nothing to go by for {SILENT_S:.0f} s: {error}")
            if endpoint.down is None:
                await asyncio.sleep(REMOTE_POLL_S if endpoint.remote else POLL_S)
            else:
                await asyncio.sleep(pause)
                pause = min(2 * pause, longest_pause, max(self.patience_s / 4, BACKOFF_S[0]))

    async def confirm(self) -> None:
        """Ask each server that has answered since it was last asked once more which model it serves.

        Raises:
            InputError: of one it is another; all were asked.
        """
        errors = await asyncio.gather(*map(self._confirm, self.endpoints))
        if found := [error for error in errors if error is not None]:
            raise found[0]

    async def _confirm(self, endpoint: Endpoint) -> InputError | None:
        try:
            if endpoint.unchecked:
                await self._check_model(endpoint)
        except RetryableError as error:
            print(
                f"{endpoint.url} cannot be asked any more which model it serves ({error}): its last "
                f"{endpoint.unchecked} answers are taken on trust",
                file=sys.stderr,
                flush=True,
            )
        except InputError as error:
            return error
        return None

    async def _check_model(self, endpoint: Endpoint) -> str | None:
        """What it serves; None if it does not tell.

        Raises:
            RetryableError: it does not answer.
            InputError: it is another model.
        """
        written, unchecked = len(self._journal), endpoint.unchecked  # before the question, so by the model it is about
        served = await self._api.served_model(endpoint, self._probing)
        if served is not None and not self._api.is_wanted(served):
            if endpoint.unchecked and (self.suspect_from is None or endpoint.written_then < self.suspect_from):
                self.suspect_from = endpoint.written_then
            raise InputError(f"{endpoint.url} serves {served}, but `model` is {self._api.model}")
        endpoint.written_then = written
        endpoint.unchecked -= unchecked
        return served

    def freest(self) -> Endpoint | None:
        """Return the server with the most room; None: none has any."""
        free = [endpoint for endpoint in self.endpoints if endpoint.free]
        return min(free, key=lambda endpoint: endpoint.in_flight / endpoint.limit, default=None)

    async def any_healthy(self, generates: bool) -> bool:
        """Return whether any server is well; `generates`: see `Api.is_healthy`."""
        return any(await asyncio.gather(*(self._api.is_healthy(e, self._probing, generates) for e in self.endpoints)))

    # -- failing -----------------------------------------------------------------------------------------------------

    @property
    def patience_s(self) -> float:
        """Seconds for which nothing may be answered."""
        return self._patience_s if self._heard else self._first_patience_s

    @property
    def _heard(self) -> bool:
        return any(endpoint.heard for endpoint in self.endpoints)

    def is_down(self, endpoint: Endpoint, why: str) -> None:
        """Take a server out; give the run up if none has been there for too long.

        Raises:
            InputError: nobody has answered for longer than the patience.
        """
        if endpoint.down is None:
            endpoint.lost(why)
        endpoint.down = why
        self.say_failing(endpoint, why)
        if any(other.down is None for other in self.endpoints):
            return
        now = time.monotonic()
        if self._all_down_since is None:
            self._all_down_since = now
        if now - self._all_down_since > self.patience_s:
            raise self.given_up(now - self._all_down_since, why) if self._heard else self._never_heard()

    def say_failing(self, endpoint: Endpoint, why: str) -> None:
        """Tell of a failure, once until something is answered again."""
        now = time.monotonic()
        if not self._said_failing and now - self._said_at >= SAID_EVERY_S:
            self._said_failing, self._said_at = True, now
            limit = f"trying again for up to {self.patience_s:.0f} s"
            print(f"{endpoint.url}: {why}; {limit}", file=sys.stderr, flush=True)

    def answered(self) -> None:
        """Note that something was answered: the next failure is reported again."""
        self._said_failing = False

    def given_up(self, silent_s: float, why: str) -> InputError:
        """Return the error that ends a run whose servers no longer answer."""
        urls = ", ".join(endpoint.url for endpoint in self.endpoints)
        return InputError(
            f"{urls} {'has' if len(self.endpoints) == 1 else 'have'} given no answer for {silent_s:.0f} s (last: "
            f"{why}); {len(self._journal)} completions are kept in {self._journal.folder}: start again to resume from "
            f"there"
        )

    def _never_heard(self) -> InputError:
        tried = "; ".join(f"{endpoint.url}: {endpoint.down}" for endpoint in self.endpoints)
        return InputError(
            f"no server has replied within {self.patience_s:g} s: {tried}. Check the address, or give a server that is "
            f"still starting more time with `--set wait_for_server_s=600`"
        )
