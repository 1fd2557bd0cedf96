"""Requests that would end or freeze the embedded server, or that a web page sends: refused, and the server lives."""

import contextlib
import gzip
import http.client
import json
import logging
import math
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers.servers import PROMPT, Server, greedy
from helpers.waiting import soon, wait_for
from micota_fast.common import processes
from micota_fast.config.generation import ServeConfig
from micota_fast.serve import connections
from micota_fast.serve.browser_guard import BrowserGuard
from micota_fast.serve.serve import serving
from micota_fast.serve.wire import log_clients_faults_on_one_line

HEALTH_S = 2.5  # beside other tests on two cores; a server that a request blocks is silent for as long as that takes
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = ServeConfig(dtype="float32", allow_hosts=["models.example"])
    with serving(qwen2_checkpoint, config, tmp_path_factory.mktemp("server") / "log.txt") as [url]:
        yield Server(url)


def params(**values: Any) -> dict[str, Any]:
    return {"input_ids": [5], "sampling_params": {"max_new_tokens": 4, **values}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", params(temperature=1, top_k=1 << 63)),
        ("/generate", params(temperature=1, top_k=10**30)),
        ("/generate", params(stop_token_ids=[-1000000000], min_new_tokens=2)),
        ("/generate", params(stop=["\ud800"])),
        ("/generate", params(sampling_seed=1 << 64)),
        ("/generate", {**params(), "return_logprob": True, "top_logprobs_num": -1}),
        ("/generate", {**params(), "return_logprob": True, "top_logprobs_num": 321}),
        ("/generate", {**params(), "rid": 5}),
        ("/generate", {"text": "\ud800"}),
        ("/generate", params(regex="[0-9]+")),
        ("/generate", params(n=100_000_000)),
        ("/v1/completions", {"prompt": "a", "n": 100_000_000}),
        ("/v1/completions", {"prompt": "\udfff"}),
        ("/v1/completions", {"prompt": "a", "logprobs": -1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}),
        ("/abort_request", {"rid": 5}),
    ],
)
def test_values_that_would_end_the_server_are_refused(server: Server, path: str, body: Any) -> None:
    with soon():
        status, answer = server.post(path, body)
        assert status == 400, answer
        assert answer["error"]["message"]
    assert server.get("/health_generate")[0] == 200


PROBE = """
import sys, threading, time, urllib.request
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
slowest = 0.0
while not ended.is_set():
    before = time.monotonic()
    with urllib.request.urlopen(sys.argv[1] + "/health", timeout=60) as response:
        assert response.status == 200
    if not slowest:
        print("asked once", flush=True)
    slowest = max(slowest, time.monotonic() - before)
    time.sleep(0.02)
print(slowest)
"""


@contextlib.contextmanager
def health_within(seconds: float, server: Server) -> Iterator[None]:
    """While the block runs, /health is asked for all the time, by a process of its own.

    It never takes longer than that; or than half of the block, on a machine on which both take long.
    """
    command = [sys.executable, "-c", PROBE, server.url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as probe:
        assert probe.stdout is not None
        assert probe.stdout.readline() == "asked once\n"
        started = time.monotonic()
        yield
        took_s = time.monotonic() - started
        told, _ = probe.communicate(timeout=240)
    assert float(told) < max(seconds, took_s / 2)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "the answer is " * 360_000}),
        ("/generate", {"text": "a" * 5_000_000}),
        ("/generate", {"text": ["the answer is " * 360] * 1000}),
        ("/generate", {"input_ids": [5] * 7_000_000}),
        ("/generate", {"input_ids": [[5]] * 1_000_000}),
        ("/generate", {"rid": [["a"]] * 2_000_000}),
        ("/v1/completions", {"prompt": "the answer is " * 360_000}),
        ("/v1/completions", {"prompt": [[5]] * 1_000_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the answer is " * 360_000}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 300_000}),
    ],
    ids=range(10),
)
def test_no_request_keeps_the_server_from_answering_others(server: Server, path: str, body: Any) -> None:
    data = json.dumps(body).encode()
    with health_within(HEALTH_S, server):
        status, answer = server.post(path, data)
    assert status in (400, 413), answer


