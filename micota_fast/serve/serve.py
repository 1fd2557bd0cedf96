"""Servers for the length of a `with` block: started, waited for, and stopped with everything they have started."""

import contextlib
import errno
import http.client
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from micota_fast.common import processes
from micota_fast.config.generation import ServeConfig
from micota_fast.errors import InputError
from micota_fast.model.checks import checked_config
from micota_fast.model.folder import names_adapter, require_checkpoint
from micota_fast.serve import gpus, sglang

LOG_TAIL_LINES = 30
POLL_S = 0.05
HEALTH_TIMEOUT_S = 30.0
# Below those that the kernel hands out (from 32768 on): SGLang listens only once it has loaded the model, and somebody
# else's server that got the port meanwhile would be taken for it.
QUIET_PORTS = range(20000, 32000)


@contextlib.contextmanager
def serving(model: str | Path, config: ServeConfig, log_path: str | Path) -> Iterator[list[str]]:
    """Run `config.replicas` servers of a checkpoint; yields their URLs once each has generated a token.

    Each runs in a process group of its own, which ends with the block and with this process, also by SIGKILL. The first
    one's output is appended to `log_path`, the others' to `log_path` with .1, .2 ... at its end.

    Raises:
        InputError: a port is taken; there are too few GPUs; or a server ended, or was not ready within
            `config.startup_timeout_s`, with the tail of its log. Raised in the block, it is raised again with what has
            become of servers that ended meanwhile.
    """
    with _started(str(model), config, Path(log_path)) as servers:
        urls = _wait_ready(servers, config)
        try:
            yield urls
        except InputError as error:
            raise InputError("\n".join([str(error), *(end for server in servers if (end := server.end))])) from None


def serve_in_foreground(model: str, config: ServeConfig, log_path: str | Path | None = None) -> None:
    """Run `config.replicas` servers of a checkpoint until all have ended or we are interrupted; tells their URLs.

    Their output goes to the terminal; with `log_path` to files, as in `serving`.

    Raises:
        InputError: what `serving` raises; or the last server ended by itself.
    """
    with _started(model, config, Path(log_path) if log_path else None) as servers:
        for url in _wait_ready(servers, config):
            print(f"ready: {url}", flush=True)
        running = servers
        while running:
            time.sleep(POLL_S)
            for server in running:
                if (end := server.end) is not None:
                    print(end, flush=True)
            running = [server for server in running if server.process.returncode is None]
    raise InputError(f"no server of {model} is left")


@dataclass
class _Server:
    """A server that was started."""

    name: str  # in messages
    process: subprocess.Popen[bytes]
    address: str  # host as it stands in a URL
    port: int  # 0: the server chooses, and its log tells
    log_path: Path | None  # None: the terminal
    log_start: int  # where its own output begins there

    @property
    def url(self) -> str | None:
        """None until it is known."""
        if not self.port:
            told = re.search(r"^listening on http://.*:(\d+)$", self._log(), re.MULTILINE)
            self.port = int(told[1]) if told else 0
        return f"http://{self.address}:{self.port}" if self.port else None

    @property
    def end(self) -> str | None:
        """How it ended, and the last of what it has said; None: it runs."""
        if self.process.poll() is None:
            return None
        return f"{self.name} ended with status {self.process.returncode}; {self.tail()}"

    def tail(self) -> str:
        """The last of what it has said."""
        if self.log_path is None:
            return "its messages are above"
        lines = self._log().splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"the end of its log ({self.log_path}):", *(f"  {line}" for line in lines)])

    def _log(self) -> str:
        if self.log_path is None:
            return ""
        with self.log_path.open("rb") as log:
            log.seek(self.log_start)
            return log.read().decode(errors="replace")


