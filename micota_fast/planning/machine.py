"""What this machine has: GPUs, memory, ports, network. Whatever may not answer is asked under a time limit."""

import itertools
import os
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from micota_fast.errors import InputError
from micota_fast.serve.gpus import VISIBLE

T = TypeVar("T")
PROBE_S, NETWORK_S = 20.0, 5.0
CGROUPS = Path("/sys/fs/cgroup")


class Device(NamedTuple):
    """A GPU as nvidia-smi shows it."""

    name: str
    memory: float  # bytes
    capability: float
    driver: str


def within(seconds: float, function: Callable[[], T]) -> T:
    """Return what `function` returns, unless it takes longer: what it waits for (a resolver, a socket) may never come.

    Raises:
        TimeoutError: it was not done in time; its thread is left alone and ends with this process.
        Exception: what `function` raises.
    """
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append((True, function()))
        except Exception as error:
            outcome.append((False, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    done, value = outcome[0]
    if not done:
        raise value
    result: T = value
    return result


def devices() -> list[Device]:
    """Return the GPUs that a process of ours would see; none without nvidia-smi.

    Raises:
        InputError: nvidia-smi fails, or does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    out = output([program, "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits"])
    try:
        rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.strip()]
        found = [Device(name, float(mib) * 2**20, float(capability), driver) for name, mib, capability, driver in rows]
    except ValueError:
        raise InputError(f"nvidia-smi does not report GPUs in a known form: {out.strip()[:200]}") from None
    named = os.environ.get(VISIBLE)
    if named is None:
        return found
    names = [name.strip() for name in named.split(",") if name.strip()]
    if any(re.match("[A-Za-z]", name) for name in names):
        return found[: len(names)]  # by UUID: how many there are is known
    # CUDA shows those before the first number that names none, such as -1 (CUDA C++ Programming Guide,
    # "CUDA Environment Variables").
    known = itertools.takewhile(lambda name: name.isdecimal() and int(name) < len(found), names)
    return [found[int(name)] for name in known]


def output(command: list[str]) -> str:
    """Return what a program prints.

    Raises:
        InputError: it cannot be run, fails, or takes longer than PROBE_S.
    """
    try:
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]} does not answer within {PROBE_S:g} s") from None
    except OSError as error:
        raise InputError(f"{command[0]} cannot be run: {error}") from None
    if told.returncode:
        last = (told.stderr.strip() or told.stdout.strip() or "it says nothing").splitlines()[-1]
        raise InputError(f"{command[0]} fails with status {told.returncode}: {last[:200]}")
    return told.stdout


def available_memory() -> float:
    """Return the bytes of memory that are available to us: of the machine, or of our control group if that has less."""
    text = Path("/proc/meminfo").read_text(encoding="utf-8") if Path("/proc/meminfo").exists() else ""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    there = float(found[1]) * 1024 if found else float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit_file, usage_file, stat_file, reclaimed in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        limit, usage = _of_group(limit_file), _of_group(usage_file)
        if limit.isdecimal() and usage.isdecimal():
            # Pages of files that nobody reads any more are given up before anything fails.
            cache = re.search(rf"^{reclaimed} (\d+)$", _of_group(stat_file), re.MULTILINE)
            used = int(usage) - (int(cache[1]) if cache else 0)
            there = min(there, max(0.0, float(limit) - used))
    return there


def cores() -> int:
    """Return the number of cores that this process may use: those it is bound to, or fewer by its group's quota."""
    quota, _, period = _of_group("cpu.max").partition(" ")  # version 2 of control groups; below, version 1
    quota = quota or _of_group("cpu/cpu.cfs_quota_us")
    period = period or _of_group("cpu/cpu.cfs_period_us")
    bound = len(os.sched_getaffinity(0))
    return min(bound, max(1, int(quota) // int(period))) if quota.isdecimal() and period.isdecimal() else bound


def _of_group(name: str) -> str:
    """Return a file of our control group, as a container sees it; empty if there is none."""
    try:
        return (CGROUPS / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def port_obstacle(host: str, port: int) -> str | None:
    """Return why a server cannot listen there; None if it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None


class _KeyStays(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but does not take our authorization to another host."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        new = super().redirect_request(req, *args)
        if new is not None and (new.type, new.host) != (req.type, req.host):
            new.remove_header("Authorization")
        return new


def http_status(url: str, method: str = "GET", authorization: str | None = None, proxies: bool = True) -> int:
    """Return the HTTP status of a request.

    Args:
        url: without user and password.
        method: GET or HEAD.
        authorization: the header of that name; None: none is sent.
        proxies: use those of the environment.

    Raises:
        OSError: there was no answer within NETWORK_S, or `url` is not valid.
    """

    def ask() -> int:
        request = urllib.request.Request(url, method=method)
        if authorization is not None:
            request.add_header("Authorization", authorization)
        handlers: list[urllib.request.BaseHandler] = [_KeyStays()]
        handlers += [] if proxies else [urllib.request.ProxyHandler({})]
        with urllib.request.build_opener(*handlers).open(request, timeout=NETWORK_S) as response:
            return int(response.status)

    try:
        return within(NETWORK_S + 1, ask)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None
    except ValueError as error:
        raise OSError(str(error)) from None


def unknown_interfaces() -> dict[str, str]:
    """Return those of $NCCL_SOCKET_IFNAME and $GLOO_SOCKET_IFNAME that name no interface, with what they name."""
    there = [name for _, name in socket.if_nameindex()]
    matches: dict[str, Callable[[str, str], bool]] = {
        "NCCL_SOCKET_IFNAME": lambda interface, name: interface.startswith(name.lstrip("=")),
        "GLOO_SOCKET_IFNAME": lambda interface, name: interface == name,
    }
    unknown = {}
    for variable, match in matches.items():
        names = os.environ.get(variable, "")
        named = bool(names) and not names.startswith("^")  # ^: all but those
        if named and not any(match(interface, name) for name in names.split(",") for interface in there):
            unknown[variable] = names
    return unknown
