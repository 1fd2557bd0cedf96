"""The load of soak.py: requests of every kind with what their answers must be, and hostile ones with their refusals."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import aiohttp

Outcome = int | str  # the status, or how the client left


class Lost(Exception):
    """A request that did not get what it must."""


class Client(NamedTuple):
    """Where requests go."""

    session: aiohttp.ClientSession
    url: str

    async def post(self, path: str, body: Any) -> Any:
        """The answer, whose status must be 200."""
        async with self.session.post(self.url + path, json=body) as response:
            if response.status != 200:
                raise Lost(f"{path}: status {response.status}: {(await response.text())[:200]}")
            return await response.json()

    async def events(self, path: str, body: Any) -> AsyncIterator[Any]:
        """The events of a stream, which must end in [DONE]."""
        async with self.session.post(self.url + path, json=body | {"stream": True}) as response:
            if response.status != 200:
                raise Lost(f"{path}: status {response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
        raise Lost(f"{path}: the stream ended without [DONE]")


def check(what: str, got: Any, wanted: Any) -> None:
    if got != wanted:
        raise Lost(f"{what}: {got!r} instead of {wanted!r}")


def ids(rng: random.Random) -> list[int]:
    return [rng.randrange(3, 380) for _ in range(rng.randint(1, 200))]


def text(rng: random.Random) -> str:
    return "A jar holds 6. " + " ".join(f"Ann+{rng.randrange(10)}" for _ in range(rng.randint(1, 20)))


async def native(client: Client, rng: random.Random) -> Outcome:
    tokens = rng.randint(1, 64)
    params = {"max_new_tokens": tokens, "temperature": rng.choice([0, 1]), "ignore_eos": True}
    answer = await client.post("/generate", {"input_ids": ids(rng), "sampling_params": params})
    check("output_ids", len(answer["output_ids"]), tokens)
    return 200


async def native_logprobs(client: Client, rng: random.Random) -> Outcome:
    tokens, prompt = rng.randint(1, 32), ids(rng)
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}
    answer = await client.post(
        "/generate", body | {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 5}
    )
    check("input log-probabilities", len(answer["meta_info"]["input_token_logprobs"]), len(prompt))
    check("output log-probabilities", len(answer["meta_info"]["output_top_logprobs"]), tokens)
    return 200


async def native_batch(client: Client, rng: random.Random) -> Outcome:
    tokens = rng.randint(1, 32)
    params = {"max_new_tokens": tokens, "ignore_eos": True, "n": 2}
    answers = await client.post("/generate", {"input_ids": [ids(rng) for _ in range(4)], "sampling_params": params})
    check("answers", [len(answer["output_ids"]) for answer in answers], [tokens] * 8)
    return 200


async def native_stream(client: Client, rng: random.Random) -> Outcome:
    tokens, last = rng.randint(1, 64), 0
    body = {"text": text(rng), "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}
    async for event in client.events("/generate", body):
        last = len(event["output_ids"])
    check("streamed ids", last, tokens)
    return 200


def chat_body(rng: random.Random) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text(rng)}], "max_tokens": rng.randint(1, 64)}
    return body | {"ignore_eos": True, "temperature": rng.choice([0, 1])}


async def chat(client: Client, rng: random.Random) -> Outcome:
    body = chat_body(rng)
    answer = await client.post("/v1/chat/completions", body)
    check("completion_tokens", answer["usage"]["completion_tokens"], body["max_tokens"])
    return 200


async def chat_stream(client: Client, rng: random.Random) -> Outcome:
    body = chat_body(rng) | {"stream_options": {"include_usage": True}}
    usage = None
    async for event in client.events("/v1/chat/completions", body):
        usage = event["usage"]
    check("completion_tokens", usage and usage["completion_tokens"], body["max_tokens"])
    return 200


async def completions_batch(client: Client, rng: random.Random) -> Outcome:
    tokens = rng.randint(1, 32)
    body = {
        "prompt": [text(rng) for _ in range(3)],
        "max_tokens": tokens,
        "ignore_eos": True,
        "echo": True,
        "logprobs": 1,
    }
    answer = await client.post("/v1/completions", body)
    check("choices", [choice["index"] for choice in answer["choices"]], [0, 1, 2])
    check("completion_tokens", answer["usage"]["completion_tokens"], 3 * tokens)
    return 200


async def aborted_stream(client: Client, rng: random.Random) -> Outcome:
    """Leaves after the first event of 800 tokens."""
    body = {"text": text(rng), "sampling_params": {"max_new_tokens": 800, "ignore_eos": True}, "stream": True}
    async with client.session.post(client.url + "/generate", json=body) as response:
        check("status", response.status, 200)
        await response.content.readline()
        response.close()
    return "left"


async def aborted(client: Client, rng: random.Random) -> Outcome:
    """Leaves before the answer."""
    body = {"text": text(rng), "sampling_params": {"max_new_tokens": 800, "ignore_eos": True}}
    try:
        async with asyncio.timeout(rng.uniform(0.01, 0.1)):
            await client.post("/generate", body)
    except TimeoutError:
        return "left"
    return 200


class Hostile(NamedTuple):
    """A request that must be refused with this status."""

    status: int
    path: str
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})
    method: str = "POST"


def hostile_requests() -> list[Hostile]:
    """One of each kind."""
    found = [
        Hostile(400, path, json.dumps(body).encode())
        for path, body in [
            ("/generate", {"text": "1", "sampling_params": {"top_k": 1 << 70}}),
            ("/generate", {"text": "1", "sampling_params": {"n": 10**9}}),
            ("/generate", {"text": "1", "sampling_params": {"stop_token_ids": [-5]}}),
            ("/generate", {"text": "1", "sampling_params": {"max_new_tokens": 10**12}}),
            ("/generate", {"text": "1", "return_logprob": True, "top_logprobs_num": 1 << 40}),
            ("/generate", {"text": "\ud83d", "sampling_params": {}}),
            ("/generate", {"text": "7" * (1 << 21)}),
            ("/generate", {"input_ids": [5] * 200_000}),
            ("/generate", {"input_ids": [[]]}),
            ("/generate", {"text": "1", "rid": {"a": 1}}),
            ("/v1/completions", {"prompt": "1", "temperature": -3}),
            ("/v1/completions", {"prompt": "1", "stop": ["\udc01"]}),
            ("/v1/completions", {"prompt": "1", "unheard_of": 1}),
            ("/v1/chat/completions", {"messages": {"role": "user"}}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1"}], "ebnf": "root ::= x"}),
        ]
    ]
    plain = b'{"text": "1", "sampling_params": {"max_new_tokens": 1}}'
    return [
        *found,
        Hostile(400, "/generate", b"[" * 90_000),
        Hostile(400, "/generate", b'{"text": ' + b"9" * 90_000 + b"}"),
        Hostile(400, "/generate", b'{"text": "1", "sampling_params": {"temperature": NaN}}'),
        Hostile(400, "/generate", b"\xff\xfe{}"),
        Hostile(413, "/generate", b'{"input_ids": [' + b"[]," * 300_000 + b"[]]}"),
        Hostile(403, "/generate", plain, {"Host": "evil.example"}),
        Hostile(403, "/generate", plain, {"Origin": "https://evil.example"}),
        Hostile(415, "/generate", plain, {"Content-Type": "text/plain"}),
        Hostile(405, "/generate", b"", method="DELETE"),
        Hostile(404, "/no/such/place", plain),
    ]


HOSTILE = hostile_requests()


async def hostile(client: Client, rng: random.Random) -> Outcome:
    request = rng.choice(HOSTILE)
    headers = {"Content-Type": "application/json", **request.headers}
    url = client.url + request.path
    async with client.session.request(request.method, url, data=request.body, headers=headers) as response:
        if response.status != request.status:
            shown = request.body[:60]
            raise Lost(f"{request.method} {request.path} {shown!r}: status {response.status}, not {request.status}")
        return response.status


Kind = Callable[[Client, random.Random], Awaitable[Outcome]]
PERCENT: dict[Kind, int] = {
    native: 20,
    native_logprobs: 8,
    native_batch: 8,
    native_stream: 13,
    chat: 15,
    chat_stream: 15,
    completions_batch: 10,
    aborted_stream: 5,
    aborted: 5,
    hostile: 1,
}
