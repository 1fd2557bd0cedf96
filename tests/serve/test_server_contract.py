"""The HTTP contract that the client relies on: one suite for our embedded server and a real SGLang, both in float32.

The checkpoint's weights are random and wide, so that no two tokens are nearly as likely: greedy text is the same from
both and from transformers.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from helpers.servers import PROMPT, Server, greedy, sglang_config
from helpers.waiting import wait_for
from micota_fast.chat.encoding import Chat
from micota_fast.common.records import Completion, Problem, write_rows
from micota_fast.config import loader
from micota_fast.config.generation import ChatConfig, GenerateConfig, ServeConfig
from micota_fast.config.scoring import ScoreConfig
from micota_fast.generation import generate
from micota_fast.scoring import score
from micota_fast.scoring.rows import load_rows
from micota_fast.serve.serve import serving
from micota_fast.sources.top_logprobs import TopLogprobs

CONTEXT = 512  # of the checkpoint
BARE = ChatConfig(system=None, prompt="{problem}")


@pytest.fixture(scope="module", params=["embedded", pytest.param("sglang", marks=pytest.mark.slow)])
def server(
    request: pytest.FixtureRequest, qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    config = ServeConfig(dtype="float32") if request.param == "embedded" else sglang_config()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with serving(qwen2_checkpoint, config, log) as [url]:
            yield Server(url, request.param)


@pytest.fixture(scope="module")
def reference(qwen2_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(qwen2_checkpoint, dtype=torch.float32)


def logprobs_of(reference: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """`[T, V]`: row t is what is predicted after ids[:t + 1]."""
    with torch.inference_mode():
        return (reference(torch.tensor([ids])).logits[0].double() / temperature).log_softmax(-1)


# -- what the server is ----------------------------------------------------------------------------------------------


def test_health(server: Server) -> None:
    assert server.get("/health")[0] == 200
    assert server.get("/health_generate")[0] == 200
    assert server.post("/flush_cache", {})[0] == 200


def test_the_model_is_named(server: Server, qwen2_checkpoint: Path) -> None:
    for path in ("/get_model_info", "/model_info"):
        info = server.read(path)
        assert info["model_path"] == info["tokenizer_path"] == info["served_model_name"] == str(qwen2_checkpoint)
        assert info["is_generation"] is True
        assert (info["model_type"], info["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
        assert info["weight_version"] == "default"
    models = server.read("/v1/models")
    assert models["object"] == "list"
    [model] = models["data"]
    assert (model["object"], model["root"], model["max_model_len"]) == ("model", str(qwen2_checkpoint), CONTEXT)


def test_limits_are_told_and_hold(server: Server) -> None:
    info = server.read("/server_info")
    assert server.read("/get_server_info").keys() == info.keys()
    assert info["max_total_num_tokens"] >= CONTEXT
    refused = info["max_req_input_len"]
    assert CONTEXT - 10 < refused <= CONTEXT
    one = greedy(max_new_tokens=1)
    assert server.post("/generate", {"input_ids": [5] * refused, "sampling_params": one})[0] == 400
    longest = server.generate(input_ids=[5] * (refused - 1), sampling_params=one)
    assert longest["meta_info"]["prompt_tokens"] == refused - 1


def test_loads(server: Server) -> None:
    wait_for(lambda: server.load()["num_running_reqs"] == 0)
    idle = server.load()
    assert (idle["dp_rank"], idle["num_waiting_reqs"], idle["num_used_tokens"]) == (0, 0, 0)
    assert idle["max_total_num_tokens"] == server.read("/server_info")["max_total_num_tokens"]
    assert idle["token_usage"] == 0
    assert idle["max_running_requests"] >= 1
    with ThreadPoolExecutor(40) as pool:
        params = greedy(max_new_tokens=400)
        for i in range(40):
            pool.submit(server.generate, input_ids=[40, 50, 60 + i], sampling_params=params)
        seen: list[dict[str, Any]] = []

        def busy() -> bool:
            seen.append(server.load())
            return seen[-1]["num_running_reqs"] > 0 and seen[-1]["num_used_tokens"] > 100

        wait_for(busy)
        server.post("/abort_request", {"abort_all": True})
    load = seen[-1]
    assert load["num_running_reqs"] + load["num_waiting_reqs"] <= 40
    assert load["token_usage"] == pytest.approx(load["num_used_tokens"] / load["max_total_num_tokens"], abs=1e-3)


# -- one prompt, many prompts, many samples --------------------------------------------------------------------------


def test_generate_single(server: Server) -> None:
    answer = server.generate(input_ids=PROMPT, sampling_params=greedy(), rid="mine")
    assert set(answer) >= {"text", "output_ids", "meta_info"}
    meta = answer["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 8)
    assert meta["e2e_latency"] > 0
    assert len(answer["output_ids"]) == 8
    assert answer["text"]


@pytest.mark.parametrize("text", ["the answer is 1 + 2", "so we get", "You are a helpful \\boxed{42}"])
def test_greedy_text_equals_transformers(
    server: Server, text: str, qwen2_checkpoint: Path, reference: PreTrainedModel
) -> None:
    # Not AutoTokenizer: transformers 5 puts Qwen2's own pre-tokenizer in the place of the checkpoint's.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(qwen2_checkpoint)
    ids = tokenizer(text, return_tensors="pt").input_ids
    want = reference.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    params = {"temperature": 0, "max_new_tokens": 40}
    answer = server.generate(text=text, sampling_params=params)
    assert answer["output_ids"] == want.tolist()
    assert answer["text"] == tokenizer.decode(want, skip_special_tokens=True)
    assert answer["meta_info"]["prompt_tokens"] == ids.shape[1]
    by_ids = server.generate(input_ids=ids[0].tolist(), sampling_params=params)
    assert (by_ids["output_ids"], by_ids["text"]) == (answer["output_ids"], answer["text"])


def test_batches_keep_their_order(server: Server) -> None:
    prompts = [PROMPT, PROMPT[::-1], [99], PROMPT]
    single = [server.generate(input_ids=p, sampling_params=greedy()) for p in prompts]
    batch = server.generate(input_ids=prompts, sampling_params=greedy(), rid=["a", "b", "c", "d"])
    assert [a["output_ids"] for a in batch] == [a["output_ids"] for a in single]
    assert [a["meta_info"]["id"] for a in batch] == ["a", "b", "c", "d"]
    assert isinstance(server.generate(input_ids=[PROMPT], sampling_params=greedy()), list)
    lengths = [1, 5, 2, 3]
    batch = server.generate(input_ids=prompts, sampling_params=[greedy(max_new_tokens=n) for n in lengths])
    assert [a["meta_info"]["completion_tokens"] for a in batch] == lengths
    texts = server.generate(text=["1 + 2", "so we get"], sampling_params=greedy())
    assert [a["text"] for a in texts] == [
        server.generate(text=t, sampling_params=greedy())["text"] for t in ("1 + 2", "so we get")
    ]


def test_several_samples_of_each_prompt(server: Server) -> None:
    answers = server.generate(input_ids=PROMPT, sampling_params=greedy(temperature=1.0, n=3, max_new_tokens=12))
    assert len({tuple(a["output_ids"]) for a in answers}) == len({a["meta_info"]["id"] for a in answers}) == 3
    answers = server.generate(input_ids=[PROMPT, [99]], sampling_params=greedy(n=2))
    alone = [server.generate(input_ids=p, sampling_params=greedy())["output_ids"] for p in (PROMPT, [99])]
    assert [a["output_ids"] for a in answers] == [alone[0], alone[0], alone[1], alone[1]]


def test_a_seed_makes_sampling_repeatable(server: Server) -> None:
    if server.read("/server_info").get("enable_deterministic_inference") is False:
        pytest.skip("SGLang heeds sampling_seed with --enable-deterministic-inference only, which needs a GPU")

    def draw(seed: int) -> list[int]:
        params = greedy(temperature=1.0, sampling_seed=seed, max_new_tokens=12)
        return server.generate(input_ids=PROMPT, sampling_params=params)["output_ids"]

    drawn = [draw(seed) for seed in range(4)]
    assert drawn == [draw(seed) for seed in range(4)]
    assert len({tuple(d) for d in drawn}) == 4


def test_sampling_keeps_to_top_k(server: Server, reference: PreTrainedModel) -> None:
    """Of the first token, whose distribution transformers tells: only the three likeliest, and not always one."""
    likeliest = logprobs_of(reference, PROMPT)[-1].topk(3).indices.tolist()
    params = greedy(temperature=1.0, top_k=3, n=48, max_new_tokens=1)
    drawn = {a["output_ids"][0] for a in server.generate(input_ids=PROMPT, sampling_params=params)}
    assert drawn <= set(likeliest)
    assert len(drawn) > 1  # 48 times the same by chance: below 1e-14, as none of the three has more than half


# -- how answers end -------------------------------------------------------------------------------------------------


def test_stops(server: Server) -> None:
    free = server.generate(input_ids=[99], sampling_params=greedy())
    token = free["output_ids"][3]
    first = free["output_ids"].index(token)
    by_id = server.generate(input_ids=[99], sampling_params=greedy(stop_token_ids=[token], ignore_eos=False))
    assert by_id["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert by_id["output_ids"] == free["output_ids"][: first + 1]
    assert by_id["meta_info"]["completion_tokens"] == first + 1
    assert free["text"].startswith(by_id["text"])
    ignored = server.generate(input_ids=[99], sampling_params=greedy(stop_token_ids=[token]))
    assert ignored["output_ids"] == free["output_ids"]  # ignore_eos ignores them, too
    stop = free["text"][-2:]
    by_string = server.generate(input_ids=[99], sampling_params=greedy(stop=["never this", stop]))
    assert by_string["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert by_string["text"] == free["text"][: free["text"].find(stop)]
    assert by_string["output_ids"] == free["output_ids"][: len(by_string["output_ids"])]
    kept = server.generate(input_ids=[99], sampling_params=greedy(stop=[stop], no_stop_trim=True))
    assert stop in kept["text"]


def test_the_context_bounds_prompt_and_answer(server: Server) -> None:
    """What is asked may fill the context, of which SGLang itself keeps two tokens back."""
    full = server.generate(input_ids=PROMPT, sampling_params=greedy(max_new_tokens=CONTEXT - 4))
    made = full["meta_info"]["completion_tokens"]
    assert full["meta_info"]["finish_reason"] == {"type": "length", "length": made}
    assert CONTEXT - 2 <= len(PROMPT) + made <= CONTEXT
    body = {"input_ids": PROMPT, "sampling_params": greedy(max_new_tokens=CONTEXT - 3)}
    status, answer = server.post("/generate", body)
    assert status == 400
    assert f"{CONTEXT}" in answer["error"]["message"]


# -- log-probabilities -----------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model(server: Server, reference: PreTrainedModel) -> None:
    body = {"input_ids": PROMPT, "sampling_params": greedy(max_new_tokens=3), "return_logprob": True}
    plain = server.generate(**body)["meta_info"]
    assert plain["input_token_logprobs"] == []
    assert len(plain["output_token_logprobs"]) == 3
    assert "output_top_logprobs" not in plain or not any(plain["output_top_logprobs"])
    full = server.generate(**body, logprob_start_len=0, top_logprobs_num=4)
    meta, ids = full["meta_info"], full["output_ids"]
    want_TV = logprobs_of(reference, PROMPT + ids)
    given = meta["input_token_logprobs"] + meta["output_token_logprobs"]
    assert [entry[1] for entry in given] == PROMPT + ids
    assert given[0][0] is None
    assert meta["input_top_logprobs"][0] is None
    tops = meta["input_top_logprobs"] + meta["output_top_logprobs"]
    for t, (entry, top) in enumerate(zip(given[1:], tops[1:], strict=True)):
        assert entry[0] == pytest.approx(want_TV[t, entry[1]].item(), abs=2e-4)
        want = want_TV[t].topk(4)
        assert [pair[1] for pair in top] == want.indices.tolist()
        assert [pair[0] for pair in top] == pytest.approx(want.values.tolist(), abs=2e-4)


def test_log_probabilities_from_a_place_in_the_prompt(server: Server) -> None:
    body = {"input_ids": PROMPT, "sampling_params": greedy(max_new_tokens=1), "return_logprob": True}
    for start in (1, 2, 4):
        given = server.generate(**body, logprob_start_len=start)["meta_info"]["input_token_logprobs"]
        assert [entry[1] for entry in given] == PROMPT[start:]
        assert all((entry[0] is None) == (i == 0) for i, entry in enumerate(given))
    assert server.post("/generate", {**body, "logprob_start_len": 5})[0] == 400


def test_a_text_is_scored_without_an_answer(server: Server, reference: PreTrainedModel) -> None:
    text = [*PROMPT, *range(100, 130)]
    body = {"input_ids": text, "sampling_params": greedy(max_new_tokens=0), "return_logprob": True}
    answer = server.generate(**body, logprob_start_len=len(PROMPT) - 1, top_logprobs_num=5)
    meta = answer["meta_info"]
    assert (meta["completion_tokens"], meta["finish_reason"]["type"]) == (0, "length")
    assert len(meta["input_token_logprobs"]) == len(meta["input_top_logprobs"]) == 31
    want_TV = logprobs_of(reference, text)[len(PROMPT) - 1 : -1]
    for t, place in enumerate(meta["input_top_logprobs"][1:]):
        want = want_TV[t].topk(5)
        assert meta["input_token_logprobs"][t + 1][1] == text[len(PROMPT) + t]
        assert [pair[1] for pair in place] == want.indices.tolist()
        assert [pair[0] for pair in place] == pytest.approx(want.values.tolist(), abs=2e-4)


def check_store(folder: Path, texts: dict[str, tuple[list[int], list[int]]], reference: PreTrainedModel) -> None:
    """See that a store has the reference's log-probabilities of answers, given the ids of each prompt and answer.

    Within 2e-4 of transformers in float32, and what float16 rounds.
    """
    store = TopLogprobs(folder)
    assert {key[0] for key in store} == set(texts)
    for name, (prompt, ids) in texts.items():
        want_TV = logprobs_of(reference, prompt + ids)[len(prompt) - 1 : -1].numpy()
        own_ids, own, top_ids, logprobs = store[name, 0]
        assert own_ids.tolist() == ids
        np.testing.assert_allclose(own, want_TV[np.arange(len(ids)), ids], rtol=0, atol=2e-4)
        order = np.argsort(-want_TV, axis=1)[:, :4]
        assert top_ids.tolist() == order.tolist()
        np.testing.assert_allclose(logprobs, np.take_along_axis(want_TV, order, 1), rtol=2**-11, atol=2e-4)


def test_score_stores_the_models_log_probabilities(
    server: Server, reference: PreTrainedModel, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    texts = [f"so the answer is {i + 1}. " * (1 + 2 * i) for i in range(4)]
    rows = [Completion(f"p{i}", 0, f"{i} + 1 =", "0", text, "stop", 9, 9, None) for i, text in enumerate(texts)]
    write_rows(tmp_path / "rows.jsonl", rows)
    options = {"model": str(qwen2_checkpoint), "completions": str(tmp_path / "rows.jsonl"), "chat": BARE, "top_k": 4}
    score.run(ScoreConfig(**options, out=str(tmp_path / "scores"), url=server.url))  # type: ignore[arg-type]
    loaded, _ = load_rows(str(tmp_path / "rows.jsonl"), Chat.from_checkpoint(qwen2_checkpoint, BARE), None)
    sent = {key.id: (loaded.sent(n), int(loaded.prompts[n])) for n, key in enumerate(loaded.keys)}
    check_store(tmp_path / "scores", {name: (ids[:n], ids[n:]) for name, (ids, n) in sent.items()}, reference)


def test_generate_stores_the_models_log_probabilities(
    server: Server, reference: PreTrainedModel, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    """Also of the tokens that end a thought, which the model has not written."""
    chat = Chat.from_checkpoint(qwen2_checkpoint, BARE)
    problems = [Problem(f"p{i}", f"{i} + 1 =", "0") for i in range(3)]
    write_rows(tmp_path / "problems.jsonl", problems)
    out = tmp_path / "answers.jsonl"
    options = {"model": str(qwen2_checkpoint), "problems": str(tmp_path / "problems.jsonl"), "chat": BARE}
    options |= {"top_logprobs": 4, "thinking_budget": 6, "max_new_tokens": 40, "url": server.url}
    generate.run(GenerateConfig(**options, out=str(out)))  # type: ignore[arg-type]
    store = TopLogprobs(f"{out}.top_logprobs")
    end = chat.tokenizer.encode([GenerateConfig(**options, out="").thinking_end])[0].tolist()  # type: ignore[arg-type]
    texts = {p.id: (chat.encode_prompt(p.problem), store[p.id, 0].token_ids_T.tolist()) for p in problems}
    assert all(ids[6 : 6 + len(end)] == end for _, ids in texts.values())
    check_store(store.folder, texts, reference)


def test_log_probabilities_are_at_the_temperature(server: Server, reference: PreTrainedModel) -> None:
    params = greedy(temperature=0.5, max_new_tokens=4)
    answer = server.generate(input_ids=PROMPT, sampling_params=params, return_logprob=True, top_logprobs_num=1)
    ids = answer["output_ids"]
    want_TV = logprobs_of(reference, PROMPT + ids, temperature=0.5)[len(PROMPT) - 1 :]
    for t, (value, token, _) in enumerate(answer["meta_info"]["output_token_logprobs"]):
        assert token == ids[t]
        assert value == pytest.approx(want_TV[t, token].item(), abs=5e-4)


def test_log_probabilities_of_a_batch_of_samples(server: Server) -> None:
    body = {"input_ids": [PROMPT, [99]], "sampling_params": greedy(n=2), "return_logprob": True, "top_logprobs_num": 2}
    for answer in server.generate(**body):
        meta = answer["meta_info"]
        assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
        assert all(len(top) == 2 and top[0][0] >= top[1][0] for top in meta["output_top_logprobs"])


# -- streams ---------------------------------------------------------------------------------------------------------


def test_streaming_is_cumulative(server: Server) -> None:
    body = {"input_ids": PROMPT, "sampling_params": greedy(max_new_tokens=20), "return_logprob": True}
    whole = server.generate(**body)
    events = server.events("/generate", {**body, "stream": True})
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 20}
    assert all(event["meta_info"]["finish_reason"] is None for event in events[:-1])
    assert all(whole["text"].startswith(event["text"]) for event in events)
    assert all(event["output_ids"] == whole["output_ids"][: len(event["output_ids"])] for event in events)
    lengths = [event["meta_info"]["completion_tokens"] for event in events]
    assert lengths == sorted(lengths)
    assert len(events) > 1
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert [e[1] for e in events[-1]["meta_info"]["output_token_logprobs"]] == whole["output_ids"]


def test_streaming_a_batch_tells_the_index(server: Server) -> None:
    body = {"input_ids": [PROMPT, [99]], "sampling_params": greedy(), "stream": True}
    last = {event["index"]: event for event in server.events("/generate", body)}
    assert last[0]["text"] == server.generate(input_ids=PROMPT, sampling_params=greedy())["text"]
    assert last[1]["text"] == server.generate(input_ids=[99], sampling_params=greedy())["text"]


def test_a_stream_ends_at_a_stop_string(server: Server) -> None:
    free = server.generate(input_ids=[99], sampling_params=greedy())
    stop = free["text"][-2:]
    params = greedy(stop=[stop])
    last = server.events("/generate", {"input_ids": [99], "sampling_params": params, "stream": True})[-1]
    assert last["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert last["text"] == server.generate(input_ids=[99], sampling_params=params)["text"]


# -- OpenAI's endpoints ----------------------------------------------------------------------------------------------


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


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input_ids": []},
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


@pytest.mark.parametrize("params", [{"temprature": 0}, {"max_new_tokens": "a"}])
def test_parameters_that_cannot_be_read_get_400(server: Server, params: dict[str, Any]) -> None:
    """SGLang's `error` is a bare string then."""
    status, answer = server.post("/generate", {"text": "a", "sampling_params": params})
    assert status == 400
    assert isinstance(answer["error"], str if server.engine == "sglang" else dict)


