"""`api: openai` against a server that is not ours and not SGLang: `transformers serve`, as it is published."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.ports import free_port
from helpers.servers import Server, clients_python
from helpers.waiting import wait_for
from micota_fast.common.records import Completion
from micota_fast.config.generation import GenerateConfig, OpenAIConfig, ServeConfig
from micota_fast.generation import generate
from micota_fast.sources.completions import read_completions

pytestmark = pytest.mark.slow

MODEL = ROOT / "micota_fast" / "micro" / "checkpoints" / "assistant"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, folder = free_port(), tmp_path_factory.mktemp("transformers")
    command = [clients_python(), "-m", "transformers.cli.transformers", "serve", str(MODEL)]
    command += ["--device=cpu", "--dtype=float32", "--host=127.0.0.1", f"--port={port}"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        wait_for(lambda: process.poll() is not None or not Server(f"http://127.0.0.1:{port}").gone(), 240)
        assert process.poll() is None, (folder / "log.txt").read_text()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(120)


def answers(folder: Path, name: str, **more: object) -> list[Completion]:
    problems = folder / "problems.jsonl"
    lines = (MODEL.parent.parent / "problems" / "press-4.jsonl").read_text().splitlines()[:4]
    problems.write_text("".join(f"{line}\n" for line in lines))
    out = folder / f"{name}.jsonl"
    settings = {"model": str(MODEL), "problems": str(problems), "out": str(out), "max_new_tokens": 40, **more}
    generate.run(GenerateConfig(**settings))
    return read_completions(out)


@pytest.mark.parametrize("stream", [True, False])
def test_transformers_serve_writes_what_our_own_server_writes(stream: bool, url: str, tmp_path: Path) -> None:
    theirs = answers(tmp_path, "theirs", api="openai", url=url, openai=OpenAIConfig(stream=stream))
    ours = answers(tmp_path, "ours", serve=ServeConfig(dtype="float32"))
    assert {row.finish_reason for row in ours} == {"stop"}
    assert [(row.id, row.completion, row.prompt_tokens) for row in theirs] == [
        (row.id, row.completion, row.prompt_tokens) for row in ours
    ]
    assert [row.finish_reason for row in theirs] == ["stop"] * len(ours)
