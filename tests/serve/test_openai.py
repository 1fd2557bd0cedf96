"""OpenAI's endpoints of the embedded server beyond what real clients use of them (test_real_clients.py)."""

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.servers import PROMPT, Server, greedy
from helpers.waiting import wait_for
from micota_fast.config.generation import ServeConfig
from micota_fast.serve.serve import serving

CHAT = {"messages": [{"role": "user", "content": "1 + 2"}], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
TEXT = {"prompt": "1 + 2", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = ServeConfig(dtype="float64", served_model_name="org/tiny")
    with serving(qwen2_checkpoint, config, tmp_path_factory.mktemp("server") / "log.txt") as [url]:
        yield Server(url)


def ask(server: Server, path: str, body: dict[str, Any]) -> Any:
    status, answer = server.post(f"/v1/{path}", body)
    assert status == 200, answer
    return answer


def generated(server: Server, text: str, **params: Any) -> Any:
    return server.generate(text=text, sampling_params=greedy(max_new_tokens=6, **params))


def test_the_served_name_is_the_models_id(server: Server, qwen2_checkpoint: Path) -> None:
    [model] = server.read("/v1/models")["data"]
    assert (model["id"], model["root"]) == ("org/tiny", str(qwen2_checkpoint))
    assert server.read("/v1/models/org/tiny") == server.read("/v1/models/org%2Ftiny") == model
    assert ask(server, "completions", TEXT)["model"] == "org/tiny"
    status, text = server.get("/v1/models/other")
    error = json.loads(text)["error"]
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_a_list_of_prompts_gets_a_choice_each(server: Server) -> None:
    want = [generated(server, text) for text in ("1 + 2", "so we get")]
    answer = ask(server, "completions", {**TEXT, "prompt": ["1 + 2", "so we get"]})
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["text"] for choice in answer["choices"]] == [w["text"] for w in want]
    lengths = [w["meta_info"]["prompt_tokens"] for w in want]
    assert answer["usage"] == {
        "prompt_tokens": sum(lengths),
        "completion_tokens": 12,
        "total_tokens": sum(lengths) + 12,
    }
    by_ids = ask(server, "completions", {**TEXT, "prompt": [PROMPT, [99]], "n": 2})
    alone = [server.generate(input_ids=ids, sampling_params=greedy(max_new_tokens=6))["text"] for ids in (PROMPT, [99])]
    assert [choice["text"] for choice in by_ids["choices"]] == [alone[0], alone[0], alone[1], alone[1]]
    assert by_ids["usage"]["prompt_tokens"] == 5  # each prompt once, however many answers it gets
    assert by_ids["usage"]["completion_tokens"] == 24
    one = ask(server, "completions", {**TEXT, "prompt": PROMPT})
    assert one["choices"][0]["text"] == alone[0]


def test_no_tokens_are_no_text(server: Server) -> None:
    for path, body in (("completions", TEXT), ("chat/completions", CHAT)):
        answer = ask(server, path, {**body, "max_tokens": 0})
        [choice] = answer["choices"]
        assert (choice.get("text", "") or choice.get("message", {}).get("content", "")) == ""
        assert choice["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0
    native = server.generate(input_ids=PROMPT, sampling_params=greedy(max_new_tokens=0))
    assert (native["text"], native["output_ids"]) == ("", [])
    assert native["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_with_logprobs_scores_the_prompt(server: Server, max_tokens: int) -> None:
    body = {**TEXT, "prompt": ["1 + 2 =", "the answer"], "max_tokens": max_tokens, "echo": True, "logprobs": 3}
    answer = ask(server, "completions", body)
    for text, choice in zip(body["prompt"], answer["choices"], strict=True):
        want = server.generate(
            text=text,
            sampling_params=greedy(max_new_tokens=max_tokens),
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=3,
        )
        meta = want["meta_info"]
        assert choice["text"] == text + want["text"]
        scored = choice["logprobs"]
        places = meta["input_token_logprobs"] + meta["output_token_logprobs"]
        assert scored["token_logprobs"][0] is scored["top_logprobs"][0] is None
        assert scored["token_logprobs"][1:] == [pytest.approx(place[0], abs=1e-9) for place in places[1:]]
        assert "".join(scored["tokens"][: len(meta["input_token_logprobs"])]) == text
        for token, offset in zip(scored["tokens"], scored["text_offset"], strict=True):
            assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
        tops = (meta["input_top_logprobs"] + meta["output_top_logprobs"])[1:]
        for token, own, given, top in zip(
            scored["tokens"][1:], scored["token_logprobs"][1:], scored["top_logprobs"][1:], tops, strict=True
        ):
            assert given[token] == own
            assert len(given) == (3 if any(own == pytest.approx(pair[0], abs=1e-9) for pair in top) else 4)
            assert max(given.values()) == pytest.approx(top[0][0], abs=1e-9)


def test_echo_without_logprobs_is_the_prompt_and_the_answer(server: Server) -> None:
    want = generated(server, "1 + 2")["text"]
    answer = ask(server, "completions", {**TEXT, "echo": True})
    assert answer["choices"][0]["text"] == "1 + 2" + want
    assert answer["choices"][0]["logprobs"] is None
    ids = server.generate(text="1 + 2", sampling_params=greedy(max_new_tokens=1))["meta_info"]["prompt_tokens"]
    assert answer["usage"]["prompt_tokens"] == ids
    events = server.events("/v1/completions", {**TEXT, "echo": True, "stream": True})
    assert "".join(event["choices"][0]["text"] for event in events) == "1 + 2" + want


def test_chat_logprobs_have_tokens_bytes_and_the_likeliest(server: Server) -> None:
    [choice] = ask(server, "chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2})["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    assert b"".join(bytes(place["bytes"]) for place in content).decode(errors="replace") == choice["message"]["content"]
    for place in content:
        assert place["logprob"] == place["top_logprobs"][0]["logprob"]  # greedy: the likeliest
        assert place["token"] == place["top_logprobs"][0]["token"]
        assert len(place["top_logprobs"]) == 2
        assert place["top_logprobs"][0]["logprob"] >= place["top_logprobs"][1]["logprob"]
    [plain] = ask(server, "chat/completions", {**CHAT, "logprobs": True})["choices"]
    assert all(place["top_logprobs"] == [] for place in plain["logprobs"]["content"])


@pytest.mark.parametrize(("path", "body"), [("completions", TEXT), ("chat/completions", CHAT)])
def test_streams_end_with_the_usage_of_the_whole_answer(server: Server, path: str, body: dict[str, Any]) -> None:
    whole = ask(server, path, body)
    plain = server.events(f"/v1/{path}", {**body, "stream": True})
    assert all("usage" not in event for event in plain)
    options = {"include_usage": True}
    events = server.events(f"/v1/{path}", {**body, "stream": True, "stream_options": options})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None and event["choices"] for event in events[:-1])
    assert {event["id"] for event in events} == {events[0]["id"]}
    options["continuous_usage_stats"] = True
    events = server.events(f"/v1/{path}", {**body, "stream": True, "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_streams_of_several_answers_bring_all_their_logprobs(server: Server) -> None:
    body = {**TEXT, "prompt": ["1 + 2", "so we get"], "logprobs": 1, "echo": True}
    whole = ask(server, "completions", body)
    events = server.events("/v1/completions", {**body, "stream": True})
    for want in whole["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == want["index"]]
        assert "".join(choice["text"] for choice in own) == want["text"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [item for choice in own for item in choice["logprobs"][key]] == want["logprobs"][key]
        assert [choice["finish_reason"] for choice in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == "length"


def test_a_stream_never_shows_the_beginning_of_a_stop_string(server: Server) -> None:
    """What might become one is held back: pieces that went out cannot be taken back."""
    free = ask(server, "completions", {**TEXT, "max_tokens": 40})["choices"][0]["text"]
    for stop in (free[8:12], free[20:21], free[9:25]):
        whole = ask(server, "completions", {**TEXT, "max_tokens": 40, "stop": stop})["choices"][0]
        assert whole["text"] == free[: free.find(stop)]
        body = {**TEXT, "max_tokens": 40, "stop": stop, "stream": True}
        events = server.events("/v1/completions", body)
        assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
        params = greedy(max_new_tokens=40, stop=stop)
        shown = [
            e["text"] for e in server.events("/generate", {"text": "1 + 2", "sampling_params": params, "stream": True})
        ]
        assert all(whole["text"].startswith(text) for text in shown)


def test_streamed_characters_are_whole(server: Server) -> None:
    """At a high temperature most tokens are pieces of characters; the pieces of a stream join to the whole text."""
    for seed in range(4):
        body = {**TEXT, "max_tokens": 200, "temperature": 4.0, "seed": seed}
        whole = ask(server, "completions", body)["choices"][0]["text"]
        events = server.events("/v1/completions", {**body, "stream": True})
        assert "".join(event["choices"][0]["text"] for event in events) == whole


def test_errors_are_objects_with_type_code_and_param(server: Server) -> None:
    for path, body, param, code in (
        ("completions", {**TEXT, "regex": "a"}, "regex", "unsupported_parameter"),
        ("completions", {**TEXT, "temprature": 1}, "temprature", "unknown_parameter"),
        ("completions", {"max_tokens": 5}, "prompt", "missing_required_parameter"),
        ("completions", {**TEXT, "max_tokens": 511}, "max_tokens", "context_length_exceeded"),
        ("completions", {**TEXT, "min_tokens": 7}, "min_tokens", "invalid_value"),
        ("completions", {**TEXT, "prompt": [5] * 512}, "prompt", "context_length_exceeded"),
        ("completions", {**TEXT, "prompt": ""}, "prompt", "invalid_value"),
        (
            "chat/completions",
            {**CHAT, "max_completion_tokens": 500},
            "max_completion_tokens",
            "context_length_exceeded",
        ),
        ("chat/completions", {**CHAT, "temperature": -1}, "temperature", "invalid_value"),
    ):
        status, answer = server.post(f"/v1/{path}", body)
        assert status == 400
        error = answer["error"]
        assert error.keys() == {"message", "type", "code", "param"}
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)


def test_a_begun_answer_is_continued(server: Server) -> None:
    """The same text as from /generate with the turn begun: no second turn."""
    rendered = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1 + 2<|im_end|>\n"
        "<|im_start|>assistant\nso we"
    )
    messages = [*CHAT["messages"], {"role": "assistant", "content": "so we"}]  # type: ignore[misc]
    answer = ask(server, "chat/completions", {**CHAT, "messages": messages, "continue_final_message": True})
    assert answer["choices"][0]["message"]["content"] == generated(server, rendered)["text"]


def test_a_request_is_aborted_by_its_id(server: Server) -> None:
    answers: list[Any] = []
    body = {**TEXT, "max_tokens": 490, "rid": "mine"}
    thread = threading.Thread(target=lambda: answers.append(ask(server, "completions", body)))
    thread.start()
    wait_for(lambda: server.load()["num_running_reqs"] > 0)
    assert server.post("/abort_request", {"rid": "mine"})[0] == 200
    thread.join(20)
    assert answers[0]["choices"][0]["finish_reason"] == "abort"


def test_what_cannot_be_chosen_has_a_finite_logprob(server: Server) -> None:
    """JSON has no infinity: a token that `min_new_tokens` forbids is written as OpenAI does."""
    params = {"temperature": 0, "max_new_tokens": 2, "min_new_tokens": 2, "stop_token_ids": [7]}
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 320}
    status, text = server.post("/generate", body)
    assert status == 200
    [first, _] = text["meta_info"]["output_top_logprobs"]
    assert [place[0] for place in first if place[1] == 7] == [-9999.0]
    assert all(math.isfinite(place[0]) for place in first)