def test_the_most_that_one_request_may_ask_keeps_nobody_from_being_answered(server: Server) -> None:
    with health_within(HEALTH_S, server):
        body = {"input_ids": PROMPT, "sampling_params": greedy(max_new_tokens=2, n=4096)}
        assert len(server.generate(**body)) == 4096
        body = {"input_ids": [PROMPT * 100] * 32, "sampling_params": greedy(max_new_tokens=1)}
        body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 320}
        request = urllib.request.Request(f"{server.url}/generate", json.dumps(body).encode(), JSON)
        with urllib.request.urlopen(request, timeout=120) as response:
            answers = response.read()
        assert answers.count(b", null]") > 32 * 399 * 320


# -- browsers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "LOCALHOST."}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "models.example"}, 200),
        ({"Origin": "http://127.0.0.1:8000"}, 200),
        ({"Origin": "https://models.example"}, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Host": "rebind.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "10.0.0.1"}, 403),
        ({"Host": "localhost@evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "evil.example@localhost"}, 403),
        ({"Host": "localhost/evil.example"}, 403),
        ({"Host": "localhost:http"}, 403),
        ({"Origin": "https://evil.example\\@localhost"}, 403),
        ({"Origin": "https://localhost/@evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
    ],
)
def test_web_pages_are_kept_out(server: Server, headers: dict[str, str], status: int) -> None:
    for path, body in (("/generate", params()), ("/v1/completions", {"prompt": "a", "max_tokens": 1})):
        told, answer = server.post(path, body, **headers)
        assert told == status
        if status != 200:
            assert answer["error"].keys() == {"message", "type", "code", "param"}
    if "Content-Type" not in headers:
        assert server.post("/flush_cache", b"", **headers)[0] == status


def said(server: Server, request: bytes) -> bytes:
    """What the server says to bytes."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as connection:
        connection.sendall(request)
        return connection.recv(1 << 16)


def test_a_whole_url_is_judged_by_its_host(server: Server) -> None:
    for host, status in (("127.0.0.1", 200), ("evil.example", 403)):
        answer = said(server, f"GET http://{host}/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "none of these"])
def test_compressed_bodies_are_not_unpacked(server: Server, encoding: str) -> None:
    for body in (gzip.compress(json.dumps(params()).encode()), json.dumps(params()).encode()):
        status, answer = server.post("/generate", body, **{"Content-Encoding": encoding})
        assert status == 415
        assert encoding in answer["error"]["message"]


def test_what_is_no_http_is_the_clients_fault(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    head = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with serving(qwen2_checkpoint, ServeConfig(dtype="float32"), tmp_path / "log.txt") as [url]:
        for request in (
            head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
            head + b"X: a\x00b\r\n\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\ngarbage\r\n",
            b"GET /health HTTP/9.9\r\n\r\n",
        ):
            answer = said(Server(url), request)
            assert answer.split(b" ")[1] == b"400", answer
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_a_client_that_leaves_in_mid_stream_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """What aiohttp logs of it, if the server writes before the handler is cancelled: which of the two is chance."""
    logger = logging.getLogger("aiohttp.server")
    before = list(logger.filters)
    log_clients_faults_on_one_line()
    try:
        raise ConnectionResetError("Cannot write to closing transport")
    except ConnectionResetError:
        logger.exception("Error handling request from %s", "127.0.0.1")
    finally:
        logger.filters[:] = before
    (record,) = caplog.records
    assert record.exc_info is None
    assert record.getMessage() == "Error handling request from 127.0.0.1: Cannot write to closing transport"


def test_a_body_without_a_type_is_refused(server: Server) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("POST", "/generate", json.dumps(params()))
    assert connection.getresponse().status == 415


def test_names_by_which_a_server_may_be_called() -> None:
    loopback = BrowserGuard("127.0.0.1", [])
    assert [loopback.allows(name) for name in ("127.0.0.1:5", "127.0.0.2", socket.gethostname(), "192.168.0.7")] == [
        True,
        True,
        socket.gethostname() == "localhost",
        False,
    ]
    everywhere = BrowserGuard("0.0.0.0", [])
    assert all(everywhere.allows(name) for name in ("127.0.0.1", socket.gethostname(), "192.168.0.7:80", "[fe80::1]"))
    assert not everywhere.allows("evil.example")
    one = BrowserGuard("192.168.0.7", ["Models.Example"])
    assert [one.allows(name) for name in ("192.168.0.7", "models.example:80", "192.168.0.8")] == [True, True, False]


# -- connections -----------------------------------------------------------------------------------------------------


def half_sent(port: int, path: str = "/generate") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    connection.sendall(head.encode() + b'{"input_ids": ')
    return connection


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from micota_fast.serve import connections, embedded
connections.REQUEST_WAIT_S = connections.KEPT_ALIVE_S = float(sys.argv[2])
from micota_fast.serve import wire
wire.REQUEST_WAIT_S = wire.KEPT_ALIVE_S = float(sys.argv[2])
sys.exit(embedded.main(["--model", sys.argv[1]]))
"""


@contextlib.contextmanager
def with_few_files(checkpoint: Path, wait_s: float) -> Iterator[Server]:
    """A server that may open 256 files, and waits no longer than so for its clients."""
    command = [sys.executable, "-c", FEW_FILES, str(checkpoint), str(wait_s)]
    process = processes.spawn(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        yield Server(process.stdout.readline().decode().removeprefix("listening on ").strip())
    finally:
        processes.stop(process)
        process.stdout.close()


def test_unfinished_requests_do_not_use_up_the_open_files(qwen2_checkpoint: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 600:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1024), hard))
    with with_few_files(qwen2_checkpoint, 600.0) as server, contextlib.ExitStack() as stack:
        port = int(server.url.rpartition(":")[2])
        for i in range(300):
            unfinished = half_sent(port) if i % 3 else socket.create_connection(("127.0.0.1", port))
            stack.enter_context(contextlib.closing(unfinished))
        with soon():
            assert server.get("/health")[0] == 200
        assert server.generate(input_ids=PROMPT, sampling_params=greedy())["output_ids"]


def test_connections_on_which_nothing_comes_are_closed(qwen2_checkpoint: Path) -> None:
    with with_few_files(qwen2_checkpoint, 1.0) as server:
        port = int(server.url.rpartition(":")[2])
        silent = socket.create_connection(("127.0.0.1", port))
        headless = socket.create_connection(("127.0.0.1", port))
        headless.sendall(b"POST /generate HTTP/1.1\r\nHost: 127")
        kept_alive = socket.create_connection(("127.0.0.1", port))
        kept_alive.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert kept_alive.recv(1 << 16).startswith(b"HTTP/1.1 200")
        for connection in (silent, headless, half_sent(port), kept_alive):
            connection.settimeout(60)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1 << 16) == b""
            connection.close()
        # one that is being answered is not among them
        answer = server.generate(input_ids=PROMPT, sampling_params=greedy(max_new_tokens=500))
        assert len(answer["output_ids"]) == 500


