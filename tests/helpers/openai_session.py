"""A session with OpenAI's SDK, in the environment that has it: `PYTHON openai_session.py URL MODEL`.

Prints what the SDK returned and raised as one JSON object, whose keys are the names of the functions below.
"""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openai

MESSAGES = [{"role": "user", "content": "A jar holds 6. Ann-3 Bob-5 Cid-1. How many modulo 10?"}]
PROMPTS = ["A jar holds 6.", "1 Ann+6=7"]
GREEDY = {"max_tokens": 24, "temperature": 0}


def models(client: "openai.OpenAI", model: str) -> Any:
    return [listed.id for listed in client.models.list()], client.models.retrieve(model).id


def chat(client: "openai.OpenAI", model: str) -> Any:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, logprobs=True, top_logprobs=2, seed=1, n=1, stop=["Zoe"], **GREEDY
    )
    return answer.model_dump()


def chat_stream(client: "openai.OpenAI", model: str) -> Any:
    options = {"include_usage": True}
    events = client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, stream_options=options, **GREEDY
    )
    return [event.model_dump() for event in events]


def text(client: "openai.OpenAI", model: str) -> Any:
    return client.completions.create(model=model, prompt=PROMPTS, echo=True, logprobs=2, **GREEDY).model_dump()


def text_stream(client: "openai.OpenAI", model: str) -> Any:
    options = {"include_usage": True}
    events = client.completions.create(model=model, prompt=PROMPTS, stream=True, stream_options=options, **GREEDY)
    return [event.model_dump() for event in events]


def closed_stream(client: "openai.OpenAI", model: str) -> Any:
    """Leaves after the first of 900 tokens."""
    body = {"ignore_eos": True}
    with client.completions.create(model=model, prompt="1", max_tokens=900, stream=True, extra_body=body) as events:
        return next(iter(events)).choices[0].finish_reason


def errors(client: "openai.OpenAI", model: str) -> Any:
    from openai import APIStatusError

    calls: dict[str, Callable[[], Any]] = {
        "temperature": lambda: client.completions.create(model=model, prompt="1", temperature=-1),
        "regex": lambda: client.completions.create(model=model, prompt="1", extra_body={"regex": "a"}),
        "messages": lambda: client.chat.completions.create(model=model, messages=[]),
        "max_tokens": lambda: client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=1 << 40),
        "prompt": lambda: client.completions.create(model=model, prompt="1 " * 2000),
        "model": lambda: client.models.retrieve("other"),
        "endpoint": lambda: client.embeddings.create(model=model, input="1"),
    }
    raised = {}
    for name, call in calls.items():
        try:
            call()
        except APIStatusError as error:
            raised[name] = [type(error).__name__, error.status_code, error.type, error.code, error.param]
    return raised


def main() -> None:
    from openai import OpenAI

    url, model = sys.argv[1:]
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    calls = (models, chat, chat_stream, text, text_stream, closed_stream, errors)
    print(json.dumps({call.__name__: call(client, model) for call in calls}))


if __name__ == "__main__":
    main()
