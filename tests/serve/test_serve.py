"""Starting servers: replicas, their GPUs, logs and ports, why one did not start, and the end of all of them."""

import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from helpers.adapters import write_adapter
from helpers.servers import PROMPT, Server, greedy
from helpers.waiting import wait_for
from micota_fast.common import processes
from micota_fast.config.generation import ServeConfig
from micota_fast.errors import InputError
from micota_fast.serve import gpus, serve, sglang
from micota_fast.serve.serve import serving


@pytest.mark.slow
def test_replicas_are_servers_of_their_own(
    tmp_path: Path, qwen2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With logs and GPUs of their own; these GPUs do not exist, so that they run on the CPU."""
    monkeypatch.setenv(gpus.VISIBLE, "no-such-gpu-a,no-such-gpu-b")
    log = tmp_path / "logs" / "server.log"
    with serving(qwen2_checkpoint, ServeConfig(replicas=2), log) as urls:
        assert len(set(urls)) == 2
        answers = [Server(url).generate(input_ids=PROMPT, sampling_params=greedy()) for url in urls]
        assert answers[0]["output_ids"] == answers[1]["output_ids"]
        for url, path in zip(urls, (log, Path(f"{log}.1")), strict=True):
            assert f"listening on {url}\n" in path.read_text()
        engines = [p for p in psutil.Process().children(recursive=True) if "micota_fast.serve.embedded" in p.cmdline()]
        seen = {process.environ()[gpus.VISIBLE] for process in engines}
    assert seen == {"no-such-gpu-a", "no-such-gpu-b"}
    assert all(Server(url).gone() for url in urls)


def test_servers_that_were_started_end_where_a_further_one_cannot_be(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    log = tmp_path / "log.txt"
    Path(f"{log}.1").mkdir()  # where the second one's log would be
    before = {child.pid for child in psutil.Process().children()}
    with (
        pytest.raises(InputError, match=r"cannot write the server's log .*Is a directory"),
        serving(qwen2_checkpoint, ServeConfig(replicas=2), log),
    ):
        pass
    assert {child.pid for child in psutil.Process().children()} <= before


def test_launch_tells_which_server_did_not_start_and_why(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("what an earlier run left\n")
    with (
        pytest.raises(InputError, match=r"no-such-model: no such folder"),
        serving(tmp_path / "no-such-model", ServeConfig(), log),
    ):
        pass
    assert "earlier run" in log.read_text()
    with (
        pytest.raises(InputError, match=r"server 1 of 2 for .* was not ready within `serve.startup_timeout_s` = 0"),
        serving(qwen2_checkpoint, ServeConfig(startup_timeout_s=0.0, replicas=2), log),
    ):
        pass


def test_a_server_that_ends_while_another_starts_is_named(
    tmp_path: Path, qwen2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds its port taken; the first would be well. Neither is left."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        busy = taken.getsockname()[1]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free = probe.getsockname()[1]
        monkeypatch.setattr(serve, "_free_ports", lambda _: [free, busy])  # taken only after we had looked
        with (
            pytest.raises(InputError, match=rf"server 2 of 2 for .* ended with status 2; .*log\.1\)[\s\S]*{busy}"),
            serving(qwen2_checkpoint, ServeConfig(replicas=2, port=free), tmp_path / "log"),
        ):
            pass
    assert Server(f"http://127.0.0.1:{free}").gone()


def test_launch_takes_no_other_server_for_its_own(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    with serving(qwen2_checkpoint, ServeConfig(), tmp_path / "log.txt") as [url]:
        port = int(url.rpartition(":")[2])
        for config in (ServeConfig(port=port), ServeConfig(port=port - 1, replicas=2)):
            log = tmp_path / "other.txt"
            with (
                # the port before it may happen to be somebody else's
                pytest.raises(InputError, match=rf"127\.0\.0\.1: port ({port}|{config.port}) is taken"),
                serving(qwen2_checkpoint, config, log),
            ):
                pass
            assert not log.exists()
        assert Server(url).get("/health")[0] == 200


@pytest.mark.slow
def test_servers_die_with_a_parent_that_was_killed(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    code = (
        "import sys, time\n"
        "from micota_fast.config.generation import ServeConfig\n"
        "from micota_fast.serve.serve import serving\n"
        "with serving(sys.argv[1], ServeConfig(replicas=2), sys.argv[2]) as urls:\n"
        "    print(*urls, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code, str(qwen2_checkpoint), str(tmp_path / "log.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        servers = [Server(url) for url in parent.stdout.readline().decode().split()]
        assert [server.get("/health")[0] for server in servers] == [200, 200]
        parent.kill()
    for server in servers:
        wait_for(server.gone)


@pytest.mark.slow
def test_a_run_that_fails_tells_what_became_of_its_server(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    def fail() -> None:
        with serving(qwen2_checkpoint, ServeConfig(), tmp_path / "log.txt"):
            [guard] = [child for child in psutil.Process().children() if str(qwen2_checkpoint) in child.cmdline()]
            [engine] = guard.children()
            engine.kill()
            wait_for(lambda: guard.status() == psutil.STATUS_ZOMBIE)
            raise InputError("no answer")

    with pytest.raises(InputError, match=r"^no answer\nthe server for .* ended with status 137; the end of its log"):
        fail()


@pytest.mark.slow
def test_serve_tells_its_urls_and_goes_on_with_the_servers_that_are_left(
    tmp_path: Path, qwen2_checkpoint: Path
) -> None:
    log = tmp_path / "server.log"
    command = [sys.executable, "-m", "micota_fast", "serve", str(qwen2_checkpoint)]
    command += ["--log", str(log), "--set", "replicas=2"]
    process = processes.spawn(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline().decode() for _ in range(2)]
        servers = [Server(line.removeprefix("ready: ").strip()) for line in lines]
        assert all(server.get("/health_generate")[0] == 200 for server in servers)
        [cli] = psutil.Process(process.pid).children()
        first, second = sorted(cli.children(), key=lambda child: child.create_time())
        first.terminate()
        assert re.match(
            r"server 1 of 2 for .* ended with status 0; the end of its log", process.stdout.readline().decode()
        )
        assert servers[1].get("/health_generate")[0] == 200
        second.terminate()
        assert process.wait(120) == 2
        assert log.stat().st_size
        assert Path(f"{log}.1").stat().st_size
    finally:
        processes.stop(process)
        process.stdout.close()


@pytest.mark.slow
def test_serve_without_a_log_talks_to_the_terminal_and_ends_on_ctrl_c(qwen2_checkpoint: Path) -> None:
    command = [sys.executable, "-m", "micota_fast", "serve", str(qwen2_checkpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("ready: "):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        server = Server(lines[-1].removeprefix("ready: ").strip())
        assert f"listening on {server.url}\n" in lines
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    assert server.gone()


# -- which GPUs ------------------------------------------------------------------------------------------------------


def visible(config: ServeConfig) -> list[str | None]:
    """What $CUDA_VISIBLE_DEVICES would be for each server."""
    return [environment.get(gpus.VISIBLE) for environment in gpus.environments(config)]


def test_gpus_are_dealt_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "4, 5,GPU-8932f937,7")
    assert visible(ServeConfig(engine="sglang", replicas=2, tp=2)) == ["4,5", "GPU-8932f937,7"]
    assert visible(ServeConfig(engine="sglang", replicas=4)) == ["4", "5", "GPU-8932f937", "7"]
    assert visible(ServeConfig(replicas=3)) == ["4", "5", "GPU-8932f937"]
    # One server sees them all, and takes what it needs: arguments that we do not know may ask for more.
    assert visible(ServeConfig(engine="sglang", tp=2)) == ["4, 5,GPU-8932f937,7"]
    for args in ([], ["--device", "cpu"]):
        config = ServeConfig(engine="sglang", device="auto" if args else "cpu", replicas=9, tp=3, args=args)
        assert visible(config) == ["4, 5,GPU-8932f937,7"] * 9


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (ServeConfig(engine="sglang", replicas=3), "3 GPUs (3 servers with 1 each"),
        (ServeConfig(engine="sglang", tp=2, dp=2), "4 GPUs (1 servers with 4 each"),
        (ServeConfig(engine="sglang", replicas=2, tp=2), "4 GPUs (2 servers with 2 each"),
        (ServeConfig(device="cuda", replicas=3), "3 GPUs (3 servers with 1 each"),
    ],
)
def test_too_few_gpus_are_counted(monkeypatch: pytest.MonkeyPatch, config: ServeConfig, needed: str) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    with pytest.raises(InputError, match="and 2 are visible") as told:
        gpus.environments(config)
    assert needed in str(told.value)


def test_copies_with_data_parallel_attention_share_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    monkeypatch.setattr(sglang, "find_python", lambda config: "python")
    for config in (
        ServeConfig(engine="sglang", tp=2, args=["--attn-dp-size", "2", "--enable-metrics"]),
        ServeConfig(engine="sglang", tp=2, dp=2, args=["--enable-dp-attention", "--enable-metrics"]),  # before 0.5.23
    ):
        assert visible(config) == ["0,1"]
        line = sglang.command("model", config, 30000)
        assert line[line.index("--tp-size") :] == ["--tp-size", "2", "--attn-dp-size", "2", "--enable-metrics"]
    both = ServeConfig(engine="sglang", tp=2, dp=2, args=["--attn-dp-size=2"])
    with pytest.raises(
        InputError, match=r"`serve\.dp` is 2 with --attn-dp-size in `serve\.args`.*leave `serve\.dp` at 1"
    ):
        sglang.command("model", both, 30000)


def test_gpus_are_counted_by_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.visible_gpus() is None
    assert visible(ServeConfig(engine="sglang")) == [None]  # it finds its own, or fails
    assert visible(ServeConfig(replicas=2)) == [None, None]  # our engine, on the CPU
    with pytest.raises(InputError, match=r"replicas` = 2: .*\$CUDA_VISIBLE_DEVICES"):
        gpus.environments(ServeConfig(engine="sglang", replicas=2))
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$*" = "--query-gpu=index --format=csv,noheader" ] && printf "0\\n1\\n2\\n"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert gpus.visible_gpus() == ["0", "1", "2"]
    assert visible(ServeConfig(engine="sglang", replicas=3)) == ["0", "1", "2"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus.visible_gpus() is None


# -- SGLang's command line -------------------------------------------------------------------------------------------


def test_sglang_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Built for an interpreter that has a package of that name; refused, with what to do, for one that has not."""
    monkeypatch.delenv("SGLANG_PYTHON", raising=False)
    with pytest.raises(InputError, match=r"not installed .*SGLANG_PYTHON"):
        sglang.command("m", ServeConfig(engine="sglang"), 1)
    with pytest.raises(InputError, match="not an executable program"):
        sglang.find_python(ServeConfig(python=str(tmp_path / "nothing")))
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "__init__.py").touch()
    with pytest.raises(InputError, match="where sglang is not installed"):
        sglang.find_python(ServeConfig(python=sys.executable))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SGLANG_PYTHON", sys.executable)
    more = ["--mem-fraction-static", "0.85"]
    config = ServeConfig(engine="sglang", dtype="bfloat16", context_length=4096, tp=4, dp=2, args=more)
    assert sglang.command("m", config, 31000) == [
        sys.executable,
        *["-m", "sglang.launch_server", "--model-path", "m", "--host", "127.0.0.1", "--port", "31000"],
        *["--dtype", "bfloat16", "--context-length", "4096", "--tp-size", "4", "--dp-size", "2", *more],
    ]
    with pytest.raises(InputError, match="float64"):
        sglang.command("m", ServeConfig(engine="sglang", dtype="float64"), 1)
    for args in (["--tp-size", "2"], ["--tensor-parallel-size=2"], ["--dp=2"]):
        with pytest.raises(InputError, match=r"give it as `serve\.[td]p`"):
            sglang.command("m", ServeConfig(engine="sglang", args=args), 1)


