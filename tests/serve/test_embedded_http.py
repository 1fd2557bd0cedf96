"""What the embedded server promises beyond SGLang's contract (test_server_contract.py): refusals, aborts, its end."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.servers import PROMPT, Server, greedy
from helpers.waiting import wait_for
from micota_fast.common import processes
from micota_fast.config.generation import ServeConfig
from micota_fast.serve.serve import serving


@pytest.fixture(scope="module")
def embedded(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(qwen2_checkpoint, ServeConfig(dtype="float32"), tmp_path_factory.mktemp("server") / "log.txt") as [
        url
    ]:
        yield Server(url)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        ([1], "expected a JSON object"),
        ({"text": "a", "input_ids": [5]}, "exactly one of"),  # a real SGLang takes input_ids
        ({"text": "a", "sampling_params": {"temprature": 0}}, "temprature is unknown"),
        ({"text": "a", "sampling_params": {"regex": "a*"}}, "not supported"),
        ({"text": "a", "lora_path": "x"}, "not supported"),
        ({"input_ids": [5, 320]}, "outside the vocabulary"),  # kills a real SGLang
        ({"input_ids": [5, "a"]}, "list of integers"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [[5], [6]], "sampling_params": [{}]}, "1 sampling_params for 2 prompts"),
        ({"input_ids": [[5], [6]], "rid": ["a"] * 3}, "rid must be"),
        ({"text": "a", "return_logprob": "yes"}, "return_logprob must be"),
    ],
)
def test_embedded_refusals(embedded: Server, body: Any, message: str) -> None:
    status, answer = embedded.post("/generate", body)
    assert status == 400
    assert message in answer["error"]["message"]


def test_unknown_paths_and_chat_refusals(embedded: Server) -> None:
    status, text = embedded.get("/nowhere")
    assert status == 404
    assert json.loads(text)["error"]["message"] == "Not Found"
    for body in ({}, {"messages": []}, {"messages": [{"role": "user"}]}, {"messages": "hi"}):
        assert embedded.post("/v1/chat/completions", body)[0] == 400


def decoded(embedded: Server) -> int:
    """Tokens so far."""
    tokens: int = embedded.read("/server_info")["internal_states"][0]["decode_tokens"]
    return tokens


def test_a_client_that_goes_away_is_aborted(embedded: Server) -> None:
    host = embedded.url.removeprefix("http://")
    connections = []
    for stream in (False, True):
        for _ in range(40):
            connection = http.client.HTTPConnection(host)
            params = greedy(max_new_tokens=500, n=4)
            body = {"input_ids": PROMPT, "sampling_params": params, "stream": stream}
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            connections.append(connection)
    wait_for(lambda: embedded.load()["num_running_reqs"] > 10)
    before = decoded(embedded)
    for connection in connections:
        connection.close()
    wait_for(lambda: embedded.load()["num_running_reqs"] + embedded.load()["num_waiting_reqs"] == 0)
    assert decoded(embedded) - before < 60 * 4 * 500  # of 80 × 4 × 500, had they been finished


def test_an_abort_names_one_request_or_all(embedded: Server) -> None:
    assert embedded.post("/abort_request", {})[0] == 400
    assert embedded.post("/abort_request", {"rid": "no such request"})[0] == 200


def start(checkpoint: Path, *more: str) -> tuple[subprocess.Popen[bytes], str]:
    """The command line itself; its first line of output tells the URL."""
    command = [sys.executable, "-m", "micota_fast.serve.embedded", "--model", str(checkpoint), *more]
    process = processes.spawn(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    first = process.stdout.readline().decode()
    assert first.startswith("listening on http://127.0.0.1:")
    return process, first.removeprefix("listening on ").strip()


def test_sigterm_ends_it_without_finishing_what_it_is_asked(qwen2_checkpoint: Path) -> None:
    process, url = start(qwen2_checkpoint)
    server = Server(url)
    wait_for(lambda: server.get("/health_generate")[0] == 200)

    finished = []

    def ask() -> None:
        """For what takes a while on any machine."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.generate(input_ids=PROMPT, sampling_params=greedy(max_new_tokens=500, n=64))
            finished.append(True)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.load()["num_running_reqs"] > 0)
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(120)
    for thread in threads:
        thread.join(120)
    if process.stdout is not None:
        process.stdout.close()
    assert not finished


BROKEN = """
import asyncio, sys
from micota_fast.serve import embedded
embedded.DEATH_LINGER_S = 5.0
server = embedded.load_server(sys.argv[1])
def fail(*_):
    raise RuntimeError("the device is lost")
server.engine.model.forward = fail
status = asyncio.run(embedded.serve(server, "127.0.0.1", 0))
sys.exit(status)
"""


def test_a_dead_engine_shows_and_ends_the_process(qwen2_checkpoint: Path) -> None:
    command = [sys.executable, "-c", BROKEN, str(qwen2_checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        server = Server(process.stdout.readline().decode().removeprefix("listening on ").strip())
        assert server.get("/health")[0] == 200
        status, answer = server.post("/generate", {"input_ids": PROMPT, "sampling_params": greedy()})
        assert status == 500
        assert "the device is lost" in answer["error"]["message"]
        for path in ("/health", "/health_generate"):
            status, text = server.get(path)
            assert status == 503
            assert "the device is lost" in text
        assert process.wait(120) == 1
