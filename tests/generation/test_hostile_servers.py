"""The client against servers that would harm it: they are named, their work goes elsewhere, nothing is believed."""

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from helpers.faulty_server import FaultyServer, Plan, answer
from helpers.ports import free_port
from helpers.servers import Handler, serving_app
from helpers.waiting import soon, wait_for
from micota_fast.common.records import Problem, write_rows
from micota_fast.config.generation import ChatConfig, GenerateConfig
from micota_fast.errors import InputError
from micota_fast.generation import fleet, generate
from micota_fast.generation.endpoint import Endpoint
from micota_fast.generation.sglang_servers import SGLangServers
from micota_fast.sources.completions import read_completions

PROBLEMS = 24
MODEL_PAGE, INFO_PAGE, LOADS_PAGE = "/get_model_info", "/server_info", "/v1/loads"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "BACKOFF_S", (0.005, 0.05))
    monkeypatch.setattr(fleet, "POLL_S", 0.02)
    monkeypatch.setattr(fleet, "MODEL_CHECK_S", 0.02)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    write_rows(path, [Problem(f"p{i}", f"{i} + {i * i} =", str(i + i * i)) for i in range(PROBLEMS)])
    return path


@pytest.fixture
def request_to(qwen2_checkpoint: Path, problems: Path, tmp_path: Path) -> Any:
    def made(*urls: str, **more: Any) -> GenerateConfig:
        settings: dict[str, Any] = {"max_new_tokens": 60, "concurrency": 4, "out": str(tmp_path / "out.jsonl")}
        settings |= {"model": str(qwen2_checkpoint), "problems": str(problems)}
        chat = ChatConfig(system=None, prompt="{problem}")
        return GenerateConfig(url=list(urls), chat=chat, **(settings | more))

    return made


class Clock:
    """A module's `time`, which a test puts forward."""

    def __init__(self) -> None:
        self.forward_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.forward_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which a run judges for how long its servers have been silent."""
    made = Clock()
    monkeypatch.setattr(fleet, "time", made)
    return made


@pytest.fixture
def good(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that answers once another one has failed: it cannot have done all the work before that is asked."""
    failed = threading.Event()
    say_failing = fleet.Fleet.say_failing

    def noted(self: fleet.Fleet, endpoint: Endpoint, why: str) -> None:
        say_failing(self, endpoint, why)
        failed.set()

    async def generate_page(http: web.Request) -> web.StreamResponse:
        while not failed.is_set():
            await asyncio.sleep(0.005)
        return web.json_response(answer(await http.json()))

    monkeypatch.setattr(fleet.Fleet, "say_failing", noted)
    with serving_app(app(generate=generate_page)) as url:
        yield url


def app(**pages: Handler) -> web.Application:
    """A server that answers well, but for the pages given by their path, with - and / as _."""

    async def generate_page(http: web.Request) -> web.StreamResponse:
        return web.json_response(answer(await http.json()))

    made = web.Application()
    made.router.add_post("/generate", pages.pop("generate", generate_page))
    for name, handler in pages.items():
        made.router.add_get({"model": MODEL_PAGE, "info": INFO_PAGE, "loads": LOADS_PAGE}[name], handler)
    return made


def sends(body: bytes, **headers: str) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(body=body, headers=headers)

    return handler


def changed(**meta: Any) -> Handler:
    """A good answer but for these keys; `text` and `output_ids` are its own, the others of its meta_info."""

    async def handler(http: web.Request) -> web.StreamResponse:
        given = answer(await http.json())
        for key, value in meta.items():
            (given if key in given else given["meta_info"])[key] = value
        return web.Response(body=json.dumps(given).encode())

    return handler


async def counts_one_more(http: web.Request) -> web.StreamResponse:
    given = answer(await http.json())
    given["meta_info"]["completion_tokens"] += 1
    given["meta_info"]["completion_tokens"] %= 61
    return web.json_response(given)


