"""OpenAI's completion endpoints: text and chat, streamed or whole, with usage and log-probabilities."""

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from aiohttp import web

from micota_fast.serve.answer import Answer
from micota_fast.serve.async_engine import AsyncEngine
from micota_fast.serve.engine import Request
from micota_fast.serve.logprobs import TokenLogprob
from micota_fast.serve.request_parser import AskedOpenAI, RequestParser
from micota_fast.serve.token_text import TokenTexts
from micota_fast.serve.wire import encode, error_object, off_loop, stream_events

BYTES_OF_TOKEN = 120  # about, in JSON with its log-probability


class OpenAI:
    """Handlers of /v1/completions and /v1/chat/completions.

    Args:
        engine: answers.
        parser: reads what is asked.
        served_model_name: as answers name the model.
    """

    def __init__(self, engine: AsyncEngine, parser: RequestParser, served_model_name: str) -> None:
        self._engine, self._parser, self._served_model_name = engine, parser, served_model_name
        self._texts = TokenTexts(engine.chat.tokenizer.library)

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """Complete texts."""
        body = await http.read()
        return await self._respond(http, await off_loop(len(body), self._parser.completions, body))

    async def chat_completions(self, http: web.Request) -> web.StreamResponse:
        """Answer a conversation."""
        body = await http.read()
        return await self._respond(http, await off_loop(len(body), self._parser.chat_completions, body))

    async def _respond(self, http: web.Request, asked: AskedOpenAI) -> web.StreamResponse:
        kind, prefix = ("chat.completion", "chatcmpl") if asked.chat else ("text_completion", "cmpl")
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
        head["model"] = self._served_model_name
        if asked.asked.stream:
            if asked.chat:
                head["object"] = "chat.completion.chunk"
            return await stream_events(http, self._events(asked, head))
        requests = await self._engine.complete(asked.asked)
        size = BYTES_OF_TOKEN * sum(map(_places, requests))
        body = await off_loop(size, self._whole, asked, head, requests)
        return web.Response(body=body, content_type="application/json")

    def _whole(self, asked: AskedOpenAI, head: dict[str, Any], requests: list[Request]) -> bytes:
        choices = [choice.whole() for choice in self._choices(asked, requests)]
        return encode({**head, "choices": choices, "usage": _usage(requests)})

    async def _events(self, asked: AskedOpenAI, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        usage: dict[str, Any] = {"usage": None} if asked.usage else {}
        async with self._engine.submitted(asked.asked) as (requests, updates):
            choices = self._choices(asked, requests)
            async for index in updates:
                reason = requests[index].finish_reason
                if reason is not None and reason.get("status_code") is not None:
                    yield encode({"error": error_object(reason["message"], "server_error")})
                    return
                choice = choices[index].news()
                if asked.usage_always:
                    usage = {"usage": _usage(requests)}
                yield encode({**head, "choices": [choice], **usage})
            if asked.usage:
                yield encode({**head, "choices": [], "usage": _usage(requests)})

    def _choices(self, asked: AskedOpenAI, requests: list[Request]) -> list["_Choice"]:
        choices = []
        copies = len(requests) // len(asked.echoed) if asked.echoed else 1
        for index, request in enumerate(requests):
            echoed = asked.echoed[index // copies] if asked.echoed else ""
            choices.append(_Choice(Answer(self._engine.chat, request), self._texts, index, asked.chat, echoed))
        return choices


class _Choice:
    """One answer as a choice, whole or piece by piece."""

    def __init__(self, answer: Answer, texts: TokenTexts, index: int, chat: bool, echoed: str) -> None:
        self._answer, self._texts, self._index, self._chat, self._echoed = answer, texts, index, chat, echoed
        self._sent = 0  # characters of text and echo
        self._sent_places = 0  # whose log-probabilities have gone out
        self._characters = 0  # in the tokens of those
        self._begun = False

    def whole(self) -> dict[str, Any]:
        """`choices[i]` of an answer that has ended."""
        text, _, reason = self._answer.progress()
        text = self._echoed + text
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {
            "index": self._index,
            **content,
            "logprobs": self._logprobs(),
            "finish_reason": reason and reason["type"],
        }

    def news(self) -> dict[str, Any]:
        """`choices[0]` of an event: what has come since the last one."""
        text, _, reason = self._answer.progress()
        text = self._echoed + text
        new, self._sent = text[self._sent :], max(self._sent, len(text))
        content: dict[str, Any] = {"text": new}
        if self._chat:
            content = {"delta": {"content": new} if self._begun else {"role": "assistant", "content": new}}
        self._begun = True
        return {
            "index": self._index,
            **content,
            "logprobs": self._logprobs(),
            "finish_reason": reason and reason["type"],
        }

    def _logprobs(self) -> dict[str, Any] | None:
        """Of the places since the last call; None if none are wanted."""
        request = self._answer.request
        if not request.return_logprob:
            return None
        start = self._sent_places
        places = (request.input_logprobs + request.output_logprobs)[start:]
        self._sent_places += len(places)
        tops: list[list[TokenLogprob]] = [[]] * len(places)
        if request.top_logprobs_num:
            likeliest = [*request.input_top_logprobs, *request.output_top_logprobs][start : self._sent_places]
            tops = [top.triples() if top else [] for top in likeliest]
        if self._chat:
            content = [
                {**self._token(place), "top_logprobs": [self._token(other) for other in top]}
                for place, top in zip(places, tops, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for _, token_id, _ in places:
            offsets.append(self._characters)
            self._characters += self._texts.characters(token_id)
        return {
            "tokens": [self._texts.text(token_id) for _, token_id, _ in places],
            "token_logprobs": [logprob for logprob, _, _ in places],
            "top_logprobs": [self._top(place, top) for place, top in zip(places, tops, strict=True)],
            "text_offset": offsets,
        }

    def _token(self, place: TokenLogprob) -> dict[str, Any]:
        logprob, token_id, _ = place
        return {"token": self._texts.text(token_id), "logprob": logprob, "bytes": list(self._texts.bytes(token_id))}

    def _top(self, place: TokenLogprob, top: list[TokenLogprob]) -> dict[str, float] | None:
        """The likeliest tokens and, as with OpenAI, always the one that stands there."""
        if place[0] is None:
            return None
        found: dict[str, float] = {}
        for logprob, token_id, _ in [*top, place]:
            found.setdefault(self._texts.text(token_id), logprob)
        return found


def _places(request: Request) -> int:
    logprobs = (len(request.input_logprobs) + len(request.output_logprobs)) * (1 + request.top_logprobs_num)
    return len(request.output_ids) // 10 + logprobs


def _usage(requests: list[Request]) -> dict[str, int]:
    """Tokens so far; those of a prompt count once, however many answers it gets."""
    prompts = {id(request.input_ids): len(request.input_ids) for request in requests}
    prompt_tokens, completion_tokens = sum(prompts.values()), sum(len(request.output_ids) for request in requests)
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
