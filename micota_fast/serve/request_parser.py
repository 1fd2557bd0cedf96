"""Bodies of requests -> what is asked of the engine: everything that a client sends is checked here, and only here.

A body's cost is bounded before it is paid: its bytes, what `json.loads` would make of it, the length of its text.
"""

import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from micota_fast.chat.encoding import Chat
from micota_fast.common.json_io import parse_json
from micota_fast.errors import InputError
from micota_fast.serve import options
from micota_fast.serve.options import MAX_ANSWERS, BadRequest, Limits, Option, read_options, shown, token_ids
from micota_fast.serve.sampling import SamplingParams

MAX_BODY_BYTES = 1 << 24
# json.loads holds the interpreter's lock to its end. A number costs it about 0.1 µs, a list, object or key 2 µs
# (2-core Xeon), so this is about half a second.
MAX_JSON_WORK, WORK_OF_CONTAINER = 5_000_000, 24
MAX_LOGPROBS = 1 << 22  # in all answers to one request: 150 MB of JSON
# What NFC or NFD can make of a text's UTF-8 bytes: at most three times fewer or more (Unicode's FAQ on normalization).
NORMALIZATION_FACTOR = 3
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions


@dataclass(frozen=True)
class Prompt:
    """One prompt of which one answer is wanted."""

    ids: list[int]
    params: SamplingParams
    rid: str


@dataclass(frozen=True)
class Asked:
    """A request for answers, checked and complete.

    Attributes:
        prompts: n copies of the first, then of the second ...
        is_list: answered by a list.
        stream: answered as it comes.
        logprobs: wanted for the answer's tokens.
        logprobs_from: first prompt position whose log-probability is wanted; -1: none.
        top_logprobs: how many of the likeliest tokens at each place.
    """

    prompts: list[Prompt]
    is_list: bool = False
    stream: bool = False
    logprobs: bool = False
    logprobs_from: int = -1
    top_logprobs: int = 0


@dataclass(frozen=True)
class AskedOpenAI:
    """A request to one of OpenAI's endpoints, checked and complete.

    Attributes:
        asked: what the engine is to do.
        chat: of /v1/chat/completions.
        echoed: for each prompt (not for each of its n copies) the text to set before its answers; None: no echo.
        usage: a stream ends with the number of tokens.
        usage_always: each of its events tells it.
    """

    asked: Asked
    chat: bool
    echoed: list[str] | None = None
    usage: bool = False
    usage_always: bool = False


@dataclass(frozen=True)
class _Names:
    """What an endpoint calls the options of which an error may speak."""

    prompt: str
    max_new_tokens: str
    min_new_tokens: str
    top_logprobs: str


_COMPLETIONS = _Names("prompt", "max_tokens", "min_tokens", "logprobs")


