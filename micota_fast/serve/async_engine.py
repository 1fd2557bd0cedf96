"""The asyncio side of the engine: submit, follow, abort, and read the answer's text."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from micota_fast.serve.engine import Engine, EngineDead, Request
from micota_fast.serve.sampling import SamplingParams


class Prompt:
    """One prompt as it is submitted."""

    def __init__(self, ids: list[int], params: SamplingParams, rid: str | None = None) -> None:
        self.ids, self.params, self.rid = ids, params, rid or uuid.uuid4().hex


def expanded(prompts: list[Prompt]) -> list[Prompt]:
    """n copies of each prompt, each with random numbers of its own."""
    copies = []
    for prompt in prompts:
        for i in range(prompt.params.n):
            params = prompt.params.for_copy(i)
            copies.append(Prompt(prompt.ids, params, prompt.rid if i == 0 else f"{prompt.rid}_{i}"))
    return copies


class AsyncEngine:
    """An engine whose thread is running, for callers in one event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.chat = engine, engine.chat
        self._unfinished: dict[str, list[Request]] = {}

    async def complete(self, prompts: list[Prompt], options: dict[str, Any]) -> list[Request]:
        """Run all prompts to their ends; the requests in order.

        Raises:
            BadRequest: one of them cannot be answered; none has been started.
            EngineDead: the engine's thread has ended.
        """
        async with self.submitted(prompts, options, stream=False) as (requests, updates):
            async for _ in updates:
                pass
            return requests

    @contextlib.asynccontextmanager
    async def submitted(
        self, prompts: list[Prompt], options: dict[str, Any], stream: bool
    ) -> AsyncIterator[tuple[list[Request], AsyncIterator[int]]]:
        """Submit all prompts or none; whatever is unfinished on leaving is aborted (a client has gone, say).

        Gives the requests, and the index of each that has news until all have finished.
        """
        loop = asyncio.get_running_loop()
        news: dict[int, None] = {}  # ordered; steps that come while we are busy collapse into one
        arrived = asyncio.Event()

        def notify(index: int) -> None:
            news[index] = None
            arrived.set()

        def on_update(index: int) -> Callable[[Request], None]:
            def update(_: Request) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(notify, index)

            return update

        requests = [
            self.engine.request(p.rid, p.ids, p.params, on_update=on_update(i), stream=stream, **options)
            for i, p in enumerate(prompts)
        ]

        async def updates() -> AsyncIterator[int]:
            left = set(range(len(requests)))
            while left:
                await arrived.wait()
                arrived.clear()
                batch = list(news)
                news.clear()
                for index in batch:
                    if requests[index].finish_reason is not None:
                        left.discard(index)
                    yield index

        for request in requests:
            self._unfinished.setdefault(request.rid, []).append(request)
        try:
            for request in requests:
                self.engine.submit(request)
            yield requests, updates()
        finally:
            for request in requests:
                if request.finish_reason is None:
                    self.engine.abort(request)
                same = self._unfinished[request.rid]
                same.remove(request)
                if not same:
                    del self._unfinished[request.rid]

    def abort(self, rid: str | None) -> None:
        """End the unfinished requests of that id; None: all."""
        for requests in list(self._unfinished.values()) if rid is None else [self._unfinished.get(rid, [])]:
            for request in requests:
                self.engine.abort(request)

    def progress(self, request: Request) -> tuple[str, list[int], dict[str, Any] | None]:
        """Text, ids and finish reason so far, of one and the same moment.

        A matched stop token or string is cut off the text, unless the request keeps it, and stays among the ids.
        """
        reason = request.finish_reason  # read before the ids, which the engine writes first
        ids = list(request.output_ids)
        params = request.params
        matched = None
        if reason is not None and reason["type"] == "stop" and not params.no_stop_trim:
            matched = reason["matched"]
        text = self.chat.decode(ids[:-1] if isinstance(matched, int) else ids, params.skip_special_tokens)
        if isinstance(matched, str) and matched in text:
            text = text[: text.find(matched)]
        # Half a character, whose other bytes are still to come, decodes to U+FFFD.
        return (text if reason is not None else text.rstrip("\ufffd")), ids, reason


def raise_if_failed(request: Request) -> None:
    """An abort by the engine's failure is an error of the whole HTTP request; one by the client is an answer."""
    reason = request.finish_reason
    if reason is not None and reason.get("status_code") is not None:
        raise EngineDead(reason["message"])
