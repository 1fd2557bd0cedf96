"""What all endpoints share: bodies in, errors, JSON and server-sent events out."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Middleware

from micota_fast.common.terminal import one_line
from micota_fast.serve.connections import KEPT_ALIVE_S, REQUEST_WAIT_S, Connections
from micota_fast.serve.engine import EngineDead
from micota_fast.serve.logprobs import Likeliest
from micota_fast.serve.options import BadRequest
from micota_fast.serve.request_parser import MAX_BODY_BYTES

log = logging.getLogger(__name__)

# Bytes of JSON, in or out, that the event loop handles itself: some milliseconds. It can do nothing else meanwhile.
INLINE_BYTES = 1 << 14
PIECE_NUMBERS = 1 << 12
_threads = ThreadPoolExecutor(4, "http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Result = TypeVar("Result")


async def off_loop(size: int, function: Callable[..., Result], *args: Any) -> Result:
    """Call a function: here, or in a thread where what it works on has more than INLINE_BYTES."""
    if size <= INLINE_BYTES:
        return function(*args)
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *args)


def error_response(
    status: int, message: str, kind: str = "server_error", code: str | None = None, param: str | None = None
) -> web.Response:
    """An error as OpenAI's API has it, which SGLang's clients read as well."""
    return web.json_response({"error": error_object(message, kind, code, param)}, status=status)


def error_object(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"message": message, "type": kind, "code": code, "param": param}


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn exceptions into JSON errors."""
    try:
        return await handler(request)
    except BadRequest as error:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return error_response(error.status, str(error), kind, error.code, error.param)
    except EngineDead as error:
        return error_response(500, str(error))
    except web.HTTPException as error:
        return error_response(error.status, error.reason, "invalid_request_error")
    except ConnectionError:
        raise  # the client has gone in mid-stream
    except Exception as error:
        log.exception("%s %s", request.method, request.path)
        return error_response(500, f"internal error: {error!r}")


def receive(connections: Connections) -> Middleware:
    """A middleware that reads the body, in limits of time, size and kind, before the request is handled."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = request.protocol
        if request.can_read_body:
            if request.content_type != "application/json":
                message = f"Content-Type must be application/json, got {request.content_type[:80]!r}"
                raise BadRequest(message, code="unsupported_media_type", status=415)
            encoding = request.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                message = f"compressed bodies are not read; send it without Content-Encoding {encoding[:80]!r}"
                raise BadRequest(message, code="unsupported_content_encoding", status=415)
            if (request.content_length or 0) > MAX_BODY_BYTES:
                raise _too_large()
            if connections.full:
                raise BadRequest("too many requests are being answered", code="server_busy", status=503)
            connections.wait(connection, REQUEST_WAIT_S)
            try:
                await request.read()
            except web.HTTPRequestEntityTooLarge:
                raise _too_large() from None
        connections.answer(connection)
        try:
            return await handler(request)
        finally:
            connections.wait(connection, KEPT_ALIVE_S)

    return middleware


def log_clients_faults_on_one_line() -> None:
    """Have aiohttp log without a traceback what is not HTTP, and clients that leave in mid-stream: both come often."""

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError | ConnectionError):
            why = one_line(" ".join(str(error).split())[:200])
            record.msg, record.args, record.exc_info = f"{record.getMessage()}: {why}", (), None
        return True

    logging.getLogger("aiohttp.server").addFilter(shorten)


def _too_large() -> BadRequest:
    return BadRequest(f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large", status=413)


async def stream_events(http: web.Request, events: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """Answer with server-sent events, and [DONE] after the last one.

    Raises:
        ConnectionError: the client has gone, or takes nothing for a long time.
    """
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(http)
    async with contextlib.aclosing(events):  # at once, where the client has gone: that aborts what it has asked for
        async for event in events:
            await _write(response, event)
    await _write(response, b"[DONE]")
    await response.write_eof()
    return response


async def _write(response: web.StreamResponse, data: bytes) -> None:
    try:
        async with asyncio.timeout(KEPT_ALIVE_S):
            await response.write(b"data: %b\n\n" % data)
    except TimeoutError:
        raise ConnectionError("the client reads no more") from None


def encode(value: Any) -> bytes:
    """JSON, in pieces between which other threads may run: a call of json.dumps lets none run until it ends."""
    return "".join(_pieces(value)).encode()


def _pieces(value: Any) -> list[str]:
    if isinstance(value, Likeliest):
        return [json.dumps(value.triples(), allow_nan=False)]
    if isinstance(value, dict):
        items = [piece for key, item in value.items() for piece in (", ", json.dumps(key), ": ", *_pieces(item))]
        return ["{", *items[1:], "}"]
    if isinstance(value, list) and value and isinstance(value[-1], list | dict | Likeliest):
        inner: Any = value[-1]
        nested = not isinstance(inner, list) or (inner and isinstance(inner[-1], list | dict))
        if nested or len(value) * len(inner) > PIECE_NUMBERS:
            items = [piece for item in value for piece in (", ", *_pieces(item))]
            return ["[", *items[1:], "]"]
    return [json.dumps(value, ensure_ascii=False, allow_nan=False)]
