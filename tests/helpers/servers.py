"""Real servers for tests: a URL and plain ways to talk to it, and where a SGLang is that runs on a CPU."""

import asyncio
import contextlib
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn

import pytest
from aiohttp import web

from helpers.paths import ROOT
from micota_fast.config.generation import ServeConfig

PROMPT = [40, 50, 60, 70]
# Without CUDA: attention in plain torch, one step at a time, and no more memory than a test needs.
SGLANG_ARGS = ["--attention-backend", "torch_native", "--disable-overlap-schedule"]
SGLANG_ARGS += ["--max-total-tokens", "4096", "--mem-fraction-static", "0.3"]


def sglang_python() -> str:
    """$SGLANG_PYTHON, or the interpreter of scripts/sglang_cpu_env.sh; where there is none, the test is skipped.

    With $MICOTA_REQUIRE_SGLANG, as in CI, it fails instead.
    """
    if "SGLANG_PYTHON" in os.environ:
        return os.environ["SGLANG_PYTHON"]
    return _python_of(".sglang-cpu", "sglang_cpu_env.sh", "MICOTA_REQUIRE_SGLANG")


def clients_python() -> str:
    """The interpreter of scripts/real_clients_env.sh; where there is none, the test is skipped.

    With $MICOTA_REQUIRE_CLIENTS, as in CI, it fails instead.
    """
    return _python_of(".real-clients", "real_clients_env.sh", "MICOTA_REQUIRE_CLIENTS")


def _python_of(folder: str, script: str, required: str) -> str:
    made = ROOT / folder
    if not (made / "installed").is_file():
        skip_or_fail(f"no {folder}: bash scripts/{script} makes one", required)
    return str(made / "bin" / "python")


def skip_or_fail(why: str, required: str) -> NoReturn:
    """Skip the test; where the variable `required` is set, as in CI, fail it."""
    if os.environ.get(required):
        pytest.fail(why)
    pytest.skip(why)


def sglang_config(**more: Any) -> ServeConfig:
    """A real SGLang server on a CPU, in float32."""
    options = {"device": "cpu", "dtype": "float32", "args": SGLANG_ARGS, "startup_timeout_s": 240.0, **more}
    return ServeConfig(engine="sglang", python=sglang_python(), **options)


class Server:
    """A URL and plain ways to talk to it."""

    def __init__(self, url: str, engine: str = "embedded") -> None:
        self.url, self.engine = url, engine

    def get(self, path: str) -> tuple[int, str]:
        return self._send(urllib.request.Request(self.url + path))

    def read(self, path: str) -> Any:
        status, text = self.get(path)
        assert status == 200, text
        return json.loads(text)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        status, text = self._send(urllib.request.Request(self.url + path, data, headers))
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def generate(self, **body: Any) -> Any:
        status, answer = self.post("/generate", body)
        assert status == 200, answer
        return answer

    def events(self, path: str, body: Any) -> list[Any]:
        """The payloads of a stream, which must end in [DONE]."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            lines = [line for line in response.read().decode().split("\n\n") if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def load(self) -> dict[str, Any]:
        """Of its one data-parallel rank."""
        [load] = self.read("/v1/loads?include=core")["loads"]
        return load

    def gone(self) -> bool:
        try:
            self.get("/health")
        except OSError:
            return True
        return False

    def _send(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def greedy(**more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, **more}


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.contextmanager
def serving_app(app: web.Application) -> Iterator[str]:
    """The URL of an aiohttp application that runs in a thread."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port: int = runner.addresses[0][1]
        return port

    port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def http_server(handler: Handler, info: dict[str, Any] | None = None, healthy: bool = False) -> Iterator[str]:
    """POST /generate is answered by `handler`, GET /get_server_info with `info`."""

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    async def server_info(_: web.Request) -> web.Response:
        return web.json_response(info)

    app = web.Application()
    app.router.add_post("/generate", handler)
    if healthy:
        app.router.add_get("/health", health)
        app.router.add_get("/health_generate", health)
    if info is not None:
        app.router.add_get("/get_server_info", server_info)
    with serving_app(app) as url:
        yield url