def test_an_aborted_request_is_answered(server: Server) -> None:
    answers: list[Any] = []
    params = greedy(max_new_tokens=500)
    body = {"input_ids": PROMPT, "sampling_params": params, "rid": "doomed"}
    thread = threading.Thread(target=lambda: answers.append(server.post("/generate", body)))
    thread.start()
    wait_for(lambda: server.load()["num_running_reqs"] > 0)
    assert server.post("/abort_request", {"rid": "doomed"})[0] == 200
    thread.join(20)
    status, answer = answers[0]
    assert status == 200
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert answer["meta_info"]["completion_tokens"] < 500


# -- the client ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_corpus_asked_for_by_openais_api_is_that_of_the_native_one(
    stream: bool, server: Server, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    problems = tmp_path / "problems.jsonl"
    write_rows(problems, [Problem(f"p{i}", f"{i} + 1 =", str(i + 1)) for i in range(6)])
    corpora = {}
    for api, openai in (("sglang", {}), ("openai", {"stream": stream})):
        out = tmp_path / f"{api}.jsonl"
        options = {"api": api, "openai": openai, "url": server.url, "max_new_tokens": 12, "concurrency": 3}
        options |= {"model": str(qwen2_checkpoint), "problems": str(problems), "out": str(out)}
        generate.run(loader.build(GenerateConfig, options, "a test"))
        corpora[api] = out.read_bytes()
    assert corpora["openai"] == corpora["sglang"]