def test_our_engine_runs_on_one_device(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    with (
        pytest.raises(InputError, match="`tp` and `dp` are SGLang's"),
        serving(qwen2_checkpoint, ServeConfig(tp=2, device="cpu"), tmp_path / "log.txt"),
    ):
        pass


@pytest.mark.parametrize(
    ("config", "passed"),
    [
        (ServeConfig(engine="sglang"), True),
        (ServeConfig(engine="sglang", args=["--attention-backend", "triton"]), True),
        (ServeConfig(engine="sglang", args=["--attention-backend=torch_native"]), False),
        (ServeConfig(engine="sglang", args=["--device", "cpu"]), False),
        (ServeConfig(engine="sglang", device="cpu"), False),
        (ServeConfig(), False),
    ],
)
def test_seeds_are_asked_for_where_sglang_has_them(config: ServeConfig, passed: bool) -> None:
    before = list(config.args)
    assert sglang.seeded(config).args == before + [sglang.DETERMINISTIC] * passed
    assert sglang.seeded(sglang.seeded(config)) == sglang.seeded(config)
    assert config.args == before


@pytest.mark.slow
def test_a_model_with_an_adapter_is_served_merged(
    tmp_path: Path, qwen2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = f"{qwen2_checkpoint}+{write_adapter(tmp_path / 'adapter')}"
    (tmp_path / "made").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "made"))
    with serving(both, ServeConfig(), tmp_path / "log.txt") as [url]:
        assert Server(url).read("/v1/models")["data"][0]["id"] == both
        assert len(list((tmp_path / "made").glob("*/model/model.safetensors"))) == 1
    assert not list((tmp_path / "made").iterdir())
