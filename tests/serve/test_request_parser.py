"""What clients may ask: each kind of wrong value is refused by name, neutral values are accepted, the rest arrives."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import LATE_TEMPLATE, LATE_TEXT, with_late_pattern, write_config
from helpers.servers import sglang_python
from micota_fast.chat.encoding import Chat
from micota_fast.config.generation import ChatConfig
from micota_fast.serve import options
from micota_fast.serve.options import MAX_ANSWERS, BadRequest, Limits
from micota_fast.serve.request_parser import RequestParser

V, CONTEXT = 320, 512
MESSAGES = [{"role": "user", "content": "a"}]
VALID: dict[str, dict[str, Any]] = {
    "generate": {"input_ids": [5]},
    "completions": {"prompt": "a"},
    "chat_completions": {"messages": MESSAGES},
}


@pytest.fixture(scope="module")
def parser(qwen2_checkpoint: Path) -> RequestParser:
    return RequestParser(Chat.from_checkpoint(qwen2_checkpoint, ChatConfig()), Limits(V, CONTEXT), True)


def parse(parser: RequestParser, endpoint: str, body: Any) -> Any:
    return getattr(parser, endpoint)(body if isinstance(body, bytes) else json.dumps(body).encode())


def refusal(parser: RequestParser, endpoint: str, body: Any) -> BadRequest:
    with pytest.raises(BadRequest) as refused:
        parse(parser, endpoint, body)
    return refused.value


HUGE = [1 << 31, 1 << 63, 10**30, 10**299, -1, -(10**30)]


@pytest.mark.parametrize("key", ["top_k", "max_new_tokens", "min_new_tokens", "n"])
@pytest.mark.parametrize("value", [*HUGE, 1.5, True, "5", [5], {}])
def test_integers_of_sampling_are_bounded(parser: RequestParser, key: str, value: Any) -> None:
    if (key, value) == ("top_k", -1):
        return
    error = refusal(parser, "generate", {"input_ids": [5], "sampling_params": {key: value}})
    assert f"sampling_params.{key} must be an integer" in str(error)
    assert error.param == f"sampling_params.{key}"
    assert len(str(error)) < 300


@pytest.mark.parametrize("value", [1 << 63, 10**299, -1, 0.5, True])
def test_seeds_are_bounded(parser: RequestParser, value: Any) -> None:
    assert refusal(parser, "generate", {"input_ids": [5], "sampling_params": {"sampling_seed": value}})
    if value != -1:
        assert refusal(parser, "completions", {"prompt": "a", "seed": value}).param == "seed"


@pytest.mark.parametrize("key", ["temperature", "top_p", "min_p"])
@pytest.mark.parametrize(
    "value", [b"1e400", b"-1", b"NaN", b"Infinity", b"-1e-320", b'"1"', b"true", b"1" + b"0" * 400]
)
def test_numbers_of_sampling_are_bounded(parser: RequestParser, key: str, value: bytes) -> None:
    body = b'{"input_ids": [5], "sampling_params": {"%b": %b}}' % (key.encode(), value)
    assert str(refusal(parser, "generate", body))


def test_the_bounds_themselves_are_accepted(parser: RequestParser) -> None:
    params = {"top_k": V, "max_new_tokens": CONTEXT - 1, "min_new_tokens": CONTEXT - 1, "sampling_seed": (1 << 63) - 1}
    [prompt] = parse(parser, "generate", {"input_ids": [V - 1], "sampling_params": params}).prompts
    assert (prompt.params.top_k, prompt.params.max_new_tokens) == (V, CONTEXT - 1)
    body = {"input_ids": [0], "return_logprob": True, "top_logprobs_num": V, "logprob_start_len": 1}
    assert parse(parser, "generate", body).top_logprobs == V
    assert len(parse(parser, "completions", {"prompt": "a", "n": MAX_ANSWERS}).asked.prompts) == MAX_ANSWERS
    tiny = parse(parser, "generate", {"input_ids": [5], "sampling_params": {"temperature": 1e-320, "top_p": 1e-320}})
    assert tiny.prompts[0].params.greedy


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"top_logprobs_num": -1}, "top_logprobs_num must be an integer from 0 to 320"),
        ({"top_logprobs_num": V + 1}, "top_logprobs_num must be"),
        ({"logprob_start_len": -2}, "logprob_start_len must be"),
        ({"logprob_start_len": 2}, "exceeds the 1 prompt tokens"),
        ({"input_ids": [V]}, "320 is outside the vocabulary of 320 ids"),
        ({"input_ids": [-1]}, "-1 is outside"),
        ({"input_ids": [10**30]}, "outside the vocabulary"),
        ({"input_ids": [True]}, "list of integers"),
        ({"input_ids": [[5], 6]}, "list of integers"),
        ({"input_ids": "a"}, "list of integers"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [[]]}, "empty"),
        ({"input_ids": [5] * CONTEXT, "sampling_params": {"max_new_tokens": 0}}, "exceed the context length 512"),
        ({"input_ids": [5] * (CONTEXT - 2), "sampling_params": {"max_new_tokens": 3}}, "510 tokens and 3 new ones"),
        ({"input_ids": [[5]] * (MAX_ANSWERS + 1)}, "at most 4096"),
        ({"input_ids": [[5]] * 65, "sampling_params": {"n": 64}}, "4160 answers are wanted; at most 4096"),
        ({"text": "a"}, "exactly one of"),
        ({"input_ids": None}, "exactly one of"),
        ({"rid": 5}, "rid must be a string"),
        ({"rid": [5]}, "rid must be a string"),
        ({"rid": ""}, "rid must be a string"),
        ({"rid": "a" * 1000}, "rid must be a string"),
        ({"rid": ["a", "b"]}, "with one for each prompt"),
        ({"rid": {}}, "rid must be a string"),
        ({"stream": "false"}, "stream must be true or false"),
        ({"return_logprob": 1}, "return_logprob must be"),
        ({"sampling_params": 5}, "sampling_params must be an object"),
        ({"sampling_params": [5]}, "sampling_params must be an object"),
        ({"sampling_params": [{}, {}]}, "2 sampling_params for 1 prompts"),
        ({"sampling_params": {"stop_token_ids": [-1000000000], "min_new_tokens": 2}}, "outside the vocabulary"),
        ({"sampling_params": {"stop_token_ids": [V]}}, "outside the vocabulary"),
        ({"sampling_params": {"stop_token_ids": 5}}, "list of integers"),
        ({"sampling_params": {"stop_token_ids": list(range(V)), "min_new_tokens": 1}}, "nothing to choose from"),
        ({"sampling_params": {"min_new_tokens": 9, "max_new_tokens": 8}}, "min_new_tokens 9 exceeds"),
        ({"sampling_params": {"stop": ["a", ""]}}, "stop must be"),
        ({"sampling_params": {"stop": ["a"] * 100}}, "at most 64 strings"),
        ({"sampling_params": {"stop": "a" * 1000}}, "at most 256 characters"),
        ({"sampling_params": {"ignore_eos": "yes"}}, "ignore_eos must be true or false"),
        ({"sampling_params": {"temprature": 0}}, "sampling_params.temprature is unknown"),
        ({"temprature": 0}, "temprature is unknown"),
    ],
)
def test_what_generate_refuses(parser: RequestParser, body: dict[str, Any], message: str) -> None:
    error = refusal(parser, "generate", {"input_ids": [5], **body})
    assert message in str(error)
    assert error.status == 400


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not UTF-8"),
        (b'{"a": \xed\xa0\x80}', "not UTF-8"),
        (b'{"text": NaN}', "NaN is not a number"),
        (b'{"text": ' + b"1" * 5000 + b"}", "5000 digits"),
        (b"[1]", "expected a JSON object"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
        (b'{"text": "a", "rid": "\\uDFFF"}', "lone surrogate"),
        (b'{"text": "a", "\\ud800": 1}', "lone surrogate"),
        (b'{"text": "a", "sampling_params": {"stop": ["\\ud800"]}}', "lone surrogate"),
    ],
)
@pytest.mark.parametrize("endpoint", ["generate", "completions", "chat_completions", "abort"])
def test_bodies_that_are_no_json_object_of_text(
    parser: RequestParser, endpoint: str, body: bytes, message: str
) -> None:
    assert message in str(refusal(parser, endpoint, body))


def test_whole_surrogate_pairs_are_text(parser: RequestParser) -> None:
    [prompt] = parse(parser, "generate", b'{"text": "\\ud83d\\ude00"}').prompts
    assert prompt.ids == parse(parser, "generate", '{"text": "😀"}'.encode()).prompts[0].ids


@pytest.mark.parametrize("value", [b"[],", b"{},", b'"a":1,', b"1,"])
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(parser: RequestParser, value: bytes) -> None:
    error = refusal(parser, "generate", b'{"x": [' + value * 6_000_000 + b"0]}")
    assert (error.status, str(error)) == (413, "the body holds too many values")


def test_text_is_refused_by_its_bytes_before_it_is_tokenised(
    parser: RequestParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser, "chat", None)  # what tokenises
    for endpoint, body in (
        ("generate", {"text": "a " * 2_500_000}),
        ("completions", {"prompt": ["a", "a " * 2_500_000]}),
        ("chat_completions", {"messages": [{"role": "user", "content": "a " * 2_500_000}]}),
    ):
        error = refusal(parser, endpoint, body)
        assert "5000000 bytes exceeds the context length 512" in str(error)
        assert error.code == "context_length_exceeded"


def test_log_probabilities_are_bounded_in_all(qwen2_checkpoint: Path) -> None:
    chat = Chat.from_checkpoint(qwen2_checkpoint, ChatConfig())
    parser = RequestParser(chat, Limits(V, 1 << 20), True)
    body = {"input_ids": [5], "return_logprob": True, "top_logprobs_num": V, "sampling_params": {"max_new_tokens": 99}}
    assert parse(parser, "generate", body)
    body["sampling_params"] = {"max_new_tokens": 1 << 19}
    assert "321 log-probabilities at each of up to 524288 places" in str(refusal(parser, "generate", body))


# -- the table -------------------------------------------------------------------------------------------------------

REFUSED = {
    "regex": "[0-9]+",
    "ebnf": "root ::= 'a'",
    "json_schema": "{}",
    "stop_regex": "a+",
    "lora_path": "x",
    "return_hidden_states": True,
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1},
    "custom_logit_processor": "x",
}
OPENAI_REFUSED = {
    "response_format": {"type": "json_object"},
    "session_params": {"id": 1},
    "use_beam_search": True,
    "length_penalty": 0.5,
    "include_stop_str_in_output": True,
    "bad_words": ["a"],
    "allowed_token_ids": [5],
    "prompt_logprobs": 1,
}
COMPLETIONS_REFUSED = {"suffix": "b", "best_of": 3, "add_special_tokens": False}
CHAT_REFUSED = {
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "functions": [{}],
    "modalities": ["text", "audio"],
    "audio": {},
    "reasoning_effort": "high",
    "echo": True,
    "include_reasoning": False,
    "chat_template": "{{ messages }}",
}


def test_what_would_change_the_answer_is_refused_by_name(parser: RequestParser) -> None:
    for endpoint, table in {
        "completions": REFUSED | OPENAI_REFUSED | COMPLETIONS_REFUSED,
        "chat_completions": REFUSED | OPENAI_REFUSED | CHAT_REFUSED,
    }.items():
        for key, value in table.items():
            error = refusal(parser, endpoint, {**VALID[endpoint], key: value})
            assert f"{key} is not supported by this engine" in str(error)
            assert (error.param, error.code) == (key, "unsupported_parameter")
    for key, value in REFUSED.items():
        sampling = key in options.SAMPLING_PARAMS
        body = {"sampling_params": {key: value}} if sampling else {key: value}
        error = refusal(parser, "generate", {"input_ids": [5], **body})
        assert f"{key} is not supported by this engine" in str(error)


def test_neutral_values_ask_for_nothing(parser: RequestParser) -> None:
    both = {
        "response_format": {"type": "text"},
        "logit_bias": {},
        "stop": "",
        "seed": -1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "repetition_penalty": 1,
        "regex": None,
        "lora_path": None,
        "return_hidden_states": False,
        "n": 1,
        "user": "me",
        "metadata": {"a": "b"},
        "stream": False,
        "stream_options": None,
        "logprobs": None,
        "top_k": 0,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "include_stop_str_in_output": False,
        "spaces_between_special_tokens": True,
        "bad_words": [],
        "allowed_token_ids": None,
        "request_id": "mine",
    }
    chat = {"echo": False, "add_generation_prompt": True, "add_special_tokens": False, "include_reasoning": True}
    chat |= {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "modalities": ["text"], "top_logprobs": 0}
    text = {"echo": False, "best_of": 1, "suffix": "", "add_special_tokens": True}
    for endpoint, more in (("chat_completions", chat), ("completions", text)):
        plain = parse(parser, endpoint, {**VALID[endpoint], "max_tokens": 2, "seed": 1})
        neutral = parse(parser, endpoint, {**VALID[endpoint], "max_tokens": 2, **both, **more})
        assert neutral.asked.prompts[0].ids == plain.asked.prompts[0].ids
        params = neutral.asked.prompts[0].params
        assert params.stop == ()
        assert (params.sampling_seed == 1) is False  # -1 draws one
        assert (neutral.asked.logprobs, neutral.asked.stream, neutral.usage) == (False, False, False)
    for value in ("auto", "none"):
        assert parse(parser, "chat_completions", {"messages": MESSAGES, "tool_choice": value})
    assert parse(parser, "completions", {"prompt": "a", "n": 3, "best_of": 3})
    assert parse(parser, "completions", {"prompt": "a", "stop": []}).asked.prompts[0].params.stop == ()


def test_no_generation_prompt_goes_with_a_begun_answer_only(parser: RequestParser) -> None:
    """As vLLM's clients ask for it."""
    begun = [*MESSAGES, {"role": "assistant", "content": "b"}]
    both = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    ids = parse(parser, "chat_completions", both).asked.prompts[0].ids
    assert ids == parse(parser, "chat_completions", {**both, "add_generation_prompt": None}).asked.prompts[0].ids
    error = refusal(parser, "chat_completions", {"messages": begun, "add_generation_prompt": False})
    assert error.param == "add_generation_prompt"


