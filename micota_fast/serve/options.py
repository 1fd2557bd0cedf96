"""Every option of every endpoint: checked and passed on, without effect here, or refused by name unless it is neutral.

The names are those of SGLang 0.5 (`GenerateReqInput`, `SamplingParams`, `CompletionRequest`, `ChatCompletionRequest`)
and of OpenAI's API reference; and those of vLLM that its clients send with neutral values. `null` is as if the key were
absent; a key that is not in the table is refused.
"""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_ANSWERS = 4096  # to one request: its prompts times n
MAX_STOPS, MAX_STOP_CHARS = 64, 256  # stop strings are looked for at every token
MAX_RID_CHARS = 256


class BadRequest(Exception):
    """A request that can never be answered.

    Attributes:
        param: the option at fault, where there is one.
        code: what is wrong, in OpenAI's words.
        status: of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Limits:
    """What the model bounds: ids lie below `vocab_size`, prompt and answer together within `context_length` tokens."""

    vocab_size: int
    context_length: int


Check = Callable[[str, Any, Limits], Any]  # (key, value, limits) -> the value as the engine takes it; or BadRequest


@dataclass(frozen=True)
class Option:
    """What a request's key does.

    Attributes:
        check: for a key that the engine acts on; None: it cannot.
        name: under which the value is passed on; None: the key.
        neutral: values that ask for nothing, and are as if the key were absent.
        no_effect: every value is taken, as none changes the answer.
    """

    check: Check | None = None
    name: str | None = None
    neutral: tuple[Any, ...] = ()
    no_effect: bool = False


def read_options(table: Mapping[str, Option], values: Mapping[str, Any], limits: Limits, where: str) -> dict[str, Any]:
    """Check the keys and values of a JSON object.

    Args:
        table: its options.
        values: the object.
        limits: of the model.
        where: "", or the object's own key with a dot, to name its keys in errors.

    Returns:
        What the engine acts on, under the names that the table gives.

    Raises:
        BadRequest: an unknown key, a value of the wrong type or out of range, or one whose effect this engine lacks.
    """
    read: dict[str, Any] = {}
    for key, value in values.items():
        if value is None:
            continue
        option = table.get(key)
        if option is None:
            name = f"{where}{shown(key)[1:-1]}"
            raise BadRequest(f"{name} is unknown; known: {', '.join(sorted(table))}", name, "unknown_parameter")
        if option.no_effect or any(_same(value, neutral) for neutral in option.neutral):
            continue
        if option.check is None:
            only = f" (only {' or '.join(map(repr, option.neutral))})" if option.neutral else ""
            raise BadRequest(
                f"{where}{key} is not supported by this engine{only}", where + key, "unsupported_parameter"
            )
        try:
            read[option.name or key] = option.check(key, value, limits)
        except BadRequest as error:
            raise BadRequest(where + str(error), error.param or where + key, error.code) from None
    return read


def shown(value: Any) -> str:
    """A value as an error may repeat it: short, however large it is."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = 80


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and not merely as 1 and true are."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


# -- checks ----------------------------------------------------------------------------------------------------------


def integer(low: int, high: int | str, *also: int) -> Check:
    """A check for whole numbers in [low, high] and `also`; `high` may name one of the limits."""

    def check(key: str, value: Any, limits: Limits) -> int:
        most: int = getattr(limits, high) if isinstance(high, str) else high
        if type(value) is not int or (not low <= value <= most and value not in also):
            which = " or ".join([f"from {low} to {most}", *map(str, also)])
            raise BadRequest(f"{key} must be an integer {which}, got {shown(value)}")
        return value

    return check


def _number(low: float, high: float, low_allowed: bool = True) -> Check:
    def check(key: str, value: Any, _: Limits) -> float:
        if type(value) not in (int, float) or not low <= value <= high or (value == low and not low_allowed):
            span = f"{'[' if low_allowed else '('}{low:g}, {high:g}]"
            raise BadRequest(f"{key} must be a number in {span}, got {shown(value)}")
        return float(value)

    return check


def boolean(key: str, value: Any, _: Limits) -> bool:
    """A check for true and false."""
    if type(value) is not bool:
        raise BadRequest(f"{key} must be true or false, got {shown(value)}")
    return value


def _string(key: str, value: Any, _: Limits) -> str:
    if type(value) is not str:
        raise BadRequest(f"{key} must be a string, got {shown(value)}")
    return value


def _rid(key: str, value: Any, _: Limits) -> Any:
    """A string, or a list with one for each prompt, which the parser counts."""
    rids = value if isinstance(value, list) else [value]
    if not all(type(rid) is str and 0 < len(rid) <= MAX_RID_CHARS for rid in rids):
        raise BadRequest(f"{key} must be a string of 1 to {MAX_RID_CHARS} characters, or a list of them")
    return value


def _stop(key: str, value: Any, _: Limits) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(type(item) is str and item for item in items):
        raise BadRequest(f"{key} must be a non-empty string or a list of them, got {shown(value)}")
    if len(items) > MAX_STOPS or any(len(item) > MAX_STOP_CHARS for item in items):
        raise BadRequest(f"{key} must be at most {MAX_STOPS} strings of at most {MAX_STOP_CHARS} characters")
    return tuple(items)


