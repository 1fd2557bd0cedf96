"""SGLang's HTTP API over the embedded engine: parsed, checked, handed to the engine, followed.

Requests and answers have the shapes of SGLang's native API (github.com/sgl-project/sglang, version 0.5), so a client
changes from one to the other by its URL. What this engine lacks is refused with 400, not ignored.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from aiohttp import web

from micota_fast import __version__
from micota_fast.serve.answer import Answer
from micota_fast.serve.async_engine import AsyncEngine
from micota_fast.serve.browser_guard import BrowserGuard
from micota_fast.serve.connections import Connections
from micota_fast.serve.engine import Engine, EngineDead, Request
from micota_fast.serve.openai import OpenAI
from micota_fast.serve.options import BadRequest, Limits
from micota_fast.serve.request_parser import MAX_BODY_BYTES, Asked, Prompt, RequestParser
from micota_fast.serve.sampling import SamplingParams
from micota_fast.serve.wire import encode, error_response, errors, off_loop, receive, stream_events

HEALTH_TIMEOUT_S = 20.0
BYTES_OF_LOGPROB = 40  # about, in JSON


class EmbeddedServer:
    """The HTTP layer.

    Args:
        engine: answers.
        model_path: folder or hub name of the checkpoint, as it was given.
        served_model_name: what clients call it.
        has_template: whether the checkpoint brings a chat template.
    """

    def __init__(self, engine: Engine, model_path: str, served_model_name: str, has_template: bool) -> None:
        self.engine = engine
        self.model_path, self.served_model_name = model_path, served_model_name
        limits = Limits(engine.model.config.vocab_size, engine.context_length)
        self._parser = RequestParser(engine.chat, limits, has_template)
        self._async_engine = AsyncEngine(engine)
        self._openai = OpenAI(self._async_engine, self._parser, served_model_name)

    def app(self, connections: Connections, host: str, allow_hosts: Sequence[str]) -> web.Application:
        """The aiohttp application with all routes.

        Args:
            connections: those on which requests come.
            host: address that is listened on.
            allow_hosts: further names by which clients may call this server.
        """
        guard = BrowserGuard(host, allow_hosts)
        middlewares = [errors, guard.middleware(), receive(connections)]
        app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
        for path in ("/get_model_info", "/model_info"):
            app.router.add_get(path, self.model_info)
        for path in ("/get_server_info", "/server_info"):
            app.router.add_get(path, self.server_info)
        app.router.add_get("/health", self.health)
        app.router.add_get("/health_generate", self.health_generate)
        app.router.add_get("/v1/loads", self.loads)
        app.router.add_get("/get_load", self.load)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{id:.+}", self.model)
        app.router.add_route("*", "/flush_cache", self.flush_cache)
        app.router.add_post("/abort_request", self.abort_request)
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/v1/completions", self._openai.completions)
        app.router.add_post("/v1/chat/completions", self._openai.chat_completions)
        return app

    # -- small endpoints ---------------------------------------------------------------------------------------------

    async def health(self, _: web.Request) -> web.Response:
        if self.engine.error is not None:
            return error_response(503, f"the engine has failed: {self.engine.error!r}")
        return web.Response()

    async def health_generate(self, _: web.Request) -> web.Response:
        """Really generates one token."""
        if self.engine.error is not None:
            return error_response(503, f"the engine has failed: {self.engine.error!r}")
        prompt = Prompt([self.engine.chat.eos_ids[0]], SamplingParams(max_new_tokens=1, temperature=0.0), "health")
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                [request] = await self._async_engine.complete(Asked([prompt]))
        except TimeoutError:
            return error_response(503, f"no token within {HEALTH_TIMEOUT_S:g} s")
        except EngineDead as error:
            return error_response(503, str(error))
        if request.finish_reason and request.finish_reason["type"] == "abort":
            return error_response(503, request.finish_reason["message"])
        return web.Response()

    async def model_info(self, _: web.Request) -> web.Response:
        config = self.engine.model.config
        return web.json_response(
            {
                "model_path": self.model_path,
                "tokenizer_path": self.model_path,
                "served_model_name": self.served_model_name,
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": "default",
                "model_type": config.raw.get("model_type"),
                "architectures": [config.architecture],
                "vocab_size": config.vocab_size,
            }
        )

    async def server_info(self, _: web.Request) -> web.Response:
        engine = self.engine
        weight = engine.model.lm_head_weight
        return web.json_response(
            {
                "engine": "micota_fast.serve.embedded",
                "version": __version__,
                "model_path": self.model_path,
                "served_model_name": self.served_model_name,
                "dtype": str(weight.dtype).removeprefix("torch."),
                "device": str(weight.device),
                "context_length": engine.context_length,
                "max_req_input_len": engine.context_length,  # a prompt of that many tokens is refused
                "max_running_requests": engine.max_running,
                "max_total_num_tokens": engine.kv_tokens,
                "internal_states": [
                    {**engine.load(), "decode_tokens": engine.decode_tokens, "decode_steps": engine.decode_steps}
                ],
            }
        )

    async def loads(self, _: web.Request) -> web.Response:
        """SGLang's, of one data-parallel rank, with those of its numbers that this engine has."""
        engine, load = self.engine, self.engine.load()
        rank = {"timestamp": time.time(), "dp_rank": 0, **load, "max_total_num_tokens": engine.kv_tokens}
        rank |= {"max_running_requests": engine.max_running}
        rank |= {"token_usage": round(load["num_used_tokens"] / engine.kv_tokens, 4)}
        return web.json_response({"version": __version__, "loads": [rank]})

    async def load(self, _: web.Request) -> web.Response:
        """What sglang-router's power_of_two policy asks; newer SGLang servers have /v1/loads alone."""
        load = self.engine.load()
        waiting = load["num_waiting_reqs"]
        load = {"num_reqs": load["num_running_reqs"] + waiting, "num_tokens": load["num_used_tokens"]}
        return web.json_response([{"dp_rank": 0, "num_waiting_reqs": waiting, **load}])

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model()]})

    async def model(self, http: web.Request) -> web.Response:
        name = http.match_info["id"]
        if name != self.served_model_name:
            raise BadRequest(f"model {name[:256]!r} is not served here", "model", "model_not_found", 404)
        return web.json_response(self._model())

    def _model(self) -> dict[str, Any]:
        model = {"id": self.served_model_name, "object": "model", "created": 0, "owned_by": "micota-fast"}
        return {**model, "root": self.model_path, "max_model_len": self.engine.context_length}

    async def flush_cache(self, _: web.Request) -> web.Response:
        return web.Response(text="Cache flushed.\n")  # nothing outlives its request

    async def abort_request(self, http: web.Request) -> web.Response:
        self._async_engine.abort(self._parser.abort(await http.read()))
        return web.Response()

    # -- generation --------------------------------------------------------------------------------------------------

    async def generate(self, http: web.Request) -> web.StreamResponse:
        """SGLang's native endpoint."""
        body = await http.read()
        asked = await off_loop(len(body), self._parser.generate, body)
        if asked.stream:
            return await stream_events(http, self._events(asked))
        requests = await self._async_engine.complete(asked)
        size = sum(map(_size, requests))
        return web.Response(
            body=await off_loop(size, self._answers, requests, asked.is_list), content_type="application/json"
        )

    def _answers(self, requests: list[Request], is_list: bool) -> bytes:
        answers = [_content(Answer(self.engine.chat, request)) for request in requests]
        return encode(answers if is_list else answers[0])

    async def _events(self, asked: Asked) -> AsyncGenerator[bytes, None]:
        async with self._async_engine.submitted(asked) as (requests, updates):
            answers = [Answer(self.engine.chat, request) for request in requests]
            async for index in updates:
                content = _content(answers[index])
                if asked.is_list:
                    content["index"] = index
                yield await off_loop(_size(requests[index]), encode, content)


def _size(request: Request) -> int:
    """Bytes of an answer, about."""
    logprobs = request.return_logprob * (1 + request.top_logprobs_num) * BYTES_OF_LOGPROB
    return len(request.output_ids) * (10 + logprobs) + len(request.input_logprobs) * logprobs


def _content(answer: Answer) -> dict[str, Any]:
    text, ids, reason = answer.progress()
    request = answer.request
    meta: dict[str, Any] = {
        "id": request.rid,
        "finish_reason": reason,
        "prompt_tokens": len(request.input_ids),
        "completion_tokens": len(ids),
        "cached_tokens": 0,
        "reasoning_tokens": 0,
        "weight_version": "default",
        "num_retractions": request.retractions,
        "dp_rank": None,
        "e2e_latency": time.perf_counter() - request.created,
    }
    if request.return_logprob:
        meta["input_token_logprobs"] = request.input_logprobs
        meta["output_token_logprobs"] = list(request.output_logprobs)
        if request.top_logprobs_num:
            meta["input_top_logprobs"] = request.input_top_logprobs
            meta["output_top_logprobs"] = list(request.output_top_logprobs)
    return {"text": text, "output_ids": ids, "meta_info": meta}
