"""One server as the client sees it: up or down, how much it is given to do, and what it says of itself.

What a server sends is read up to a limit, checked, and never acted on: a redirect is not followed, a compressed body is
not unpacked, a cookie is not kept.
"""

import asyncio
import contextlib
import itertools
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp

from micota_fast.common.json_io import parse_json
from micota_fast.common.records import model_name
from micota_fast.common.schema import Bounds, from_json
from micota_fast.common.terminal import one_line
from micota_fast.common.urls import basic_authorization, hide_credentials
from micota_fast.errors import InputError

RETRY_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
BUSY_STATUSES = RETRY_STATUSES - {408, 500}  # of an answer: the server's state, not the request, is the reason
UNAVAILABLE_STATUSES = RETRY_STATUSES - {500}  # of a GET: the server (or the one behind a router) is not up yet
PROBE_TIMEOUT_S = 30.0
HALVED_EVERY_S = 1.0
RESTS_AFTER = 8  # failures in a row
FIRST_LIMIT = 64  # requests in flight before the server has said how it fares
PAGE_BYTES = 4 << 20  # of what a server says of itself
NOT_ASKED = "no reply yet"
SHOWN_CHARACTERS = 500  # of a server's message
HEADERS = {"Accept-Encoding": "identity"}
_OURS = uuid.uuid4().hex  # how the ids of this process's requests begin
_numbers = itertools.count()
_MOST = 1 << 32  # of anything that a server counts
_Positive = Annotated[int, Bounds(1, _MOST)]


class RetryableError(Exception):
    """A failure that another try may mend.

    `own`: it may be the request's fault, so that a request which meets nothing else is given up on. `lost`: the server
    is not there.
    """

    def __init__(self, message: str, own: bool = True, lost: bool = False) -> None:
        super().__init__(message)
        self.own, self.lost = own, lost


@dataclass(frozen=True)
class ServerInfo:
    """A server's settings as it states them; None: it does not say.

    `context_length`: tokens of prompt and answer together. `max_req_input_len`: a prompt of this many is refused.
    """

    context_length: _Positive | None = None
    max_req_input_len: _Positive | None = None
    enable_deterministic_inference: bool | None = None
    device: str | None = None
    tp_size: _Positive | None = None
    dp_size: _Positive | None = None
    pp_size: _Positive | None = None

    @property
    def gpus(self) -> int | None:
        """GPUs that it uses; None: not known."""
        if self.device != "cuda" or self.tp_size is None:
            return None
        return self.tp_size * (self.dp_size or 1) * (self.pp_size or 1)


@dataclass(frozen=True)
class Load:
    """What a server says of its work."""

    running: int
    waiting: int
    usage: float | None  # share of its KV cache that is taken


def parse_load(body: Any) -> Load | None:
    """Read SGLang's /v1/loads, its data-parallel ranks added up; None if the body is nothing of that kind."""
    try:
        ranks = body["loads"]
        usage = [used for rank in ranks if type(used := rank.get("token_usage")) in (int, float) and 0 <= used < 2]
        counts = [rank[key] for rank in ranks for key in ("num_running_reqs", "num_waiting_reqs")]
    except (AttributeError, KeyError, TypeError):
        return None
    if not all(type(count) is int and 0 <= count <= _MOST for count in counts):
        return None
    return Load(sum(counts[::2]), sum(counts[1::2]), sum(usage) / len(usage) if usage else None)