def test_text_on_which_template_or_tokenizer_explode_is_refused_and_the_next_is_read(tmp_path: Path) -> None:
    folder = with_late_pattern(tmp_path / "c").parent
    write_config(folder, eos_token="<|im_end|>", chat_template=LATE_TEMPLATE)
    parser = RequestParser(Chat.from_checkpoint(folder, ChatConfig()), Limits(V, CONTEXT), True)
    for endpoint, body, file in (
        ("generate", {"text": LATE_TEXT}, "tokenizer.json"),
        ("completions", {"prompt": ["a", LATE_TEXT]}, "tokenizer.json"),
        ("chat_completions", {"messages": [{"role": "user", "content": LATE_TEXT}]}, "tokenizer.json"),
        ("chat_completions", {"messages": [{"role": "user", "content": "BOOM"}]}, "tokenizer_config.json"),
    ):
        assert file in str(refusal(parser, endpoint, body))
        assert parse(parser, "generate", {"text": "a"}).prompts


def test_options_arrive(parser: RequestParser) -> None:
    body = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "max_tokens": 9,
        "min_tokens": 2,
        "seed": 11,
        "stop": ["x", "y"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }
    for endpoint in ("completions", "chat_completions"):
        params = parse(parser, endpoint, {**VALID[endpoint], **body}).asked.prompts[0].params
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
        assert (params.max_new_tokens, params.min_new_tokens, params.sampling_seed) == (9, 2, 11)
        assert (params.stop, params.stop_token_ids) == (("x", "y"), frozenset({3}))
        assert (params.ignore_eos, params.no_stop_trim, params.skip_special_tokens) == (True, True, False)
    both = {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6}
    assert parse(parser, "chat_completions", both).asked.prompts[0].params.max_new_tokens == 6
    assert parse(parser, "completions", {"prompt": "a", "max_tokens": 0}).asked.prompts[0].params.max_new_tokens == 0
    assert parse(parser, "completions", {"prompt": "a"}).asked.prompts[0].params.max_new_tokens == 16


