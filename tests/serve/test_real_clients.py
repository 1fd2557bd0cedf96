"""The server and the programs that people point at one: OpenAI's SDK, lm-evaluation-harness, bench_serving, guidellm.

Each runs as it is published, in an environment of its own (scripts/real_clients_env.sh, scripts/sglang_cpu_env.sh), and
must agree with what the server's native endpoint, `micota evaluate` or transformers say of the same problems.

Of SGLang's bench_serving 0.5.23 `--backend sglang-oai` cannot be used with a server that sends what it asks for: usage
in streams, and reads `choices[0]` of the event that brings it, where OpenAI has no choices.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.openai_session import GREEDY, MESSAGES, PROMPTS
from helpers.paths import HELPERS, ROOT
from helpers.servers import Server, clients_python, sglang_python, skip_or_fail
from helpers.waiting import wait_for
from micota_fast.chat.encoding import Chat
from micota_fast.config.evaluation import BenchmarkConfig, EvaluateConfig
from micota_fast.config.generation import TEACHER_PROMPT, ChatConfig, ServeConfig
from micota_fast.evaluation import evaluate
from micota_fast.serve.serve import serving
from micota_fast.sources.completions import read_completions

pytestmark = pytest.mark.slow

MICRO = ROOT / "micota_fast" / "micro"
MODEL = MICRO / "checkpoints" / "assistant"
NAME = "org/micro"
PROBLEMS_PER_LEVEL = 8
MAX_NEW_TOKENS = 44  # too few for some answers, which are wrong then
CHOICES = [f"\\boxed{{{digit}}}" for digit in range(10)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    clients_python()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serving(MODEL, ServeConfig(dtype="float64", served_model_name=NAME), log) as [url]:
        yield Server(url)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of each level, with answers short and long."""
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    levels = [(MICRO / "problems" / f"press-{n}.jsonl").read_text().splitlines() for n in (4, 5, 6, 8, 10)]
    path.write_text("".join(f"{line}\n" for lines in levels for line in lines[:PROBLEMS_PER_LEVEL]))
    return path


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.from_checkpoint(MODEL, ChatConfig())


