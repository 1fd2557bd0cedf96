"""OpenAI's chat completions, as vLLM, SGLang, TGI, llama.cpp and paid APIs have them.

The server renders the prompt, counts the tokens and knows what ends an answer; what it does not support is refused
before a run begins (`config.generation.check_api`). Each sample is a request of its own, so that it has its own seed
and is kept as soon as it is there.
"""

import contextlib
import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import aiohttp

from micota_fast.chat.prompt import Prompt
from micota_fast.chat.thoughts import join_thought
from micota_fast.common.api_key import read_key
from micota_fast.common.json_io import parse_json
from micota_fast.common.records import Completion, model_name
from micota_fast.common.urls import api_base
from micota_fast.config.generation import SamplingSettings
from micota_fast.errors import InputError
from micota_fast.generation.endpoint import (
    SHOWN_CHARACTERS,
    UNAVAILABLE_STATUSES,
    Endpoint,
    Load,
    RefusedError,
    RetryableError,
    decode_object,
    error_message,
)
from micota_fast.generation.model_names import is_model
from micota_fast.generation.openai_reply import ChatReply, EventReader, read_whole
from micota_fast.generation.problem_file import ProblemFile
from micota_fast.generation.prompts import KEPT
from micota_fast.generation.request import REPLY_BYTES, derive_seed
from micota_fast.generation.schedule import Wanted

TOKEN_BYTES = 256  # of a token in JSON: far more than any tokenizer's longest, escaped
EVENT_BYTES = 4096  # of the event that brings a token
FEW_MODELS = 8  # a server that lists no more may answer any name with what it has; paid APIs refuse unknown names
DISPENSABLE = ("seed", "stream_options")  # keys of a request that some servers do not know; it can do without
TOLD = (
    "asked through OpenAI's API: the server renders the prompts, refuses one that is too long only when it is sent, "
    "ends answers at its own end tokens and counts tokens by its own rules; it returns no token ids"
)


