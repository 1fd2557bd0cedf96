"""The real sglang-router in front of two embedded servers: requests are spread, and one server dies under load."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from helpers.ports import free_ports
from helpers.servers import PROMPT, Server, greedy, sglang_python
from helpers.waiting import wait_for
from micota_fast.common import processes
from micota_fast.common.records import Problem, write_rows
from micota_fast.config.generation import ServeConfig
from micota_fast.serve.serve import serving
from micota_fast.sources.completions import read_completions

PROBLEMS, SAMPLES = 100, 2


@pytest.fixture
def workers(tmp_path: Path, qwen2_checkpoint: Path) -> Iterator[list[Server]]:
    sglang_python()  # before two servers are started in vain
    with serving(qwen2_checkpoint, ServeConfig(replicas=2), tmp_path / "workers.log") as urls:
        yield [Server(url) for url in urls]


@pytest.fixture
def router(tmp_path: Path, workers: list[Server]) -> Iterator[Server]:
    port, metrics_port = free_ports(2)
    command = [sglang_python(), "-m", "sglang_router.launch_router", "--policy", "round_robin"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)]
    command += ["--worker-urls", *(worker.url for worker in workers)]
    with (tmp_path / "router.log").open("wb") as log:
        process = processes.spawn(command, stdout=log, stderr=log)
    router = Server(f"http://127.0.0.1:{port}")
    try:

        def ready() -> bool:
            assert process.poll() is None, (tmp_path / "router.log").read_text()
            return not router.gone() and router.get("/readiness")[0] == 200

        wait_for(ready, 240)
        wait_for(lambda: router.read("/readiness")["healthy_workers"] == 2)
        yield router
    finally:
        processes.stop(process)


def decoded(server: Server) -> int:
    """Tokens so far."""
    tokens: int = server.read("/server_info")["internal_states"][0]["decode_tokens"]
    return tokens


@pytest.mark.slow
def test_a_router_spreads_requests_and_outlives_a_server(
    tmp_path: Path, qwen2_checkpoint: Path, workers: list[Server], router: Server
) -> None:
    # What our client sends passes through as it is, and so does what our server answers.
    body = {"input_ids": PROMPT, "sampling_params": greedy(), "return_logprob": True, "top_logprobs_num": 2}
    direct, routed = workers[0].generate(**body), router.generate(**body)
    assert (routed["text"], routed["output_ids"]) == (direct["text"], direct["output_ids"])
    assert routed["meta_info"]["output_top_logprobs"] == direct["meta_info"]["output_top_logprobs"]
    assert router.read("/get_model_info") == workers[0].read("/get_model_info")
    loads = {load["worker"]: load["load"] for load in router.read("/get_loads")["workers"]}
    assert loads == {worker.url: 0 for worker in workers}  # tokens; -1 where a worker does not tell
    status, answer = router.post("/generate", {"input_ids": [5, 320]})
    assert (status, answer["error"]["message"]) == (400, "input_ids: 320 is outside the vocabulary of 320 ids")

    problems, out = tmp_path / "problems.jsonl", tmp_path / "out.jsonl"
    write_rows(problems, [Problem(f"p{i}", f"{i} + 1 = ", str(i + 1)) for i in range(PROBLEMS)])
    options = {"model": qwen2_checkpoint, "problems": problems, "out": out, "url": router.url}
    options |= {"samples": SAMPLES, "temperature": 1.0, "max_new_tokens": 400, "concurrency": 16}
    command = [sys.executable, "-m", "micota_fast", "generate"]
    command += [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    before = [decoded(worker) for worker in workers]
    with (tmp_path / "generate.log").open("w") as log:
        maker = subprocess.Popen(command, stdout=log, stderr=log)

    def said() -> str:
        return (tmp_path / "generate.log").read_text()

    def under_load() -> bool:
        assert maker.poll() is None, said()
        spread = [decoded(worker) - had > 400 for worker, had in zip(workers, before, strict=True)]
        return all(spread) and all(worker.load()["num_running_reqs"] > 0 for worker in workers)

    try:
        wait_for(under_load, 240)
        port = workers[0].url.rpartition(":")[2]
        [engine] = {
            process.pid
            for process in psutil.Process().children(recursive=True)
            if any(c.laddr.port == int(port) for c in process.net_connections() if c.status == psutil.CONN_LISTEN)
        }
        os.killpg(engine, signal.SIGKILL)
        assert workers[0].gone()
        assert maker.poll() is None, said()
        left = decoded(workers[1])
        assert maker.wait(240) == 0, said()
        assert decoded(workers[1]) > left
    finally:
        maker.kill()
        maker.wait()
    rows = read_completions(out)
    assert [(row.id, row.sample) for row in rows] == [(f"p{i}", s) for i in range(PROBLEMS) for s in range(SAMPLES)]
    assert all(row.finish_reason in ("stop", "length") for row in rows)