def test_messages_may_have_parts_or_no_content(parser: RequestParser) -> None:
    def ids(*messages: Any, **more: Any) -> list[int]:
        [prompt] = parse(parser, "chat_completions", {"messages": messages, **more}).asked.prompts
        return prompt.ids

    plain = ids({"role": "user", "content": "a"})
    assert ids({"role": "user", "content": [{"type": "text", "text": "a"}]}) == plain
    empty = {"refusal": None, "tool_calls": None, "function_call": None, "audio": None, "annotations": []}
    assert ids({"role": "user", "content": "a", **empty}) == plain
    user = {"role": "user", "content": "a"}
    assert ids(user, {"role": "assistant", "content": None}, user) == ids(
        user, {"role": "assistant", "content": ""}, user
    )
    begun = ids(user, {"role": "assistant", "content": "b"}, continue_final_message=True)
    assert begun == plain + parser.chat.tokenizer.encode(["b"])[0].tolist()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        ([5], "messages[0] must be an object"),
        ([{"role": "user"}], "content is missing"),
        ([{"role": 5, "content": "a"}], "string role"),
        ([{"role": "user", "content": 5}], "messages[0].content must be a string"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "must be a text part"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "text must be a string"),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], "tool_calls is not supported"),
        ([{"role": "user", "content": "a", "contents": "b"}], "contents is unknown"),
    ],
)
def test_messages_that_are_none(parser: RequestParser, messages: Any, message: str) -> None:
    assert message in str(refusal(parser, "chat_completions", {"messages": messages}))


