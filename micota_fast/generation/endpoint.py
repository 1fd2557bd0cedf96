"""One server as the client sees it: up or down, how much it is given to do, and what it says of itself."""

import asyncio
import contextlib
import itertools
import json
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from micota_fast.common.json_io import parse_json
from micota_fast.common.records import model_name
from micota_fast.common.terminal import one_line
from micota_fast.errors import InputError

RETRY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
BUSY_STATUSES = RETRY_STATUSES - {408, 500}  # of an answer: the server's state, not the request, is the reason
UNAVAILABLE_STATUSES = RETRY_STATUSES - {500}  # of a GET: the server (or the one behind a router) is not up yet
PROBE_TIMEOUT_S = 30.0
HALVED_EVERY_S = 1.0
RESTS_AFTER = 8  # failures in a row
FIRST_LIMIT = 64  # requests in flight before the server has said how it fares
JSON = {"Content-Type": "application/json"}
_OURS = uuid.uuid4().hex  # how the ids of this process's requests begin
_numbers = itertools.count()


class RetryableError(Exception):
    """A failure that another try may mend.

    `own`: it may be the request's fault, so that a request which meets nothing else is given up on. `lost`: the server
    is not there.
    """

    def __init__(self, message: str, own: bool = True, lost: bool = False) -> None:
        super().__init__(message)
        self.own, self.lost = own, lost


@dataclass(frozen=True)
class Load:
    """What a server says of its work."""

    running: int
    waiting: int
    usage: float | None  # share of its KV cache that is taken


