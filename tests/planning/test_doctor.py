"""`micota doctor` on this machine, and on others whose programs, servers and folders are made here."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from helpers.ports import free_port
from helpers.waiting import soon
from micota_fast.cli import main
from micota_fast.config.shipped import RECIPES
from micota_fast.planning import machine

PAPER = "micota-qwen2.5-7b"
SETS = {"math_train": 8, "aime2024": 30, "amc23": 40, "olympiadbench": 675, "math500": 500, "gsm8k_test": 1319}


class Said(dict[str, list[tuple[str, str]]]):
    """What -> its (level, text), one a finding."""

    def levels(self, what: str) -> list[str]:
        return [level for level, _ in self.get(what, [])]

    def text(self, what: str) -> str:
        return " | ".join(text for _, text in self.get(what, []))


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Said]:
    capsys.readouterr()
    status = main(["doctor", *arguments])
    return status, read(capsys.readouterr().out)


def read(out: str) -> Said:
    said = Said()
    what = ""
    for line in out.splitlines()[:-1]:
        level, rest = line[:8].strip(), line[9:]
        if level:
            assert level in ("ok", "warning", "error"), line
            what, _, text = rest.partition(": ")
            said.setdefault(what, []).append((level, text))
        else:
            assert rest.startswith("-> "), line
            level, text = said[what].pop()
            said[what].append((level, f"{text} {rest}"))
    return said


@pytest.fixture
def data(tmp_path: Path) -> str:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in SETS.items():
        rows = ({"id": f"{name}-{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data_dir={folder}"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, no SGLang, no hub, whatever this machine has."""
    for name in ("SGLANG_PYTHON", "CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("g++", "sh", "sleep", "cat"):
        if (found := shutil.which(name)) is not None:
            (programs / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def program(tmp_path: Path, name: str, script: str) -> Path:
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@contextlib.contextmanager
def hub(status: int) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that answers everything with `status`; its address, and the requests it had."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_this_machine_will_do_for_micro(tmp_path: Path) -> None:
    """As a user calls it, in a process of its own; nothing is left behind."""
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "micota_fast", "doctor", "micro", "--out", str(tmp_path / "run")]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = read(ended.stdout)
    assert not [what for what in said if "error" in said.levels(what)]
    assert {"files", "packages", "GPUs", "attention", "memory", "disk", "run folder"} <= said.keys()
    assert "sdpa for float32 on cpu" in said.text("attention")
    assert "hub" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bare_machine_will_not_do_for_the_paper(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str
) -> None:
    status, said = doctor(capsys, PAPER, "--set", data, "--out", str(tmp_path / "run"))
    assert status == 1
    assert said.levels("files") == ["ok"]
    assert said.levels("GPUs") == ["error"]
    assert "none visible, 8 needed" in said.text("GPUs")
    assert "run on a machine with 8 GPUs of" in said.text("GPUs")
    assert said.levels("SGLang") == ["error"]
    assert f"not installed for {sys.executable}" in said.text("SGLang")
    assert "$SGLANG_PYTHON" in said.text("SGLang")
    assert said.levels("hub") == ["error"]
    assert "cannot be reached" in said.text("hub")
    assert "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B" in said.text("hub")
    assert said.levels("attention") == ["warning"]
    assert said.levels("memory") == ["error"] or "available, 180 GB needed" in said.text("memory")


def test_every_missing_file_and_a_damaged_checkpoint_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "student"
    shutil.copytree(RECIPES.parent / "micro" / "checkpoints" / "student", checkpoint)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    options = (f"models.student.checkpoint={checkpoint}", "problems.train.path=nowhere.jsonl", f"data_dir={tmp_path}")
    status, said = doctor(capsys, "micro", *(f"--set={option}" for option in options), "--out", str(tmp_path / "run"))
    assert status == 1
    assert f"no such file: {tmp_path}/nowhere.jsonl" in said.text("files")
    assert said.text("files").count("no such file") == 6  # five benchmarks beside it
    assert said.levels("checkpoint") == ["error"]
    assert str(weights) in said.text("checkpoint")
    assert "must be counted" in said.text("needs")
    assert said.levels("disk") == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "micota doctor: nowhere: no such file, and no shipped recipe"),
        (["micro", "--set", "seedz=1"], "`seedz`: unknown key"),
        (["micro", "--set", "corpora.long.generate.model=nobody"], "names the model 'nobody'"),
    ],
)
def test_a_wrong_recipe_is_status_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert said in capsys.readouterr().err


def smi(tmp_path: Path, gpus: int, mib: int = 81559, capability: str = "9.0") -> None:
    rows = "\n".join(f"NVIDIA H100 80GB HBM3, {mib}, {capability}, 570.86.15" for _ in range(gpus))
    program(tmp_path, "nvidia-smi", f"cat <<END\n{rows}\nEND")


