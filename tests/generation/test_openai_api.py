"""`api: openai`: answers of chat completions become rows; no reply harms, no key is written down, nothing is lost."""

import asyncio
import contextlib
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from helpers.servers import serving_app
from helpers.waiting import wait_for
from micota_fast.chat.thoughts import join_thought
from micota_fast.cli import main
from micota_fast.common.records import Problem, write_rows
from micota_fast.config import loader
from micota_fast.config.corpus import FilterSettings
from micota_fast.config.generation import GenerateConfig, OpenAIConfig
from micota_fast.errors import InputError
from micota_fast.generation import fleet, generate
from micota_fast.generation.request import derive_seed
from micota_fast.sources.completions import read_completions

PROBLEMS, MODEL, KEY = 6, "org/teacher", "sk-very-secret-0123456789"
ROUTE = "/v1/chat/completions"
Reply = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "BACKOFF_S", (0.005, 0.05))
    monkeypatch.setattr(fleet, "REMOTE_POLL_S", 0.05)
    monkeypatch.setenv("TEACHER_KEY", KEY)


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., GenerateConfig]:
    problems = tmp_path / "problems.jsonl"
    write_rows(problems, [Problem(f"p{i}", f"{i} + 1 =", str(i + 1)) for i in range(PROBLEMS)])

    def made(url: str, **more: Any) -> GenerateConfig:
        settings: dict[str, Any] = {"model": MODEL, "max_new_tokens": 50, "out": str(tmp_path / "out.jsonl")}
        settings |= {"problems": str(problems), "openai": OpenAIConfig(key_env="TEACHER_KEY")}
        return GenerateConfig(url=url, api="openai", **(settings | more))

    return made


def text_of(body: dict[str, Any]) -> str:
    return f"It is \\boxed{{{body['messages'][-1]['content'].split()[0]}}}, by {body.get('seed')}."