def parse_load(body: Any) -> Load | None:
    """SGLang's /v1/loads, its data-parallel ranks added up; None where the body is nothing of that kind."""
    try:
        ranks = body["loads"]
        usage = [rank["token_usage"] for rank in ranks if isinstance(rank.get("token_usage"), int | float)]
        return Load(
            running=sum(int(rank["num_running_reqs"]) for rank in ranks),
            waiting=sum(int(rank["num_waiting_reqs"]) for rank in ranks),
            usage=sum(usage) / len(usage) if usage else None,
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return None


class Endpoint:
    """A server's address, its state, and how many requests it is given at once.

    The limit follows the server's own queue: requests that only wait there gain nothing, and would be lost with it. It
    grows by a quarter a second while hardly anything waits and the KV cache has room, and falls by what waits beyond
    an eighth of what runs. A server that tells nothing of itself gets `most` at once. A 429 or 503 halves the limit, at
    most once a second: those that were sent together are one refusal. A server on which one request after another fails
    is left alone for a while, and for longer each time: it would fail on all work there is before others get to it.
    """

    def __init__(self, url: str, most: int) -> None:
        self.url = url
        self.most = most
        self.limit = float(min(most, FIRST_LIMIT))
        self.in_flight = 0
        self.timeouts: set[asyncio.Timeout] = set()  # of the requests in flight, to break them off
        self.load: Load | None = None
        self.info: dict[str, Any] = {}
        self.down: str | None = "not asked yet"
        self.answered = 0
        self._headers = JSON
        self._adapted = False
        self._halved_at = -math.inf
        self._work_again()

    def _work_again(self) -> None:
        self._failed_in_row, self._rest_s, self._rests_until = 0, 0.0, -math.inf

    @property
    def free(self) -> bool:
        return self.down is None and self.in_flight < int(self.limit) and time.monotonic() >= self._rests_until

    def up(self) -> None:
        """It answers."""
        self.down = None
        self._work_again()

    def succeeded(self) -> None:
        """It has answered a request."""
        self.answered += 1
        self._work_again()

    def failed(self, shortest_s: float, longest_s: float) -> float:
        """A request has failed there; returns for how many seconds it now gets no further one.

        Args:
            shortest_s: the first rest.
            longest_s: the last.
        """
        self._failed_in_row += 1
        now = time.monotonic()
        if self._failed_in_row >= RESTS_AFTER and now >= self._rests_until:
            self._rest_s = min(max(2 * self._rest_s, shortest_s), longest_s)
            self._rests_until = now + self._rest_s
        return max(0.0, self._rests_until - now)

    def lost(self, why: str) -> None:
        """It answers no more: everything in flight there is broken off, to be asked elsewhere."""
        self.down = why
        self.load = None
        now = asyncio.get_running_loop().time()
        for timeout in self.timeouts:
            timeout.reschedule(now)

    def busy(self) -> None:
        """It refused a request for lack of room."""
        now = time.monotonic()
        if now - self._halved_at >= HALVED_EVERY_S:
            self._halved_at = now
            self.limit = max(1.0, min(self.limit, self.in_flight) / 2)

    def adapt(self, load: Load | None) -> None:
        """Take in what the server says of itself; None: it does not say."""
        self.load = load
        first, self._adapted = not self._adapted, True
        if load is None:
            self.limit = float(self.most) if first else min(float(self.most), self.limit + max(1.0, self.limit / 8))
            return
        slack = max(4, load.running // 8)
        if load.waiting > slack:
            self.limit = max(1.0, self.in_flight - (load.waiting - slack))
        elif load.waiting <= slack // 2 and self.in_flight >= int(self.limit) and (load.usage or 0.0) < 0.95:
            self.limit = min(float(self.most), self.limit + max(1.0, self.limit / 4))

    async def ask(self, session: aiohttp.ClientSession, body: Mapping[str, Any], timeout_s: float) -> Any:
        """POST /generate; the decoded answer.

        Raises:
            RetryableError: another try may succeed, here or elsewhere.
            InputError: the server refuses this request (any other 4xx).
        """
        rid = f"{_OURS}-{next(_numbers)}"
        data = json.dumps({**body, "rid": rid})
        try:
            async with asyncio.timeout(timeout_s) as timeout:
                self.timeouts.add(timeout)
                try:
                    async with session.post(self.url + "/generate", data=data, headers=self._headers) as response:
                        content = await response.read()
                        if response.status == 200:
                            answer = parse_json(content, "its answer", object, finite=False)
                            if _is_anothers(answer, rid):
                                # Whatever comes on that connection is off by one from now on, and it is among the
                                # idle ones again: this server has each connection for one request from now on.
                                self._headers = JSON | {"Connection": "close"}
                                raise RetryableError("the answer to another request came", own=False)
                            return answer
                finally:
                    self.timeouts.discard(timeout)
        except aiohttp.ClientConnectorError as error:
            raise RetryableError(f"{type(error).__name__}: {error}", own=False, lost=True) from None
        except (aiohttp.ClientError, TimeoutError, OSError, InputError) as error:
            if self.down is not None:
                raise RetryableError(self.down, own=False) from None
            what = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            no_http = isinstance(error, aiohttp.ClientResponseError)  # but what an answer before it has left behind
            raise RetryableError(f"{type(error).__name__}: {what}", own=not no_http) from None
        message = _message(content)
        if response.status in RETRY_STATUSES:
            if response.status in BUSY_STATUSES:
                self.busy()
            raise RetryableError(f"HTTP {response.status}: {message}", own=response.status not in BUSY_STATUSES)
        raise InputError(f"{self.url} refused it with HTTP {response.status}: {message}")

    async def healthy(self, session: aiohttp.ClientSession, path: str) -> bool:
        """Whether GET `path` answers 200."""
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S), session.get(self.url + path) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def probe_load(self, session: aiohttp.ClientSession) -> Load | None:
        """What it says of its load, and None where it has no such page.

        Raises:
            RetryableError: it does not answer at all.
        """
        status, content = await self._get(session, "/v1/loads?include=core")
        if status != 200:
            return None
        with contextlib.suppress(InputError):
            return parse_load(parse_json(content, self.url, object, finite=False))
        return None

    async def read_info(self, session: aiohttp.ClientSession) -> None:
        """Its settings into `info`; nothing where it does not tell (a router, say)."""
        self.info = {}
        for path in ("/server_info", "/get_server_info"):  # newer and older name
            with contextlib.suppress(RetryableError, InputError):
                status, content = await self._get(session, path)
                if status == 200:
                    self.info = parse_json(content, self.url, finite=False)
                    return

    async def served_model(self, session: aiohttp.ClientSession) -> str | None:
        """Name or folder of what it serves; None where it does not tell.

        Raises:
            RetryableError: it does not answer, or is not up yet.
            InputError: the URL is none.
        """
        for path in ("/get_model_info", "/model_info"):
            status, content = await self._get(session, path)
            if status in UNAVAILABLE_STATUSES:
                raise RetryableError(f"HTTP {status}: {_message(content)}")
            if status != 200:
                continue
            with contextlib.suppress(InputError):
                info = parse_json(content, self.url, finite=False)
                if isinstance(info.get("model_path"), str):
                    return str(info["model_path"])
        return None

    async def _get(self, session: aiohttp.ClientSession, path: str) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S), session.get(self.url + path) as response:
                return response.status, await response.read()
        except aiohttp.InvalidURL:
            raise InputError(f"`url`: {self.url!r} is no address of a server") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RetryableError(f"{type(error).__name__}: {error}") from None


def is_model(served: str, wanted: str, checkpoint: Path) -> bool:
    """Whether a server's model is the one that is wanted.

    That is the same folder or hub name; or, as another machine's folders lie elsewhere, the same last component.
    """
    theirs = Path(served)
    if served == wanted or checkpoint.resolve() == theirs.resolve():
        return True
    # NAME/model is called NAME: of our own making, all of them end in `model`.
    last = theirs.parent.name if theirs.name == "model" else theirs.name
    return last in {model_name(wanted).rpartition("/")[2], checkpoint.name} - {"model"}


def _is_anothers(answer: Any, rid: str) -> bool:
    """Whether an answer names another of our requests; one that names none of ours may have passed a router."""
    try:
        named = answer["meta_info"]["id"]
    except (KeyError, TypeError):
        return False
    return isinstance(named, str) and named.startswith(_OURS) and named != rid


def _message(content: bytes) -> str:
    """What an error body says."""
    try:
        return one_line(str(parse_json(content, "")["error"]["message"]))
    except (InputError, KeyError, TypeError):
        return one_line(content.decode(errors="replace")[:500])
