"""The HTTP contract that the client relies on: one suite for the embedded server and, with $MICOTA_SGLANG_URL, SGLang.

A server under that URL must serve a checkpoint made by `checkpoints.make_checkpoint(DIR, "qwen2")`, in float32.
"""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from micota_fast import processes
from micota_fast.errors import InputError
from micota_fast.recipe import ServeConfig
from micota_fast.serve import sglang
from micota_fast.serve.launch import serving

PROMPT = [40, 50, 60, 70]
ENGINES = ["embedded", *(["sglang"] if os.environ.get("MICOTA_SGLANG_URL") else [])]


class Server:
    """A URL and plain ways to talk to it."""

    def __init__(self, url: str, engine: str) -> None:
        self.url, self.engine = url, engine

    def get(self, path: str) -> tuple[int, str]:
        return self._send(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
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

    def _send(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module", params=ENGINES)
def server(
    request: pytest.FixtureRequest, qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    if request.param == "sglang":
        yield Server(os.environ["MICOTA_SGLANG_URL"].rstrip("/"), "sglang")
        return
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serving(qwen2_checkpoint, ServeConfig(dtype="float32"), log) as url:
        yield Server(url, "embedded")


def greedy(**more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, **more}


def test_health_and_information(server: Server, qwen2_checkpoint: Path) -> None:
    assert server.get("/health")[0] == 200
    assert server.get("/health_generate")[0] == 200
    for path in ("/get_model_info", "/model_info"):
        info = json.loads(server.get(path)[1])
        assert info["is_generation"] is True
        assert info["model_path"] == info["tokenizer_path"]
    for path in ("/get_server_info", "/server_info"):
        assert server.get(path)[0] == 200
    models = json.loads(server.get("/v1/models")[1])
    assert models["object"] == "list"
    assert models["data"][0]["object"] == "model"
    assert server.post("/flush_cache", {})[0] == 200


def test_generate_single(server: Server) -> None:
    answer = server.generate(input_ids=PROMPT, sampling_params=greedy(), rid="mine")
    assert set(answer) >= {"text", "output_ids", "meta_info"}
    meta = answer["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 8)
    assert len(answer["output_ids"]) == 8
    assert answer["text"]


def test_greedy_text_equals_transformers(server: Server, qwen2_checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    # Not AutoTokenizer: transformers 5 puts Qwen2's own pre-tokenizer in the place of the checkpoint's.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(qwen2_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(qwen2_checkpoint, dtype=torch.float32)
    text = "the answer is 1 + 2"
    ids = tokenizer(text, return_tensors="pt").input_ids
    want = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    answer = server.generate(text=text, sampling_params={"temperature": 0, "max_new_tokens": 20})
    assert answer["output_ids"] == want.tolist()
    assert answer["text"] == tokenizer.decode(want, skip_special_tokens=True)


def test_batches_keep_their_order(server: Server) -> None:
    prompts = [PROMPT, PROMPT[::-1], [99], PROMPT]
    single = [server.generate(input_ids=p, sampling_params=greedy()) for p in prompts]
    batch = server.generate(input_ids=prompts, sampling_params=greedy())
    assert [a["output_ids"] for a in batch] == [a["output_ids"] for a in single]
    lengths = [1, 5, 2, 3]
    batch = server.generate(input_ids=prompts, sampling_params=[greedy(max_new_tokens=n) for n in lengths])
    assert [a["meta_info"]["completion_tokens"] for a in batch] == lengths
    texts = server.generate(text=["1 + 2", "so we get"], sampling_params=greedy())
    assert [a["text"] for a in texts] == [
        server.generate(text=t, sampling_params=greedy())["text"] for t in ("1 + 2", "so we get")
    ]


def test_several_samples_of_one_prompt(server: Server) -> None:
    answers = server.generate(input_ids=PROMPT, sampling_params={"temperature": 1.0, "n": 3, "max_new_tokens": 6})
    assert len(answers) == 3
    assert all(a["meta_info"]["completion_tokens"] <= 6 for a in answers)


def test_a_seed_makes_sampling_repeatable(server: Server) -> None:
    if json.loads(server.get("/get_server_info")[1]).get("enable_deterministic_inference") is False:
        pytest.skip("SGLang heeds sampling_seed with --enable-deterministic-inference only")

    def draw(seed: int) -> list[int]:
        params = greedy(temperature=1.0, sampling_seed=seed, max_new_tokens=12)
        return server.generate(input_ids=PROMPT, sampling_params=params)["output_ids"]

    drawn = [draw(seed) for seed in range(4)]
    assert drawn == [draw(seed) for seed in range(4)]
    assert len({tuple(d) for d in drawn}) == 4


def test_stops(server: Server) -> None:
    free = server.generate(input_ids=PROMPT, sampling_params=greedy())
    token = free["output_ids"][3]
    first = free["output_ids"].index(token)
    by_id = server.generate(input_ids=PROMPT, sampling_params=greedy(stop_token_ids=[token], ignore_eos=False))
    assert by_id["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert by_id["output_ids"] == free["output_ids"][: first + 1]
    assert free["text"].startswith(by_id["text"])
    ignored = server.generate(input_ids=PROMPT, sampling_params=greedy(stop_token_ids=[token]))
    assert ignored["output_ids"] == free["output_ids"]  # ignore_eos ignores them, too
    stop = free["text"][-2:]
    by_string = server.generate(input_ids=PROMPT, sampling_params=greedy(stop=[stop]))
    assert by_string["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert by_string["text"] == free["text"][: free["text"].find(stop)]
    assert by_string["output_ids"] == free["output_ids"][: len(by_string["output_ids"])]
    kept = server.generate(input_ids=PROMPT, sampling_params=greedy(stop=[stop], no_stop_trim=True))
    assert stop in kept["text"]


def test_log_probabilities(server: Server) -> None:
    body = {"input_ids": PROMPT, "sampling_params": greedy(max_new_tokens=3), "return_logprob": True}
    plain = server.generate(**body)["meta_info"]
    assert plain["input_token_logprobs"] == []
    assert len(plain["output_token_logprobs"]) == 3
    assert "output_top_logprobs" not in plain or not any(plain["output_top_logprobs"])
    full = server.generate(**body, logprob_start_len=0, top_logprobs_num=2)
    meta = full["meta_info"]
    assert [entry[1] for entry in meta["input_token_logprobs"]] == PROMPT
    assert meta["input_token_logprobs"][0][0] is None
    assert [entry[1] for entry in meta["output_token_logprobs"]] == full["output_ids"]
    assert all(len(top) == 2 and top[0][0] >= top[1][0] for top in meta["output_top_logprobs"])
    assert all(entry[0] <= 0 for entry in meta["output_token_logprobs"])


def test_streaming_is_cumulative(server: Server) -> None:
    whole = server.generate(input_ids=PROMPT, sampling_params=greedy(max_new_tokens=20))
    events = server.events(
        "/generate", {"input_ids": PROMPT, "sampling_params": greedy(max_new_tokens=20), "stream": True}
    )
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 20}
    assert all(event["meta_info"]["finish_reason"] is None for event in events[:-1])
    lengths = [event["meta_info"]["completion_tokens"] for event in events]
    assert lengths == sorted(lengths)
    assert whole["output_ids"] == events[-1]["output_ids"]


def test_streaming_a_batch_tells_the_index(server: Server) -> None:
    body = {"input_ids": [PROMPT, [99]], "sampling_params": greedy(), "stream": True}
    last = {event["index"]: event for event in server.events("/generate", body)}
    assert last[0]["text"] == server.generate(input_ids=PROMPT, sampling_params=greedy())["text"]
    assert last[1]["text"] == server.generate(input_ids=[99], sampling_params=greedy())["text"]


def test_chat_completions_use_the_template(server: Server) -> None:
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": "1 + 2"}],
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
    }
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200
    rendered = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1 + 2<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    want = server.generate(text=rendered, sampling_params=greedy(max_new_tokens=6))
    assert answer["choices"][0]["message"]["content"] == want["text"]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == want["meta_info"]["prompt_tokens"]
    chunks = server.events("/v1/chat/completions", {**body, "stream": True})
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]]
    assert "".join(pieces) == want["text"]


def test_text_completions(server: Server) -> None:
    body = {"model": "any", "prompt": "1 + 2", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    status, answer = server.post("/v1/completions", body)
    assert status == 200
    want = server.generate(text="1 + 2", sampling_params=greedy(max_new_tokens=5))
    assert answer["choices"][0]["text"] == want["text"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "a", "sampling_params": {"temperature": -1}},
        {"text": "a", "sampling_params": {"top_p": 2}},
        {"input_ids": [5] * 600, "sampling_params": {"max_new_tokens": 4}},
    ],
)
def test_bad_requests_get_400_and_a_message(server: Server, body: dict[str, Any]) -> None:
    status, answer = server.post("/generate", body)
    assert status == 400
    assert answer["error"]["message"]
    assert server.get("/health_generate")[0] == 200


# -- what our own server promises beyond SGLang ----------------------------------------------------------------------


@pytest.fixture
def embedded(server: Server) -> Server:
    if server.engine != "embedded":
        pytest.skip("a promise of the embedded server alone")
    return server


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        ([1], "must be a JSON object"),
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


def load(embedded: Server) -> dict[str, int]:
    info: dict[str, int] = json.loads(embedded.get("/get_server_info")[1])["internal_states"][0]
    return info


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_a_client_that_goes_away_is_aborted(embedded: Server) -> None:
    host = embedded.url.removeprefix("http://")
    connections = []
    for stream in (False, True):
        for _ in range(40):
            connection = http.client.HTTPConnection(host)
            params = greedy(max_new_tokens=500)
            body = {"input_ids": PROMPT, "sampling_params": params, "stream": stream}
            connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
            connections.append(connection)
    wait_for(lambda: load(embedded)["num_running_reqs"] > 10)
    before = load(embedded)["decode_tokens"]
    for connection in connections:
        connection.close()
    wait_for(lambda: load(embedded)["num_running_reqs"] + load(embedded)["num_waiting_reqs"] == 0)
    assert load(embedded)["decode_tokens"] - before < 60 * 500  # of 80 × 500, had they been finished


def test_abort_request(embedded: Server) -> None:
    answers: list[Any] = []
    body = {"input_ids": PROMPT, "sampling_params": greedy(max_new_tokens=500), "rid": "doomed"}
    threads = [threading.Thread(target=lambda: answers.append(embedded.post("/generate", body))) for _ in range(1)]
    filler = [threading.Thread(target=embedded.post, args=("/generate", {**body, "rid": f"r{i}"})) for i in range(30)]
    for thread in filler + threads:
        thread.start()
    wait_for(lambda: load(embedded)["num_running_reqs"] > 20)
    assert embedded.post("/abort_request", {"rid": "doomed"})[0] == 200
    threads[0].join(20)
    embedded.post("/abort_request", {"abort_all": True})
    for thread in filler:
        thread.join(20)
    status, answer = answers[0]
    assert status == 200
    assert answer["meta_info"]["finish_reason"]["type"] in ("abort", "length")
    assert embedded.post("/abort_request", {})[0] == 400


def start(checkpoint: Path, *more: str) -> tuple[subprocess.Popen[bytes], str]:
    """The command line itself; its first line of output tells the URL."""
    command = [sys.executable, "-m", "micota_fast.serve.embedded", "--model", str(checkpoint), *more]
    process = processes.spawn(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    first = process.stdout.readline().decode()
    assert first.startswith("listening on http://127.0.0.1:")
    return process, first.removeprefix("listening on ").strip()


def test_sigterm_ends_within_a_second_under_load(qwen2_checkpoint: Path) -> None:
    process, url = start(qwen2_checkpoint)
    server = Server(url, "embedded")
    wait_for(lambda: server.get("/health_generate")[0] == 200)

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            server.post("/generate", {"input_ids": PROMPT, "sampling_params": greedy(max_new_tokens=500)})

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_for(lambda: load(server)["num_running_reqs"] > 0)
    before = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(20)
    took_s = time.monotonic() - before
    for thread in threads:
        thread.join(20)
    if process.stdout is not None:
        process.stdout.close()
    assert took_s < 3.0  # one second is meant; this machine may be busy


def test_launch_tells_why_a_server_did_not_start(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    with (
        pytest.raises(InputError, match=r"ended with status 2; the end of its log[\s\S]*no-such-model"),
        serving(tmp_path / "no-such-model", ServeConfig(), tmp_path / "log.txt"),
    ):
        pass
    with (
        pytest.raises(InputError, match="startup_timeout_s"),
        serving(qwen2_checkpoint, ServeConfig(startup_timeout_s=0.0), tmp_path / "log.txt"),
    ):
        pass


def test_launch_takes_no_other_server_for_its_own(server: Server, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    port = int(server.url.rpartition(":")[2])
    log = tmp_path / "log.txt"
    with (
        pytest.raises(InputError, match=rf"127\.0\.0\.1: port {port} is taken"),
        serving(qwen2_checkpoint, ServeConfig(port=port), log),
    ):
        pass
    assert not log.exists()
    assert server.get("/health")[0] == 200


BROKEN = """
import asyncio, sys
from micota_fast.serve import embedded
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
        server = Server(process.stdout.readline().decode().removeprefix("listening on ").strip(), "embedded")
        assert server.get("/health")[0] == 200
        status, answer = server.post("/generate", {"input_ids": PROMPT, "sampling_params": greedy()})
        assert status == 500
        assert "the device is lost" in answer["error"]["message"]
        for path in ("/health", "/health_generate"):
            status, text = server.get(path)
            assert status == 503
            assert "the device is lost" in text
        assert process.wait(20) == 1


def test_a_server_dies_with_a_parent_that_was_killed(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    code = (
        "import sys, time\n"
        "from micota_fast.recipe import ServeConfig\n"
        "from micota_fast.serve.launch import serving\n"
        "with serving(sys.argv[1], ServeConfig(), sys.argv[2]) as url:\n"
        "    print(url, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(qwen2_checkpoint), str(tmp_path / "log.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        server = Server(parent.stdout.readline().decode().strip(), "embedded")
        assert server.get("/health")[0] == 200
        parent.kill()

    def gone() -> bool:
        try:
            server.get("/health")
        except OSError:
            return True
        return False

    wait_for(gone)


def test_sglang_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Built for an interpreter that has a package of that name; refused, with what to do, for one that has not."""
    monkeypatch.delenv("SGLANG_PYTHON", raising=False)
    with pytest.raises(InputError, match=r"not installed .*SGLANG_PYTHON"):
        sglang.command("m", ServeConfig(engine="sglang"), 1)
    with pytest.raises(InputError, match="no program"):
        sglang.find_python(ServeConfig(python=str(tmp_path / "nothing")))
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    with pytest.raises(InputError, match="where sglang is not installed"):
        sglang.find_python(ServeConfig(python=sys.executable))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SGLANG_PYTHON", sys.executable)
    config = ServeConfig(engine="sglang", dtype="bfloat16", context_length=4096, args=["--tp-size", "4"])
    assert sglang.command("m", config, 31000) == [
        sys.executable,
        *["-m", "sglang.launch_server", "--model-path", "m", "--host", "127.0.0.1", "--port", "31000"],
        *["--dtype", "bfloat16", "--context-length", "4096", "--tp-size", "4"],
    ]
    with pytest.raises(InputError, match="float64"):
        sglang.command("m", ServeConfig(engine="sglang", dtype="float64"), 1)


@pytest.mark.parametrize(
    ("config", "passed"),
    [
        (ServeConfig(engine="sglang"), True),
        (ServeConfig(engine="sglang", args=["--attention-backend", "triton"]), True),
        (ServeConfig(engine="sglang", args=["--attention-backend=torch_native"]), False),
        (ServeConfig(engine="sglang", args=["--device", "cpu"]), False),
        (ServeConfig(engine="sglang", device="cpu"), False),
        (ServeConfig(), False),
    ],
)
def test_seeds_are_asked_for_where_sglang_has_them(config: ServeConfig, passed: bool) -> None:
    before = list(config.args)
    assert sglang.seeded(config).args == before + [sglang.DETERMINISTIC] * passed
    assert sglang.seeded(sglang.seeded(config)) == sglang.seeded(config)
    assert config.args == before
