"""What all endpoints share: JSON bodies in, errors and server-sent events out."""

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from micota_fast.common.json_io import parse_json
from micota_fast.errors import InputError
from micota_fast.serve.async_engine import AsyncEngine, Prompt
from micota_fast.serve.engine import EngineDead, Request
from micota_fast.serve.sampling import BadRequest

log = logging.getLogger(__name__)


async def read_json(http: web.Request) -> dict[str, Any]:
    """The body's JSON object. Raises BadRequest if it is none."""
    try:
        body: dict[str, Any] = parse_json(await http.read(), "the body")
    except InputError as error:
        raise BadRequest(str(error)) from None
    return body


def error_response(status: int, message: str) -> web.Response:
    """`{"error": {"message": ...}}`."""
    return web.json_response({"error": {"message": message}}, status=status)


@web.middleware
async def errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn exceptions into JSON errors of SGLang's shape."""
    try:
        return await handler(request)
    except BadRequest as error:
        return error_response(400, str(error))
    except EngineDead as error:
        return error_response(500, str(error))
    except web.HTTPException as error:
        return error_response(error.status, error.reason)
    except ConnectionError:
        raise  # the client has gone in mid-stream
    except Exception as error:
        log.exception("%s %s", request.method, request.path)
        return error_response(500, f"internal error: {error!r}")


async def stream_events(
    http: web.Request,
    engine: AsyncEngine,
    prompts: list[Prompt],
    options: dict[str, Any],
    is_list: bool,
    payload: Callable[[Request], Mapping[str, Any]],
) -> web.StreamResponse:
    """Submit, and answer with server-sent events: a payload on news of a request (`index` in a list), then [DONE]."""
    async with engine.submitted(prompts, options, stream=True) as (requests, updates):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(http)
        async for index in updates:
            data = payload(requests[index])
            if is_list:
                data = {**data, "index": index}
            await response.write(f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response
