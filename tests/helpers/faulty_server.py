"""A server in SGLang's shape, in a process of its own, whose answers are functions of the requests; it fails by plan.

It can be killed, started again on its port, and stopped (it then neither answers nor closes a connection). Each request
that arrives is a line of its log, which outlives it.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

# Written to the connection as they are: the HTTP itself is wrong, or what comes in it.
RAW = ("reset", "reset in the body", "too long", "too short", "drip", "again")
# Bodies that no answer may be made of.
BODIES = ("truncated", "twice", "not json", "wrong shape", "no text", "no count", "abort")
STATUSES = ("429", "500", "503")
FAULTS = (*STATUSES, *RAW, *BODIES, "never")


@dataclass(frozen=True)
class Plan:
    """What a server does.

    `tries`: so many faults of the list, drawn by `seed` and the request, meet each request before it is answered.
    `slots`: so many requests run at once, the others wait, and /v1/loads says so; None: all run and there is no such
    page. `delays_s`: an answer takes a time between these. `refusing_while`: as long as this file is there, everything
    is refused by 503.
    """

    seed: int = 0
    faults: tuple[str, ...] = ()
    tries: int = 0
    slots: int | None = None
    delays_s: tuple[float, float] = (0.0, 0.0)
    refusing_while: str | None = None
    model: str | None = None


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """Words, and at the end a box: `expected` of the prompt in four of ten cases, else one more. A token is a word.

    Where the words are cut off by the limit, the next request may bring them with the prompt; its answer is then
    another, as it is another prompt.
    """
    ids, params = body["input_ids"], body["sampling_params"]
    rng = random.Random(f"{ids} {params.get('sampling_seed')}")
    value = expected(ids) + (rng.random() >= 0.4)
    words = [f"w{rng.randrange(1000)}" for _ in range(rng.randrange(1, 40))] + [f"\\boxed{{{value}}}"]
    if rng.random() < 0.5:
        words.insert(rng.randrange(len(words)), "</think>")
    most = params["max_new_tokens"]
    finish: dict[str, Any] = {"type": "stop", "matched": 2} if len(words) < most else {"type": "length", "length": most}
    words = words[:most]
    tokens = [3 + rng.randrange(300) for _ in words]
    meta: dict[str, Any] = {"finish_reason": finish, "prompt_tokens": len(ids), "completion_tokens": len(words)}
    if "rid" in body:
        meta["id"] = body["rid"]
    if body.get("return_logprob"):
        top = body["top_logprobs_num"]
        asked = ids[body.get("logprob_start_len", len(ids)) :]
        for kind, scored in (("input", asked), ("output", tokens)):
            meta[f"{kind}_token_logprobs"] = [[-2.0, token, None] for token in scored]
            likeliest = [[[-2 - 0.5 * k, (token + k) % 300, None] for k in range(top)] for token in scored]
            meta[f"{kind}_top_logprobs"] = likeliest
    return {"text": "".join(f" {word}" for word in words), "output_ids": tokens, "meta_info": meta}


def expected(ids: list[int]) -> int:
    """The right answer to a prompt."""
    return sum(ids) % 997


def key(body: dict[str, Any]) -> str:
    """What tells requests apart, and is the same when one is tried again."""
    return f"{body['input_ids']} {body['sampling_params']}"


class _Server:
    def __init__(self, plan: Plan, log: Path) -> None:
        self._plan = plan
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._tries: Counter[str] = Counter()
        self._at_once = self._running = 0
        self._slots = asyncio.Semaphore(plan.slots or 1 << 30)

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._refuse])
        app.router.add_post("/generate", self.generate)
        for path, answer_of in (("/health", dict), ("/health_generate", dict), ("/server_info", dict)):
            app.router.add_get(path, _page(answer_of))
        if self._plan.model is not None:
            app.router.add_get("/get_model_info", _page(lambda: {"model_path": self._plan.model}))
        if self._plan.slots is not None:
            app.router.add_get("/v1/loads", _page(self._loads))
        return app

    def _loads(self) -> dict[str, Any]:
        waiting = self._at_once - self._running
        return {"loads": [{"num_running_reqs": self._running, "num_waiting_reqs": waiting, "token_usage": 0.5}]}

    @web.middleware
    async def _refuse(self, http: web.Request, handler: Callable[..., Awaitable[Any]]) -> Any:
        if self._plan.refusing_while is not None and os.path.exists(self._plan.refusing_while):
            return web.json_response({"error": {"message": "starting"}}, status=503)
        return await handler(http)

    async def generate(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self._at_once += 1
        line = {"body": body, "at_once": self._at_once, "time": time.time()}
        os.write(self._log, json.dumps(line).encode() + b"\n")
        try:
            async with self._slots:
                self._running += 1
                try:
                    return await self._answer(http, body)
                finally:
                    self._running -= 1
        finally:
            self._at_once -= 1

    async def _answer(self, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        plan, name = self._plan, key(body)
        number = self._tries[name]
        self._tries[name] += 1
        rng = random.Random(f"{plan.seed} {name}")
        faults = rng.sample(plan.faults, min(plan.tries, len(plan.faults)))
        await asyncio.sleep(random.Random(f"{plan.seed} {name} {number}").uniform(*plan.delays_s))
        whole = json.dumps(answer(body)).encode()
        fault = faults[number] if number < len(faults) else None
        if fault is None:
            return web.Response(body=whole)
        if fault in STATUSES:
            return web.json_response({"error": {"message": "busy"}}, status=int(fault))
        if fault in RAW:
            return await _raw(http, fault, whole)
        if fault == "never":
            await asyncio.sleep(3600)
        if fault == "abort":
            aborted = answer(body)
            aborted["meta_info"]["finish_reason"] = {"type": "abort", "message": "out of memory", "status_code": 500}
            return web.json_response(aborted)
        return web.Response(
            body={
                "truncated": whole[:-5],
                "twice": whole + whole,
                "not json": b"<html>",
                "wrong shape": json.dumps([answer(body)]).encode(),
                "no text": json.dumps({**answer(body), "text": None}).encode(),
                "no count": whole.replace(b'"completion_tokens": ', b'"completion_tokens": -1'),
            }[fault]
        )


async def _raw(http: web.Request, fault: str, whole: bytes) -> web.StreamResponse:
    """Written past aiohttp, which would not let it be wrong; the connection ends with it but for two faults."""
    transport = http.transport
    assert isinstance(transport, asyncio.Transport)

    def head(length: int) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % length

    match fault:
        case "reset":
            transport.abort()
        case "reset in the body":
            transport.write(head(len(whole)) + whole[: len(whole) // 2])
            await asyncio.sleep(0.01)
            transport.abort()
        case "too long":  # promises more than comes
            transport.write(head(len(whole) + 10) + whole)
            transport.close()
        case "too short":
            transport.write(head(len(whole) - 10) + whole)
            await asyncio.sleep(0.01)
            transport.close()
        case "drip":
            response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
            await response.prepare(http)
            step = len(whole) // 6 + 1
            for start in range(0, len(whole), step):
                await response.write(whole[start : start + step])
                await asyncio.sleep(0.01)
            return response
        case "again":  # and it comes once more a while later, on a connection that is idle or another request's by then
            asyncio.get_running_loop().call_later(0.002, transport.write, head(len(whole)) + whole)
            return web.Response(body=whole)
    await asyncio.sleep(3600)  # what aiohttp would write of its own must not come; it ends this with the connection
    return web.Response()


def _page(content: Callable[[], dict[str, Any]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(_: web.Request) -> web.Response:
        return web.json_response(content())

    return handler


async def _serve(plan: Plan, log: Path, port: int) -> None:
    runner = web.AppRunner(_Server(plan, log).app(), handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


class FaultyServer:
    """The process. A context manager.

    Args:
        folder: where its log lies.
        plan: what it does.
    """

    def __init__(self, folder: Path, plan: Plan | None = None) -> None:
        self._plan, self._port = plan or Plan(), 0
        self._log = folder / f"asked-{id(self):x}.jsonl"
        self.start()

    def start(self, plan: Plan | None = None) -> None:
        """Start it (again, on the same port)."""
        self._plan = plan or self._plan
        command = [sys.executable, __file__, json.dumps(asdict(self._plan)), str(self._log), str(self._port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())
        self._process.stdout.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Each request that arrived, in order: its body, how many were there at once with it, and the time."""
        if not self._log.exists():
            return []
        *whole, _ = self._log.read_bytes().split(b"\n")  # the last may still be under way
        return [json.loads(line) for line in whole]

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """From now on it does nothing; its connections stay."""
        self._process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> "FaultyServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    asyncio.run(_serve(Plan(**settings), Path(sys.argv[2]), int(sys.argv[3])))