def token_ids(key: str, value: Any, limits: Limits) -> list[int]:
    """A check for lists of token ids."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise BadRequest(f"{key} must be a list of integers, got {shown(value)}")
    if value and not (min(value) >= 0 and max(value) < limits.vocab_size):
        wrong = next(i for i in value if not 0 <= i < limits.vocab_size)
        raise BadRequest(f"{key}: {shown(wrong)} is outside the vocabulary of {limits.vocab_size} ids")
    return value


def _token_id_set(key: str, value: Any, limits: Limits) -> frozenset[int]:
    return frozenset(token_ids(key, value, limits))


def _stream_options(key: str, value: Any, limits: Limits) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise BadRequest(f"{key} must be an object, got {shown(value)}")
    return read_options(_STREAM_OPTIONS, value, limits, f"{key}.")


def _object(key: str, value: Any, _: Limits) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{key} must be an object, got {shown(value)}")
    return value


def _unchecked(_: str, value: Any, __: Limits) -> Any:
    return value  # the parser of the endpoint has a function of its own for it


# -- the table -------------------------------------------------------------------------------------------------------


def _passed(check: Check, name: str | None = None, neutral: tuple[Any, ...] = ()) -> Option:
    return Option(check, name, neutral)


def _refused(*but: Any) -> Option:
    return Option(neutral=but)


_NO_EFFECT = Option(no_effect=True)
_OFF = _refused(False)

_INT64 = integer(-(1 << 63), (1 << 63) - 1)
_LENGTH = integer(0, "context_length")
_STREAM_OPTIONS = {"include_usage": _passed(boolean), "continuous_usage_stats": _passed(boolean)}
_STREAM_OPTIONS["include_obfuscation"] = _NO_EFFECT  # OpenAI's padding against eavesdroppers

_DECODING: dict[str, Option] = {
    "temperature": _passed(_number(0.0, 1e6)),
    "top_p": _passed(_number(0.0, 1.0, low_allowed=False)),
    "top_k": _passed(integer(1, "vocab_size", -1), neutral=(0,)),  # 0 as in vLLM and transformers
    "min_p": _passed(_number(0.0, 1.0)),
    "n": _passed(integer(1, MAX_ANSWERS)),
    "stop": _passed(_stop, neutral=("", [])),
    "stop_token_ids": _passed(_token_id_set),
    "ignore_eos": _passed(boolean),
    "skip_special_tokens": _passed(boolean),
    "no_stop_trim": _passed(boolean),
    "frequency_penalty": _refused(0),
    "presence_penalty": _refused(0),
    "repetition_penalty": _refused(1),
    "logit_bias": _refused({}),
    "regex": _refused(""),
    "ebnf": _refused(""),
    "json_schema": _refused(""),
    "stop_regex": _refused("", []),
    "custom_params": _refused({}),
    "watermark": _refused(),
}

SAMPLING_PARAMS: dict[str, Option] = _DECODING | {
    "max_new_tokens": _passed(_LENGTH),
    "min_new_tokens": _passed(_LENGTH),
    "sampling_seed": _passed(integer(0, (1 << 63) - 1)),
    "structural_tag": _refused(""),
    "spaces_between_special_tokens": _refused(True),
    "beam_width": _refused(1),
    "stream_interval": _NO_EFFECT,
}

# What SGLang's own endpoint and its OpenAI endpoints have in common beside sampling.
_SERVING: dict[str, Option] = {
    "rid": _passed(_rid),
    "stream": _passed(boolean),
    "return_hidden_states": _OFF,
    "return_routed_experts": _OFF,
    "routed_experts_start_len": _refused(0),
    "lora_path": _refused(""),
    "session_params": _refused({}),
    "custom_logit_processor": _refused(""),
    "watermark": _refused(),
    "images_config": _refused({}),
    "mm_processor_kwargs": _refused({}),
    "max_dynamic_patch": _refused(),
    "min_dynamic_patch": _refused(),
    "video_config": _refused({}),
    "use_audio_in_video": _OFF,
    "return_sampling_mask": _OFF,
    "sampling_logprobs_mode": _refused(),
    "return_flat_raw_output_top_logprobs": _OFF,
    "bootstrap_host": _refused(),
    "bootstrap_port": _refused(),
    "bootstrap_room": _refused(),
    "disagg_prefill_dp_rank": _refused(),
    # Scheduling, caching and bookkeeping: one device, no cache between requests, first come first served.
    **dict.fromkeys(["session_id", "priority", "extra_key", "cache_salt", "custom_labels"], _NO_EFFECT),
    **dict.fromkeys(["routed_dp_rank", "data_parallel_rank", "return_flat_raw_top_logprobs_b64"], _NO_EFFECT),
}

_VLLM: dict[str, Option] = {
    **dict.fromkeys(["use_beam_search", "include_stop_str_in_output", "return_tokens_as_token_ids"], _OFF),
    **dict.fromkeys(["bad_words", "logits_processors"], _refused([])),
    **dict.fromkeys(["truncate_prompt_tokens", "prompt_logprobs", "allowed_token_ids"], _refused()),
    **dict.fromkeys(["kv_transfer_params", "vllm_xargs"], _refused({})),
    "length_penalty": _refused(1),
    "spaces_between_special_tokens": _refused(True),
    "request_id": _NO_EFFECT,
}

_OPENAI: dict[str, Option] = (
    _DECODING
    | _SERVING
    | {
        "model": _passed(_string),
        "max_tokens": _passed(_LENGTH),
        "min_tokens": _passed(_LENGTH, "min_new_tokens"),
        "seed": _passed(_INT64, "sampling_seed", neutral=(-1,)),
        "stream_options": _passed(_stream_options),
        "response_format": _refused({"type": "text"}),
        "return_cached_tokens_details": _OFF,
        "return_spec_tokens_details": _OFF,
        "return_token_ids": _OFF,
        **dict.fromkeys(["user", "metadata", "store", "service_tier", "safety_identifier"], _NO_EFFECT),
        **dict.fromkeys(["prompt_cache_key", "prompt_cache_retention"], _NO_EFFECT),
        **_VLLM,
    }
)

COMPLETIONS: dict[str, Option] = _OPENAI | {
    "prompt": _passed(_unchecked),
    "best_of": _passed(integer(1, MAX_ANSWERS)),
    "echo": _passed(boolean),
    "logprobs": _passed(integer(0, "vocab_size")),
    "suffix": _refused(""),
    "add_special_tokens": _refused(True),
}

CHAT_COMPLETIONS: dict[str, Option] = _OPENAI | {
    "messages": _passed(_unchecked),
    "max_completion_tokens": _passed(_LENGTH),
    "logprobs": _passed(boolean),
    "top_logprobs": _passed(integer(0, "vocab_size")),
    "continue_final_message": _passed(boolean),
    "add_generation_prompt": _passed(boolean),
    "add_special_tokens": _OFF,
    "echo": _OFF,
    "include_reasoning": _refused(True),
    "chat_template": _refused(),
    "documents": _refused([]),
    "tools": _refused([]),
    "tool_choice": _refused("none", "auto"),
    "functions": _refused([]),
    "function_call": _refused("none", "auto"),
    "modalities": _refused(["text"]),
    "audio": _refused(),
    "prediction": _refused(),
    "web_search_options": _refused(),
    "reasoning_effort": _refused(),
    "verbosity": _refused(),
    "thinking": _refused(),
    "task": _refused(),
    "chat_template_kwargs": _passed(_object),
    "input_ids": _refused(),
    "return_prompt_token_ids": _OFF,
    "return_meta_info": _OFF,
    "return_input_ids_in_sglext": _OFF,
    "return_output_ids_in_sglext": _OFF,
    # No tool is called in parallel where none is called; thoughts stay in the text, as with SGLang's defaults.
    **dict.fromkeys(["parallel_tool_calls", "separate_reasoning", "stream_reasoning"], _NO_EFFECT),
}

GENERATE: dict[str, Option] = _SERVING | {
    "text": _passed(_unchecked),
    "input_ids": _passed(_unchecked),
    "model": _NO_EFFECT,  # sglang-router sends it
    "sampling_params": _passed(_unchecked),
    "return_logprob": _passed(boolean),
    "logprob_start_len": _passed(integer(-1, "context_length")),
    "top_logprobs_num": _passed(integer(0, "vocab_size")),
    "token_ids_logprob": _refused([]),
    "return_text_in_logprobs": _OFF,
    "return_flat_raw_top_logprobs": _OFF,
    "return_indexer_topk": _OFF,
    "return_entropy": _OFF,
    "return_bytes": _OFF,
    "return_prompt_token_ids": _OFF,
    "require_reasoning": _OFF,
    "background": _OFF,
    "max_thinking_tokens": _refused(),
    "modalities": _refused(["text"]),
    **dict.fromkeys(["input_embeds", "image_data", "audio_data", "video_data", "mm_hashes"], _refused()),
    **dict.fromkeys(["mm_content_hashes", "positional_embed_overrides", "multi_item_delimiter_indices"], _refused()),
    **dict.fromkeys(["token_indices_to_pool", "image_max_dynamic_patch", "video_max_dynamic_patch"], _refused()),
    **dict.fromkeys(["lora_id", "encoder_urls", "kv_hints", "bootstrap_pair_key", "decode_tp_size"], _refused()),
    **dict.fromkeys(["log_metrics", "no_logs", "routing_key", "conversation_id", "http_worker_ipc"], _NO_EFFECT),
    **dict.fromkeys(["external_trace_header", "received_time"], _NO_EFFECT),
    **dict.fromkeys(["need_wait_for_mm_inputs", "num_items_assigned"], _refused(False, {})),
}

ABORT: dict[str, Option] = {
    "rid": _passed(_rid),
    "abort_all": _passed(boolean),
    **dict.fromkeys(["finished_reason", "abort_message", "http_worker_ipc", "weight_versions"], _NO_EFFECT),
}