@pytest.mark.parametrize(
    ("endpoint", "body", "message"),
    [
        ("completions", {}, "prompt is missing"),
        ("completions", {"prompt": []}, "empty"),
        ("completions", {"prompt": ""}, "empty"),
        ("completions", {"prompt": ["a", 5]}, "list of strings"),
        ("completions", {"prompt": [5, "a"]}, "list of integers"),
        ("completions", {"prompt": {}}, "list of integers"),
        ("completions", {"prompt": "a", "logprobs": True}, "logprobs must be an integer"),
        ("completions", {"prompt": "a", "logprobs": V + 1}, "logprobs must be an integer from 0 to 320"),
        ("completions", {"prompt": "a", "max_tokens": CONTEXT}, "context length"),
        ("completions", {"prompt": "a", "stream_options": []}, "stream_options must be an object"),
        ("completions", {"prompt": "a", "stream_options": {"usage": True}}, "stream_options.usage is unknown"),
        ("chat_completions", {}, "messages is missing"),
        ("chat_completions", {"messages": MESSAGES, "logprobs": 1}, "logprobs must be true or false"),
        ("chat_completions", {"messages": MESSAGES, "top_logprobs": 2}, "needs logprobs"),
        ("chat_completions", {"messages": MESSAGES, "continue_final_message": True}, "assistant's message at the end"),
        ("chat_completions", {"messages": MESSAGES, "temprature": 1}, "temprature is unknown"),
        ("abort", {}, "rid must be a string, or abort_all true"),
        ("abort", {"rid": 5}, "rid must be a string"),
        ("abort", {"rid": ["a"]}, "rid must be a string"),
        ("abort", {"abort_all": "yes"}, "abort_all must be true or false"),
    ],
)
def test_what_the_other_endpoints_refuse(
    parser: RequestParser, endpoint: str, body: dict[str, Any], message: str
) -> None:
    assert message in str(refusal(parser, endpoint, body))


def test_every_option_of_sglang_is_in_the_table() -> None:
    """Read from the source of an installed SGLang, so that no option of a later one is passed over unnoticed."""
    [source] = Path(sglang_python()).parent.parent.glob("lib/python*/site-packages/sglang/srt")
    found: dict[str, set[str]] = {}
    for file in ("entrypoints/openai/protocol.py", "managers/io_struct.py", "sampling/sampling_params.py"):
        for node in ast.walk(ast.parse((source / file).read_text())):
            if isinstance(node, ast.ClassDef):
                names = [
                    s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
                ]
                found[node.name] = {name for name in names if not name.startswith("_")}
    # Set by SGLang itself, in front of its scheduler.
    internal = {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"}
    internal |= {"ebnf_full_assistant"}
    assert found["SamplingParams"] - internal <= options.SAMPLING_PARAMS.keys()
    assert found["GenerateReqInput"] <= options.GENERATE.keys()
    routing = found["PDRoutingFields"]
    assert found["CompletionRequest"] | routing <= options.COMPLETIONS.keys()
    assert found["ChatCompletionRequest"] | routing <= options.CHAT_COMPLETIONS.keys()
