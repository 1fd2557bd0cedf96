"""What does the client cost, and how fast is the embedded server?

    .venv/bin/python bench/generate.py [--quick] [--only PART] [--json FILE]

- client: 20,000 problems of about 100 tokens, asked of a server that answers at once with 20 tokens
  (`trivial_server.py`, on another core if there is one). Requests per second of the client's processor time (all of
  its process from the call to the finished corpus, without start and imports) and by the clock; one sample per problem,
  and four. "bare aiohttp" posts the same bodies, decodes the answers and does nothing else: the floor.
- long: 200 in flight with answers of 8,192 tokens. At 50 tokens/s each, 1.2 of them end a second. Two runs of 20 s, in
  one of which ten times as many answers come: the difference is what an answer costs, the rest what a second costs.
  The share of a core is what 200 such sequences would take.
- server: `micota serve` on a Qwen2 of 14M random weights in float32, one thread: 64 prompts of 16 to 64 tokens, answers
  of 16 to 256 (log-uniform), greedy, ends ignored. All at once, and a quarter of them one after another; and
  transformers' `generate` in padded batches of 64 and, sorted by length, of 16, whose tokens beyond a wanted length do
  not count. "as transformers": answers that equal its batches' token by token.

Every run is a fresh process (of "server" one server answers all), contestants in turn, medians of 3. Rows are appended
to FILE part by part.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from machine import ROOT, append_rows, provenance
from train_contestants import Case, prepare

from micota_fast.common.records import Problem, write_rows
from micota_fast.config.generation import ServeConfig
from micota_fast.serve.serve import serving

Row = dict[str, Any]
HERE = Path(__file__).parent
TEACHER = ROOT / "micota_fast" / "micro" / "checkpoints" / "teacher"  # its tokenizer makes the prompts
IN_FLIGHT, TOKENS_PER_S = 200, 50
MODEL = (384, 1024, 8, 6, 2, 4096, True)  # hidden, intermediate, layers, heads, key heads, vocabulary, tied
TINY = (64, 128, 2, 4, 2, 512, True)
CORES = sorted(os.sched_getaffinity(0))


def contestant(name: str, settings: Row) -> Row:
    """Figures of a run in a fresh process."""
    command = [sys.executable, str(HERE / "generate_contestants.py"), name, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: status {done.returncode}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


@contextlib.contextmanager
def trivial_server(tokens: int, hold_s: float, figures: Row) -> Iterator[str]:
    """Its URL; at the end `figures` holds its own."""
    command = [sys.executable, str(HERE / "trivial_server.py"), str(tokens), str(hold_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        os.sched_setaffinity(process.pid, {CORES[-1]})
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()
            figures |= json.loads(process.stdout.readline())


def write_problems(path: Path, number: int) -> None:
    """Texts that the teacher's tokenizer and template make about 100 tokens of."""
    text = "A jar holds 8." + " Ann+2 Bob+2 Cid-2 Dan-3 Eva-5 Fay-7" * 3 + ". How many modulo 10?"
    write_rows(path, (Problem(f"p{i}", f"{i}: {text}", "5") for i in range(number)))


def write_model(folder: Path) -> None:
    """The teacher's tokenizer and template, with a context that holds the longest answers."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TEACHER / name, folder)
    config = json.loads((TEACHER / "config.json").read_text()) | {"max_position_embeddings": 32_768}
    (folder / "config.json").write_text(json.dumps(config))


def measure_client(
    name: str, folder: Path, number: int, samples: int, concurrency: int, tokens: int, hold_s: float
) -> Row:
    """Figures of one run, those of the server with them."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        write_problems(Path(run) / "problems.jsonl", number)
        write_model(Path(run) / "model")
        settings = {
            "model": f"{run}/model",
            "problems": f"{run}/problems.jsonl",
            "out": f"{run}/out.jsonl",
            "samples": samples,
            "temperature": 1.0,
            "max_new_tokens": tokens,
            "concurrency": concurrency,
            "core": CORES[0],
        }
        server: Row = {}
        with trivial_server(tokens, hold_s, server) as url:
            figures = contestant(name, settings | {"url": url})
    assert figures["requests"] == server["requests"] == number * samples
    return figures | {"server_cpu_s": server["cpu_s"]}


