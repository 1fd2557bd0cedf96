"""Does the embedded server hold under mixed load: is a request lost, does /health stay quick, is its memory flat?

    .venv/bin/python bench/soak.py [--seconds S] [--json FILE]

One server in its own process with the micro assistant in float32, 12 clients that ask one request after another for
S seconds (600): native, OpenAI's, whole and streamed, single and batched, 10% that leave before the end, 1% hostile
ones (soak_load.py). Apart from them a prober asks /health every 100 ms and reads the server's resident memory.

Exits with 1 unless all of this holds:

- no request is lost: each well-formed one gets 200 and as many tokens as it asked for, each hostile one the refusal
  that is declared for it; when the load has ended nothing runs or waits, and SIGTERM ends the server with status 0;
- no answer to /health takes longer than 1 s;
- memory is flat: over the time after the warm-up (the first fifth, at least 5 s), the slope of a straight line through
  its resident memory, times that time, is at most 3% of what it was at the end of the warm-up.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from machine import ROOT, append_rows, provenance
from soak_load import PERCENT, Client, Lost

MODEL = ROOT / "micota_fast" / "micro" / "checkpoints" / "assistant"
CLIENTS = 12
PROBE_S, MOST_HEALTH_S = 0.1, 1.0
MOST_GROWTH = 0.03
MIB = 1 << 20


@contextlib.contextmanager
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its URL and process."""
    command = [sys.executable, "-m", "micota_fast.serve.embedded", "--model", str(MODEL), "--dtype", "float32"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1], process
        finally:
            process.kill()


class Prober:
    """Asks /health and reads the resident memory at intervals, in a thread of its own."""

    def __init__(self, url: str, pid: int) -> None:
        self.health_s: list[float] = []
        self.memory: list[tuple[float, int]] = []  # (time, bytes)
        self.failures: list[str] = []
        self._url, self._pid = url, pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Prober":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(PROBE_S):
            started = time.monotonic()
            try:
                with urllib.request.urlopen(f"{self._url}/health", timeout=30):
                    pass
                pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
                self.memory.append((started, pages * os.sysconf("SC_PAGE_SIZE")))
            except OSError as error:
                self.failures.append(f"/health: {error!r}")
            self.health_s.append(time.monotonic() - started)


async def load(url: str, seconds: float, lost: list[str]) -> dict[str, collections.Counter[str]]:
    """Ask until the time is over; outcomes by kind."""
    outcomes: dict[str, collections.Counter[str]] = {kind.__name__: collections.Counter() for kind in PERCENT}
    until = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < until:
                [kind] = rng.choices(list(PERCENT), list(PERCENT.values()))
                try:
                    outcome = str(await kind(Client(session, url), rng))
                except (Lost, OSError, aiohttp.ClientError) as error:
                    outcome = "lost"
                    lost.append(f"{kind.__name__}: {error!r}")
                outcomes[kind.__name__][outcome] += 1

        await asyncio.gather(*map(one, range(CLIENTS)))
    return outcomes


def left_over(url: str) -> str | None:
    """What still runs or waits five seconds after the load."""
    for _ in range(50):
        with urllib.request.urlopen(f"{url}/get_load", timeout=30) as response:
            [state] = json.load(response)
        if state["num_reqs"] == 0:
            return None
        time.sleep(0.1)
    return f"still there after the load: {state}"


def soak(seconds: float) -> dict[str, Any]:
    """The figures of one run."""
    lost: list[str] = []
    with server() as (url, process):
        started = time.monotonic()
        with Prober(url, process.pid) as prober:
            outcomes = asyncio.run(load(url, seconds, lost))
        lost += prober.failures
        if (left := left_over(url)) is not None:
            lost.append(left)
        process.send_signal(signal.SIGTERM)
        if status := process.wait(30):
            lost.append(f"the server ended with status {status}")
    warm = started + max(5.0, seconds / 5)
    times, memory = np.array([row for row in prober.memory if row[0] >= warm]).T
    slope = float(np.polyfit(times - times[0], memory, 1)[0])
    growth = float(slope * (times[-1] - times[0]) / memory[0])
    worst, p99 = max(prober.health_s), float(np.quantile(prober.health_s, 0.99))
    return {
        "seconds": seconds,
        "requests": sum(counts.total() for counts in outcomes.values()),
        "lost": len(lost),
        "first_lost": lost[:10],
        "health_probes": len(prober.health_s),
        "health_worst_s": worst,
        "health_p99_s": p99,
        "rss_start_mib": memory[0] / MIB,
        "rss_end_mib": memory[-1] / MIB,
        "rss_slope_mib_per_min": slope * 60 / MIB,
        "rss_growth": growth,
        "outcomes": outcomes,
        "passed": not lost and worst <= MOST_HEALTH_S and growth <= MOST_GROWTH,
    }


def main() -> int:
    """Measure, print, append a row. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to ask; more than 6")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the row here")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    row: dict[str, Any] = {"benchmark": "soak", "model": "micro assistant, float32", "clients": CLIENTS}
    row |= provenance("micota-fast", "aiohttp", "torch", "tokenizers") | soak(arguments.seconds)
    for kind, counts in row["outcomes"].items():
        print(f"{kind:18} {counts.total():8,}  {dict(counts)}")
    print(
        f"{row['requests']:,} requests in {row['seconds']:g} s, {row['lost']} lost {row['first_lost']}; /health worst "
        f"{row['health_worst_s']:.3f} s, p99 {row['health_p99_s']:.3f} s of {row['health_probes']:,}; memory "
        f"{row['rss_start_mib']:.1f} -> {row['rss_end_mib']:.1f} MiB, {row['rss_slope_mib_per_min']:+.2f} MiB/min "
        f"({row['rss_growth']:+.2%}): {'passed' if row['passed'] else 'FAILED'}"
    )
    if arguments.json:
        append_rows(arguments.json, [row | {"load": os.getloadavg()[0]}])
    return 0 if row["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
