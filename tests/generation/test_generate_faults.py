"""The client against servers that fail: complete, once each, in order, the same bytes; no more asked than is needed."""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from helpers.disks import small_file_system
from helpers.faulty_server import FAULTS, FaultyServer, Plan, answer, expected, key
from helpers.ports import free_port
from helpers.servers import http_server
from helpers.waiting import wait_for
from micota_fast.chat.encoding import Chat
from micota_fast.common.records import Problem, write_rows
from micota_fast.config.corpus import FilterSettings
from micota_fast.config.generation import ChatConfig, GenerateConfig
from micota_fast.errors import InputError
from micota_fast.generation import answer_store, client, endpoint, fleet, generate
from micota_fast.generation.request import derive_seed
from micota_fast.generation.scores import decode_scores
from micota_fast.sources.completions import read_completions
from micota_fast.sources.top_logprobs import TopLogprobs

PROBLEMS, SAMPLES = 200, 4
CHAT = ChatConfig(system=None, prompt="{problem}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "BACKOFF_S", (0.005, 0.05))
    monkeypatch.setattr(fleet, "POLL_S", 0.05)


@pytest.fixture(scope="module")
def problems(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose answers are what the servers take for right."""
    chat = Chat.from_checkpoint(qwen2_checkpoint, CHAT)
    texts = [f"{i} + {i * i} =" for i in range(PROBLEMS)]
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    golds = [str(expected(chat.encode_prompt(text))) for text in texts]
    write_rows(path, [Problem(f"p{i}", text, gold) for i, (text, gold) in enumerate(zip(texts, golds, strict=True))])
    return path


Configure = Callable[..., GenerateConfig]


@pytest.fixture
def config(qwen2_checkpoint: Path, problems: Path, tmp_path: Path) -> Configure:
    """A request whose `out` is `tmp_path`/NAME.jsonl."""

    def made(url: str | list[str], name: str = "out", **more: Any) -> GenerateConfig:
        settings: dict[str, Any] = {"samples": SAMPLES, "temperature": 0.8, "max_new_tokens": 60, "concurrency": 64}
        settings |= {"model": str(qwen2_checkpoint), "problems": str(problems), "out": str(tmp_path / f"{name}.jsonl")}
        return GenerateConfig(url=url, chat=CHAT, **{**settings, **more})

    return made


@pytest.fixture(scope="module")
def clean(qwen2_checkpoint: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run against a server without faults writes."""
    folder = tmp_path_factory.mktemp("clean")
    with FaultyServer(folder) as server:
        request = GenerateConfig(
            model=str(qwen2_checkpoint),
            problems=str(problems),
            out=str(folder / "out.jsonl"),
            url=server.url,
            chat=CHAT,
            samples=SAMPLES,
            temperature=0.8,
            max_new_tokens=60,
        )
        generate.run(request)
        asked = server.asked
    rows = read_completions(request.out)
    assert [(row.id, row.sample) for row in rows] == [(f"p{i}", s) for i in range(PROBLEMS) for s in range(SAMPLES)]
    answers = {line["body"]["sampling_params"]["sampling_seed"]: answer(line["body"])["text"] for line in asked}
    assert len(asked) == len(answers) == len(rows)
    assert all(row.completion == answers[row.seed] for row in rows)
    return Path(request.out).read_bytes()


def meters(request: GenerateConfig) -> dict[str, Any]:
    return dict(json.loads(Path(f"{request.out}.meters.json").read_bytes()))


def meta(request: GenerateConfig) -> dict[str, Any]:
    return dict(json.loads(Path(f"{request.out}.meta.json").read_bytes()))


def seed_of(line: dict[str, Any]) -> int:
    seed: int = line["body"]["sampling_params"]["sampling_seed"]
    return seed


# -- one server that fails -------------------------------------------------------------------------------------------


def test_every_fault_is_outlived(config: Configure, tmp_path: Path, clean: bytes) -> None:
    """Each request meets three different faults before it is answered, in another order than it was asked."""
    with FaultyServer(tmp_path, Plan(faults=FAULTS, tries=3, delays_s=(0.0, 0.02))) as server:
        request = config(server.url, request_timeout_s=2.0)
        generate.run(request)
        asked = server.asked
    assert Path(request.out).read_bytes() == clean
    tries = Counter(key(line["body"]) for line in asked)
    assert len(tries) == PROBLEMS * SAMPLES
    assert meters(request)["failed_tries"] >= len(asked) - len(tries) > PROBLEMS * SAMPLES


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_alone(fault: str, config: Configure, tmp_path: Path, clean: bytes) -> None:
    """Met by every request, so that nothing else hides what it does."""
    with FaultyServer(tmp_path, Plan(faults=(fault,), tries=1)) as server:
        request = config(server.url, limit=20, request_timeout_s=2.0)
        generate.run(request)
    assert Path(request.out).read_bytes() == b"".join(clean.splitlines(keepends=True)[: 20 * SAMPLES])


def test_a_connection_that_is_off_by_one_is_not_used_again(config: Configure, tmp_path: Path, clean: bytes) -> None:
    """Each answer comes a second time, and is there before that to the next request, which takes longer to come."""
    with FaultyServer(tmp_path, Plan(faults=("again",), tries=1, delays_s=(0.1, 0.1))) as server:
        request = config(server.url, limit=3, concurrency=1)
        generate.run(request)
        asked = len(server.asked)
    assert Path(request.out).read_bytes() == b"".join(clean.splitlines(keepends=True)[: 3 * SAMPLES])
    assert asked <= 3 * SAMPLES + 2


def test_an_answer_is_on_the_disk_soon_though_no_other_follows(
    config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is held back until the first has been seen there."""
    monkeypatch.setattr(client, "PROGRESS_S", 0.1)
    asked, seen = 0, threading.Event()

    async def generate_page(http: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        while asked > 1 and not seen.is_set():
            await asyncio.sleep(0.005)
        return web.json_response(answer(await http.json()))

    with http_server(generate_page) as url:
        request = config(url, limit=1, samples=2, concurrency=1)
        index = Path(f"{request.out}.parts") / "index.bin"
        with running(request):
            wait_for(lambda: index.exists() and index.stat().st_size == 40)
            assert not Path(request.out).exists()
            seen.set()


def test_a_server_that_is_killed_comes_back(config: Configure, tmp_path: Path, clean: bytes) -> None:
    with FaultyServer(tmp_path, Plan(delays_s=(0.01, 0.03))) as server:
        request = config(server.url, concurrency=16)
        with running(request):
            for answers in (200, 400):
                wait_for(lambda answers=answers: len(server.asked) > answers)  # type: ignore[misc]
                server.kill()
                time.sleep(0.2)
                server.start()
        asked = server.asked
    assert Path(request.out).read_bytes() == clean
    assert len(asked) <= PROBLEMS * SAMPLES + 2 * 16  # what was in flight there, and nothing else, was asked again


@contextlib.contextmanager
def running(request: GenerateConfig) -> Iterator[None]:
    """`generate.run` in a thread, to its end."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            generate.run(request)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(240)
    assert not thread.is_alive()
    assert not failures, failures


# -- several servers -------------------------------------------------------------------------------------------------


def test_servers_that_are_dead_die_hang_and_refuse_leave_their_work_to_the_others(
    config: Configure, tmp_path: Path, clean: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One refuses everything until half of the work is done, and then does its part."""
    monkeypatch.setattr(fleet, "SILENT_S", 3.0)
    monkeypatch.setattr(endpoint, "PROBE_TIMEOUT_S", 1.5)
    starting = tmp_path / "starting"
    starting.touch()
    with contextlib.ExitStack() as stack:
        slow = Plan(delays_s=(0.02, 0.06))
        well, dying, hanging = (stack.enter_context(FaultyServer(tmp_path, slow)) for _ in range(3))
        refusing = stack.enter_context(FaultyServer(tmp_path, dataclasses.replace(slow, refusing_while=str(starting))))
        urls = [f"http://127.0.0.1:{free_port()}", dying.url, hanging.url, refusing.url, well.url]
        request = config(urls, concurrency=8)
        with running(request):
            wait_for(lambda: len(dying.asked) > 50)
            dying.kill()
            wait_for(lambda: len(hanging.asked) > 80)
            hanging.stop()
            wait_for(lambda: len(well.asked) > PROBLEMS * SAMPLES // 2)
            starting.unlink()
        by = meters(request)["answered_by"]
        asked = [line for server in (well, dying, hanging, refusing) for line in server.asked]
    assert Path(request.out).read_bytes() == clean
    assert sum(by.values()) == PROBLEMS * SAMPLES
    assert by[urls[0]] == 0
    assert min(by[server.url] for server in (well, dying, hanging, refusing)) > 0
    assert by[well.url] == max(by.values())
    # Only what the two that were lost had in flight was asked twice, or what was refused.
    assert len(asked) - PROBLEMS * SAMPLES <= 16


@pytest.mark.parametrize("fault", ["500", "503", "reset", "truncated", "abort"])
def test_a_server_that_fails_on_everything_costs_no_answer(
    fault: str, config: Configure, tmp_path: Path, clean: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is up and always free, so that it could have every request fail; each is answered by the other."""
    monkeypatch.setattr(fleet, "BACKOFF_S", (0.05, 1.0))
    always = Plan(faults=(fault,) * 100, tries=100)
    at_once = 16
    with FaultyServer(tmp_path, always) as broken, FaultyServer(tmp_path, Plan(delays_s=(0.02, 0.06))) as well:
        request = config([broken.url, well.url], concurrency=at_once, limit=60)
        started = time.monotonic()
        generate.run(request)
        took_s = time.monotonic() - started
        asked = len(broken.asked)
    assert Path(request.out).read_bytes() == b"".join(clean.splitlines(keepends=True)[: 60 * SAMPLES])
    assert meters(request)["answered_by"] == {broken.url: 0, well.url: 60 * SAMPLES}
    # It is left alone for longer and longer, so that in this time it can have been tried only so often.
    tries, rest_s = 1, fleet.BACKOFF_S[0]
    while took_s > 0:
        took_s -= rest_s
        tries, rest_s = tries + 1, min(2 * rest_s, fleet.BACKOFF_S[1])
    assert asked <= tries * at_once + endpoint.RESTS_AFTER


def test_one_server_of_another_model_ends_the_run(
    config: Configure, tmp_path: Path, qwen2_checkpoint: Path, qwen3_checkpoint: Path
) -> None:
    with (
        FaultyServer(tmp_path, Plan(model=str(qwen2_checkpoint))) as ours,
        FaultyServer(tmp_path, Plan(model=str(qwen3_checkpoint))) as other,
    ):
        with pytest.raises(InputError) as caught:
            generate.run(config([ours.url, other.url]))
        assert str(caught.value) == f"{other.url} serves {qwen3_checkpoint}, but `model` is {qwen2_checkpoint}"
        assert other.asked == []


def test_a_server_is_given_what_it_can_run(config: Configure, tmp_path: Path) -> None:
    """One of 8 slots and one of 60, each asked for 150 at once: by what they say of their queues."""
    with (
        FaultyServer(tmp_path, Plan(slots=8, delays_s=(0.2, 0.4))) as small,
        FaultyServer(tmp_path, Plan(slots=60, delays_s=(0.2, 0.4))) as large,
    ):
        request = config([small.url, large.url], samples=5, concurrency=150)
        generate.run(request)
        seen = {server: [line["at_once"] for line in server.asked] for server in (small, large)}
    assert meta(request)["completions"] == len(seen[small]) + len(seen[large]) == PROBLEMS * 5
    assert statistics.median(seen[small][-len(seen[small]) // 3 :]) <= 8 + 4  # its slots, and the few that may wait
    assert statistics.median(seen[large]) > 2 * (8 + 4)
    assert len(seen[large]) > 2 * len(seen[small])


# -- what is asked for -----------------------------------------------------------------------------------------------


def rule(problems: Path, samples: int, enough: int, chat: Chat) -> dict[tuple[str, int], str | None]:
    """What must be in the corpus, with the reason of a rejection, computed from the servers' answers alone."""
    wanted: dict[tuple[str, int], str | None] = {}
    for line in problems.read_text().splitlines():
        problem = json.loads(line)
        ids = chat.encode_prompt(problem["problem"])
        accepted = 0
        for sample in range(samples):
            if accepted == enough:
                break
            params = {"max_new_tokens": 30, "sampling_seed": derive_seed(0, problem["id"], sample)}
            given = answer({"input_ids": ids, "sampling_params": params})
            right = f"\\boxed{{{problem['answer']}}}" in given["text"]
            cut = given["meta_info"]["finish_reason"]["type"] == "length"
            wanted[problem["id"], sample] = "truncated" if cut else None if right else "wrong"
            accepted += right and not cut
    return wanted


def test_rejection_asks_for_the_prefix_that_holds_enough(
    config: Configure, tmp_path: Path, problems: Path, qwen2_checkpoint: Path
) -> None:
    """Also where it is killed and taken up: the same rows, the same counts, nothing asked twice."""
    wanted = rule(problems, 6, 2, Chat.from_checkpoint(qwen2_checkpoint, CHAT))
    accept = FilterSettings(workers=1)
    settings: dict[str, Any] = {
        "samples": 6,
        "stop_after_accepted": 2,
        "accept": accept,
        "max_new_tokens": 30,
        "concurrency": 16,
    }
    with FaultyServer(tmp_path, Plan(delays_s=(0.0, 0.01))) as server:
        request = config(server.url, **settings)
        generate.run(request)
        assert len(server.asked) == len(wanted)
    rows = read_completions(request.out)
    assert [(row.id, row.sample) for row in rows] == sorted(wanted, key=lambda of: (int(of[0][1:]), of[1]))
    reasons = Counter(wanted.values())
    assert set(reasons) == {None, "truncated", "wrong"}
    accepted = reasons.pop(None)
    assert meta(request)["judged"] == {"accepted": accepted, "rejected": dict(reasons)}
    assert (meters(request)["accepted"], meters(request)["rejected"]) == (accepted, dict(reasons))
    # Slow until it has been killed, so that it is not at its end by then.
    slow = Plan(delays_s=(0.05, 0.15))
    with FaultyServer(tmp_path, slow) as server, Client(config(server.url, "b", **settings)) as b:
        for answers in (100, 300):
            b.start()
            wait_for(lambda answers=answers: len(server.asked) >= answers)  # type: ignore[misc]
            assert b.kill() == signal.SIGKILL
        server.kill()
        server.start(Plan())
        b.start()
        assert b.wait() == 0
        asked = Counter(map(seed_of, server.asked))
    assert (tmp_path / "b.jsonl").read_bytes() == Path(request.out).read_bytes()
    assert (tmp_path / "b.jsonl.meta.json").read_bytes() == Path(f"{request.out}.meta.json").read_bytes()
    assert len(asked) == len(wanted)
    assert sum(asked.values()) <= len(wanted) + 2 * 16


def test_a_thinking_budget_ends_the_thought(config: Configure, tmp_path: Path, qwen2_checkpoint: Path) -> None:
    with FaultyServer(tmp_path) as server:
        request = config(server.url, samples=1, temperature=0.0, thinking_budget=20, max_new_tokens=60)
        generate.run(request)
        asked = [line["body"] for line in server.asked]
    chat = Chat.from_checkpoint(qwen2_checkpoint, CHAT)
    end = chat.tokenizer.encode(["\n</think>\n\n"])[0].tolist()
    asked_first = {tuple(body["input_ids"]): body for body in asked}
    kinds: Counter[str] = Counter()
    for row in read_completions(request.out):
        body = asked_first.pop(tuple(chat.encode_prompt(row.problem)))
        assert body["sampling_params"]["max_new_tokens"] == 20
        first = answer(body)
        if first["meta_info"]["finish_reason"]["type"] == "stop":
            kinds["ended in time"] += 1
            assert row.completion == first["text"]
            continue
        forced = "</think>" not in first["text"]
        kinds["forced" if forced else "had ended its thought"] += 1
        ids = body["input_ids"] + first["output_ids"] + (end if forced else [])
        body = asked_first.pop(tuple(ids))
        assert body["sampling_params"]["max_new_tokens"] == 60 - 20 - forced * len(end)
        second = answer(body)
        assert row.completion == first["text"] + forced * "\n</think>\n\n" + second["text"]
        assert row.completion_tokens == 20 + forced * len(end) + second["meta_info"]["completion_tokens"]
        assert row.finish_reason == second["meta_info"]["finish_reason"]["type"]
        if forced:
            assert row.completion.index("</think>") == len(first["text"]) + 1
    assert asked_first == {}  # no other was asked
    assert min(kinds.values()) > 10
    assert len(kinds) == 3


@pytest.mark.parametrize("budget", [None, 20])
def test_log_probabilities_are_stored_of_every_token(budget: int | None, config: Configure, tmp_path: Path) -> None:
    """Also of those that end a thought, which the next request brings as a part of its prompt."""
    with FaultyServer(tmp_path) as server:
        request = config(server.url, limit=40, samples=2, temperature=1.0, top_logprobs=3, thinking_budget=budget)
        generate.run(request)
        asked = [line["body"] for line in server.asked]
    assert all(body["return_logprob"] is True and body["top_logprobs_num"] == 3 for body in asked)
    store, rows = TopLogprobs(f"{request.out}.top_logprobs"), read_completions(request.out)
    assert set(store) == {(row.id, row.sample) for row in rows}
    assert not {"completion_ids", "scores"} & set(json.loads(Path(request.out).read_bytes().splitlines()[0]))
    for row in rows:
        ids, own, top_ids, logprobs = store[row.id, row.sample]
        assert len(ids) == row.completion_tokens
        assert (own == -2).all()
        assert top_ids.tolist() == [[(token + k) % 300 for k in range(3)] for token in ids.tolist()]
        assert logprobs.tolist() == [[-2.0, -2.5, -3.0]] * len(ids)
    inserted = sum("logprob_start_len" in body for body in asked)
    assert (inserted > 0) == (budget is not None)


# -- the client is killed, the disk fills up -------------------------------------------------------------------------

# Forks before each run, as importing all takes longer than being killed.
CLIENT = """
import json, os, sys, traceback
from micota_fast.config import loader
from micota_fast.config.generation import GenerateConfig
from micota_fast.generation import client, generate
request = loader.build(GenerateConfig, json.loads(sys.argv[1]), "test")
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            generate.run(request)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Client:
    """`generate.run` in a process that can be killed, again and again. A context manager."""

    def __init__(self, request: GenerateConfig) -> None:
        self._pid = 0
        self._forker = subprocess.Popen(
            [sys.executable, "-c", CLIENT, json.dumps(dataclasses.asdict(request))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._forker.stdout is not None
        return self._forker.stdout.readline().strip()

    def start(self) -> None:
        assert self._forker.stdin is not None
        self._forker.stdin.write("\n")
        self._pid = int(self._read())

    def wait(self) -> int:
        """Its wait status."""
        return int(self._read())

    def kill(self) -> int:
        os.kill(self._pid, signal.SIGKILL)
        return self.wait()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._forker.communicate()


def in_journal(parts: Path) -> set[int]:
    """The seeds of the rows that are there, torn lines left out."""
    lines = [line for path in parts.glob("0*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    return {json.loads(line)["seed"] for line in lines if line.endswith(b"\n")}


def test_a_killed_run_leaves_the_same_store(config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed among the answers, which two servers bring, and then while the store is written."""
    options: dict[str, Any] = {"limit": 40, "samples": 2, "temperature": 1.0, "top_logprobs": 3, "thinking_budget": 20}
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    slow = Plan(delays_s=(0.05, 0.2))
    with FaultyServer(folders[0], slow) as one, FaultyServer(folders[1], slow) as other:
        generate.run(config(one.url, "whole", **options))
        request = config([one.url, other.url], "killed", concurrency=2, **options)
        parts = Path(f"{request.out}.parts")
        with Client(request) as there:
            for rows in (5, 20):
                there.start()
                wait_for(lambda rows=rows: len(in_journal(parts)) >= rows)  # type: ignore[misc]
                assert there.kill() == signal.SIGKILL
                assert not Path(request.out).exists()
        left = iter(range(30))

        def stop(*args: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return decode_scores(*args)

        monkeypatch.setattr(answer_store, "decode_scores", stop)
        with pytest.raises(KeyboardInterrupt):
            generate.run(request)
        monkeypatch.setattr(answer_store, "decode_scores", decode_scores)
    assert Path(f"{request.out}.top_logprobs.journal").exists()
    generate.run(request)  # the servers are gone, and nothing is left to ask
    for name in ("", ".meta.json", ".top_logprobs/top_logprobs.json", ".top_logprobs/000000.safetensors"):
        ours, whole = (Path(f"{tmp_path / of}.jsonl{name}").read_bytes() for of in ("killed", "whole"))
        assert ours == whole, name
    made = {path.name for path in tmp_path.glob("killed.jsonl*")}
    assert made == {f"killed.jsonl{name}" for name in ("", ".meta.json", ".meters.json", ".top_logprobs")}
    generate.run(request)  # done already
    shard = Path(f"{request.out}.top_logprobs/000000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=r"000000\.safetensors: tensor \w+ does not match its checksum"):
        generate.run(request)
    shutil.rmtree(shard.parent)
    with pytest.raises(
        InputError, match=r"killed\.jsonl\.top_logprobs is missing next to .*killed\.jsonl; put it back"
    ):
        generate.run(request)
    shutil.copytree(tmp_path / "whole.jsonl.top_logprobs", shard.parent)
    generate.run(request)
    manifest = shard.with_name("top_logprobs.json")
    manifest.write_text(manifest.read_text().replace('"completions": "', '"completions": "0'))
    with pytest.raises(InputError, match=r"top_logprobs does not belong to .*killed\.jsonl"):
        generate.run(request)


@pytest.mark.slow
def test_twenty_kills_at_random(config: Configure, tmp_path: Path, clean: bytes) -> None:
    """Each comes a moment after a random number of new rows; every fourth at a random moment of the start.

    The server answers slowly until the last run: however late a kill comes on a busy machine, rows are left to ask for.
    """
    rng = random.Random(0)
    with FaultyServer(tmp_path, Plan(delays_s=(0.05, 0.2))) as server:
        request = config(server.url, concurrency=8)
        parts = Path(f"{request.out}.parts")
        kept: set[int] = set()
        with Client(request) as there:
            for kill in range(20):
                before = len(server.asked)
                there.start()
                if kill % 4:
                    rows = len(kept) + rng.randrange(1, 16)
                    wait_for(lambda rows=rows: len(in_journal(parts)) >= rows)  # type: ignore[misc]
                    time.sleep(rng.uniform(0.0, 0.02))
                else:
                    rows = len(kept)
                    time.sleep(rng.uniform(0.0, 0.3))
                assert there.kill() == signal.SIGKILL
                assert not Path(request.out).exists()
                asked = {seed_of(line) for line in server.asked[before:]}
                assert not asked & kept
                assert kept <= in_journal(parts)
                kept = in_journal(parts)
                assert len(kept) >= rows
            before = len(server.asked)
            server.kill()
            server.start(Plan())
            there.start()
            assert there.wait() == 0
            asked = {seed_of(line) for line in server.asked[before:]}
            assert not asked & kept
            assert len(asked) + len(kept) == PROBLEMS * SAMPLES
    assert Path(request.out).read_bytes() == clean
    assert not parts.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "disk", "1m") as disk:
        yield disk


def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(
    config: Configure, tmp_path: Path, small_disk: Path, clean: bytes
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((1 << 20) - len(clean)))  # room for the rows, but not for them with their marks
    with FaultyServer(tmp_path) as server:
        request = config(server.url, out=str(small_disk / "out.jsonl"))
        refused(request, server, "No space left on device", 600)
        ballast.unlink()
        finished_after(request, server, clean)


def test_a_limit_on_the_size_of_files_is_said_and_the_run_goes_on_without_it(
    config: Configure, tmp_path: Path, clean: bytes
) -> None:
    """It stops the writing in the middle of a row."""
    with FaultyServer(tmp_path) as server:
        request = config(server.url)
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
        try:
            refused(request, server, "File too large", 200)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        finished_after(request, server, clean)


def refused(request: GenerateConfig, server: FaultyServer, why: str, least: int) -> None:
    """The run ends with `why`, and at least so many rows are kept."""
    with pytest.raises(InputError, match=f"cannot write .*out.jsonl.parts.*: {why}; what was written before is kept"):
        generate.run(request)
    assert not Path(request.out).exists()
    assert len(in_journal(Path(f"{request.out}.parts"))) >= least


def finished_after(request: GenerateConfig, server: FaultyServer, clean: bytes) -> None:
    """The same command goes on: it asks for nothing that is there, and ends with the same bytes."""
    kept, before = in_journal(Path(f"{request.out}.parts")), len(server.asked)
    generate.run(request)
    asked = {seed_of(line) for line in server.asked[before:]}  # some of the run before may be written down late
    assert not kept & asked
    assert len(kept) + len(asked) == PROBLEMS * SAMPLES
    assert Path(request.out).read_bytes() == clean
