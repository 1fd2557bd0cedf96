"""The asyncio side of the engine: submit, follow, abort."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from micota_fast.serve.engine import Engine, EngineDead, Request
from micota_fast.serve.request_parser import Asked


class AsyncEngine:
    """An engine whose thread is running, for callers in one event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.chat = engine, engine.chat
        self._unfinished: dict[str, list[Request]] = {}

    async def complete(self, asked: Asked) -> list[Request]:
        """Run all prompts to their ends; the requests in order.

        Raises:
            EngineDead: the engine's thread has ended, or has failed on one of them.
        """
        async with self.submitted(asked) as (requests, updates):
            async for _ in updates:
                pass
        for request in requests:
            raise_if_failed(request)
        return requests

    @contextlib.asynccontextmanager
    async def submitted(self, asked: Asked) -> AsyncIterator[tuple[list[Request], AsyncIterator[int]]]:
        """Submit all prompts; whatever is unfinished on leaving is aborted (a client has gone, say).

        Yields the requests, and the index of each that has news until all have finished.
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
            self.engine.request(
                prompt.rid,
                prompt.ids,
                prompt.params,
                on_update=on_update(i),
                stream=asked.stream,
                return_logprob=asked.logprobs,
                logprob_start_len=asked.logprobs_from,
                top_logprobs_num=asked.top_logprobs,
            )
            for i, prompt in enumerate(asked.prompts)
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


def raise_if_failed(request: Request) -> None:
    """An abort by the engine's failure is an error of the whole HTTP request; one by the client is an answer."""
    reason = request.finish_reason
    if reason is not None and reason.get("status_code") is not None:
        raise EngineDead(reason["message"])