ANSWERS: dict[str, tuple[Handler, str]] = {
    "deep lists": (sends(b"[" * 100_000), "nested more than"),
    "deep objects": (sends(b'{"text":' * 100_000), "nested more than"),
    "a long number": (sends(b'{"text": ' + b"9" * 100_000 + b"}"), "100000 digits"),
    "a gzip bomb": (sends(gzip.compress(bytes(1 << 26)), **{"Content-Encoding": "gzip"}), "compressed"),
    "more tokens than asked for": (
        changed(completion_tokens=61, output_ids=[]),
        "61 tokens, though at most 60 were asked for",
    ),
    "a negative count": (changed(completion_tokens=-1), "-1 tokens"),
    "a bool for a count": (changed(completion_tokens=True), "not SGLang's"),
    "a float for a count": (changed(completion_tokens=3.0), "not SGLang's"),
    "an infinite number": (changed(e2e_latency=float("inf")), "Infinity is not a number"),
    "ids that are not as many": (counts_one_more, "`output_ids`, but a count"),
    "an id that is none": (changed(completion_tokens=2, output_ids=[5, 1 << 40]), "token id 1099511627776"),
    "a bool for an id": (changed(completion_tokens=2, output_ids=[5, True]), "token id True"),
    "ids that are no list": (changed(completion_tokens=3, output_ids="abc"), "not SGLang's"),
    "half a character": (changed(text="a\ud800"), "half a character"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_that_cannot_be_goes_to_another_server(
    case: str, request_to: Any, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    handler, why = ANSWERS[case]
    with serving_app(app(generate=handler)) as bad:
        request = request_to(bad, good)
        generate.run(request)
    check_complete(request, bad)
    told = capsys.readouterr().err
    assert f"{bad}: " in told
    assert why in told


def check_complete(request: GenerateConfig, bad: str) -> None:
    rows = read_completions(request.out)
    assert [row.id for row in rows] == [f"p{i}" for i in range(PROBLEMS)]
    assert all(row.finish_reason in ("stop", "length") for row in rows)
    by = json.loads(Path(f"{request.out}.meters.json").read_bytes())["answered_by"]
    assert by[bad] == 0


@pytest.mark.parametrize("logprobs", [0, 2])
def test_a_reply_without_end_is_broken_off_at_what_was_asked_for(
    logprobs: int, request_to: Any, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sent: list[int] = []

    async def endless(http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(http)
        sent.append(0)
        place = len(sent) - 1
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b" " * 65536)
                sent[place] += 65536
        return response

    with serving_app(app(generate=endless)) as bad:
        request = request_to(bad, good, top_logprobs=logprobs)
        generate.run(request)
    check_complete(request, bad)
    assert "bytes that a reply to /generate can have" in capsys.readouterr().err
    assert sent
    assert max(sent) < 8 << 20  # 1 MiB and what 60 tokens can have, and what the sockets hold


@pytest.mark.parametrize("page", ["generate", "model", "info", "loads"])
@pytest.mark.parametrize("status", [301, 303, 307, 308])
def test_a_redirect_is_not_followed(
    page: str, status: int, request_to: Any, good: str, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere: list[str] = []

    async def anything(http: web.Request) -> web.StreamResponse:
        elsewhere.append(await http.text())
        return web.json_response({})

    trap = web.Application()
    trap.router.add_route("*", "/{path:.*}", anything)

    async def redirect(http: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": f"http://me:secret@{trap_url[7:]}/x"})

    with serving_app(trap) as trap_url, serving_app(app(**{page: redirect})) as bad:
        request = request_to(bad, good)
        generate.run(request)
    check_complete(request, bad)
    told = capsys.readouterr().err
    assert elsewhere == []
    assert f"{bad}: HTTP {status}: it redirects " in told
    assert f"to '{trap_url}/x'" in told


PAGES: dict[str, tuple[str, Handler, str]] = {
    "a model with NUL": ("model", sends(b'{"model_path": "a\\u0000b"}'), "'model_path' cannot be a name"),
    "a model with an escape": ("model", sends(b'{"model_path": "a\\u001b[2J"}'), "'model_path' cannot be a name"),
    "half a model": ("model", sends(b'{"model_path": "\\ud800"}'), "half a character"),
    "a deep model": ("model", sends(b"[" * 100_000), "nested more than"),
    "a model's list": ("model", sends(b'["model_path"]'), "expected a JSON object"),
    "a gzip bomb": ("model", sends(gzip.compress(bytes(1 << 26)), **{"Content-Encoding": "gzip"}), "compressed"),
    "an infinite context": ("info", sends(b'{"context_length": 1e999}'), "1e999 is too large"),
    "a negative context": ("info", sends(b'{"context_length": -5}'), "'context_length' must be a whole number from 1"),
    "a context of true": ("info", sends(b'{"context_length": true}'), "'context_length' must be a whole number from 1"),
    "a limit of nothing": ("info", sends(b'{"max_req_input_len": 0}'), "'max_req_input_len' must be a whole number"),
    "too many GPUs": ("info", sends(b'{"tp_size": 1%s}' % (b"0" * 290)), "'tp_size' must be a whole number from 1"),
    "large settings": ("info", sends(b" " * (5 << 20) + b"{}"), "bytes that a reply to /server_info can have"),
    "infinite loads": ("loads", sends(b'{"loads": [{"num_running_reqs": Infinity}]}'), "Infinity is not a number"),
    "deep loads": ("loads", sends(b'{"loads":' * 100_000), "nested more than"),
}


@pytest.mark.parametrize("case", PAGES)
def test_a_server_that_cannot_be_what_it_says_gets_no_work(
    case: str, request_to: Any, good: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, handler, why = PAGES[case]
    with serving_app(app(**{page: handler})) as bad:
        request = request_to(bad, good)
        generate.run(request)
        check_complete(request, bad)
        told = capsys.readouterr().err
        assert f"{bad}: " in told
        assert why in told
    if page != "loads":
        return
    with serving_app(app(**{page: sends(b'{"loads": [{"num_running_reqs": -1, "num_waiting_reqs": 1}]}')})) as odd:
        generate.run(request_to(odd, out=str(tmp_path / "odd.jsonl")))  # it tells nothing that can be believed


def test_a_server_that_tells_only_a_folder_is_not_taken_for_one_with_an_adapter(qwen2_checkpoint: Path) -> None:
    async def asked(url: str) -> str | None:
        async with aiohttp.ClientSession() as session:
            servers = SGLangServers(f"{qwen2_checkpoint}+adapter", qwen2_checkpoint, 5)
            return await servers.served_model(Endpoint(url, 1), session)

    with (
        serving_app(app(model=sends(b'{"model_path": "/m"}'))) as url,
        pytest.raises(InputError, match=r"serves '/m' and does not tell its `served_model_name`, .*\+adapter"),
    ):
        asyncio.run(asked(url))
    with serving_app(app(model=sends(b'{"model_path": "/m", "served_model_name": "org/m"}'))) as url:
        assert asyncio.run(asked(url)) == "org/m"
    with serving_app(app()) as url:
        assert asyncio.run(asked(url)) is None


# -- a server that changes its model ---------------------------------------------------------------------------------


class Changing:
    """Answers `first` requests, then waits until it was asked twice which model it serves, and becomes another."""

    def __init__(self, model: Path, other: Path, first: int) -> None:
        self.serves, self._other, self._first = str(model), str(other), first
        self.answered = self.checks = 0
        self._checks_then: int | None = None

    def app(self) -> web.Application:
        return app(generate=self._generate, model=self._model)

    async def _model(self, _: web.Request) -> web.StreamResponse:
        self.checks += 1
        return web.json_response({"model_path": self.serves})

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.answered += 1
        if self.answered > self._first:
            if self._checks_then is None:
                self._checks_then = self.checks
            while self.checks < self._checks_then + 2:
                await asyncio.sleep(0.005)
            self.serves = self._other
        return web.json_response(answer(body))


def test_what_a_server_gave_after_it_changed_its_model_is_thrown_away(
    request_to: Any, qwen2_checkpoint: Path, qwen3_checkpoint: Path, tmp_path: Path
) -> None:
    request = request_to("http://127.0.0.1:9", concurrency=4)
    server = Changing(qwen2_checkpoint, qwen3_checkpoint, 8)
    with serving_app(server.app()) as url:
        request.url = url
        with pytest.raises(InputError) as caught:
            generate.run(request)
        kept = tmp_path / "out.jsonl.parts"
        assert str(caught.value).startswith(
            f"{url} serves {qwen3_checkpoint}, but `model` is {qwen2_checkpoint}: it has"
        )
        assert f"are thrown away; 8 are kept in {kept}" in str(caught.value)
        lines = b"".join(path.read_bytes() for path in kept.glob("0*.jsonl")).splitlines()
        assert len(lines) == 8
        assert not Path(request.out).exists()
    with serving_app(app()) as right:
        clean = request_to(right, out=str(tmp_path / "clean.jsonl"))
        generate.run(clean)
        generate.run(request_to(right))
    assert Path(request.out).read_bytes() == Path(clean.out).read_bytes()


def test_a_model_that_changed_is_noticed_before_the_end(
    request_to: Any, qwen2_checkpoint: Path, qwen3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "MODEL_CHECK_S", 1e9)

    served = [str(qwen2_checkpoint), str(qwen3_checkpoint)]  # as it comes up, and at the end

    async def model(_: web.Request) -> web.StreamResponse:
        return web.json_response({"model_path": served.pop(0)})

    with serving_app(app(model=model)) as url, pytest.raises(InputError, match=r"24 completions, .* 0 are kept"):
        generate.run(request_to(url))
    assert served == []
    assert not Path(tmp_path / "out.jsonl").exists()


def test_a_model_that_changed_is_noticed_when_the_run_fails_for_another_reason(
    request_to: Any, qwen2_checkpoint: Path, qwen3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new model refuses what the old one took, between two questions."""
    monkeypatch.setattr(fleet, "MODEL_CHECK_S", 1e9)
    answered = 0

    async def generate_page(http: web.Request) -> web.StreamResponse:
        nonlocal answered
        answered += 1
        if answered > 8:
            return web.json_response({"error": {"message": "too long"}}, status=400)
        return web.json_response(answer(await http.json()))

    async def model(_: web.Request) -> web.StreamResponse:
        return web.json_response({"model_path": str(qwen3_checkpoint if answered else qwen2_checkpoint)})

    told = f"serves {qwen3_checkpoint}, but .* 0 are kept"
    with serving_app(app(generate=generate_page, model=model)) as url, pytest.raises(InputError, match=told):
        generate.run(request_to(url, concurrency=1))
    assert not Path(tmp_path / "out.jsonl").exists()


def test_what_any_of_several_changed_servers_gave_is_thrown_away(
    request_to: Any, qwen2_checkpoint: Path, qwen3_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both change together, and the one that is asked first came up when the other had answered already."""
    monkeypatch.setattr(fleet, "MODEL_CHECK_S", 1e9)
    answered = {"late": 0, "early": 0}

    def server(name: str) -> web.Application:
        async def generate_page(http: web.Request) -> web.StreamResponse:
            while name == "early" and answered["early"] >= 8 and answered["late"] < 4:
                await asyncio.sleep(0.005)
            answered[name] += 1
            return web.json_response(answer(await http.json()))

        async def model(_: web.Request) -> web.StreamResponse:
            if name == "late" and answered["early"] < 8:
                return web.Response(status=503)
            return web.json_response({"model_path": str(qwen3_checkpoint if answered["late"] else qwen2_checkpoint)})

        return app(generate=generate_page, model=model)

    with (
        serving_app(server("late")) as late,
        serving_app(server("early")) as early,
        pytest.raises(InputError, match=r"are thrown away; 0 are kept"),
    ):
        generate.run(request_to(late, early, concurrency=1))


def test_a_server_that_comes_back_with_another_model_is_noticed(
    request_to: Any, qwen2_checkpoint: Path, qwen3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "MODEL_CHECK_S", 1e9)
    ours = Plan(model=str(qwen2_checkpoint), delays_s=(0.05, 0.1))
    with FaultyServer(tmp_path, ours) as server:
        request = request_to(server.url, samples=40, temperature=1.0)  # more than are asked for before it is killed
        failures: list[str] = []

        def run() -> None:
            with pytest.raises(InputError) as caught:
                generate.run(request)
            failures.append(str(caught.value))

        thread = threading.Thread(target=run)
        thread.start()
        wait_for(lambda: len(server.asked) > 12)
        server.kill()
        server.start(Plan(model=str(qwen3_checkpoint)))
        thread.join(120)
    assert "it has changed its model during the run" in failures[0]
    assert failures[0].count(" 0 are kept") == 1


def test_a_server_that_is_lost_at_the_end_is_taken_on_trust(
    request_to: Any, qwen2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fleet, "MODEL_CHECK_S", 1e9)
    asked: list[int] = []

    async def model(http: web.Request) -> web.StreamResponse:
        asked.append(1)
        if len(asked) > 1:
            assert http.transport is not None
            http.transport.abort()
        return web.json_response({"model_path": str(qwen2_checkpoint)})

    with serving_app(app(model=model)) as url:
        request = request_to(url)
        generate.run(request)
    assert len(read_completions(request.out)) == PROBLEMS
    assert f"its last {PROBLEMS} answers are taken on trust" in capsys.readouterr().err


# -- addresses -------------------------------------------------------------------------------------------------------


def test_a_password_in_a_url_goes_to_the_server_and_nowhere_else(
    request_to: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed: list[str | None] = []

    async def generate_page(http: web.Request) -> web.StreamResponse:
        allowed.append(http.headers.get("Authorization"))
        return web.json_response(answer(await http.json()))

    with serving_app(app(generate=generate_page)) as plain:
        url = plain.replace("//", "//me:p%40ss-word@")
        generate.run(request_to(url))
        assert set(allowed) == {"Basic bWU6cEBzcy13b3Jk"}  # me:p@ss-word
        with pytest.raises(InputError, match="names a server twice"):
            generate.run(request_to(url, plain, out=str(tmp_path / "b.jsonl")))
    told = capsys.readouterr()
    everything = told.out + told.err
    nobody = f"http://me:p%40ss-word@127.0.0.1:{free_port()}"
    with pytest.raises(InputError) as caught:
        generate.run(request_to(nobody, out=str(tmp_path / "c.jsonl"), wait_for_server_s=0.4))
    for wrong in ("http://me:p%40ss-word@host:port", "me:p%40ss-word@host:1", "http://me:p/ss-word@host:1"):
        with pytest.raises(InputError, match="`url`: 'host:") as refused:
            generate.run(request_to(wrong, out=str(tmp_path / "d.jsonl")))
        everything += str(refused.value)
    everything += str(caught.value) + capsys.readouterr().err
    everything += "".join(path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl"))
    assert "ss-word" not in everything
    assert json.loads((tmp_path / "out.jsonl.meters.json").read_bytes())["answered_by"] == {plain: PROBLEMS}


@pytest.fixture
def silent() -> Iterator[str]:
    """It takes connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_servers_that_never_reply_end_the_run_soon_and_say_what_was_tried(request_to: Any, silent: str) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    with soon(), pytest.raises(InputError) as caught:
        generate.run(request_to(nobody, silent, wait_for_server_s=1.5))
    assert time.monotonic() - started >= 1.5
    assert "no server has replied within 1.5 s: " in str(caught.value)
    assert f"{nobody}: ClientConnectorError: " in str(caught.value)
    assert f"{silent}: no reply yet" in str(caught.value)
    assert "--set wait_for_server_s=" in str(caught.value)


def test_a_server_that_is_still_starting_has_more_time(request_to: Any, clock: Clock) -> None:
    """It says that it is not up yet until long after the time for the first reply."""
    asked = 0

    async def model(_: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked == 3:
            clock.forward_s = 100.0
        return web.Response(status=503 if asked < 6 else 404)

    with serving_app(app(model=model)) as url:
        request = request_to(url, wait_for_server_s=60.0)
        generate.run(request)
    assert asked >= 6
    assert len(read_completions(request.out)) == PROBLEMS


def test_a_server_that_has_replied_may_be_gone_for_longer(
    request_to: Any, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    downs: list[str] = []
    is_down = fleet.Fleet.is_down

    def noted(self: fleet.Fleet, endpoint: Endpoint, why: str) -> None:
        is_down(self, endpoint, why)
        downs.append(why)

    monkeypatch.setattr(fleet.Fleet, "is_down", noted)
    with FaultyServer(tmp_path, Plan(delays_s=(0.05, 0.1))) as server:
        request = request_to(server.url, samples=16, temperature=1.0, wait_for_server_s=60.0)
        thread = threading.Thread(target=generate.run, args=(request,))
        thread.start()
        wait_for(lambda: len(server.asked) > 8)
        server.kill()
        wait_for(lambda: downs)
        clock.forward_s, before = 100.0, len(downs)  # longer than the first reply may take
        wait_for(lambda: len(downs) > before + 1)
        server.start(Plan())
        thread.join(120)
    assert len(read_completions(request.out)) == PROBLEMS * 16
