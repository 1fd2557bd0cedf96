"""SGLang's HTTP API on our own decoder: `python -m micota_fast.serve.embedded --model DIR`.

Requests and answers have the shapes of SGLang's native API (github.com/sgl-project/sglang, version 0.5), so a client
changes from one to the other by its URL. What this engine lacks is refused with 400, not ignored.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import torch
from aiohttp import web

from micota_fast import __version__
from micota_fast.chat.encoding import Chat
from micota_fast.chat.template import load_chat_template
from micota_fast.config.generation import ChatConfig
from micota_fast.errors import InputError
from micota_fast.model.folder import resolve_checkpoint
from micota_fast.model.safetensors_io import load_model
from micota_fast.serve.async_engine import AsyncEngine, Prompt, expanded, raise_if_failed
from micota_fast.serve.engine import Engine, Request
from micota_fast.serve.openai import OpenAI
from micota_fast.serve.sampling import BadRequest, SamplingParams
from micota_fast.serve.wire import error_response, errors, read_json, stream_events

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 28
HEALTH_TIMEOUT_S = 20.0
SHUTDOWN_GRACE_S = 0.2
DEATH_LINGER_S = 2.0  # a dead engine stays visible on /health this long before the process ends

# Fields of a /generate body that would change the answer and that this engine does not have.
_UNSUPPORTED = ["input_embeds", "image_data", "audio_data", "video_data", "lora_path", "session_params"]
_UNSUPPORTED += ["custom_logit_processor", "return_hidden_states", "token_ids_logprob", "return_text_in_logprobs"]


class EmbeddedServer:
    """The HTTP layer: parses, checks, hands to the engine, follows its progress."""

    def __init__(self, engine: Engine, model_path: str, served_model_name: str, has_template: bool) -> None:
        self.engine, self.chat = engine, engine.chat
        self.model_path, self.served_model_name = model_path, served_model_name
        self._async_engine = AsyncEngine(engine)
        self._openai = OpenAI(self._async_engine, served_model_name, has_template)

    def app(self) -> web.Application:
        """The aiohttp application with all routes."""
        app = web.Application(middlewares=[errors], client_max_size=MAX_BODY_BYTES)
        for path in ("/get_model_info", "/model_info"):
            app.router.add_get(path, self.model_info)
        for path in ("/get_server_info", "/server_info"):
            app.router.add_get(path, self.server_info)
        app.router.add_get("/health", self.health)
        app.router.add_get("/health_generate", self.health_generate)
        app.router.add_get("/v1/loads", self.loads)
        app.router.add_get("/get_load", self.load)
        app.router.add_get("/v1/models", self.models)
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
        params = SamplingParams(max_new_tokens=1, temperature=0.0)
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                [request] = await self._async_engine.complete([Prompt([self.chat.eos_ids[0]], params)], {})
        except TimeoutError:
            return error_response(503, f"no token within {HEALTH_TIMEOUT_S:g} s")
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
                "max_req_input_len": engine.context_length,  # a prompt of so many tokens is refused
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
        model = {"id": self.served_model_name, "object": "model", "created": 0, "owned_by": "micota-fast"}
        model |= {"root": self.model_path, "max_model_len": self.engine.context_length}
        return web.json_response({"object": "list", "data": [model]})

    async def flush_cache(self, _: web.Request) -> web.Response:
        return web.Response(text="Cache flushed.\n")  # nothing outlives its request

    async def abort_request(self, http: web.Request) -> web.Response:
        body = await read_json(http)
        abort_all = body.get("abort_all") is True
        if not abort_all and not isinstance(body.get("rid"), str):
            raise BadRequest("rid must be a string, or abort_all true")
        self._async_engine.abort(None if abort_all else body["rid"])
        return web.Response()

    # -- generation --------------------------------------------------------------------------------------------------

    async def generate(self, http: web.Request) -> web.StreamResponse:
        """SGLang's native endpoint."""
        body = await read_json(http)
        prompts, is_list, options = self._parse_generate(body)
        if body.get("stream"):
            return await stream_events(http, self._async_engine, prompts, options, is_list, self._answer)
        requests = await self._async_engine.complete(prompts, options)
        for request in requests:
            raise_if_failed(request)
        answers = [self._answer(request) for request in requests]
        return web.json_response(answers if is_list else answers[0])

    def _parse_generate(self, body: dict[str, Any]) -> tuple[list[Prompt], bool, dict[str, Any]]:
        for key in _UNSUPPORTED:
            if body.get(key):
                raise BadRequest(f"{key} is not supported by this engine")
        text, input_ids = body.get("text"), body.get("input_ids")
        if (text is None) == (input_ids is None):
            raise BadRequest("exactly one of text and input_ids must be given")
        if text is not None:
            is_list = isinstance(text, list)
            texts = text if is_list else [text]
            if not all(isinstance(item, str) for item in texts):
                raise BadRequest("text must be a string or a list of strings")
            ids = [self.chat.tokenizer.encode(item).ids for item in texts]
        else:
            is_list = isinstance(input_ids, list) and any(isinstance(item, list) for item in input_ids)
            ids = []
            for item in input_ids if isinstance(input_ids, list) and is_list else [input_ids]:
                if not isinstance(item, list) or not all(type(i) is int for i in item):
                    raise BadRequest("input_ids must be a list of integers or a list of such lists")
                ids.append(item)
        if not ids:
            raise BadRequest("the batch is empty")
        options: dict[str, Any] = {}
        for key, kind in (("return_logprob", bool), ("logprob_start_len", int), ("top_logprobs_num", int)):
            if body.get(key) is not None:
                if type(body[key]) is not kind:
                    raise BadRequest(f"{key} must be {kind.__name__}, got {body[key]!r}")
                options[key] = body[key]
        params = body.get("sampling_params")
        listed = params if isinstance(params, list) else [params] * len(ids)
        if len(listed) != len(ids):
            raise BadRequest(f"{len(listed)} sampling_params for {len(ids)} prompts")
        rids = body.get("rid")
        rids = [rids] if isinstance(rids, str) else rids or [None] * len(ids)
        if len(rids) == 1 and len(ids) > 1:
            rids = [f"{rids[0]}_{i}" for i in range(len(ids))]
        if len(rids) != len(ids) or not all(rid is None or isinstance(rid, str) for rid in rids):
            raise BadRequest("rid must be a string, or a list with one for each prompt")
        prompts = [
            Prompt(prompt, SamplingParams.parse(values), rid)
            for prompt, values, rid in zip(ids, listed, rids, strict=True)
        ]
        return expanded(prompts), is_list or any(p.params.n > 1 for p in prompts), options

    def _answer(self, request: Request) -> dict[str, Any]:
        text, ids, reason = self._async_engine.progress(request)
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