def spread(values: list[float]) -> Row:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def client_part(folder: Path, quick: bool, runs: int) -> list[Row]:
    """The client's cost a request."""
    requests = 1000 if quick else 20_000
    rows: list[Row] = []
    cases: dict[tuple[str, int], list[Row]] = {("micota", 1): [], ("micota", 4): [], ("bare aiohttp", 1): []}
    for _ in range(runs):
        for (name, samples), taken in cases.items():
            taken.append(measure_client(name, folder, requests // samples, samples, 64, 20, 0.0))
    print(f"{requests:,} short requests; requests/s of processor time, by the clock, and what the server could answer")
    for (name, samples), taken in cases.items():
        row = {
            "part": "client",
            "contestant": name,
            "samples": samples,
            "requests": requests,
            "per_cpu_s": spread([run["requests"] / run["cpu_s"] for run in taken]),
            "per_s": spread([run["requests"] / run["wall_s"] for run in taken]),
            "server_per_cpu_s": spread([run["requests"] / run["server_cpu_s"] for run in taken]),
        }
        rows.append(row)
        shown = "  ".join(f"{show(row[key]):>24}" for key in ("per_cpu_s", "per_s", "server_per_cpu_s"))
        print(f"{name:14} {samples} a problem  {shown}", flush=True)
    return rows


def show(figure: Row, digits: int = 0) -> str:
    return f"{figure['median']:,.{digits}f} [{figure['min']:,.{digits}f}, {figure['max']:,.{digits}f}]"


def long_part(folder: Path, quick: bool, runs: int) -> list[Row]:
    """The share of a core that long answers take."""
    tokens, seconds = 8192, 2.0 if quick else 20.0
    per_answer, per_second, share = [], [], []
    for _ in range(runs):
        few = measure_client("micota", folder, IN_FLIGHT, 1, IN_FLIGHT, tokens, seconds)
        many = measure_client("micota", folder, 10 * IN_FLIGHT, 1, IN_FLIGHT, tokens, seconds / 10)
        per_answer.append((many["cpu_s"] - few["cpu_s"]) / (many["requests"] - few["requests"]))
        per_second.append((few["cpu_s"] - per_answer[-1] * few["requests"]) / few["wall_s"])
        share.append(per_answer[-1] * IN_FLIGHT * TOKENS_PER_S / tokens + per_second[-1])
    row = {
        "part": "long",
        "contestant": "micota",
        "answer_tokens": tokens,
        "in_flight": IN_FLIGHT,
        "cpu_ms_per_answer": spread([1e3 * value for value in per_answer]),
        "cpu_ms_per_second": spread([1e3 * value for value in per_second]),
        "share_of_core": spread(share),
    }
    print(
        f"{IN_FLIGHT} in flight, answers of {tokens:,} tokens: {show(row['cpu_ms_per_answer'], 2)} ms of processor "
        f"time an answer, {show(row['cpu_ms_per_second'], 2)} ms a second besides (the start included); at "
        f"{TOKENS_PER_S} tokens/s each {share_text(row['share_of_core'])} of a core",
        flush=True,
    )
    return [row]


def share_text(figure: Row) -> str:
    return f"{figure['median']:.2%} [{figure['min']:.2%}, {figure['max']:.2%}]"


async def served(url: str, prompts: list[list[int]], lengths: list[int], at_once: bool) -> list[list[int]]:
    """The answers' token ids."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(ids: list[int], length: int) -> list[int]:
            params = {"max_new_tokens": length, "temperature": 0.0, "ignore_eos": True}
            body = {"input_ids": ids, "sampling_params": params}
            async with session.post(f"{url}/generate", json=body) as response:
                output: list[int] = (await response.json())["output_ids"]
                return output

        pairs = list(zip(prompts, lengths, strict=True))
        if at_once:
            return await asyncio.gather(*(one(*pair) for pair in pairs))
        return [await one(*pair) for pair in pairs]


def server_part(folder: Path, quick: bool, runs: int) -> list[Row]:
    """The embedded server's speed, next to transformers'."""
    case = Case("Qwen2-tiny" if quick else "Qwen2-14M", TINY if quick else MODEL, (10, 100), 256, 1, 1, 1)
    model = prepare(case, folder / "server").folder / "model"
    rng = np.random.default_rng(0)
    number, most = (8, 32) if quick else (64, 256)
    prompts = [rng.integers(1, case.shape[5], size=int(rng.integers(16, 65))).tolist() for _ in range(number)]
    lengths = np.exp(rng.uniform(np.log(16), np.log(most + 1), number)).astype(int).tolist()
    given: Row = {"model": str(model), "prompts": prompts, "lengths": lengths, "threads": 1}
    os.environ["OMP_NUM_THREADS"] = "1"
    figures: dict[str, list[float]] = {}
    answers: dict[str, list[list[int]]] = {}

    def timed(name: str, run: Callable[[], list[list[int]]]) -> None:
        started = time.perf_counter()
        got = run()
        took = time.perf_counter() - started
        figures.setdefault(name, []).append(sum(map(len, got)) / took)
        answers[name] = got

    with serving(model, ServeConfig(dtype="float32", device="cpu"), folder / "server.log") as (url,):
        asyncio.run(served(url, prompts, [4] * number, True))  # once, to warm up
        for _ in range(runs):
            timed("micota, all at once", lambda: asyncio.run(served(url, prompts, lengths, True)))
            timed("micota, one at a time", lambda: asyncio.run(served(url, prompts[::4], lengths[::4], False)))
            for batch in (number, number // 4):
                done = contestant("transformers", given | {"batch": batch})
                name = f"transformers, batches of {batch}"
                figures.setdefault(name, []).append(done["tokens"] / done["wall_s"])
                answers[name] = done["answers"]
    theirs = answers[f"transformers, batches of {number}"]
    best = statistics.median(figures["micota, all at once"])
    rows = []
    print(f"{case.model}, {number} prompts, {sum(lengths):,} tokens in answers of {min(lengths)} to {max(lengths)}")
    for name, values in figures.items():
        got = answers[name]
        alike = sum(a == b for a, b in zip(got, theirs if len(got) == number else theirs[::4], strict=True))
        row = {
            "part": "server",
            "contestant": name,
            "model": case.model,
            "threads": 1,
            "answers": len(got),
            "tokens": sum(map(len, got)),
            "tokens_per_s": spread(values),
            "all_at_once_over_it": best / statistics.median(values),
            "as_transformers": alike,
        }
        rows.append(row)
        print(
            f"{name:32} {show(row['tokens_per_s']):>24} tokens/s  {row['all_at_once_over_it']:5.2f}  as transformers: "
            f"{alike} of {len(got)}",
            flush=True,
        )
    return rows


PARTS = {"client": client_part, "long": long_part, "server": server_part}


def main() -> None:
    """Measure, print, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller, one run: under a minute")
    parser.add_argument("--only", choices=PARTS, metavar="PART", help="one of client, long, server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows here")
    arguments = parser.parse_args()
    runs = 1 if arguments.quick else 3
    common: Row = {"benchmark": "generate", "runs": runs, "cores": len(CORES)}
    common |= provenance("micota-fast", "aiohttp", "torch", "transformers", "tokenizers")
    print(f"median of {runs} runs [min, max]; {common['machine']}")
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory(prefix="bench-generate-") as folder:
                rows = part(Path(folder), arguments.quick, runs)
            if arguments.json:
                append_rows(arguments.json, (common | row | {"load": os.getloadavg()[0]} for row in rows))


if __name__ == "__main__":
    main()