class RequestParser:
    """Reads the bodies of all endpoints. Methods may take seconds and touch nothing shared: call them in a thread.

    Args:
        chat: tokenizer, template and end tokens.
        limits: of the model.
        has_template: whether the checkpoint brings a chat template.
    """

    def __init__(self, chat: Chat, limits: Limits, has_template: bool) -> None:
        self.chat, self.limits, self._has_template = chat, limits, has_template
        # Byte-level vocabularies write each byte as one character; an added token stands there as its own text.
        longest = max(len(token.encode()) for token in chat.tokenizer.library.get_vocab(with_added_tokens=True))
        if chat.tokenizer.library.normalizer is not None:
            longest *= NORMALIZATION_FACTOR
        self._max_text_bytes = longest * limits.context_length

    # -- endpoints ---------------------------------------------------------------------------------------------------

    def generate(self, body: bytes) -> Asked:
        """SGLang's /generate. Raises BadRequest."""
        read = self._read(body, options.GENERATE)
        if ("text" in read) == ("input_ids" in read):
            raise BadRequest("exactly one of text and input_ids must be given", "text")
        key = "text" if "text" in read else "input_ids"
        if key == "text":
            is_list, texts = _as_list("text", read["text"], str)
            prompts = self._encode("text", texts, add_special_tokens=True)
        else:
            is_list, prompts = self._id_lists("input_ids", read["input_ids"])
        params = read.get("sampling_params", {})
        listed = params if isinstance(params, list) else [params] * len(prompts)
        if len(listed) != len(prompts):
            raise BadRequest(f"{len(listed)} sampling_params for {len(prompts)} prompts", "sampling_params")
        names = _Names(key, "max_new_tokens", "min_new_tokens", "top_logprobs_num")
        parsed = [self.sampling_params(values) for values in (listed if isinstance(params, list) else listed[:1])]
        parsed *= 1 if isinstance(params, list) else len(prompts)
        return self._asked(
            prompts,
            parsed,
            read.get("rid"),
            names,
            is_list=is_list or any(p.n > 1 for p in parsed),
            stream=read.get("stream", False),
            logprobs=read.get("return_logprob", False),
            logprobs_from=read.get("logprob_start_len", -1),
            top_logprobs=read.get("top_logprobs_num", 0),
        )

    def completions(self, body: bytes) -> AskedOpenAI:
        """OpenAI's /v1/completions. Raises BadRequest."""
        read = self._read(body, options.COMPLETIONS)
        if "prompt" not in read:
            raise _missing("prompt")
        prompt, echo, logprobs = read["prompt"], read.get("echo", False), read.get("logprobs")
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], str)):
            _, texts = _as_list("prompt", prompt, str)
            prompts = self._encode("prompt", texts, add_special_tokens=True)
        else:
            _, prompts = self._id_lists("prompt", prompt)
            texts = [self.chat.decode(ids) for ids in prompts] if echo else []
        if "best_of" in read and read["best_of"] not in (1, read.get("n", 1)):
            raise BadRequest(
                "best_of is not supported by this engine (only 1 or n)", "best_of", "unsupported_parameter"
            )
        room = self.limits.context_length - max(map(len, prompts))
        params = self._openai_params(read, read.get("max_tokens", min(COMPLETION_TOKENS, max(1, room))), _COMPLETIONS)
        asked = self._asked(
            prompts,
            [params] * len(prompts),
            read.get("rid"),
            _COMPLETIONS,
            stream=read.get("stream", False),
            logprobs=logprobs is not None,
            logprobs_from=0 if echo and logprobs is not None else -1,
            top_logprobs=logprobs or 0,
        )
        return AskedOpenAI(asked, False, texts if echo else None, *_usage(read))

    def chat_completions(self, body: bytes) -> AskedOpenAI:
        """OpenAI's /v1/chat/completions, rendered by the checkpoint's own template. Raises BadRequest."""
        read = self._read(body, options.CHAT_COMPLETIONS)
        if "messages" not in read:
            raise _missing("messages")
        messages = _messages(read["messages"])
        if not self._has_template:
            raise BadRequest("this checkpoint has no chat template; use /generate or /v1/completions", "messages")
        self._check_bytes("messages", sum(len(message["content"].encode()) for message in messages))
        begun = ""
        if read.get("continue_final_message"):
            if messages[-1]["role"] != "assistant":
                raise BadRequest(
                    "continue_final_message needs an assistant's message at the end", "continue_final_message"
                )
            begun = messages.pop()["content"]
        elif not read.get("add_generation_prompt", True):
            raise BadRequest(
                "add_generation_prompt: false is supported with continue_final_message: true only",
                "add_generation_prompt",
                "unsupported_parameter",
            )
        try:
            text = self.chat.render(messages, True, read.get("chat_template_kwargs")) + begun
        except InputError as error:
            raise BadRequest(str(error), "messages") from None
        prompts = self._encode("messages", [text], add_special_tokens=False)
        if read.get("top_logprobs") and not read.get("logprobs"):
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        room = max(1, self.limits.context_length - len(prompts[0]))
        most = "max_completion_tokens" if "max_completion_tokens" in read else "max_tokens"
        names = _Names("messages", most, "min_tokens", "top_logprobs")
        params = self._openai_params(read, read.get(most, room), names)
        asked = self._asked(
            prompts,
            [params],
            read.get("rid"),
            names,
            stream=read.get("stream", False),
            logprobs=read.get("logprobs", False),
            top_logprobs=read.get("top_logprobs", 0),
        )
        return AskedOpenAI(asked, True, None, *_usage(read))

    def abort(self, body: bytes) -> str | None:
        """SGLang's /abort_request: the id of what is to end; None: all. Raises BadRequest."""
        read = self._read(body, options.ABORT)
        if read.get("abort_all"):
            return None
        rid = read.get("rid")
        if not isinstance(rid, str):
            raise BadRequest("rid must be a string, or abort_all true", "rid")
        return rid

    def sampling_params(self, values: Any) -> SamplingParams:
        """SGLang's `sampling_params`; without `sampling_seed` a random one is drawn. Raises BadRequest."""
        if not isinstance(values, Mapping):
            raise BadRequest(f"sampling_params must be an object, got {shown(values)}", "sampling_params")
        read = read_options(options.SAMPLING_PARAMS, values, self.limits, "sampling_params.")
        return self._params(read, "max_new_tokens", "min_new_tokens")

    # -- parts -------------------------------------------------------------------------------------------------------

    def _read(self, body: bytes, table: Mapping[str, Option]) -> dict[str, Any]:
        return read_options(table, _json_object(body), self.limits, "")

    def _openai_params(self, read: Mapping[str, Any], max_new_tokens: int, names: _Names) -> SamplingParams:
        known = SamplingParams.__dataclass_fields__
        values = {key: value for key, value in read.items() if key in known}
        return self._params(values | {"max_new_tokens": max_new_tokens}, names.max_new_tokens, names.min_new_tokens)

    def _params(self, checked: Mapping[str, Any], most: str, least: str) -> SamplingParams:
        params = SamplingParams(**({"sampling_seed": secrets.randbits(63)} | dict(checked)))
        if params.min_new_tokens > params.max_new_tokens:
            raise BadRequest(
                f"{least} {params.min_new_tokens} exceeds {most} {params.max_new_tokens}",
                least,
            )
        stops = params.stop_token_ids | set(self.chat.eos_ids)
        if params.min_new_tokens and not params.ignore_eos and len(stops) >= self.limits.vocab_size:
            raise BadRequest(f"stop_token_ids leave {least} nothing to choose from", "stop_token_ids")
        return params

    def _encode(self, key: str, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Ids of texts of which none is too long for the context by its bytes alone."""
        for text in texts:
            self._check_bytes(key, len(text.encode()))
        try:
            return [ids.tolist() for ids in self.chat.tokenizer.encode(texts, add_special_tokens)]
        except InputError as error:
            raise BadRequest(f"{key} cannot be tokenised: {error}", key) from None

    def _check_bytes(self, key: str, size: int) -> None:
        if size > self._max_text_bytes:
            raise BadRequest(
                f"{key} of {size} bytes exceeds the context length {self.limits.context_length}, whatever its tokens",
                key,
                "context_length_exceeded",
            )

    def _id_lists(self, key: str, value: Any) -> tuple[bool, list[list[int]]]:
        """Whether it is a list of lists of ids, and these."""
        if not isinstance(value, list):
            raise BadRequest(f"{key} must be a list of integers or a list of such lists, got {shown(value)}", key)
        is_list = any(isinstance(item, list) for item in value)
        prompts = value if is_list else [value]
        if len(prompts) > MAX_ANSWERS:
            raise _too_many(len(prompts), key)
        for prompt in prompts:
            if isinstance(prompt, list) and len(prompt) > self.limits.context_length:
                raise self._too_long(len(prompt), 0, key)
            token_ids(key, prompt, self.limits)
        return is_list, prompts

    def _too_long(self, length: int, new: int, key: str) -> BadRequest:
        return BadRequest(
            f"a prompt of {length} tokens and {new} new ones exceed the context length {self.limits.context_length}",
            key,
            "context_length_exceeded",
        )

    def _asked(self, ids: list[list[int]], params: list[SamplingParams], rid: Any, names: _Names, **more: Any) -> Asked:
        """n answers to each prompt, each with an id and random numbers of its own."""
        if not ids:
            raise BadRequest("the batch is empty", names.prompt)
        answers = sum(p.n for p in params)
        if answers > MAX_ANSWERS:
            raise _too_many(answers, "n")
        rids = rid if isinstance(rid, list) else [rid]
        if rid is None:
            rids = [uuid.uuid4().hex for _ in ids]
        elif len(rids) == 1 and len(ids) > 1:
            rids = [f"{rids[0]}_{i}" for i in range(len(ids))]
        if len(rids) != len(ids):
            raise BadRequest("rid must be a string, or a list with one for each prompt", "rid")
        prompts: list[Prompt] = []
        places = 0
        for prompt, wanted, name in zip(ids, params, rids, strict=True):
            if not prompt:
                raise BadRequest("the prompt is empty", names.prompt)
            if len(prompt) + max(1, wanted.max_new_tokens) > self.limits.context_length:
                fits_alone = len(prompt) < self.limits.context_length
                key = names.max_new_tokens if fits_alone else names.prompt
                raise self._too_long(len(prompt), wanted.max_new_tokens, key)
            start = more.get("logprobs_from", -1)
            if start > len(prompt):
                raise BadRequest(
                    f"logprob_start_len {start} exceeds the {len(prompt)} prompt tokens", "logprob_start_len"
                )
            places += wanted.n * (wanted.max_new_tokens + (len(prompt) - start if start >= 0 else 0))
            prompts += [Prompt(prompt, wanted.for_copy(i), f"{name}_{i}" if i else name) for i in range(wanted.n)]
        each = 1 + more.get("top_logprobs", 0)
        if more.get("logprobs") and each * places > MAX_LOGPROBS:
            raise BadRequest(
                f"{each} log-probabilities at each of up to {places} places are more than {MAX_LOGPROBS}",
                names.top_logprobs,
            )
        return Asked(prompts, **more)


def _json_object(body: bytes) -> dict[str, Any]:
    containers = body.count(b"[") + body.count(b"{") + body.count(b'":')
    if body.count(b",") + WORK_OF_CONTAINER * containers > MAX_JSON_WORK:
        raise BadRequest("the body holds too many values", code="body_too_large", status=413)
    try:
        value: dict[str, Any] = parse_json(body, "the body")
    except InputError as error:
        raise BadRequest(str(error), code="invalid_json") from None
    return value


def _as_list(key: str, value: Any, kind: type) -> tuple[bool, list[Any]]:
    is_list = isinstance(value, list)
    items = value if is_list else [value]
    if not all(type(item) is kind for item in items):
        raise BadRequest(f"{key} must be a string or a list of strings, got {shown(value)}", key)
    if len(items) > MAX_ANSWERS:
        raise _too_many(len(items), key)
    return is_list, items


def _messages(value: Any) -> list[dict[str, str]]:
    """Messages with a role and a text, from strings, null or parts of text."""
    if not isinstance(value, list) or not value:
        raise BadRequest("messages must be a non-empty list", "messages")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(value)]


_MESSAGE = ("role", "content", "name", "tool_call_id", "reasoning_content")
_EMPTY_IN_MESSAGE = ("tool_calls", "function_call", "refusal", "audio", "annotations", "tools", "phase", "prefix")


def _message(where: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise BadRequest(f"{where} must be an object with a string role, got {shown(value)}", where)
    message = {}
    for key, item in value.items():
        if key in _EMPTY_IN_MESSAGE:
            if item:
                raise BadRequest(
                    f"{where}.{key} is not supported by this engine", f"{where}.{key}", "unsupported_parameter"
                )
        elif key not in _MESSAGE:
            raise BadRequest(f"{where}.{shown(key)[1:-1]} is unknown", f"{where}", "unknown_parameter")
        elif key == "content" and isinstance(item, list):
            message[key] = " ".join(_text_part(f"{where}.content[{i}]", part) for i, part in enumerate(item))
        elif isinstance(item, str):
            message[key] = item
        elif item is not None:
            raise BadRequest(f"{where}.{key} must be a string, got {shown(item)}", f"{where}.{key}")
    if "content" not in value:
        raise BadRequest(f"{where}.content is missing", f"{where}.content", "missing_required_parameter")
    message.setdefault("content", "")
    return message


def _text_part(where: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") not in ("text", "input_text"):
        raise BadRequest(f"{where} must be a text part, got {shown(part)}", where, "unsupported_parameter")
    if not isinstance(part.get("text"), str):
        raise BadRequest(f"{where}.text must be a string", where)
    return str(part["text"])


def _usage(read: Mapping[str, Any]) -> tuple[bool, bool]:
    wanted = read.get("stream_options", {})
    return wanted.get("include_usage", False), wanted.get("continuous_usage_stats", False)


def _missing(key: str) -> BadRequest:
    return BadRequest(f"{key} is missing", key, "missing_required_parameter")


def _too_many(answers: int, key: str) -> BadRequest:
    return BadRequest(f"{answers} answers are wanted; at most {MAX_ANSWERS} to one request", key)