def test_requests_are_refused_before_no_file_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    held = connections.Connections()
    answered: list[Any] = [object() for _ in range(1000)]
    while not held.full:
        held.answer(answered.pop())
    assert 128 < 1000 - len(answered) < 256 - 32


# -- numbers that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["config.json", "model.layers.1.mlp.up_proj.weight"])
def test_a_checkpoint_that_is_not_finite_is_not_served(tmp_path: Path, qwen2_checkpoint: Path, where: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(qwen2_checkpoint, checkpoint)
    if where == "config.json":
        config = json.loads((checkpoint / where).read_text())
        (checkpoint / where).write_text(json.dumps({**config, "rms_norm_eps": math.nan}))
    else:
        tensors = load_file(checkpoint / "model.safetensors")
        tensors[where][3, 5] = math.nan
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-m", "micota_fast.serve.embedded", "--model", str(checkpoint)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert where in ended.stderr
    assert "NaN" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_denormal_temperatures_are_greedy(server: Server) -> None:
    want = server.generate(input_ids=PROMPT, sampling_params=greedy())["output_ids"]
    for temperature in (1e-320, 5e-324, 1e-7):
        got = server.generate(
            input_ids=PROMPT, sampling_params=greedy(temperature=temperature), return_logprob=True, top_logprobs_num=2
        )
        assert got["output_ids"] == want
        assert all(math.isfinite(place[0]) for place in got["meta_info"]["output_token_logprobs"])


def test_a_stream_of_chunks_that_a_client_stops_reading_ends(server: Server) -> None:
    """Its answer is aborted once the client has gone, and does not run to its end for nobody."""
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    body = {"input_ids": PROMPT, "sampling_params": greedy(max_new_tokens=500), "stream": True}
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    assert connection.getresponse().read(10)
    connection.close()
    wait_for(lambda: server.load()["num_running_reqs"] == 0)
