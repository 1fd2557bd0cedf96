"""The client: a corpus is complete, each sample once, the same bytes, whoever is killed in between."""

import asyncio
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from aiohttp import web

from helpers.adapters import write_adapter
from helpers.ports import free_port
from helpers.servers import http_server
from helpers.waiting import rows_in
from micota_fast.common.fingerprint import Fingerprints
from micota_fast.common.records import Completion, Problem, write_rows
from micota_fast.config.corpus import FilterSettings
from micota_fast.config.generation import ChatConfig, GenerateConfig, ServeConfig
from micota_fast.errors import InputError
from micota_fast.generation import client as http_client
from micota_fast.generation import fleet, generate
from micota_fast.generation.generate import Generation
from micota_fast.generation.journal import Journal
from micota_fast.generation.model_identity import model_fingerprint
from micota_fast.generation.request import derive_seed
from micota_fast.serve.serve import serving
from micota_fast.sources.completions import read_completions

SERVE = ServeConfig(dtype="float64", startup_timeout_s=120)
SAMPLES = 2


@pytest.fixture(scope="module")
def url(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(qwen2_checkpoint, SERVE, tmp_path_factory.mktemp("server") / "log.txt") as (url,):
        yield url


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    write_rows(path, [Problem(f"p{i}", f"{i} + {i * i} =", str(i + i * i)) for i in range(30)])
    return path


def config(checkpoint: Path, problems: Path, out: Path, url: str | None, **more: Any) -> GenerateConfig:
    settings: dict[str, Any] = {"samples": SAMPLES, "temperature": 0.8, "max_new_tokens": 40, "concurrency": 6}
    return GenerateConfig(
        model=str(checkpoint),
        problems=str(problems),
        out=str(out),
        url=url,
        chat=ChatConfig(system=None, prompt="{problem}"),
        serve=SERVE,
        **{**settings, **more},
    )


@pytest.fixture(scope="module")
def corpus(url: str, qwen2_checkpoint: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("corpus") / "out.jsonl"
    generate.run(config(qwen2_checkpoint, problems, out, url))
    return out


def test_the_corpus_is_complete_and_in_order(corpus: Path, url: str) -> None:
    rows = read_completions(corpus)
    assert [(r.id, r.sample) for r in rows] == [(f"p{i}", s) for i in range(30) for s in range(SAMPLES)]
    for row in rows:
        assert row.problem == f"{(i := int(row.id[1:]))} + {i * i} ="
        assert row.answer == str(i + i * i)
        assert row.finish_reason in ("stop", "length")
        assert row.completion_tokens == 40 or row.finish_reason == "stop"
    assert len({row.seed for row in rows}) == len(rows)
    assert len({row.completion for row in rows}) > len(rows) / 2
    meta = json.loads(Path(f"{corpus}.meta.json").read_text())
    assert meta["completions"] == 60
    assert meta["completion_tokens"] == sum(row.completion_tokens for row in rows)
    assert sum(reason["completions"] for reason in meta["by_finish_reason"].values()) == 60
    assert not Path(f"{corpus}.parts").exists()


def test_a_row_is_what_the_server_answers_to_the_rendered_prompt(
    corpus: Path, url: str, qwen2_checkpoint: Path
) -> None:
    from micota_fast.chat.encoding import Chat

    row = read_completions(corpus)[7]
    chat = Chat.from_checkpoint(qwen2_checkpoint, ChatConfig(system=None, prompt="{problem}"))
    ids = chat.encode_prompt(row.problem)
    assert row.prompt_tokens == len(ids)
    params = {"temperature": 0.8, "max_new_tokens": 40, "sampling_seed": row.seed}
    import urllib.request

    body = json.dumps({"input_ids": ids, "sampling_params": params}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        assert json.loads(response.read())["text"] == row.completion


def test_a_finished_run_is_left_alone_and_another_is_refused(
    corpus: Path, qwen2_checkpoint: Path, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = "http://127.0.0.1:9"  # no server is needed to see that all is done
    before = corpus.stat()
    generate.run(config(qwen2_checkpoint, problems, corpus, nobody, concurrency=1))
    assert "done already" in capsys.readouterr().out
    assert corpus.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(InputError, match=r"belongs to another run \(it differs in: sampling\.temperature\)"):
        generate.run(config(qwen2_checkpoint, problems, corpus, nobody, temperature=0.9))
    with pytest.raises(InputError, match=r"it differs in: problems"):
        generate.run(config(qwen2_checkpoint, problems, corpus, nobody, limit=3))
    with pytest.raises(InputError, match=r"it differs in: slice\)"):
        generate.run(config(qwen2_checkpoint, problems, corpus, nobody, slice=(0, 30)))


def test_a_slice_of_the_problems_is_answered_as_all_of_them_are(
    corpus: Path, url: str, qwen2_checkpoint: Path, problems: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    generate.run(config(qwen2_checkpoint, problems, out, url, slice=(28, 3)))
    whole = {(row.id, row.sample): row for row in read_completions(corpus)}
    rows = read_completions(out)
    assert [(row.id, row.sample) for row in rows] == [(p, s) for p in ("p28", "p29", "p0") for s in range(SAMPLES)]
    assert rows == [whole[row.id, row.sample] for row in rows]
    for wrong in ((-1, 3), (0, 0)):
        with pytest.raises(InputError, match=r"`slice` must be \[START, COUNT\]"):
            config(qwen2_checkpoint, problems, out, url, slice=wrong)


@pytest.mark.slow
def test_a_model_with_an_adapter_answers_merged_and_has_a_fingerprint_of_both(
    corpus: Path, url: str, qwen2_checkpoint: Path, problems: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "tuned" / "adapter")
    both = config(Path(f"{qwen2_checkpoint}+{adapter}"), problems, tmp_path / "out.jsonl", None, limit=5)
    generate.run(both)
    rows, of_base = read_completions(both.out), read_completions(corpus)[: 5 * SAMPLES]
    assert {row.model for row in rows} == {f"{qwen2_checkpoint.name}+tuned"}
    assert [row.seed for row in rows] == [row.seed for row in of_base]
    assert [row.completion for row in rows] != [row.completion for row in of_base]
    generate.run(both)  # it is done
    known = json.loads(Path(f"{both.out}.meta.json").read_text())["fingerprint"]
    assert known["model"] == model_fingerprint(qwen2_checkpoint, Fingerprints(None))
    write_adapter(tmp_path / "tuned" / "adapter", 2.0)
    with pytest.raises(InputError, match=r"it differs in: adapter\)"):
        generate.run(both)
    with pytest.raises(InputError, match=rf"serves {qwen2_checkpoint}, but `model` is {qwen2_checkpoint}\+"):
        generate.run(replace(both, url=url, out=str(tmp_path / "other.jsonl")))


def test_what_is_no_adapter_is_told_before_anything_is_read(
    qwen2_checkpoint: Path, problems: Path, tmp_path: Path
) -> None:
    both = config(Path(f"{qwen2_checkpoint}+{qwen2_checkpoint}"), problems, tmp_path / "out.jsonl", None)
    with pytest.raises(InputError, match=r"no adapter_config.json is there, so it is not a LoRA adapter"):
        generate.run(both)
    missing = config(Path(f"{qwen2_checkpoint}+{tmp_path}/none"), problems, tmp_path / "out.jsonl", None)
    with pytest.raises(InputError, match=r"none: no such folder"):
        generate.run(missing)


def test_a_foreign_file_is_not_overwritten(tmp_path: Path, qwen2_checkpoint: Path, problems: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(InputError, match="was not written by generate"):
        generate.run(config(qwen2_checkpoint, problems, out, "http://127.0.0.1:9"))
    assert out.read_text() == "mine\n"


CLIENT = """
import json, sys
from helpers import moments
from micota_fast.config import loader
from micota_fast.config.generation import GenerateConfig
from micota_fast.generation import generate
moments.at_call(None, "micota_fast.generation.journal:Journal.append", moments.die, my_rank=0, nth=int(sys.argv[2]))
generate.run(loader.build(GenerateConfig, json.loads(sys.argv[1]), "test"))
"""


def run_client(request: GenerateConfig, rows: int) -> int:
    """In a process that is killed as it is about to write one row more than these; its exit status."""
    command = [sys.executable, "-c", CLIENT, json.dumps(asdict(request)), str(rows + 1)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode


def stored(parts: Path) -> list[bytes]:
    """The rows of a journal that lies there, as they will stand in the output."""
    copy = parts.with_name("copy-of-parts")
    shutil.copytree(parts, copy)
    with Journal(copy, json.loads((copy / "manifest.json").read_bytes())["fingerprint"]) as journal:
        rows = list(journal.rows(np.arange(len(journal))))
    shutil.rmtree(copy)
    return rows


def generation_of(request: GenerateConfig) -> Generation:
    return Generation(request.problems, request, request.out, request.limit)


def write_journal(request: GenerateConfig, rows: Iterable[Completion]) -> None:
    """What a run that was killed leaves."""
    asked = generation_of(request)
    ordinal = {problem.id: i for i, problem in enumerate(asked.problems)}
    with Journal(Path(f"{request.out}.parts"), asked.fingerprint) as journal:
        for row in rows:
            journal.append(ordinal[row.id], row.sample, 0, row.completion_tokens, row.prompt_tokens, asdict(row))


def test_sigkill_of_the_client(tmp_path: Path, url: str, corpus: Path, qwen2_checkpoint: Path, problems: Path) -> None:
    """Killed at a quarter and at a half, each time with requests in flight; the third run ends it: the same bytes."""
    out, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    for rows in (15, 30):
        assert run_client(config(qwen2_checkpoint, problems, out, url, concurrency=2), 15) == -signal.SIGKILL
        assert not out.exists()
        assert rows_in(parts) == rows
    kept = stored(parts)
    assert len(kept) == 30
    generate.run(config(qwen2_checkpoint, problems, out, url))
    assert out.read_bytes() == corpus.read_bytes()
    assert Path(f"{out}.meta.json").read_bytes() == Path(f"{corpus}.meta.json").read_bytes()
    assert set(kept) <= set(out.read_bytes().splitlines(keepends=True))
    assert not parts.exists()


def test_sigkill_between_the_last_writes(tmp_path: Path, corpus: Path, qwen2_checkpoint: Path, problems: Path) -> None:
    """The two moments at the end: OUT is there but its meta file is not; both are there but OUT.parts still is."""
    out, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    request = config(qwen2_checkpoint, problems, out, "http://127.0.0.1:9")
    write_journal(request, reversed(read_completions(corpus)))
    saved = tmp_path / "saved"
    shutil.copytree(parts, saved)
    shutil.copy(corpus, out)
    meta = generation_of(request).run([])
    assert out.read_bytes() == corpus.read_bytes()
    assert meta == json.loads(Path(f"{corpus}.meta.json").read_bytes())
    assert not parts.exists()
    shutil.copytree(saved, parts)
    assert generation_of(request).run([]) == meta
    assert not parts.exists()
    shutil.copytree(saved, parts)
    generate.run(request)  # says "done already"
    assert not parts.exists()


@pytest.mark.slow
def test_sigkill_of_the_server(
    tmp_path: Path, corpus: Path, qwen2_checkpoint: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client waits, gives up cleanly, keeps its rows; with the server back it ends with the same bytes."""
    monkeypatch.setattr(fleet, "PATIENCE_URL_S", 1.0)
    out, parts = tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    port = free_port()
    serve = ServeConfig(dtype="float64", port=port)
    request = config(qwen2_checkpoint, problems, out, f"http://127.0.0.1:{port}")
    append = Journal.append

    before = set(psutil.Process().children())
    with serving(qwen2_checkpoint, serve, tmp_path / "log.txt"):
        # The guard of `processes.spawn` is the one child that leads a group of its own; the server is the guard's.
        [guard] = {c for c in psutil.Process().children() if os.getpgid(c.pid) == c.pid} - before
        [group] = {os.getpgid(c.pid) for c in guard.children()}

        def kill_at_ten(journal: Journal, *args: Any) -> None:
            append(journal, *args)
            if len(journal) == 10:
                os.killpg(group, signal.SIGKILL)

        monkeypatch.setattr(Journal, "append", kill_at_ten)
        with pytest.raises(InputError, match=r"has given no answer for .*start again"):
            generate.run(request)
    assert 10 <= rows_in(parts) < 60
    assert not out.exists()
    with serving(qwen2_checkpoint, serve, tmp_path / "log.txt"):
        generate.run(request)
    assert out.read_bytes() == corpus.read_bytes()


def test_it_starts_and_stops_a_server_of_its_own(
    tmp_path: Path, corpus: Path, qwen2_checkpoint: Path, problems: Path
) -> None:
    out = tmp_path / "out.jsonl"
    generate.run(config(qwen2_checkpoint, problems, out, None, limit=3))
    assert out.read_bytes() == b"".join(corpus.read_bytes().splitlines(keepends=True)[: 3 * SAMPLES])
    [told] = [line for line in Path(f"{out}.server.log").read_text().splitlines() if line.startswith("listening")]
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", int(told.rpartition(":")[2])))


# -- a server that misbehaves ----------------------------------------------------------------------------------------


def answer(body: dict[str, Any], reason: str = "stop") -> dict[str, Any]:
    """In SGLang's shape; the text is made of the request, so that a mix-up would show."""
    seed = body["sampling_params"].get("sampling_seed")
    finish = (
        {"type": reason, "matched": 2} if reason == "stop" else {"type": reason, "message": "", "status_code": None}
    )
    meta = {"finish_reason": finish, "prompt_tokens": len(body["input_ids"]), "completion_tokens": 3}
    return {"text": f"{sum(body['input_ids'])} {seed}", "meta_info": meta}


def test_faults_are_retried_until_each_sample_is_there_once(
    tmp_path: Path, qwen2_checkpoint: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "BACKOFF_S", (0.005, 0.02))
    seen: dict[str, int] = {}
    faults = ["429", "500", "503", "reset", "truncated", "not json", "wrong shape", "abort", "short body"]

    async def handler(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        key = json.dumps({name: body[name] for name in ("input_ids", "sampling_params")})
        tries = seen[key] = seen.get(key, -1) + 1
        # Each request meets three different faults before it is answered.
        fault = faults[(sum(body["input_ids"]) + tries) % len(faults)] if tries < 3 else None
        whole = json.dumps(answer(body)).encode()
        match fault:
            case "429" | "500" | "503":
                return web.json_response({"error": {"message": "busy"}}, status=int(fault))
            case "reset":
                assert http.transport is not None
                http.transport.abort()
                return web.Response()
            case "truncated":
                return web.Response(body=whole[:-5])
            case "not json":
                return web.Response(body=b"<html>")
            case "wrong shape":
                return web.json_response([])
            case "abort":
                return web.json_response(answer(body, "abort"))
            case "short body":  # promises more than it sends
                response = web.StreamResponse(headers={"Content-Length": str(len(whole))})
                await response.prepare(http)
                await response.write(whole[:10])
                assert http.transport is not None
                http.transport.close()
                return response
        return web.Response(body=whole)

    out = tmp_path / "out.jsonl"
    with http_server(handler) as url:
        generate.run(config(qwen2_checkpoint, problems, out, url, concurrency=16))
    rows = read_completions(out)
    assert [(r.id, r.sample) for r in rows] == [(f"p{i}", s) for i in range(30) for s in range(SAMPLES)]
    assert all(row.completion.split()[1] == str(row.seed) for row in rows)
    assert len(seen) == 60
    assert set(seen.values()) == {3}


def test_what_the_server_refuses_ends_the_run_and_names_the_problem(
    tmp_path: Path, qwen2_checkpoint: Path, problems: Path
) -> None:
    calls = []

    async def handler(http: web.Request) -> web.StreamResponse:
        calls.append(http)
        if len(calls) == 5:
            return web.json_response({"error": {"message": "top_p is odd"}}, status=400)
        return web.json_response(answer(await http.json()))

    out = tmp_path / "out.jsonl"
    with http_server(handler) as url, pytest.raises(InputError, match=r"problem 'p\d+': .*HTTP 400: top_p is odd"):
        generate.run(config(qwen2_checkpoint, problems, out, url, concurrency=1))
    assert len(calls) == 5
    assert rows_in(tmp_path / "out.jsonl.parts") == 4


def test_gold_answers_that_cannot_be_read_are_named_before_a_server_starts(
    tmp_path: Path, qwen2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Started(Exception):
        pass

    def start(*_: object) -> None:
        raise Started

    monkeypatch.setattr(generate, "servers_for", start)
    path = tmp_path / "problems.jsonl"
    golds = ["The answer is 5.", "3+2=5\n#### 5", "", "{5", "5"]
    write_rows(path, [Problem(f"p{i}", "2 + 3 =", gold) for i, gold in enumerate(golds)])
    request = config(qwen2_checkpoint, path, tmp_path / "out.jsonl", None, accept=FilterSettings(workers=1))
    with pytest.raises(Started):
        generate.run(request)
    warning = capsys.readouterr().err
    assert re.search(r"problems\.jsonl: 4 of 5 gold answers cannot be read.*'p0' .*'p1' .*'p2' .*; \.\.\.", warning)
    assert all(part in warning for part in ("is a sentence", "keep what follows ####", "is empty", "key 'answer'"))
    for accept in (None, FilterSettings(require_correct=False)):
        with pytest.raises(Started):
            generate.run(replace(request, accept=accept))
        assert not capsys.readouterr().err  # nothing is compared
    with pytest.raises(InputError, match=r"problems\.jsonl: 1 of 1 gold answers cannot be read"):
        generate.run(replace(request, limit=1))


def test_nothing_that_could_kill_a_server_is_sent(tmp_path: Path, qwen2_checkpoint: Path, problems: Path) -> None:
    async def handler(http: web.Request) -> web.StreamResponse:
        raise AssertionError("it was sent")

    small = tmp_path / "small"
    shutil.copytree(qwen2_checkpoint, small)
    raw = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**raw, "vocab_size": 100}))
    with http_server(handler) as url:
        with pytest.raises(InputError, match=r"problem 'p0': .*token id \d+; the model knows only 100"):
            generate.run(config(small, problems, tmp_path / "a.jsonl", url))
        with pytest.raises(InputError, match=r"`thinking_end` has token id \d+; the model knows only 100"):
            generate.run(config(small, problems, tmp_path / "a.jsonl", url, thinking_budget=5))
        with pytest.raises(InputError, match="`top_logprobs` is 101; the model knows only 100 tokens"):
            generate.run(config(small, problems, tmp_path / "a.jsonl", url, temperature=1.0, top_logprobs=101))
        (small / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 16}))
        with pytest.raises(InputError, match=r"problem 'p0': .*context of 16"):
            generate.run(config(small, problems, tmp_path / "b.jsonl", url))


def test_the_servers_own_limit_on_prompts_is_kept(tmp_path: Path, qwen2_checkpoint: Path, problems: Path) -> None:
    """SGLang takes no prompt from `max_req_input_len` tokens on, though the context would hold it."""
    lengths: list[int] = []

    async def handler(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        lengths.append(len(body["input_ids"]))
        return web.json_response(answer(body))

    greedy = {"temperature": 0.0, "samples": 1}
    with http_server(handler) as url:
        generate.run(config(qwen2_checkpoint, problems, tmp_path / "a.jsonl", url, **greedy))
    with http_server(handler, {"max_req_input_len": max(lengths) + 1}) as url:
        generate.run(config(qwen2_checkpoint, problems, tmp_path / "b.jsonl", url, **greedy))
    with (
        http_server(handler, {"max_req_input_len": max(lengths)}) as url,
        pytest.raises(InputError, match=f"its prompt of {max(lengths)} tokens leaves no room"),
    ):
        generate.run(config(qwen2_checkpoint, problems, tmp_path / "c.jsonl", url, **greedy))


def test_the_answer_limit_fits_the_context(tmp_path: Path, qwen2_checkpoint: Path, problems: Path) -> None:
    """SGLang refuses what could grow over its context (512 here): the limit sent is what is left of it."""
    asked: list[dict[str, Any]] = []

    async def handler(http: web.Request) -> web.StreamResponse:
        asked.append(await http.json())
        return web.json_response(answer(asked[-1]))

    greedy = {"max_new_tokens": 16384, "temperature": 0.0, "samples": 1, "stop": ["\n\n"], "limit": 4}
    with http_server(handler) as url:
        generate.run(config(qwen2_checkpoint, problems, tmp_path / "out.jsonl", url, **greedy))
    assert [a["sampling_params"]["max_new_tokens"] for a in asked] == [511 - len(a["input_ids"]) for a in asked]
    assert all(a["sampling_params"]["stop"] == ["\n\n"] for a in asked)
    assert all("sampling_seed" not in a["sampling_params"] for a in asked)
    assert {row.seed for row in read_completions(tmp_path / "out.jsonl")} == {None}


def test_a_server_that_ignores_seeds_is_told_of(
    tmp_path: Path, qwen2_checkpoint: Path, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang without --enable-deterministic-inference answers the same request differently each time."""

    async def handler(http: web.Request) -> web.StreamResponse:
        return web.json_response(answer(await http.json()))

    def told(info: dict[str, Any] | None, **more: Any) -> bool:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}.jsonl"
        with http_server(handler, info) as url:
            generate.run(config(qwen2_checkpoint, problems, out, url, limit=2, **more))
        return "ignores sampling seeds" in capsys.readouterr().err

    default = {"context_length": None, "enable_deterministic_inference": False}
    assert told(default)
    assert not told(default, temperature=0.0, samples=1)
    assert not told({**default, "enable_deterministic_inference": True})
    assert not told(None)


@pytest.mark.parametrize("damage", ["cut off", "a row less", "changed"])
def test_a_damaged_output_is_not_taken_as_done(
    damage: str, tmp_path: Path, corpus: Path, url: str, qwen2_checkpoint: Path, problems: Path
) -> None:
    out = tmp_path / "out.jsonl"
    for end in ("", ".meta.json"):
        shutil.copy(f"{corpus}{end}", f"{out}{end}")
    good = corpus.read_bytes()
    bad = {"cut off": good[:-200], "a row less": good[: good.rindex(b"\n", 0, -1) + 1], "changed": good[:-9] + good[9:]}
    out.write_bytes(bad[damage])
    generate.run(config(qwen2_checkpoint, problems, out, url))
    assert out.read_bytes() == good
    assert Path(f"{out}.damaged").read_bytes() == bad[damage]


def test_another_model_behind_the_url_is_refused(
    tmp_path: Path, url: str, qwen2_checkpoint: Path, qwen3_checkpoint: Path, problems: Path
) -> None:
    with serving(qwen3_checkpoint, SERVE, tmp_path / "log.txt") as (other,):
        with pytest.raises(InputError) as caught:
            generate.run(config(qwen2_checkpoint, problems, tmp_path / "a.jsonl", other, limit=1))
        assert f"serves {qwen3_checkpoint}, but `model` is {qwen2_checkpoint}" in str(caught.value)
        generate.run(config(qwen3_checkpoint, problems, tmp_path / "b.jsonl", other, limit=1))
    elsewhere = tmp_path / "elsewhere" / qwen2_checkpoint.name  # the same name in another place: another machine's
    shutil.copytree(qwen2_checkpoint, elsewhere)
    generate.run(config(elsewhere, problems, tmp_path / "c.jsonl", url, limit=1))


def test_folders_called_model_are_told_apart(
    tmp_path: Path, qwen2_checkpoint: Path, problems: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained models lie in NAME/model: NAME is what they are called, and what is compared."""
    a, b = (tmp_path / name / "model" for name in ("arm-a", "arm-b"))
    for folder in (a, b):
        shutil.copytree(qwen2_checkpoint, folder)
    with serving(a, SERVE, tmp_path / "log.txt") as (url,):
        with pytest.raises(InputError, match=r"arm-a/model, but `model` is .*arm-b/model"):
            generate.run(config(b, problems, tmp_path / "b.jsonl", url, limit=1))
        generate.run(config(a, problems, tmp_path / "a.jsonl", url, limit=1))
    assert {row.model for row in read_completions(tmp_path / "a.jsonl")} == {"arm-a"}
    assert "on trust" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["localhost:30000", "http://", "http://a:port", "http://[::1", "ftp://a:1", "http://a b:3"]
)
def test_what_is_no_url_is_refused_at_once(url: str, tmp_path: Path, qwen2_checkpoint: Path, problems: Path) -> None:
    with pytest.raises(InputError, match="not the address of a server"):
        generate.run(config(qwen2_checkpoint, problems, tmp_path / "out.jsonl", url))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_there_starts_no_server(tmp_path: Path, problems: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        generate.run(config(tmp_path / "gone", problems, tmp_path / "out.jsonl", None))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_may_move_between_a_url_and_a_server_of_its_own(
    tmp_path: Path, qwen2_checkpoint: Path, problems: Path
) -> None:
    from dataclasses import replace

    here = config(qwen2_checkpoint, problems, tmp_path / "out.jsonl", None)
    made_by = generation_of(here).fingerprint
    assert made_by == generation_of(replace(here, url="http://a:1", serve=replace(SERVE, port=7))).fingerprint
    for change in ({"dtype": "float32"}, {"engine": "sglang"}, {"args": ["--tp-size", "2"]}, {"context_length": 99}):
        for url in (None, "http://a:1"):
            assert made_by != generation_of(replace(here, url=url, serve=replace(SERVE, **change))).fingerprint


def test_all_prompts_are_checked_before_the_first_is_sent(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    async def handler(http: web.Request) -> web.StreamResponse:
        raise AssertionError("it was sent")

    path = tmp_path / "problems.jsonl"
    write_rows(path, [Problem(f"p{i}", "1 + " * (400 if i > 5 else 1), "1") for i in range(12)])
    with http_server(handler) as url, pytest.raises(InputError) as caught:
        generate.run(config(qwen2_checkpoint, path, tmp_path / "out.jsonl", url))
    assert "6 of 12 prompts cannot be sent: problem 'p6': " in str(caught.value)
    assert "problem 'p8': " in str(caught.value)
    assert "problem 'p9'" not in str(caught.value)


@pytest.mark.parametrize("fault", ["500", "abort"])
def test_one_poisoned_request_neither_ends_the_run_nor_keeps_it(
    fault: str,
    tmp_path: Path,
    qwen2_checkpoint: Path,
    problems: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fleet, "BACKOFF_S", (0.005, 0.02))
    monkeypatch.setattr(fleet, "PATIENCE_URL_S", 0.5)
    poison: list[int] = []
    tries: list[int] = []
    answered: list[int] = []

    async def handler(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        poison.extend([] if poison else body["input_ids"])  # the first that comes
        if body["input_ids"] != poison:
            while not tries:
                await asyncio.sleep(0.005)
            answered.append(1)
            return web.json_response(answer(body))
        tries.append(1)
        while len(tries) > 1 and not answered:  # others are answered after its first failure, and before its last
            await asyncio.sleep(0.005)
        if fault == "500":
            return web.json_response({"error": {"message": "no"}}, status=500)
        return web.json_response(answer(body, "abort"))

    out = tmp_path / "out.jsonl"
    greedy = {"samples": 1, "temperature": 0.0}
    with http_server(handler, healthy=True) as url:
        generate.run(config(qwen2_checkpoint, problems, out, url, **greedy))
        assert "1 of 30 completions aborted" in capsys.readouterr().err
        assert len(tries) == http_client.POISONED_AFTER
        rows = read_completions(out)
        [bad] = [row for row in rows if row.finish_reason != "stop"]
        assert (bad.finish_reason, bad.completion, bad.completion_tokens) == ("abort", "", 0)
        assert json.loads(Path(f"{out}.meta.json").read_text())["by_finish_reason"]["abort"]["completions"] == 1
        # Taken up with nothing but it left: no other can be answered meanwhile, but the server says it is well.
        again = tmp_path / "again.jsonl"
        request = config(qwen2_checkpoint, problems, again, url, **greedy)
        write_journal(request, (row for row in rows if row != bad))
        generate.run(request)
    assert again.read_bytes() == out.read_bytes()


def test_a_server_that_fails_on_everything_is_given_up_on_though_it_calls_itself_healthy(
    tmp_path: Path, qwen2_checkpoint: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "BACKOFF_S", (0.005, 0.02))
    monkeypatch.setattr(fleet, "PATIENCE_URL_S", 0.5)

    async def handler(http: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "broken"}}, status=500)

    with http_server(handler, healthy=True) as url, pytest.raises(InputError, match=r"no answer for .*broken"):
        generate.run(config(qwen2_checkpoint, problems, tmp_path / "out.jsonl", url))


def test_long_answers_and_a_few_faults_are_no_silence(
    tmp_path: Path, qwen2_checkpoint: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request fails early, one late, each once, while no answer comes for longer than the patience."""
    monkeypatch.setattr(fleet, "BACKOFF_S", (0.005, 0.02))
    monkeypatch.setattr(fleet, "PATIENCE_URL_S", 0.3)
    started = time.monotonic()
    tries: dict[str, int] = {}

    async def handler(http: web.Request) -> web.StreamResponse:
        body = await http.json()
        key = str(body["input_ids"])
        tries[key] = tries.get(key, 0) + 1
        if tries[key] == 1:  # at once, and after 0.5 s
            await asyncio.sleep(0.5 * (len(tries) - 1))
            return web.json_response({"error": {"message": "busy"}}, status=503)
        await asyncio.sleep(1.0)
        return web.json_response(answer(body))

    with http_server(handler, healthy=True) as url:
        generate.run(
            config(qwen2_checkpoint, problems, tmp_path / "out.jsonl", url, limit=2, samples=1, temperature=0.0)
        )
    assert time.monotonic() - started > 1.0
    assert [row.finish_reason for row in read_completions(tmp_path / "out.jsonl")] == ["stop", "stop"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1 << 16}, "`samples` must be at most 65535, not 65536"),
        ({"stop": ["a", ""]}, "`stop` contains an empty"),
    ],
)
def test_settings_that_no_run_can_have(settings: dict[str, Any], message: str, tmp_path: Path, problems: Path) -> None:
    with pytest.raises(InputError, match=message):
        config(tmp_path, problems, tmp_path / "out.jsonl", None, **settings)


def test_seeds_depend_on_problem_and_sample_alone() -> None:
    seeds = {derive_seed(s, f"p{i}", k) for s in range(2) for i in range(50) for k in range(4)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "p1", 2) == derive_seed(0, "p1", 2)


def test_the_fingerprint_tells_checkpoints_apart(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    """Same files, same fingerprint; another byte anywhere, another."""
    copy, hashes = tmp_path / "copy", Fingerprints(None)
    shutil.copytree(qwen2_checkpoint, copy)
    assert model_fingerprint(copy, hashes) == model_fingerprint(qwen2_checkpoint, hashes)
    with pytest.MonkeyPatch.context() as patch:  # unchanged files are read once
        patch.setattr(hashlib, "file_digest", None)
        model_fingerprint(copy, hashes)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_fingerprint(copy, hashes) != model_fingerprint(qwen2_checkpoint, hashes)
