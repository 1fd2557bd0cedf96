"""One server as the client sees it: up or down, how much it is given to do, and how it is asked over HTTP.

What a server sends is read up to a limit, checked, and never acted on: a redirect is not followed, a compressed body is
not unpacked, a cookie is not kept. What is asked, and what the answers mean, is the API's (`sglang_api`, `openai_api`).
"""

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import aiohttp

from micota_fast.common.json_io import parse_json
from micota_fast.common.schema import Bounds
from micota_fast.common.terminal import one_line
from micota_fast.common.urls import basic_authorization, hide_credentials
from micota_fast.errors import InputError
from micota_fast.generation.retry_after import seconds_to_wait

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
MOST_COUNTED = 1 << 32  # of anything that a server counts
KEY_SHOWN = "[key]"
_Positive = Annotated[int, Bounds(1, MOST_COUNTED)]


class RetryableError(Exception):
    """A failure that another try may mend.

    `own`: it may be the request's fault, so that a request which meets nothing else is given up on. `lost`: the server
    is not there.
    """

    def __init__(self, message: str, own: bool = True, lost: bool = False) -> None:
        super().__init__(message)
        self.own, self.lost = own, lost


class RefusedError(InputError):
    """A server refuses a request for what it asks.

    Attributes:
        status: of HTTP, 400 to 499.
        body: of the reply.
    """

    def __init__(self, message: str, status: int, body: bytes) -> None:
        super().__init__(message)
        self.status, self.body = status, body


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