def client(python: str, arguments: list[str], folder: Path) -> str:
    """What it prints. It finds no hub, and keeps its caches in the folder."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], env=environment | offline, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- OpenAI's SDK ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("openai")
    return json.loads(client(clients_python(), [str(HELPERS / "openai_session.py"), server.url, NAME], folder))


@pytest.fixture(scope="module")
def native_chat(server: Server, chat: Chat) -> Any:
    text = chat.render(MESSAGES, add_generation_prompt=True)
    params = {"temperature": 0, "max_new_tokens": GREEDY["max_tokens"]}
    return server.generate(text=text, sampling_params=params, return_logprob=True, top_logprobs_num=2)


def test_the_sdk_lists_and_finds_the_model(session: Any) -> None:
    assert session["models"] == [[NAME], NAME]


def test_the_sdk_reads_an_answer_its_usage_and_its_logprobs(session: Any, native_chat: Any) -> None:
    answer, meta = session["chat"], native_chat["meta_info"]
    [choice] = answer["choices"]
    assert choice["message"]["content"] == native_chat["text"]
    assert choice["finish_reason"] == meta["finish_reason"]["type"]
    assert answer["usage"]["prompt_tokens"] == meta["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == meta["completion_tokens"]
    content = choice["logprobs"]["content"]
    assert [place["logprob"] for place in content] == [place[0] for place in meta["output_token_logprobs"]]
    tops = [[top["logprob"] for top in place["top_logprobs"]] for place in content]
    assert tops == [[top[0] for top in place] for place in meta["output_top_logprobs"]]


def test_the_sdk_joins_a_stream_that_ends_with_usage(session: Any, native_chat: Any) -> None:
    *events, last = session["chat_stream"]
    assert "".join(event["choices"][0]["delta"]["content"] or "" for event in events) == native_chat["text"]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["choices"][0]["finish_reason"] == native_chat["meta_info"]["finish_reason"]["type"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == native_chat["meta_info"]["completion_tokens"]


def test_the_sdk_gets_several_prompts_echoed_scored_and_streamed(session: Any, server: Server) -> None:
    answer, events = session["text"], session["text_stream"]
    tokens = 0
    for index, (prompt, choice) in enumerate(zip(PROMPTS, answer["choices"], strict=True)):
        params = {"temperature": 0, "max_new_tokens": GREEDY["max_tokens"]}
        want = server.generate(text=prompt, sampling_params=params, return_logprob=True, logprob_start_len=0)
        meta = want["meta_info"]
        tokens += meta["completion_tokens"]
        assert choice["text"] == prompt + want["text"]
        places = meta["input_token_logprobs"] + meta["output_token_logprobs"]
        assert choice["logprobs"]["token_logprobs"] == [
            None,
            *(pytest.approx(place[0], abs=1e-6) for place in places[1:]),
        ]
        own = [event["choices"][0]["text"] for event in events[:-1] if event["choices"][0]["index"] == index]
        assert "".join(own) == want["text"]
    assert answer["usage"]["completion_tokens"] == events[-1]["usage"]["completion_tokens"] == tokens


def test_a_stream_that_the_sdk_closes_is_aborted(session: Any, server: Server) -> None:
    assert session["closed_stream"] is None  # it had not ended
    wait_for(lambda: server.load()["num_running_reqs"] == 0)


def test_errors_are_the_sdks_own_exceptions_with_the_parameter(session: Any) -> None:
    bad = ["BadRequestError", 400, "invalid_request_error"]
    assert session["errors"] == {
        "temperature": [*bad, "invalid_value", "temperature"],
        "regex": [*bad, "unsupported_parameter", "regex"],
        "messages": [*bad, "invalid_value", "messages"],
        "max_tokens": [*bad, "invalid_value", "max_tokens"],
        "prompt": [*bad, "context_length_exceeded", "prompt"],
        "model": ["NotFoundError", 404, "invalid_request_error", "model_not_found", "model"],
        "endpoint": ["NotFoundError", 404, "invalid_request_error", None, None],
    }


# -- lm-evaluation-harness -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness(server: Server, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("lm-eval")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(problems)}},
        "test_split": "test",
        "doc_to_text": TEACHER_PROMPT.replace("{problem}", "{{problem}}"),
    }
    box = {"function": "regex", "regex_pattern": r"\\boxed\{(.*?)\}", "group_select": -1}
    generate = {
        **common,
        "task": "generate",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": MAX_NEW_TOKENS, "temperature": 0},
        "filter_list": [{"name": "box", "filter": [box, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    choose = {
        **common,
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": CHOICES,
        "doc_to_target": "{{answer | int}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tasks").mkdir()
    for task in (generate, choose):
        (folder / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    arguments = [str(HELPERS / "lm_eval_run.py"), server.url, NAME, str(MODEL), str(folder / "tasks")]
    return json.loads(client(clients_python(), arguments, folder).splitlines()[-1])


@pytest.mark.parametrize("name", ["local-chat-completions", "local-completions"])
def test_the_harness_finds_the_accuracy_of_micota_evaluate(
    name: str, harness: Any, server: Server, problems: Path, tmp_path: Path
) -> None:
    config = EvaluateConfig(
        model=str(MODEL),
        url=server.url,
        out=str(tmp_path),
        max_new_tokens=MAX_NEW_TOKENS,
        benchmarks=[BenchmarkConfig(name="mixed", path=str(problems))],
    )
    evaluate.run(config)
    results = json.loads((tmp_path / "results.json").read_text())["benchmarks"]["mixed"]
    assert 0 < results["accuracy"] < 1
    task = harness[name]["generate"]
    assert task["metrics"]["exact_match,box"] == pytest.approx(results["accuracy"], abs=1e-12)
    own = {row.id: row.completion for row in read_completions(tmp_path / "completions" / "mixed.jsonl")}
    assert {sample["doc"]["id"]: sample["resps"][0][0] for sample in task["samples"]} == own


def test_the_harness_gets_the_likelihoods_of_a_plain_forward_pass(harness: Any) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    right = 0
    samples = harness["local-completions"]["choose"]["samples"]
    assert len(samples) == 5 * PROBLEMS_PER_LEVEL
    for sample in samples:
        wanted = []
        for (given, choice), response in zip(sample["arguments"], sample["resps"], strict=True):
            # The harness counts white space at the end of what is given as part of the choice.
            context = tokenizer.encode(given.rstrip(), add_special_tokens=False).ids
            whole = tokenizer.encode(given + choice, add_special_tokens=False).ids
            assert whole[: len(context)] == context
            with torch.inference_mode():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)[len(context) - 1 : -1]
            ids = torch.tensor(whole[len(context) :])
            wanted.append(logprobs.gather(1, ids[:, None]).sum().item())
            [[logprob, is_greedy]] = response
            assert float(logprob) == pytest.approx(wanted[-1], abs=1e-4)
            assert str(is_greedy) == str(bool((logprobs.argmax(-1) == ids).all()))
        right += wanted.index(max(wanted)) == int(sample["doc"]["answer"])
    assert harness["local-completions"]["choose"]["metrics"]["acc,none"] == pytest.approx(right / len(samples))


# -- load generators -------------------------------------------------------------------------------------------------


def questions(problems: Path, number: int) -> list[str]:
    return [row["problem"] for row in read_rows(problems)[-number:]]


def generated_tokens(server: Server) -> int:
    """All that the engine ever made but the first of each answer, which prefilling makes."""
    [state] = server.read("/server_info")["internal_states"]
    return int(state["decode_tokens"])


def test_bench_serving_counts_the_tokens_that_were_made(server: Server, problems: Path, tmp_path: Path) -> None:
    python = sglang_python()
    if subprocess.run([python, "-c", "import datasets"], capture_output=True).returncode:
        skip_or_fail(f"{python} lacks `datasets`, which bench_serving imports", "MICOTA_REQUIRE_CLIENTS")
    number, most = 8, 24  # no answer ends before: of a streamed conversation it counts what it asked for, not what came
    asked = questions(problems, number)
    data = tmp_path / "conversations.jsonl"
    lines = [{"conversations": [{"value": text}, {"value": "an answer"}]} for text in asked]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for backend in ("sglang", "sglang-oai-chat"):
        before = generated_tokens(server)
        out = tmp_path / f"{backend}.jsonl"
        arguments = ["--backend", backend, "--base-url", server.url, "--model", str(MODEL), "--served-model-name", NAME]
        arguments += ["--dataset-name", "custom", "--dataset-path", str(data), "--num-prompts", str(number)]
        arguments += ["--sharegpt-output-len", str(most), "--disable-ignore-eos", "--max-concurrency", "4"]
        arguments += ["--warmup-requests", "0", "--output-file", str(out), "--output-details", "--disable-tqdm"]
        client(python, ["-m", "sglang.bench_serving", *arguments], tmp_path)
        made = generated_tokens(server) - before + number
        [found] = read_rows(out)
        own = []
        for text in asked:
            if backend == "sglang":
                params = {"temperature": 0, "max_new_tokens": most}
                meta = server.generate(text=text, sampling_params=params)["meta_info"]
            else:
                messages = [{"role": "user", "content": text}]
                body = {"messages": messages, "temperature": 0, "max_tokens": most}
                meta = server.post("/v1/chat/completions", body)[1]["usage"]
            own.append((meta["prompt_tokens"], meta["completion_tokens"]))
        assert found["completed"] == number
        assert sorted(found["output_lens"]) == sorted(tokens for _, tokens in own)
        assert found["total_output_tokens"] == made
        if backend == "sglang":  # for a conversation it counts the text of the question alone
            assert sorted(found["input_lens"]) == sorted(tokens for tokens, _ in own)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_guidellm_counts_the_tokens_that_were_made(path: str, server: Server, problems: Path, tmp_path: Path) -> None:
    number = 8
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions(problems, number)))
    before = generated_tokens(server)
    arguments = ["-m", "guidellm", "run", "--disable-console", "--profile", "kind=concurrent,streams=4"]
    arguments += ["--backend", f"kind=openai_http,target={server.url},request_format={path},extras.body.temperature=0"]
    arguments += ["--tokenizer", f"kind=huggingface_auto,model={MODEL}", "--data", f"kind=json_file,path={data}"]
    arguments += ["--constraint", f"kind=max_requests,count={number}", "--output", "kind=json,path=report.json"]
    client(clients_python(), arguments, tmp_path)
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    rows = benchmark["requests"]["successful"]
    assert len(rows) == number
    made = sum(row["output_metrics"]["text_tokens"] for row in rows)
    assert made == generated_tokens(server) - before + number
    for row in rows:
        body = json.loads(row["request_args"])["body"]
        status, answer = server.post(path, {key: body[key] for key in body if not key.startswith("stream")})
        assert status == 200
        [choice] = answer["choices"]
        assert row["output"] == (choice["text"] if "text" in choice else choice["message"]["content"])
        assert row["input_metrics"]["text_tokens"] == answer["usage"]["prompt_tokens"]
        assert row["output_metrics"]["text_tokens"] == answer["usage"]["completion_tokens"]