class OpenAIApi:
    """Asks for answers by POST /chat/completions.

    Args:
        problems: what is asked.
        config: the settings.
        model: the name by which the servers know what they are to answer with.

    Raises:
        InputError: see `read_key`.
    """

    def __init__(self, problems: ProblemFile, config: SamplingSettings, model: str) -> None:
        self.model = model
        self._config, self._key = config, read_key(config.openai.key_env)
        self._problem = lru_cache(maxsize=KEPT)(problems.__getitem__)
        self._names: dict[str, str] = {}  # of the model, by the URL of the server that calls it so
        # Reasoning models of OpenAI take the second name alone, llama-cpp-python and TGI the first alone.
        self._limit_name = "max_tokens"
        self._refused: set[str] = set()  # keys of a request that a server does not know

    # -- the servers -------------------------------------------------------------------------------------------------

    def endpoint(self, url: str, most: int) -> Endpoint:
        """Return a server that is not asked yet.

        Its answers do not say which request they belong to, so no connection carries more than one.
        """
        return Endpoint(api_base(url), most, key=self._key, remote=True, reuse=False)

    def is_wanted(self, served: str) -> bool:
        """Return whether what a server says it serves is the model that is wanted."""
        return is_model(served, self.model, Path(self.model))

    async def served_model(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> str | None:
        """Return the name under which a server lists our model, or what it lists instead; None: it does not say.

        One that lists many models and not ours is taken to know more names than it lists.

        Raises:
            RetryableError: it does not answer, is not up yet, or its list is not OpenAI's.
            InputError: it refuses the key.
        """
        path = "/models"
        status, content = await endpoint.get(session, path)
        if status in (401, 403):
            raise InputError(f"{endpoint.url} answers with HTTP {status}: {error_message(content)}; {self._remedy}")
        if status in UNAVAILABLE_STATUSES - {429}:
            raise RetryableError(f"HTTP {status}: {error_message(content)}")
        if status != 200:
            return None
        try:
            names = [model["id"] for model in decode_object(content, path)["data"]]
        except (KeyError, TypeError) as error:
            raise RetryableError(f"{path} is not OpenAI's list of models: {error!r:.200}") from None
        if any(type(name) is not str or not name or not name.isprintable() for name in names):
            raise RetryableError(f"{path} lists an impossible name of a model: {names!r:.200}")
        ours = [name for name in names if name == self.model] or [name for name in names if self.is_wanted(name)]
        if ours:
            self._names[endpoint.url] = ours[0]
            return ours[0]
        return ", ".join(names)[:SHOWN_CHARACTERS] if 0 < len(names) <= FEW_MODELS else None

    async def read_settings(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> None:
        """Do nothing: this API has no page of settings."""

    async def probe_load(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> Load | None:
        """Return None: this API has no page of its load."""
        return None

    async def is_healthy(self, endpoint: Endpoint, session: aiohttp.ClientSession, generates: bool) -> bool:
        """Return whether it lists its models, which is all that it can say."""
        return await endpoint.healthy(session, "/models")

    async def check_prompts(self, up: Sequence[Endpoint], folder: Path) -> None:
        """Say that prompts are not checked, and what else this API does not give."""
        print(f"{', '.join(endpoint.url for endpoint in up)}: {TOLD}", file=sys.stderr, flush=True)

    # -- the answers -------------------------------------------------------------------------------------------------

    async def answer(
        self, endpoint: Endpoint, session: aiohttp.ClientSession, wanted: Wanted
    ) -> tuple[Completion, dict[str, Any]]:
        """Return the row of one answer; what a reasoning server gives apart as its thought is joined with it.

        Raises:
            RetryableError: another try may succeed.
            InputError: the server refuses this request, or does not say how many tokens it has used.
        """
        while True:
            body = self._body(endpoint, wanted)
            try:
                reply = await self._ask(endpoint, session, body)
                break
            except RefusedError as refused:
                if _is_filtered(refused):
                    return self._row(wanted, "content_filter", "", 0, 0, body.get("seed")), {}
                if not self._adapt(endpoint, body, refused):
                    problem_id = self._problem(wanted.problem).id
                    remedy = f"; {self._remedy}" if refused.status in (401, 403) else ""
                    raise InputError(f"problem {problem_id!r}: {refused}{remedy}") from None
        text = endpoint.without_key(join_thought(reply.thought, reply.answer, reply.reason == "stop"))
        tokens = reply.prompt_tokens, reply.completion_tokens
        return self._row(wanted, reply.reason, text, *tokens, body.get("seed")), {}

    def aborted(self, wanted: Wanted) -> Completion:
        """Return the row of an answer that is given up on."""
        return self._row(wanted, "abort", "", 0, 0, self._seed(wanted))

    def _row(
        self, wanted: Wanted, reason: str, text: str, prompt_tokens: int, completion_tokens: int, seed: int | None
    ) -> Completion:
        problem = self._problem(wanted.problem)
        return Completion(
            id=problem.id,
            sample=wanted.sample,
            problem=problem.problem,
            answer=problem.answer,
            completion=text,
            finish_reason=reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            seed=seed,
            model=model_name(self.model),
        )

    def _seed(self, wanted: Wanted) -> int | None:
        if self._config.temperature == 0 or "seed" in self._refused:
            return None
        return derive_seed(self._config.seed, self._problem(wanted.problem).id, wanted.sample)

    def _body(self, endpoint: Endpoint, wanted: Wanted) -> dict[str, Any]:
        """The request. What has the value that is OpenAI's default is left out: some models refuse its mere name."""
        config = self._config
        body: dict[str, Any] = {
            "model": self._names.get(endpoint.url, self.model),
            "messages": Prompt(config.chat).prompt_messages(self._problem(wanted.problem).problem),
            self._limit_name: config.max_new_tokens,
            "temperature": config.temperature,
        }
        if config.chat.template_kwargs:
            body["chat_template_kwargs"] = config.chat.template_kwargs
        if config.temperature > 0 and config.top_p < 1:
            body["top_p"] = config.top_p
        if config.temperature > 0 and config.top_k != -1:
            body["top_k"] = config.top_k
        if config.stop:
            body["stop"] = list(config.stop)
        if (seed := self._seed(wanted)) is not None:
            body["seed"] = seed
        if config.openai.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return {key: value for key, value in body.items() if key not in self._refused}

    async def _ask(self, endpoint: Endpoint, session: aiohttp.ClientSession, body: dict[str, Any]) -> ChatReply:
        tokens, timeout_s = self._config.max_new_tokens, self._config.request_timeout_s
        most_bytes = REPLY_BYTES + tokens * (EVENT_BYTES if self._config.openai.stream else TOKEN_BYTES)
        reader = EventReader(endpoint.url)
        on_line = reader.take if self._config.openai.stream else None
        content = await endpoint.post(session, "/chat/completions", body, timeout_s, most_bytes, on_line)
        if content:  # not streamed, though perhaps asked to be
            return read_whole(decode_object(content, "its answer"), endpoint.url)
        return reader.reply()

    def _adapt(self, endpoint: Endpoint, body: dict[str, Any], refused: RefusedError) -> bool:
        """Leave out, or call by its other name, what a server refuses by name; whether it is worth another try."""
        message = error_message(refused.body)
        if refused.status not in (400, 422):
            return False
        if "max_tokens" in body and "max_completion_tokens" in message:
            self._limit_name = "max_completion_tokens"
            return True
        named = {key for key in DISPENSABLE if key in body and re.search(rf"\b{key}\b", message)}
        if "seed" in named - self._refused:
            told = f"{endpoint.url} takes no seeds ({message}): the answers are random, and another run's will differ"
            print(told, file=sys.stderr, flush=True)
        self._refused |= named
        return bool(named)

    @property
    def _remedy(self) -> str:
        name = self._config.openai.key_env
        return "name the variable with its key as `openai.key_env`" if name is None else f"see that ${name} is its key"


def _is_filtered(refused: RefusedError) -> bool:
    """Whether a request is refused for its content, as Azure does: the answer's fate, not the run's."""
    with contextlib.suppress(InputError, KeyError, TypeError):
        return bool(parse_json(refused.body, "error")["error"]["code"] == "content_filter")
    return False