class Endpoint:
    """A server's address, its state, and how many requests it is given at once.

    The limit follows the server's own queue: requests that only wait there gain nothing, and would be lost with it. It
    grows by a quarter a second while hardly anything waits and the KV cache has room, and falls by what waits beyond
    an eighth of what runs. A server that tells nothing of itself gets `most` at once. A 429 or 503 halves the limit, at
    most once a second: those that were sent together are one refusal. A server on which one request after another fails
    is left alone for a while, and for longer each time: it would fail on all work there is before others get to it.
    """

    def __init__(self, url: str, most: int) -> None:
        self.url = hide_credentials(url)
        self.most = most
        self.limit = float(min(most, FIRST_LIMIT))
        self.in_flight = 0
        self.timeouts: set[asyncio.Timeout] = set()  # of the requests in flight, to break them off
        self.load: Load | None = None
        self.info = ServerInfo()
        self.down: str | None = NOT_ASKED
        self.heard = False  # it was up once, or has said that it is not up yet
        self.answered = 0
        self.unchecked = 0  # answers since it was last asked which model it serves
        self.written_then = 0  # answers that the run had written by then
        authorization = basic_authorization(url)
        self._headers = HEADERS if authorization is None else HEADERS | {"Authorization": authorization}
        self._reuse = True  # connections
        self._adapted = False
        self._halved_at = -math.inf
        self._work_again()

    def _work_again(self) -> None:
        self._failed_in_row, self._rest_s, self._rests_until = 0, 0.0, -math.inf

    @property
    def free(self) -> bool:
        return self.down is None and self.in_flight < int(self.limit) and time.monotonic() >= self._rests_until

    def up(self) -> None:
        """Note that it answers."""
        self.down = None
        self.heard = True
        self._work_again()

    def succeeded(self) -> None:
        """Note that it has answered a request."""
        self.answered += 1
        self.unchecked += 1
        self._work_again()

    def failed(self, shortest_s: float, longest_s: float) -> float:
        """Note that a request has failed there; returns for how many seconds it now gets no further one.

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
        """Break off everything in flight there, to be asked elsewhere: it answers no more."""
        self.down = why
        self.load = None
        now = asyncio.get_running_loop().time()
        for timeout in self.timeouts:
            timeout.reschedule(now)

    def busy(self) -> None:
        """Note that it refused a request for lack of room."""
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

    async def ask(
        self, session: aiohttp.ClientSession, body: Mapping[str, Any], timeout_s: float, most_bytes: int
    ) -> dict[str, Any]:
        """POST /generate and return the decoded answer.

        Args:
            session: see `client_session`.
            body: of the request, without an id.
            timeout_s: seconds until it must be answered.
            most_bytes: that an answer to this request can have.

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
                    status, content = await self._exchange(session, "POST", "/generate", most_bytes, data)
                finally:
                    self.timeouts.discard(timeout)
        except aiohttp.ClientConnectorError as error:
            raise RetryableError(f"{type(error).__name__}: {error}", own=False, lost=True) from None
        except (aiohttp.ClientError, TimeoutError, OSError, EOFError, ValueError) as error:
            if self.down is not None:
                raise RetryableError(self.down, own=False) from None
            what = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            no_http = isinstance(error, aiohttp.ClientResponseError)  # but what an answer before it has left behind
            raise RetryableError(f"{type(error).__name__}: {what}", own=not no_http) from None
        if status == 200:
            answer = _decoded(content, "its answer")
            if _is_anothers(answer, rid):
                # Whatever comes on that connection is off by one from now on, and it is among the idle ones again:
                # this server has each connection for one request from now on.
                self._reuse = False
                raise RetryableError("the answer to another request came", own=False)
            return answer
        message = _message(content)
        if 400 <= status < 500 and status not in RETRY_STATUSES:
            raise InputError(f"{self.url} refused it with HTTP {status}: {message}")
        if status in BUSY_STATUSES:
            self.busy()
        raise RetryableError(f"HTTP {status}: {message}", own=status not in BUSY_STATUSES)

    async def healthy(self, session: aiohttp.ClientSession, path: str) -> bool:
        """Return whether GET `path` answers 200."""
        try:
            return (await self._get(session, path))[0] == 200
        except RetryableError:
            return False

    async def probe_load(self, session: aiohttp.ClientSession) -> Load | None:
        """Ask for its load; None if it has no such page.

        Raises:
            RetryableError: it does not answer, or what it says is not JSON.
        """
        path = "/v1/loads?include=core"
        status, content = await self._get(session, path)
        return parse_load(_decoded(content, path)) if status == 200 else None

    async def read_info(self, session: aiohttp.ClientSession) -> None:
        """Read its settings into `info`; nothing if it does not state them (a router, say).

        Raises:
            RetryableError: it does not answer, or states a setting that cannot be.
        """
        self.info = ServerInfo()
        for path in ("/server_info", "/get_server_info"):  # newer and older name
            status, content = await self._get(session, path)
            if status == 200:
                try:
                    self.info = from_json(ServerInfo, _decoded(content, path), path)
                except InputError as error:
                    raise RetryableError(str(error)) from None
                return

    async def served_model(self, session: aiohttp.ClientSession) -> str | None:
        """Name or folder of what it serves; None if it does not tell.

        Raises:
            RetryableError: it does not answer, is not up yet, or what it says cannot be a name.
        """
        for path in ("/get_model_info", "/model_info"):
            status, content = await self._get(session, path)
            if status in UNAVAILABLE_STATUSES:
                raise RetryableError(f"HTTP {status}: {_message(content)}")
            if status != 200:
                continue
            served = _decoded(content, path).get("model_path")
            if isinstance(served, str):
                if not served or len(served) > SHOWN_CHARACTERS or any(ord(c) < 32 or ord(c) == 127 for c in served):
                    raise RetryableError(f"{path}: key 'model_path' cannot be a name or folder: {served[:60]!r}")
                return served
        return None

    async def _get(self, session: aiohttp.ClientSession, path: str) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                status, content = await self._exchange(session, "GET", path, PAGE_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError, EOFError, ValueError) as error:
            raise RetryableError(f"{type(error).__name__}: {error}") from None
        self.heard = self.heard or status in UNAVAILABLE_STATUSES
        return status, content

    async def _exchange(
        self, session: aiohttp.ClientSession, method: str, path: str, most_bytes: int, data: str | None = None
    ) -> tuple[int, bytes]:
        """Status and body of a reply.

        Raises:
            RetryableError: it is larger than `most_bytes`, compressed, or a redirect.
        """
        headers = self._headers
        if data is not None:
            headers = headers | {"Content-Type": "application/json"} | ({} if self._reuse else {"Connection": "close"})
        async with session.request(
            method, self.url + path, data=data, headers=headers, allow_redirects=False
        ) as response:
            if 300 <= response.status < 400:
                where = hide_credentials(response.headers.get("Location", "nowhere"))[:SHOWN_CHARACTERS]
                raise RetryableError(
                    f"HTTP {response.status}: it redirects {path} to {where!r}; redirects are not followed, so that "
                    f"prompts go to the servers that `url` names and nowhere else"
                )
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise RetryableError(f"it sent {path} compressed ({encoding[:60]!r}), though it was asked not to")
            parts, size = [], 0
            async for part in response.content.iter_any():
                parts.append(part)
                size += len(part)
                if size > most_bytes:
                    raise RetryableError(f"it sent more than the {most_bytes:,} bytes that a reply to {path} can have")
            return response.status, b"".join(parts)


def client_session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    """Return a session for `Endpoint`: it unpacks nothing, keeps no cookie, and limits only the time to connect."""
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30.0),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def is_model(served: str, wanted: str, checkpoint: Path) -> bool:
    """Return whether a server's model is the one that is wanted.

    That is the same folder or hub name; or, as another machine's folders lie elsewhere, the same last component.
    """
    theirs = Path(served)
    if served == wanted or os.path.realpath(checkpoint) == os.path.realpath(served):
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


def _decoded(content: bytes, what: str) -> dict[str, Any]:
    """The JSON object that a server sent."""
    try:
        return dict(parse_json(content, what))
    except InputError as error:
        raise RetryableError(str(error)) from None


def _message(content: bytes) -> str:
    """What an error body says."""
    text = content.decode(errors="replace")
    with contextlib.suppress(InputError, KeyError, TypeError):
        text = str(parse_json(content, "error")["error"]["message"])
    return one_line(text[:SHOWN_CHARACTERS])