def whole(message: dict[str, Any], reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
    return {"object": "chat.completion", "choices": [choice], "usage": usage(), **more}


def usage(**more: Any) -> dict[str, Any]:
    return {"prompt_tokens": 20, "completion_tokens": 30, "total_tokens": 50, **more}


def events(message: dict[str, Any], reason: str | None = "stop", used: Any = ..., done: bool = True) -> bytes:
    """A stream of the message's texts, three characters each, with a proxy's comments in between."""
    parts = [{"role": "assistant", "content": ""}]
    parts += [{key: text[i : i + 3]} for key, text in message.items() for i in range(0, len(text), 3)]
    choices: list[Any] = [[{"index": 0, "delta": part, "finish_reason": None}] for part in parts]
    choices.append([{"index": 0, "delta": {}, "finish_reason": reason}])
    sent: list[Any] = [{"choices": choice} for choice in choices]
    if used is not None:
        sent.append({"choices": [], "usage": usage() if used is ... else used})
    lines = ["data: " + json.dumps(event) for event in sent] + (["data: [DONE]"] if done else [])
    return "\n\n".join([": keep alive", *lines, ""]).encode()


def stream(content: bytes) -> web.Response:
    return web.Response(body=content, content_type="text/event-stream")


async def answers(_: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    message = {"content": text_of(body)}
    return stream(events(message)) if body.get("stream") else web.json_response(whole(message))


class Teacher:
    """A server of chat completions: what it was asked, and how it replies to the first tries of each request."""

    def __init__(self, reply: Reply = answers, first: Reply | None = None, tries: int = 1, **models: Any) -> None:
        self.asked: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.named = math.inf  # when it was first asked for its models
        self.headers: list[dict[str, str]] = []
        self._reply, self._first, self._tries = reply, first, tries
        self._seen: Counter[str] = Counter()
        self._models = models or {"data": [{"id": MODEL}]}

    async def chat(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.asked.append(body)
        self.times.append(time.monotonic())
        self.headers.append(dict(http.headers))
        name = f"{body['messages']} {body.get('seed')}"
        self._seen[name] += 1
        if self._first is not None and self._seen[name] <= self._tries:
            return await self._first(http, body)
        return await self._reply(http, body)

    async def models(self, http: web.Request) -> web.StreamResponse:
        self.named = min(self.named, time.monotonic())
        status = self._models.get("status", 200)
        return web.json_response(self._models, status=status)

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        app = web.Application()
        app.router.add_post(ROUTE, self.chat)
        app.router.add_get("/v1/models", self.models)
        with serving_app(app) as url:
            yield url


# -- what is asked, and what becomes of the answers ------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [True, False])
def test_each_sample_is_asked_for_with_its_seed_and_becomes_a_row(
    streamed: bool, configure: Callable[..., GenerateConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Teacher()
    options = OpenAIConfig(
        key_env="TEACHER_KEY",
        stream=streamed,
        dollars_per_million_prompt_tokens=2,
        dollars_per_million_completion_tokens=10,
    )
    with teacher.serving() as url:
        config = configure(url, samples=2, temperature=0.6, top_p=0.9, stop=["\n\n\n"], openai=options)
        generate.run(config)
    rows = read_completions(config.out)
    assert [(row.id, row.sample) for row in rows] == [(f"p{i}", s) for i in range(PROBLEMS) for s in range(2)]
    for row in rows:
        assert row.seed == derive_seed(0, row.id, row.sample)
        assert row.completion == f"It is \\boxed{{{row.id[1:]}}}, by {row.seed}."
        assert (row.finish_reason, row.prompt_tokens, row.completion_tokens) == ("stop", 20, 30)
        assert row.model == MODEL
    body = next(body for body in teacher.asked if body["seed"] == rows[0].seed)
    assert body.pop("stream", False) is streamed
    assert body.pop("stream_options", {"include_usage": True}) == {"include_usage": True}
    system, user = body.pop("messages")
    assert (system["role"], user["role"], user["content"][:5]) == ("system", "user", "0 + 1")
    assert body == {
        "model": MODEL,
        "max_tokens": 50,
        "temperature": 0.6,
        "top_p": 0.9,
        "stop": ["\n\n\n"],
        "seed": rows[0].seed,
    }
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in teacher.headers)
    told = capsys.readouterr()
    assert "240 prompt tokens and 360 completion tokens: $0.00 at $2 and $10 per million" in told.out
    assert "it returns no token ids" in told.err
    meters = json.loads(Path(f"{config.out}.meters.json").read_bytes())
    assert meters["dollars"] == pytest.approx((240 * 2 + 360 * 10) / 1e6)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_a_thought_that_comes_apart_is_joined_with_the_answer(
    key: str, streamed: bool, configure: Callable[..., GenerateConfig]
) -> None:
    async def thinks(_: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        message = {key: "\nOne and one.\n", "content": "\n\nTwo."}
        return stream(events(message)) if streamed else web.json_response(whole(message))

    with Teacher(thinks).serving() as url:
        config = configure(url, openai=OpenAIConfig(stream=streamed))
        generate.run(config)
    texts = {row.completion for row in read_completions(config.out)}
    assert texts == {"<think>\nOne and one.\n</think>\n\nTwo."}


@pytest.mark.parametrize(
    ("thought", "answer", "ended", "text"),
    [
        ("", "Two.", True, "Two."),
        ("", "", True, ""),
        (" \n", "Two.", True, "Two."),
        ("So.", "Two.", False, "<think>\nSo.\n</think>\n\nTwo."),
        ("So.", "", True, "<think>\nSo.\n</think>\n\n"),
        ("So", "", False, "<think>\nSo"),
        ("", "So.\n</think>\n\nTwo.", True, "<think>\nSo.\n</think>\n\nTwo."),
        ("", "<think>\nSo.\n</think>\n\nTwo.", True, "<think>\nSo.\n</think>\n\nTwo."),
    ],
)
def test_a_completion_has_its_thought_in_one_pair_of_tags(thought: str, answer: str, ended: bool, text: str) -> None:
    assert join_thought(thought, answer, ended) == text


def test_an_answer_that_is_withheld_is_a_row_and_the_filter_names_the_reason(
    configure: Callable[..., GenerateConfig], tmp_path: Path
) -> None:
    async def withholds(_: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if "0 +" in body["messages"][-1]["content"]:
            return stream(events({"content": "I"}, "content_filter"))
        error = {"message": "The prompt triggered our policy.", "code": "content_filter"}
        return web.json_response({"error": error}, status=400)

    with Teacher(withholds).serving() as url:
        config = configure(url, accept=FilterSettings(require_correct=False))
        generate.run(config)
    assert {row.finish_reason for row in read_completions(config.out)} == {"content_filter"}
    corpus = tmp_path / "corpus.jsonl"
    assert main(["filter", f"--set=completions={config.out}", f"--set=out={corpus}"]) == 0
    rejected = json.loads(Path(f"{corpus}.counts.json").read_bytes())["rejected"]
    assert {reason: number for reason, number in rejected.items() if number} == {"content_filter": PROBLEMS}


def test_what_a_server_refuses_by_name_is_left_out_or_called_by_its_other_name(
    configure: Callable[..., GenerateConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    async def strict(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        for key, message in {
            "max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            "seed": "Extra inputs are not permitted: seed",
            "stream_options": "stream_options: unknown field",
        }.items():
            if key in body:
                return web.json_response({"error": {"message": message}}, status=422)
        return await answers(http, body)

    teacher = Teacher(strict)
    with teacher.serving() as url:
        config = configure(url, temperature=1.0)
        generate.run(config)
    rows = read_completions(config.out)
    assert [row.seed for row in rows] == [None] * PROBLEMS
    assert teacher.asked[-1]["max_completion_tokens"] == 50
    assert capsys.readouterr().err.count("takes no seeds") == 1


def test_a_server_that_counts_no_tokens_is_refused_with_the_remedy(configure: Callable[..., GenerateConfig]) -> None:
    async def uncounted(_: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return stream(events({"content": "Two."}, used=None))

    with Teacher(uncounted).serving() as url, pytest.raises(InputError, match=r"set `openai\.stream: false`"):
        generate.run(configure(url))


# -- replies that would harm -----------------------------------------------------------------------------------------


def sends(content: bytes, kind: str = "text/event-stream", status: int = 200, **headers: str) -> Reply:
    async def reply(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.Response(body=content, content_type=kind, status=status, headers=headers)

    return reply


async def drops(http: web.Request, _: dict[str, Any]) -> web.StreamResponse:
    transport = http.transport
    assert isinstance(transport, asyncio.Transport)
    transport.abort()
    return web.Response()


def data(value: str) -> bytes:
    return b"data: " + value.encode() + b"\n\n"


SAID = {"content": "Two."}
JSON = "application/json"
REPLIES: dict[str, tuple[Reply, str]] = {
    "500": (sends(b'{"error": {"message": "out of memory"}}', JSON, 500), "HTTP 500: out of memory"),
    "a proxy's page": (sends(b"<html>Bad gateway</html>", "text/html", 502), "HTTP 502: <html>"),
    "a page with status 200": (sends(b"<html>", "text/html"), "its answer"),
    "a connection that ends": (drops, "ServerDisconnectedError"),
    "half a stream": (sends(events(SAID)[:200]), "not JSON"),
    "a stream without its end": (sends(events(SAID, used=None, done=False)), "broke off"),
    "an empty stream": (sends(b""), "broke off"),
    "an error in the stream": (sends(data('{"error": {"message": "preempted"}}')), "preempted"),
    "an endless body": (sends(b"x" * (3 << 20), JSON), "more than"),
    "a compressed body": (sends(gzip.compress(b"{}"), JSON, **{"Content-Encoding": "gzip"}), "compressed"),
    "no JSON in an event": (sends(data("{")), "an event of its answer"),
    "an event that is a list": (sends(data("[]")), "an event of its answer"),
    "no choices": (sends(json.dumps({"usage": usage()}).encode(), JSON), "not OpenAI's: KeyError"),
    "choices that are empty": (sends(json.dumps(whole(SAID) | {"choices": []}).encode(), JSON), "not OpenAI's"),
    "a choice that is none": (sends(data('{"choices": [5]}')), "not OpenAI's"),
    "a text that is none": (sends(events(SAID).replace(b'"Two"', b"[2]")), "`content` is [2]"),
    "no reason": (sends(events(SAID, None)), "has no `finish_reason`"),
    "a reason that is none": (sends(events(SAID, "tool_calls")), "ended the answer with 'tool_calls'"),
    "NaN tokens": (sends(events(SAID).replace(b'"completion_tokens": 30', b'"completion_tokens": NaN')), "NaN"),
    "negative tokens": (sends(events(SAID, used=usage(completion_tokens=-1))), "an impossible `usage`"),
    "a bool for tokens": (sends(events(SAID, used=usage(completion_tokens=True))), "an impossible `usage`"),
    "too many tokens": (sends(events(SAID, used=usage(prompt_tokens=1 << 40))), "an impossible `usage`"),
    "a usage that is none": (sends(events(SAID, used=[1])), "an impossible `usage`"),
    "half a character": (sends(data('{"choices": [{"delta": {"content": "\\ud800"}}]}')), "half a character"),
}


@pytest.mark.parametrize("case", REPLIES)
def test_a_reply_that_cannot_be_is_asked_for_again(
    case: str, configure: Callable[..., GenerateConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    reply, why = REPLIES[case]
    teacher = Teacher(first=reply)
    with teacher.serving() as url:
        config = configure(url)
        generate.run(config)
    assert [row.completion for row in read_completions(config.out)] == [
        f"It is \\boxed{{{i}}}, by None." for i in range(PROBLEMS)
    ]
    assert len(teacher.asked) == 2 * PROBLEMS
    assert why in capsys.readouterr().err


def test_a_redirect_is_not_followed_so_neither_prompts_nor_the_key_go_elsewhere(
    configure: Callable[..., GenerateConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = Teacher()
    with elsewhere.serving() as other:

        async def redirects(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
            raise web.HTTPTemporaryRedirect(f"{other}{ROUTE}?key={KEY}")

        with Teacher(first=redirects).serving() as url:
            config = configure(url)
            generate.run(config)
    assert elsewhere.asked == []
    assert "redirects are not followed" in (told := capsys.readouterr().err)
    assert KEY not in told
    assert len(read_completions(config.out)) == PROBLEMS


@pytest.mark.parametrize("date", [False, True])
def test_a_server_that_asks_for_time_is_given_it(date: bool, configure: Callable[..., GenerateConfig]) -> None:
    async def busy(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        now = time.time()
        header = {
            "Retry-After": formatdate(now + 1, usegmt=True) if date else "1",
            "Date": formatdate(now, usegmt=True),
        }
        return web.json_response({"error": {"message": "slow down"}}, status=429, headers=header)

    teacher = Teacher(first=busy)
    with teacher.serving() as url:
        config = configure(url, concurrency=PROBLEMS)
        generate.run(config)
    assert len(read_completions(config.out)) == PROBLEMS
    refused, answered = teacher.times[:PROBLEMS], teacher.times[PROBLEMS:]
    assert min(answered) - max(refused) > 0.9


def test_a_server_that_asks_for_long_is_not_given_up_meanwhile(
    configure: Callable[..., GenerateConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "PATIENCE_URL_S", 0.2)

    async def busy(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": "slow down"}, status=503, headers={"Retry-After": "0.7"})

    with Teacher(first=busy).serving() as url:
        config = configure(url)
        generate.run(config)
    assert len(read_completions(config.out)) == PROBLEMS


def test_a_server_that_refuses_for_want_of_credit_ends_the_run_with_what_it_has(
    configure: Callable[..., GenerateConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "PATIENCE_URL_S", 0.3)

    async def spent(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if "0 +" in body["messages"][-1]["content"]:
            return await answers(http, body)
        return web.json_response({"error": {"message": "You exceeded your current quota"}}, status=429)

    why = r"exceeded your current quota\); 1 completions are kept"
    with Teacher(spent).serving() as url, pytest.raises(InputError, match=why):
        generate.run(configure(url))


def test_requests_keep_to_the_rate_that_is_given(configure: Callable[..., GenerateConfig]) -> None:
    teacher = Teacher()
    with teacher.serving() as url:
        generate.run(configure(url, samples=3, temperature=1.0, openai=OpenAIConfig(requests_per_minute=600)))
    assert len(teacher.asked) == 18
    # Ten in a burst, then one in 0.1 s. The first was sent after the server had said which models it has.
    assert teacher.times[-1] - teacher.named > 0.7


# -- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_is_written_nowhere_though_the_server_repeats_it(
    configure: Callable[..., GenerateConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    async def repeats(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": f"overloaded, dear {KEY}"}}, status=500)

    async def echoes(_: web.Request, __: dict[str, Any]) -> web.StreamResponse:
        return stream(events({"content": f"Your key is {KEY}."}))

    with Teacher(echoes, repeats).serving() as url:
        config = configure(url)
        generate.run(config)
    assert {row.completion for row in read_completions(config.out)} == {"Your key is [key]."}
    told = capsys.readouterr()
    assert "overloaded, dear [key]" in told.err
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert not any(KEY.encode() in content for content in [*written, told.out.encode(), told.err.encode()])


def test_a_key_that_is_refused_is_an_error_that_names_its_variable(configure: Callable[..., GenerateConfig]) -> None:
    unknown = {"status": 401, "error": {"message": f"Incorrect API key provided: {KEY}"}}
    with Teacher(**unknown).serving() as url, pytest.raises(InputError) as caught:
        generate.run(configure(url))
    assert "HTTP 401: Incorrect API key provided: [key]; see that $TEACHER_KEY is its key" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "why"),
    [(None, "TEACHER_KEY is not set"), ("  ", "TEACHER_KEY is not set"), ("sk-a b", r"\$TEACHER_KEY holds a char")],
)
def test_a_key_that_cannot_be_is_refused_before_anything_is_asked(
    value: str | None, why: str, configure: Callable[..., GenerateConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEACHER_KEY")
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    teacher = Teacher()
    with teacher.serving() as url, pytest.raises(InputError, match=why) as caught:
        generate.run(configure(url))
    assert "sk-a" not in str(caught.value)
    assert teacher.asked == []


# -- what is refused before a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"thinking_budget": 5}, "`thinking_budget` needs SGLang's native API"),
        ({"top_logprobs": 2}, "`top_logprobs` needs SGLang's native API"),
        ({"chat": {"use_template": False}}, "`chat.use_template: false` needs SGLang's native API"),
        ({"url": None}, "`api: openai` needs `url`"),
        ({"openai": {"key_env": KEY}}, "`key_env` must be the name of an environment variable"),
        ({"openai": {"requests_per_minute": 0}}, "`requests_per_minute` must be at least"),
        ({"openai": {"tokens_per_minute": -1}}, "`tokens_per_minute` must be at least"),
        ({"openai": {"dollars_per_million_prompt_tokens": 1}}, "goes with `dollars_per_million_completion_tokens`"),
        ({"openai": {"dollars_per_million_prompt_tokens": -1}}, "must be at least 0"),
        ({"api": "anthropic"}, "'anthropic'"),
    ],
)
def test_what_the_api_cannot_give_is_refused_by_name(options: dict[str, Any], why: str) -> None:
    values = {"model": MODEL, "problems": "p.jsonl", "out": "o.jsonl", "url": "http://a/v1", "api": "openai"}
    with pytest.raises(InputError) as caught:
        loader.build(GenerateConfig, values | options, "a test")
    assert why in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_key_given_for_the_name_of_its_variable_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", f"--set=openai.key_env={KEY}", "--set=model=m", "--set=problems=p", "--set=out=o"]) == 2
    told = capsys.readouterr()
    assert "`key_env` must be the name" in told.err
    assert KEY not in told.err + told.out


def test_a_server_of_another_model_is_refused_and_one_of_many_is_trusted(
    configure: Callable[..., GenerateConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    why = f"/v1 serves org/another, but `model` is {MODEL}"
    with Teacher(data=[{"id": "org/another"}]).serving() as url, pytest.raises(InputError, match=why):
        generate.run(configure(url))
    teacher = Teacher(data=[{"id": f"org/{i}"} for i in range(50)])
    with teacher.serving() as url:
        generate.run(configure(url))
    assert "does not say which model it serves: `model` is taken on trust" in capsys.readouterr().err


def test_a_model_is_asked_for_by_the_name_under_which_the_server_lists_it(
    configure: Callable[..., GenerateConfig],
) -> None:
    teacher = Teacher(data=[{"id": "/mnt/elsewhere/teacher"}])
    with teacher.serving() as url:
        generate.run(configure(f"{url}/v1/"))
    assert {body["model"] for body in teacher.asked} == {"/mnt/elsewhere/teacher"}


# -- interrupted -----------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_resumes_and_no_answer_is_paid_twice(
    configure: Callable[..., GenerateConfig], tmp_path: Path
) -> None:
    at_once, samples = 3, 8

    killed = threading.Event()

    async def some(http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Until the client is killed, no more than it waits for."""
        while len(teacher.asked) >= 3 * at_once and not killed.is_set():
            await asyncio.sleep(0.005)
        return await answers(http, body)

    teacher = Teacher(some)
    with teacher.serving() as url:
        config = configure(url, samples=samples, temperature=1.0, concurrency=at_once)
        path = tmp_path / "generate.yaml"
        path.write_text(loader.dump(config))
        command = [sys.executable, "-m", "micota_fast", "generate", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            wait_for(lambda: process.poll() is not None or len(teacher.asked) >= 3 * at_once)
            assert process.poll() is None, process.communicate()
            os.kill(process.pid, signal.SIGKILL)
        killed.set()
        journal = b"".join(file.read_bytes() for file in Path(f"{config.out}.parts").iterdir())
        assert KEY.encode() not in journal
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming after" in done.stderr
    rows = read_completions(config.out)
    assert [(row.id, row.sample) for row in rows] == [(f"p{i}", s) for i in range(PROBLEMS) for s in range(samples)]
    assert all(row.completion.endswith(f"by {row.seed}.") for row in rows)
    assert len(teacher.asked) <= PROBLEMS * samples + at_once
    assert generate.Generation(config.problems, config, config.out).is_finished()


def test_a_finished_corpus_belongs_to_the_api_and_the_name_it_was_made_with(
    configure: Callable[..., GenerateConfig],
) -> None:
    teacher = Teacher()
    with teacher.serving() as url:
        config = configure(url)
        generate.run(config)
        asked = len(teacher.asked)
        config.openai = OpenAIConfig(key_env="TEACHER_KEY", requests_per_minute=5, stream=False)
        generate.run(config)
        assert len(teacher.asked) == asked
        config.model = "org/other"
        with pytest.raises(InputError, match="it differs in: model"):
            generate.run(config)
    made_by = json.loads(Path(f"{config.out}.meta.json").read_bytes())["fingerprint"]
    assert (made_by["api"], made_by["model"]) == ("openai", MODEL)
    assert "serve" not in made_by