async def serve(server: EmbeddedServer, host: str, port: int) -> int:
    """Answer until SIGTERM or SIGINT, or until the engine fails. Returns the exit status."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port, or 0") from None
    runner = web.AppRunner(server.app(), handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_GRACE_S)
    await runner.setup()
    await web.SockSite(runner, listener, backlog=1024).start()

    def work() -> None:
        server.engine.run()
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(ended.set)

    thread = threading.Thread(target=work, name="engine", daemon=True)
    thread.start()
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    print(f"listening on http://{shown}:{listener.getsockname()[1]}", flush=True)
    await ended.wait()
    if server.engine.error is not None:
        await asyncio.sleep(DEATH_LINGER_S)
    server.engine.stop()
    await runner.cleanup()
    thread.join(SHUTDOWN_GRACE_S)
    return 0 if server.engine.error is None else 1


def load_server(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_running: int = 128,
    context_length: int | None = None,
    served_model_name: str | None = None,
) -> EmbeddedServer:
    """Load a checkpoint (folder or hub name) and build its server, not yet listening.

    Raises:
        InputError: the checkpoint cannot be found or read.
    """
    path = resolve_checkpoint(model)
    has_template = load_chat_template(path) is not None
    chat = Chat.from_checkpoint(path, ChatConfig(use_template=has_template))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = load_model(path, dtype, device).eval()
    engine = Engine(decoder, chat, max_running=max_running, context_length=context_length)
    return EmbeddedServer(engine, model, served_model_name or model, has_template)


def main(argv: list[str] | None = None) -> int:
    """Command line. Returns the exit status: 0 after SIGTERM, 1 if the engine failed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="micota_fast.serve.embedded", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint: a folder or a hub name")
    parser.add_argument("--host", default="127.0.0.1", help="anything but loopback opens the server to the network")
    parser.add_argument("--port", type=int, default=0, help="0: a free one, told in the first line of the output")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32", "float64"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--max-running", type=int, default=128, help="requests decoded at once")
    parser.add_argument("--context-length", type=int, default=None, help="tokens; default: the checkpoint's")
    parser.add_argument("--served-model-name", default=None)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    try:
        server = load_server(
            args.model,
            dtype=args.dtype,
            device=args.device,
            max_running=args.max_running,
            context_length=args.context_length,
            served_model_name=args.served_model_name,
        )
        return asyncio.run(serve(server, args.host, args.port))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # The engine's thread may still be in a step, which interpreter shutdown must not pull the ground from under.
    os._exit(status)