@pytest.mark.slow
def test_gpus_are_counted_and_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = (PAPER, "--set", data, "--set", "train.activation_checkpointing=full", "--out", str(tmp_path / "run"))
    smi(tmp_path, 8)
    _, said = doctor(capsys, *call)
    assert said.levels("GPUs") == ["ok"]
    assert "8 (NVIDIA H100 80GB HBM3), 8 needed" in said.text("GPUs")
    assert said.levels("GPU memory") == ["ok"]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    _, said = doctor(capsys, *call)
    assert "2 visible, 8 needed" in said.text("GPUs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _, said = doctor(capsys, *call)
    assert "none visible, 8 needed" in said.text("GPUs")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    smi(tmp_path, 8, mib=40960, capability="7.5")
    _, said = doctor(capsys, *call, "--set", "train.activation_checkpointing=selective")
    assert said.levels("GPU kind") == ["error"]
    assert "compute capability 7.5 is below 8.0" in said.text("GPU kind")
    assert "error" in said.levels("GPU memory")
    assert "student/long-seed0 needs" in said.text("GPU memory")
    assert "fits with --set train.activation_checkpointing=full" in said.text("GPU memory")


@pytest.mark.parametrize(
    ("visible", "seen"),
    [(None, 8), ("0,3", 2), ("", 0), ("-1", 0), ("0,9,1", 1), ("2,-1,3", 1), ("GPU-1234,GPU-5678", 2)],
)
def test_gpus_are_those_that_cuda_shows(
    visible: str | None, seen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those before the first number that names none, as the CUDA programming guide has it."""
    smi(tmp_path, 8)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(machine.devices()) == seen


def test_a_server_needs_room_beside_its_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str) -> None:
    """70 GB of weights and one long answer do not fit 85% of 80 GB, as the plan says."""
    smi(tmp_path, 8, mib=76_294)
    options = ("models.teacher.serve={tp: 1}", "models.assistant.serve={tp: 2}")
    call = (PAPER, "--set", data, *(f"--set={option}" for option in options), "--out", str(tmp_path / "run"))
    _, said = doctor(capsys, *call)
    assert "error" in said.levels("GPU memory")
    assert "needs 69.9 GB on each GPU, which can use 68.0 of its 80.0 GB (15% is kept free" in said.text("GPU memory")
    assert "fits with --set models.teacher.serve.tp=2" in said.text("GPU memory")


def groups(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_a_control_group_limits_cores_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "none")
    assert machine.cores() == 64
    second = groups(
        tmp_path / "v2", cpu_dot_max="250000 100000", memory_dot_max="2000000", memory_dot_current="1500000"
    )
    groups(second, memory_dot_stat="anon 900000\ninactive_file 400000\n")
    first = groups(tmp_path / "v1", cpu__cpu_dot_cfs_quota_us="250000", cpu__cpu_dot_cfs_period_us="100000")
    groups(first, memory__memory_dot_limit_in_bytes="2000000", memory__memory_dot_usage_in_bytes="1500000")
    groups(first, memory__memory_dot_stat="inactive_file 1\ntotal_inactive_file 400000\n")
    for root in (first, second):
        monkeypatch.setattr(machine, "CGROUPS", root)
        assert machine.cores() == 2
        assert machine.available_memory() == 2000000 - (1500000 - 400000)
    unlimited = groups(tmp_path / "free", cpu_dot_max="max 100000", memory_dot_max="max", memory_dot_current="1")
    monkeypatch.setattr(machine, "CGROUPS", unlimited)
    assert machine.cores() == 64
    assert machine.available_memory() > 3 * 2000000  # the machine's, of which others take some meanwhile
    monkeypatch.setattr(machine, "CGROUPS", groups(tmp_path / "v1free", cpu__cpu_dot_cfs_quota_us="-1"))
    assert machine.cores() == 64


def test_a_config_alone_is_no_model_in_the_cache(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    of_model = tmp_path / "cache" / "models--Qwen--Qwen2.5-7B-Instruct"
    (of_model / "refs").mkdir(parents=True)
    (of_model / "refs" / "main").write_text("0" * 40)
    (of_model / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (of_model / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, said = doctor(capsys, PAPER, "--set", data, "--out", str(tmp_path / "run"))
    assert "Qwen/Qwen2.5-7B-Instruct is not in the cache" in said.text("hub")


def test_what_does_not_answer_is_an_error_in_time(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that hangs, an interpreter that hangs, a hub that takes the connection and says nothing."""
    monkeypatch.setattr(machine, "PROBE_S", 0.5)
    monkeypatch.setattr(machine, "NETWORK_S", 0.5)
    program(tmp_path, "nvidia-smi", "exec sleep 90")
    monkeypatch.setenv("SGLANG_PYTHON", str(program(tmp_path, "hangs", "exec sleep 90")))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with soon():  # the programs would take 90 s
            status, said = doctor(capsys, PAPER, "--set", data, "--out", str(tmp_path / "run"))
    assert status == 1
    assert "does not answer within 0.5 s" in said.text("GPUs")
    assert "hangs does not answer within 0.5 s" in said.text("SGLang")
    assert "cannot be reached (timed out)" in said.text("hub")

    program(tmp_path, "nvidia-smi", "echo 'driver/library version mismatch' >&2; exit 18")
    _, said = doctor(capsys, PAPER, "--set", data, "--out", str(tmp_path / "run"))
    assert "fails with status 18: driver/library version mismatch" in said.text("GPUs")


def test_sglang_in_an_interpreter_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "packages"
    (packages / "sglang").mkdir(parents=True)
    (packages / "sglang" / "__init__.py").touch()
    (packages / "sglang-0.5.23.dist-info").mkdir()
    (packages / "sglang-0.5.23.dist-info" / "METADATA").write_text("Name: sglang\nVersion: 0.5.23\n")
    python = program(tmp_path, "its-python", f'PYTHONPATH={packages} exec "{sys.executable}" "$@"')
    call = (PAPER, "--set", data, "--out", str(tmp_path / "run"))
    _, said = doctor(
        capsys, *call, "--set", f"generate.serve.python={python}", "--set", f"evaluate.serve.python={python}"
    )
    assert said.levels("SGLang") == ["ok"]
    assert f"0.5.23 with torch {torch.__version__}, by {python}" in said.text("SGLang")
    monkeypatch.setenv("SGLANG_PYTHON", "no-such-python")
    _, said = doctor(capsys, *call)
    assert said.levels("SGLang") == ["error"]
    assert "$SGLANG_PYTHON names no-such-python" in said.text("SGLang")


@pytest.mark.parametrize(
    ("answer", "level", "text"),
    [
        (200, "ok", "can be downloaded"),
        (401, "error", "no access (401)"),
        (404, "error", "the hub answers 404"),
    ],
)
def test_the_hub_is_asked_for_each_model(
    answer: int,
    level: str,
    text: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = (PAPER, "--set", data, "--out", str(tmp_path / "run"))
    with hub(answer) as (address, asked):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        _, said = doctor(capsys, *call)
        assert said.levels("hub") == [level] * 4
        assert text in said.text("hub")
        assert "HEAD /Qwen/Qwen2.5-7B-Instruct/resolve/main/config.json" in asked
        assert len(asked) == 4
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        _, said = doctor(capsys, *call)
        assert said.levels("hub") == ["error"] * 4
        assert "HF_HUB_OFFLINE is set" in said.text("hub")
        assert len(asked) == 4


def test_a_model_of_unknown_shapes_leaves_the_other_checks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ("--set", data, "--set", "models.student.checkpoint=nobody/nothing")
    status, said = doctor(capsys, PAPER, *options, "--out", str(tmp_path / "run"))
    assert status == 1
    assert said.levels("needs") == ["warning"]
    assert "nobody/nothing: its config.json is not here" in said.text("needs")
    assert said.levels("SGLang") == ["error"]


def test_ports_and_servers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken, hub(200) as (address, _):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        free = free_port()
        dead = f"http://127.0.0.1:{free_port()}"
        options = (
            f"models.teacher.serve.port={port}",
            f"models.student.serve.port={free}",
            f"models.assistant.url=[{address.replace('//', '//me:secret@')}, '{dead}']",
        )
        call = ("micro", "--out", str(tmp_path / "run"))
        status, said = doctor(capsys, *call, *(f"--set={option}" for option in options))
        assert status == 1
        assert sorted(said.levels("port")) == ["error", "ok"]
        assert f"127.0.0.1:{port} is not available to answers/long" in said.text("port")
        assert f"127.0.0.1:{free} is free" in said.text("port")
        assert said.levels("server") == ["ok", "warning"]
        assert f"{address} answers 200" in said.text("server")
        assert f"{dead} does not answer" in said.text("server")
        assert "secret" not in said.text("server")


@pytest.mark.slow
def test_the_host(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    options = (
        "launch.jobs=1",
        "launch.nproc=1000000",  # each of which needs some memory
        "train.keep_checkpoints=10000000000",
        "train.compile=true",
        "train.wandb=project",
        "generate.concurrency=10000000",
        "train.pack_tokens=2000000000",
        "train.max_doc_tokens=1024",
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    status, said = doctor(capsys, "micro", *(f"--set={o}" for o in options), "--out", "/dev/null/run")
    assert status == 1
    assert "GLOO_SOCKET_IFNAME=no-such-interface names no interface" in said.text("network")
    assert said.levels("C++ compiler") == ["error"]
    assert said.levels("wandb") == ["error"] or "wandb" not in said
    assert said.levels("memory") == ["error"]
    assert said.levels("open files") in (["warning"], ["ok"])
    assert said.levels("run folder") == ["error"]
    _, said = doctor(capsys, "micro", *(f"--set={o}" for o in options), "--out", str(tmp_path / "run"))
    assert said.levels("disk") == ["error"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", socket.if_nameindex()[0][1])
    _, said = doctor(capsys, "micro", "--set=launch.nproc=2", "--out", str(tmp_path / "run"))
    assert "network" not in said


def test_a_package_out_of_range_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda _: ["torch>=99", "no-such-package>=1", 'x; extra == "gpu"']
    )
    _, said = doctor(capsys, "micro", "--out", str(tmp_path / "run"))
    assert said.levels("packages") == ["error"]
    assert f"torch {torch.__version__} is not >=99" in said.text("packages")
    assert "no-such-package>=1 is not installed" in said.text("packages")
    assert "x" not in said
