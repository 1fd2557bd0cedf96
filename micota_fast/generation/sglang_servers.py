"""SGLang servers, whatever they are asked for: what they serve, their settings and load, and a POST to /generate."""

import itertools
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from micota_fast.common.schema import from_json
from micota_fast.errors import InputError
from micota_fast.generation.endpoint import (
    MOST_COUNTED,
    SHOWN_CHARACTERS,
    UNAVAILABLE_STATUSES,
    Endpoint,
    Load,
    RetryableError,
    ServerInfo,
    decode_object,
    error_message,
)
from micota_fast.generation.model_names import is_model
from micota_fast.model.config import ModelConfig
from micota_fast.model.folder import names_adapter

LOGPROB_BYTES = 96  # of a triple of log-probability, id and null
_OURS = uuid.uuid4().hex  # how the ids of this process's requests begin
_numbers = itertools.count()


class SGLangServers:
    """The servers' half of an `Api`: all but its prompts and answers.

    Args:
        model: what is served, as the recipe names it.
        checkpoint: its folder.
        request_timeout_s: seconds that one try of a request may take.

    Attributes:
        context_length: tokens of prompt and answer together that all servers take; 0: none is up yet.
    """

    def __init__(self, model: str, checkpoint: Path, request_timeout_s: float) -> None:
        self.model = model
        self._checkpoint, self._request_timeout_s = checkpoint, request_timeout_s
        self.context_length = 0

    def endpoint(self, url: str, most: int) -> Endpoint:
        """Return a server that is not asked yet."""
        return Endpoint(url, most)

    def is_wanted(self, served: str) -> bool:
        """Return whether what a server says it serves is the model that is wanted."""
        return is_model(served, self.model, self._checkpoint)

    async def served_model(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> str | None:
        """Return the name or folder of what it serves; None if it does not tell.

        MODEL+ADAPTER is served from a folder of the two merged, so there it is the name that clients call it by.

        Raises:
            RetryableError: it does not answer, is not up yet, or what it says cannot be a name.
            InputError: it tells a folder alone, by which MODEL+ADAPTER cannot be told from MODEL.
        """
        key = "served_model_name" if names_adapter(self.model) else "model_path"
        for path in ("/get_model_info", "/model_info"):
            status, content = await endpoint.get(session, path)
            if status in UNAVAILABLE_STATUSES:
                raise RetryableError(f"HTTP {status}: {error_message(content)}")
            if status != 200:
                continue
            told = decode_object(content, path)
            served = told.get(key)
            if isinstance(served, str):
                if not served or len(served) > SHOWN_CHARACTERS or any(ord(c) < 32 or ord(c) == 127 for c in served):
                    raise RetryableError(f"{path}: key {key!r} cannot be a name or folder: {served[:60]!r}")
                return served
            if key not in told and "model_path" in told:
                raise InputError(
                    f"{endpoint.url} serves {str(told['model_path'])[:SHOWN_CHARACTERS]!r} and does not tell its "
                    f"`served_model_name`, so it cannot be seen whether that is {self.model}, with the adapter; use a "
                    f"newer SGLang or `micota serve`, or merge the two (`micota merge`) and name the folder"
                )
        return None

    async def read_settings(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> None:
        """Read a server's settings into its `info`; nothing if it does not state them (a router, say).

        Raises:
            RetryableError: it does not answer, or states a setting that cannot be.
            InputError: its context is shorter than that of the servers that were up before.
        """
        endpoint.info = ServerInfo()
        for path in ("/server_info", "/get_server_info"):  # newer and older name
            status, content = await endpoint.get(session, path)
            if status == 200:
                try:
                    endpoint.info = from_json(ServerInfo, decode_object(content, path), path)
                except InputError as error:
                    raise RetryableError(str(error)) from None
                break
        context = endpoint.info.context_length
        if context is not None and context < self.context_length:
            raise InputError(
                f"{endpoint.url} has started with a context of {context} tokens, less than the "
                f"{self.context_length} of the others, which the prompts were checked against; start it like them"
            )

    async def probe_load(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> Load | None:
        """Ask for its load; None if it has no such page.

        Raises:
            RetryableError: it does not answer, or what it says is not JSON.
        """
        path = "/v1/loads?include=core"
        status, content = await endpoint.get(session, path)
        return parse_load(decode_object(content, path)) if status == 200 else None

    async def is_healthy(self, endpoint: Endpoint, session: aiohttp.ClientSession, generates: bool) -> bool:
        """Return whether it is well; `generates`: and still answers a request of its own making."""
        return await endpoint.healthy(session, "/health_generate" if generates else "/health")

    def take_context(self, up: Sequence[Endpoint]) -> int:
        """Take in the context of the servers that are up first; returns the longest prompt that all take, in tokens."""
        # SGLang at its default says nothing of its context and takes the checkpoint's.
        default = ModelConfig.from_checkpoint(self._checkpoint).max_position_embeddings
        self.context_length = min((endpoint.info.context_length or default for endpoint in up), default=default)
        # It refuses prompts from its `max_req_input_len` on, a few below the context's length.
        told = [endpoint.info.max_req_input_len for endpoint in up]
        return min((limit - 1 for limit in told if limit is not None), default=self.context_length - 2)

    async def post(
        self, endpoint: Endpoint, session: aiohttp.ClientSession, body: dict[str, Any], most_bytes: int
    ) -> dict[str, Any]:
        """POST /generate with an id, and return the decoded answer to it.

        Raises:
            RetryableError: another try may succeed, here or elsewhere.
            RefusedError: the server refuses this request.
        """
        rid = f"{_OURS}-{next(_numbers)}"
        content = await endpoint.post(session, "/generate", {**body, "rid": rid}, self._request_timeout_s, most_bytes)
        answer = decode_object(content, "its answer")
        if _is_anothers(answer, rid):
            # Whatever comes on that connection is off by one from now on, and it is among the idle ones again:
            # this server has each connection for one request from now on.
            endpoint.reuse = False
            raise RetryableError("it returned the answer to another request", own=False)
        return answer


def parse_load(body: Any) -> Load | None:
    """Read SGLang's /v1/loads, its data-parallel ranks added up; None if the body is nothing of that kind."""
    try:
        ranks = body["loads"]
        usage = [used for rank in ranks if type(used := rank.get("token_usage")) in (int, float) and 0 <= used < 2]
        counts = [rank[key] for rank in ranks for key in ("num_running_reqs", "num_waiting_reqs")]
    except (AttributeError, KeyError, TypeError):
        return None
    if not all(type(count) is int and 0 <= count <= MOST_COUNTED for count in counts):
        return None
    return Load(sum(counts[::2]), sum(counts[1::2]), sum(usage) / len(usage) if usage else None)


def _is_anothers(answer: Any, rid: str) -> bool:
    """Whether an answer names another of our requests; one that names none of ours may have passed a router."""
    try:
        named = answer["meta_info"]["id"]
    except (KeyError, TypeError):
        return False
    return isinstance(named, str) and named.startswith(_OURS) and named != rid
