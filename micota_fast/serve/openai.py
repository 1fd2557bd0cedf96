"""OpenAI's completion endpoints, as far as SGLang's users of them need: text and chat, streamed or whole."""

import time
import uuid
from typing import Any

from aiohttp import web

from micota_fast.errors import InputError
from micota_fast.serve.async_engine import AsyncEngine, Prompt, expanded, raise_if_failed
from micota_fast.serve.engine import Request
from micota_fast.serve.sampling import BadRequest, SamplingParams
from micota_fast.serve.wire import read_json, stream_events

# Passed on as they are: OpenAI's and the extensions that SGLang takes.
_SAMPLING_KEYS = ["temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "ignore_eos"]
_SAMPLING_KEYS += ["skip_special_tokens", "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"]


class OpenAI:
    """Handlers of /v1/completions and /v1/chat/completions."""

    def __init__(self, engine: AsyncEngine, served_model_name: str, has_template: bool) -> None:
        self._engine, self._chat = engine, engine.chat
        self._served_model_name, self._has_template = served_model_name, has_template

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """OpenAI's text completion, without log-probabilities."""
        body = await read_json(http)
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            ids = self._chat.tokenizer.encode(prompt).ids
        elif isinstance(prompt, list) and all(type(i) is int for i in prompt):
            ids = prompt
        else:
            raise BadRequest("prompt must be a string or a list of token ids")
        return await self._answer(http, body, ids, "text_completion", default_max_tokens=16)

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        """OpenAI's chat completion, rendered by the checkpoint's own template."""
        body = await read_json(http)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadRequest("messages must be a non-empty list")
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise BadRequest("each message needs a string role and a string content")
        if not self._has_template:
            raise BadRequest("this checkpoint has no chat template; use /generate or /v1/completions")
        try:
            prompt = self._chat.render(messages, add_generation_prompt=True)
        except InputError as error:
            raise BadRequest(str(error)) from None
        ids = self._chat.tokenizer.encode(prompt, add_special_tokens=False).ids
        room = max(1, self._engine.engine.context_length - len(ids))
        return await self._answer(http, body, ids, "chat.completion", default_max_tokens=room)

    async def _answer(
        self, http: web.Request, body: dict[str, Any], ids: list[int], kind: str, default_max_tokens: int
    ) -> web.StreamResponse:
        for key in ("logprobs", "top_logprobs", "tools", "response_format", "echo", "suffix"):
            if body.get(key):
                raise BadRequest(f"{key} is not supported by this engine")
        max_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or default_max_tokens
        values: dict[str, Any] = {"max_new_tokens": max_tokens, "sampling_seed": body.get("seed")}
        values |= {key: body[key] for key in _SAMPLING_KEYS if body.get(key) is not None}
        prompts = expanded([Prompt(ids, SamplingParams.parse(values))])
        head = {"id": uuid.uuid4().hex, "created": int(time.time()), "model": self._served_model_name}
        chat = kind == "chat.completion"
        if body.get("stream"):
            sent: dict[str, int] = {}

            def chunk(request: Request) -> dict[str, Any]:
                text, _, reason = self._engine.progress(request)
                new = text[sent.get(request.rid, 0) :]
                first = request.rid not in sent
                sent[request.rid] = len(text)
                delta = {"role": "assistant", "content": new} if first else {"content": new}
                choice: dict[str, Any] = {"index": index_of[request.rid], "finish_reason": reason and reason["type"]}
                choice |= {"delta": delta} if chat else {"text": new}
                return {**head, "object": f"{kind}.chunk" if chat else kind, "choices": [choice]}

            index_of = {prompt.rid: i for i, prompt in enumerate(prompts)}
            return await stream_events(http, self._engine, prompts, {}, False, chunk)
        requests = await self._engine.complete(prompts, {})
        choices = []
        for index, request in enumerate(requests):
            raise_if_failed(request)
            text, _, reason = self._engine.progress(request)
            choice = {"index": index, "finish_reason": reason and reason["type"], "logprobs": None}
            choices.append(choice | ({"message": {"role": "assistant", "content": text}} if chat else {"text": text}))
        completion_tokens = sum(len(r.output_ids) for r in requests)
        usage = {"prompt_tokens": len(ids), "completion_tokens": completion_tokens}
        usage["total_tokens"] = len(ids) + completion_tokens
        return web.json_response({**head, "object": kind, "choices": choices, "usage": usage})
