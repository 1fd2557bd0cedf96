"""`micota generate` with real SGLang servers on a CPU: its maker is killed, then a server under it; nothing is lost.

The model is MODEL+ADAPTER, so SGLang loads what LoRA has merged.

The server's contract is tested in test_server_contract.py.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from helpers.adapters import write_adapter
from helpers.servers import Server, sglang_config
from helpers.waiting import wait_for
from micota_fast.common.records import Problem, write_rows
from micota_fast.config import loader
from micota_fast.config.generation import ServeConfig
from micota_fast.serve.serve import QUIET_PORTS, serving
from micota_fast.sources.completions import read_completions

PROBLEMS, SAMPLES = 25, 2
START_S = 240.0
ANSWERED = '"POST /generate HTTP/1.1" 200'  # in SGLang's log


@pytest.fixture(scope="module")
def serve() -> ServeConfig:
    return sglang_config()


@pytest.fixture
def model(tmp_path: Path, qwen2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint with an adapter, which servers get merged, from a folder of TMPDIR."""
    (tmp_path / "merged").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "merged"))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is read anew
    return f"{qwen2_checkpoint}+{write_adapter(tmp_path / 'adapter')}"


@pytest.fixture
def settings(tmp_path: Path, model: str, serve: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a corpus of PROBLEMS × SAMPLES answers by a server that is started for it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # by which we know what we have started
    problems = tmp_path / "problems.jsonl"
    write_rows(problems, [Problem(f"p{i}", f"{i} + 1 = ", str(i + 1)) for i in range(PROBLEMS)])
    options = {
        "model": model,
        "problems": str(problems),
        "out": str(tmp_path / "out.jsonl"),
        "samples": SAMPLES,
        "temperature": 1.0,
        "max_new_tokens": 300,
        "concurrency": 4,
        "serve": loader.plain(serve),
    }
    path = tmp_path / "generate.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def generate(settings: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "micota_fast", "generate", str(settings), *more]
    with (settings.parent / "generate.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def answered(log: Path) -> int:
    return log.read_text().count(ANSWERED) if log.exists() else 0


def living_in(folder: Path) -> list[psutil.Process]:
    """Processes other than ourselves that work in the folder: what we have started, and all that this has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder) and process.pid != os.getpid():
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_corpus_outlives_its_maker_and_its_server(
    tmp_path: Path, settings: Path, serve: ServeConfig, model: str
) -> None:
    told = settings.parent / "generate.log"

    # Started by `serve.engine: sglang`: the server ends with a parent that was killed.
    maker = generate(settings)
    own_log = tmp_path / "out.jsonl.server.log"
    wait_for(lambda: maker.poll() is not None or answered(own_log) > 2, START_S)
    assert maker.poll() is None, told.read_text()
    maker.send_signal(signal.SIGSTOP)  # it asks for no more while we look around, however long that takes
    assert len(living_in(tmp_path)) > 3  # the guard, the server, its scheduler, its detokenizer
    url = re.findall(r"Uvicorn running on (http://127\.0\.0\.1:\d+)", own_log.read_text())[-1]
    assert Server(url).get("/health")[0] == 200
    maker.kill()
    maker.wait()
    wait_for(lambda: Server(url).gone() and not living_in(tmp_path), 30)

    # The same corpus goes on at a server that runs already, and that is lost and comes back.
    port = random.SystemRandom().choice(QUIET_PORTS)
    fixed = replace(serve, port=port)
    log = tmp_path / "server.log"
    with contextlib.ExitStack() as servers:
        [url] = servers.enter_context(serving(model, fixed, log))
        start = answered(log)
        maker = generate(settings, "--set", f"url={url}")
        wait_for(lambda: maker.poll() is not None or answered(log) > start + 2, 120)
        assert maker.poll() is None, told.read_text()
        maker.send_signal(signal.SIGSTOP)
        # Not its guard, which has the same arguments and -I: as when its node is lost.
        [leader] = [p for p in living_in(tmp_path) if str(port) in p.cmdline() and "-I" not in p.cmdline()]
        os.killpg(leader.pid, signal.SIGKILL)
        wait_for(Server(url).gone)
        before = answered(log)
        maker.send_signal(signal.SIGCONT)
        [again] = servers.enter_context(serving(model, fixed, log))
        assert again == url
        assert maker.wait(240) == 0, told.read_text()
        assert answered(log) > before

    rows = read_completions(tmp_path / "out.jsonl")
    assert [(row.id, row.sample) for row in rows] == [(f"p{i}", s) for i in range(PROBLEMS) for s in range(SAMPLES)]
    assert all(row.finish_reason in ("stop", "length") and row.completion_tokens > 0 for row in rows)
    assert len({row.completion for row in rows}) > len(rows) // 2  # as random as they are, two may be equal
    assert living_in(tmp_path) == []