class Endpoint:
    """A server's address, its state, and how many requests it is given at once.

    The limit follows the server's own queue: requests that only wait there gain nothing, and would be lost with it. It
    grows by a quarter a second while hardly anything waits and the KV cache has room, and falls by what waits beyond
    an eighth of what runs. A server that tells nothing of itself gets `most` at once. A 429 or 503 halves the limit, at
    most once a second: those that were sent together are one refusal. A server on which one request after another fails
    is left alone for a while, and for longer each time: it would fail on all work there is before others get to it.
    One that says for how long it wants to be left alone (`Retry-After`) is.

    Args:
        url: without a slash at the end. A user and password in it are sent as basic authorization, and never shown.
        most: requests in flight there.
        key: is sent as a bearer token, and never shown.
        remote: somebody else's, behind proxies: a connection that fails does not mean that the server is lost.
        reuse: whether a connection may carry one request after another.
    """

    def __init__(
        self, url: str, most: int, *, key: str | None = None, remote: bool = False, reuse: bool = True
    ) -> None:
        self.url = hide_credentials(url)
        self.most = most
        self.remote, self.reuse = remote, reuse
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
        self.asked_to_rest_until = -math.inf  # by the server, on the clock of time.monotonic
        self._key = key
        authorization = basic_authorization(url) if key is None else f"Bearer {key}"
        self._headers = HEADERS if authorization is None else HEADERS | {"Authorization": authorization}
        self._adapted = False
        self._halved_at = -math.inf
        self._work_again()

    def _work_again(self) -> None:
        self._failed_in_row, self._rest_s, self._rests_until = 0, 0.0, -math.inf

    @property
    def free(self) -> bool:
        now = time.monotonic()
        rests = now < max(self._rests_until, self.asked_to_rest_until)
        return self.down is None and self.in_flight < int(self.limit) and not rests

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
        return max(0.0, self._rests_until - now, self.asked_to_rest_until - now)

    def rest(self, seconds: float) -> None:
        """Send it nothing for this time, as it has asked."""
        self.asked_to_rest_until = max(self.asked_to_rest_until, time.monotonic() + seconds)

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

    async def post(
        self,
        session: aiohttp.ClientSession,
        path: str,
        body: Mapping[str, Any],
        timeout_s: float,
        most_bytes: int,
        on_line: Callable[[bytes], None] | None = None,
    ) -> bytes:
        """POST a JSON body and return that of the answer, which has status 200.

        Args:
            session: see `client_session`.
            path: below the server's address.
            body: of the request.
            timeout_s: seconds until it must be answered.
            most_bytes: that an answer to this request can have.
            on_line: takes each line, without its newline, of an answer that is an event stream; b"" is returned then.

        Raises:
            RetryableError: another try may succeed, here or elsewhere; also what `on_line` raises.
            RefusedError: the server refuses this request (any other 4xx).
        """
        data = json.dumps(body)
        try:
            async with asyncio.timeout(timeout_s) as timeout:
                self.timeouts.add(timeout)
                try:
                    reply = await self._exchange(session, "POST", path, most_bytes, data, on_line)
                finally:
                    self.timeouts.discard(timeout)
        except aiohttp.ClientConnectorError as error:
            raise RetryableError(f"{type(error).__name__}: {error}", own=False, lost=not self.remote) from None
        except (aiohttp.ClientError, TimeoutError, OSError, EOFError, ValueError) as error:
            if self.down is not None:
                raise RetryableError(self.down, own=False) from None
            what = f"no answer within {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            no_http = isinstance(error, aiohttp.ClientResponseError)  # but what an answer before it has left behind
            raise RetryableError(f"{type(error).__name__}: {what}", own=not no_http) from None
        status = reply.status
        if status == 200:
            return reply.content
        message = error_message(reply.content)
        if 400 <= status < 500 and status not in RETRY_STATUSES:
            raise RefusedError(f"{self.url} refused it with HTTP {status}: {message}", status, reply.content)
        if status in BUSY_STATUSES:
            self.busy()
            if reply.retry_after_s > 0:
                self.rest(reply.retry_after_s)
        raise RetryableError(f"HTTP {status}: {message}", own=status not in BUSY_STATUSES)

    async def get(self, session: aiohttp.ClientSession, path: str) -> tuple[int, bytes]:
        """GET a page of at most PAGE_BYTES and return its status and body.

        Raises:
            RetryableError: it does not come within PROBE_TIMEOUT_S, or not as it should.
        """
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                reply = await self._exchange(session, "GET", path, PAGE_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError, EOFError, ValueError) as error:
            raise RetryableError(f"{type(error).__name__}: {error}") from None
        self.heard = self.heard or reply.status in UNAVAILABLE_STATUSES
        return reply.status, reply.content

    async def healthy(self, session: aiohttp.ClientSession, path: str) -> bool:
        """Return whether GET `path` answers 200."""
        try:
            return (await self.get(session, path))[0] == 200
        except RetryableError:
            return False

    def without_key(self, text: str) -> str:
        """Return a text without this server's key: some repeat it in their messages, and it is written down nowhere."""
        return text if self._key is None else text.replace(self._key, KEY_SHOWN)

    async def _exchange(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        most_bytes: int,
        data: str | None = None,
        on_line: Callable[[bytes], None] | None = None,
    ) -> "_HttpReply":
        """A reply, without our key.

        Raises:
            RetryableError: it is larger than `most_bytes`, compressed, or a redirect.
        """
        headers = self._headers
        if data is not None:
            headers = headers | {"Content-Type": "application/json"} | ({} if self.reuse else {"Connection": "close"})
        async with session.request(
            method, self.url + path, data=data, headers=headers, allow_redirects=False
        ) as response:
            if 300 <= response.status < 400:
                where = hide_credentials(response.headers.get("Location", "nowhere"))[:SHOWN_CHARACTERS]
                raise RetryableError(
                    f"HTTP {response.status}: it redirects {path} to {self.without_key(where)!r}; redirects are not "
                    f"followed, so that prompts go to the servers that `url` names and nowhere else"
                )
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise RetryableError(f"it sent {path} compressed ({encoding[:60]!r}), though it was asked not to")
            streamed = on_line is not None and response.status == 200 and response.content_type == "text/event-stream"
            parts: list[bytes] = []
            size = 0
            async for part in response.content.iter_any():
                size += len(part)
                if size > most_bytes:
                    raise RetryableError(f"it sent more than the {most_bytes:,} bytes that a reply to {path} can have")
                if on_line is not None and streamed and b"\n" in part:
                    *lines, part = b"".join([*parts, part]).split(b"\n")
                    parts.clear()
                    for line in lines:
                        on_line(self._without_key(line))
                parts.append(part)
            content = self._without_key(b"".join(parts))
            if on_line is not None and streamed:
                on_line(content)
                content = b""
            wait_s = seconds_to_wait(response.headers.get("Retry-After"), response.headers.get("Date"))
            return _HttpReply(response.status, content, wait_s)

    def _without_key(self, content: bytes) -> bytes:
        return content if self._key is None else content.replace(self._key.encode(), KEY_SHOWN.encode())


@dataclass(frozen=True, slots=True)
class _HttpReply:
    status: int
    content: bytes
    retry_after_s: float  # 0: at once


def client_session(connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    """Return a session for `Endpoint`: it unpacks nothing, keeps no cookie, and limits only the time to connect."""
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30.0),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def decode_object(content: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object that a server sent; raises RetryableError if it is none."""
    try:
        return dict(parse_json(content, what))
    except InputError as error:
        raise RetryableError(str(error)) from None


def error_message(content: bytes) -> str:
    """Return what the body of an error says, on one line of at most SHOWN_CHARACTERS."""
    text = content.decode(errors="replace")
    with contextlib.suppress(InputError, KeyError, TypeError):
        text = str(parse_json(content, "error")["error"]["message"])
    return one_line(text[:SHOWN_CHARACTERS])