@contextlib.contextmanager
def _started(model: str, config: ServeConfig, log_path: Path | None) -> Iterator[list[_Server]]:
    """Start the servers, and end them all in the end. MODEL+ADAPTER is served merged, under that name."""
    if names_adapter(model):
        from micota_fast.model.adapter import temporarily_merged  # imports torch

        config = replace(config, served_model_name=config.served_model_name or model)
        with temporarily_merged(model) as folder, _started(str(folder), config, log_path) as of_merged:
            yield of_merged
        return
    if config.engine == "embedded":  # SGLang knows further families
        require_checkpoint(model)
        if Path(model).is_dir():
            checked_config(model)
    environments = gpus.environments(config)
    # Our own engine finds a free port best itself, as it listens at once; but only a log that we read tells which.
    chooses = config.engine == "embedded" and config.port == 0 and log_path is not None
    ports = [0] * config.replicas if chooses else _free_ports(config)
    commands = [_command(model, config, port) for port in ports]
    servers: list[_Server] = []
    try:
        for i, (command, port, environment) in enumerate(zip(commands, ports, environments, strict=True)):
            name = f"server {i + 1} of {config.replicas}" if config.replicas > 1 else "the server"
            name = f"{name} for {model}"
            path = log_path and (Path(f"{log_path}.{i}") if i else log_path)
            with contextlib.ExitStack() as stack:
                log = None
                if path is not None:
                    try:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        log = stack.enter_context(path.open("ab"))
                    except OSError as error:
                        raise InputError(f"cannot write the server's log {path}: {error.strerror}") from None
                process = processes.spawn(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT if log else None
                )
                servers.append(_Server(name, process, _address(config.host), port, path, log.tell() if log else 0))
        yield servers
    finally:
        for server in servers:  # all at once, then each is waited for
            if server.process.poll() is None:
                server.process.terminate()
        for server in servers:
            processes.stop(server.process)


def _command(model: str, config: ServeConfig, port: int) -> list[str]:
    """The engine's command line."""
    if config.engine == "sglang":
        return sglang.command(model, config, port)
    if config.tp * config.dp > 1:
        raise InputError("`serve`: `tp` and `dp` are SGLang's; the embedded engine runs on one device (see `replicas`)")
    command = [sys.executable, "-m", "micota_fast.serve.embedded", "--model", model]
    command += ["--host", config.host, "--port", str(port), "--dtype", config.dtype]
    command += ["--device", config.device, "--max-running", str(config.max_running)]
    if config.context_length is not None:
        command += ["--context-length", str(config.context_length)]
    if config.served_model_name is not None:
        command += ["--served-model-name", config.served_model_name]
    return [*command, *(f"--allow-host={host}" for host in config.allow_hosts)]


def _wait_ready(servers: list[_Server], config: ServeConfig) -> list[str]:
    """The URLs, once /health_generate of each has answered 200."""
    deadline = time.monotonic() + config.startup_timeout_s
    urls: dict[str, str] = {}
    while True:
        for server in servers:
            if (end := server.end) is not None:
                raise InputError(end)
        waiting = [server for server in servers if server.name not in urls]
        if not waiting:
            return [urls[server.name] for server in servers]
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            limit = f"`serve.startup_timeout_s` = {config.startup_timeout_s:g}"
            raise InputError(f"{waiting[0].name} was not ready within {limit}; {waiting[0].tail()}")
        for server in waiting:
            url = server.url
            if url is not None and _healthy(url, min(left_s, HEALTH_TIMEOUT_S)):
                urls[server.name] = url
        time.sleep(POLL_S)


def _healthy(url: str, timeout_s: float) -> bool:
    # Proxies of the environment are for the world outside, not for a server of our own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health_generate", timeout=timeout_s) as response:
            return response.status == 200
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False


def _address(host: str) -> str:
    """Where a server that listens on `host` is reached from here, as a URL has it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _free_ports(config: ServeConfig) -> list[int]:
    """`config.port` and those after it, or free ones if it is 0. A server already there would be taken for ours.

    Raises:
        InputError: a port is taken, or the host is none of this machine's addresses.
    """
    with contextlib.ExitStack() as probes:  # all held until the last is found, so that none is found twice
        ports: list[int] = []
        while len(ports) < config.replicas:
            port = config.port + len(ports) if config.port else random.SystemRandom().choice(QUIET_PORTS)
            probe = probes.enter_context(socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
            try:
                probe.bind((config.host, port))
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                if taken and not config.port:
                    continue
                what = f"port {port} is taken" if taken else f"cannot listen there ({error})"
                raise InputError(
                    f"`serve`: {config.host}: {what}; choose another (0: a free one), or name the server that runs "
                    "there in `url`"
                ) from None
            ports.append(port)
        return ports
