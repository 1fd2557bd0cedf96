"""A server for the length of a `with` block: started, waited for, and stopped with everything it has started."""

import contextlib
import errno
import http.client
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from micota_fast import processes
from micota_fast.errors import InputError
from micota_fast.recipe import ServeConfig
from micota_fast.serve import sglang

LOG_TAIL_LINES = 30
POLL_S = 0.05


@contextlib.contextmanager
def serving(model: str | Path, config: ServeConfig, log_path: str | Path) -> Iterator[str]:
    """Run the engine that `config` names on a checkpoint; yields its URL once it has generated a token.

    The server runs in a process group of its own, which ends with the block and with this process, also by SIGKILL.
    Its output is appended to `log_path`.

    Raises:
        InputError: the port is taken; or the server ended, or was not ready within `config.startup_timeout_s`, with the
            tail of its log.
    """
    command, port = _command(str(model), config)
    log_path = Path(log_path)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as log:
        start = log.tell()
        process = _spawn(command, config, log)
    try:
        yield _wait_ready(process, config, port, log_path, start)
    finally:
        processes.stop(process)


def serve_in_foreground(model: str, config: ServeConfig) -> None:
    """Run the engine that `config` names until it ends or is interrupted; its output is ours.

    Raises:
        InputError: the port is taken, or the server ended by itself.
    """
    command, _ = _command(model, config)
    process = _spawn(command, config, None)
    try:
        status = process.wait()
    finally:
        processes.stop(process)
    raise InputError(f"the server for {model} ended with status {status}; its messages are above")


def _command(model: str, config: ServeConfig) -> tuple[list[str], int]:
    """The engine's command line, and its port; 0 where it says itself on which it listens."""
    free = _free_port(config.host, config.port)
    if config.engine == "embedded":
        return _embedded_command(model, config), 0
    # SGLang takes no port 0, nor does it say which it took.
    return sglang.command(model, config, free), free


def _spawn(command: list[str], config: ServeConfig, log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    environment = sglang.environment() if config.engine == "sglang" else None
    return processes.spawn(command, env=environment, stdout=log, stderr=subprocess.STDOUT if log else None)


def _embedded_command(model: str, config: ServeConfig) -> list[str]:
    command = [sys.executable, "-m", "micota_fast.serve.embedded", "--model", model]
    command += ["--host", config.host, "--port", str(config.port), "--dtype", config.dtype]
    command += ["--device", config.device, "--max-running", str(config.max_running)]
    if config.context_length is not None:
        command += ["--context-length", str(config.context_length)]
    return command


def _wait_ready(process: subprocess.Popen[bytes], config: ServeConfig, port: int, log_path: Path, start: int) -> str:
    """The URL, once /health_generate has answered 200."""
    deadline = time.monotonic() + config.startup_timeout_s
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host else host
    url = f"http://{host}:{port}" if port else None
    while True:
        if process.poll() is not None:
            raise InputError(f"the server ended with status {process.returncode}; {_tail(log_path, start)}")
        if time.monotonic() > deadline:
            limit = f"`serve.startup_timeout_s` = {config.startup_timeout_s:g}"
            raise InputError(f"the server was not ready within {limit}; {_tail(log_path, start)}")
        if url is None:
            told = re.search(r"^listening on http://.*:(\d+)$", _read(log_path, start), re.MULTILINE)
            url = f"http://{host}:{told[1]}" if told else None
        if url is not None and _healthy(url):
            return url
        time.sleep(POLL_S)


def _healthy(url: str) -> bool:
    # Proxies of the environment are for the world outside, not for a server of our own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health_generate", timeout=30) as response:
            return response.status == 200
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one where it is 0. A server already there would be taken for ours.

    Raises:
        InputError: the port is taken, or the host is none of this machine's addresses.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
        try:
            probe.bind((host, port))
        except OSError as error:
            what = f"port {port} is taken" if error.errno == errno.EADDRINUSE else f"cannot listen there ({error})"
            raise InputError(
                f"`serve`: {host}: {what}; choose another (0: a free one), or name the server that runs there in `url`"
            ) from None
        return int(probe.getsockname()[1])


def _read(log_path: Path, start: int) -> str:
    with log_path.open("rb") as log:
        log.seek(start)
        return log.read().decode(errors="replace")


def _tail(log_path: Path, start: int) -> str:
    lines = _read(log_path, start).splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"the end of its log ({log_path}):", *(f"  {line}" for line in lines)])
