"""What does keeping a teacher's top-k log-probabilities cost: bytes, and tokens per second written and read?

    .venv/bin/python bench/top_logprobs.py [--tokens N] [--top-k K] [--quick] [--dir DIR] [--json FILE]

Documents of 600 to 12,000 tokens are appended to a store under way, which is interrupted, taken up again and finished;
the store is opened, verified, and read as training reads it: a document's rows at a time, in random order, copied into
a batch. Files are read from the page cache. Everything is removed afterwards.
"""

import argparse
import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import append_rows, provenance

from micota_fast.sources.top_logprobs import TopLogprobs, TopLogprobsWriter

VOCABULARY = 151_936


def lengths(tokens: int) -> list[int]:
    """Of documents of about `tokens` tokens in all."""
    numbers = np.random.default_rng(0).integers(600, 12_000, tokens // 6300 + 1)
    return [int(n) for n in numbers]


def append(folder: Path, documents: list[int], top_k: int) -> dict[str, float]:
    numbers = np.random.default_rng(1)
    first = numbers.integers(0, VOCABULARY, (12_000, 1))
    ids = ((first + 1009 * np.arange(top_k)) % VOCABULARY).astype(np.int32)  # no id twice in a row
    logprobs = -(np.log(top_k) + numbers.exponential(5, (12_000, top_k))).astype(np.float16)  # a sum of at most 1
    seconds = 0.0
    with contextlib.suppress(KeyboardInterrupt), TopLogprobsWriter(folder, top_k) as writer:
        for d, n in enumerate(documents):
            started = time.perf_counter()
            writer.append((f"problem-{d:07d}", 0), ids[:n, 0], logprobs[:n, 0], ids[:n], logprobs[:n])
            seconds += time.perf_counter() - started
        raise KeyboardInterrupt
    return {"seconds": seconds}


def take_up_and_finish(folder: Path, documents: list[int], top_k: int) -> dict[str, float]:
    started = time.perf_counter()
    with TopLogprobsWriter(folder, top_k) as writer:
        taken_up_s = time.perf_counter() - started
        assert len(writer) == len(documents)
    return {"seconds": time.perf_counter() - started, "of_it_taking_up_s": taken_up_s}


def open_store(folder: Path, documents: list[int], top_k: int) -> dict[str, float]:
    started = time.perf_counter()
    assert len(TopLogprobs(folder)) == len(documents)
    return {"seconds": time.perf_counter() - started}


def verify(folder: Path, documents: list[int], top_k: int) -> dict[str, float]:
    store = TopLogprobs(folder)
    started = time.perf_counter()
    store.verify()
    return {"seconds": time.perf_counter() - started}


def read(folder: Path, documents: list[int], top_k: int) -> dict[str, float]:
    store = TopLogprobs(folder)
    keys = list(store)
    batch = np.empty((12_000, top_k), np.int32), np.empty((12_000, top_k), np.float16)
    started = time.perf_counter()
    for d in np.random.default_rng(2).permutation(len(keys)).tolist():
        rows = store[keys[d]]
        n = len(rows.token_ids_T)
        batch[0][:n], batch[1][:n] = rows.top_ids_TK, rows.top_logprobs_TK
    return {"seconds": time.perf_counter() - started}


STEPS = {
    "append": append,
    "take up, finish": take_up_and_finish,
    "open": open_store,
    "verify": verify,
    "read": read,
}


def main() -> None:
    """Measure, print a table, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000, metavar="N", help="in all, about (10 million)")
    parser.add_argument("--top-k", type=int, default=32, metavar="K", help="entries per token (32)")
    parser.add_argument("--quick", action="store_true", help="200,000 tokens: a second")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the files go (default: the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows here")
    arguments = parser.parse_args()
    documents = lengths(200_000 if arguments.quick else arguments.tokens)
    tokens = sum(documents)
    common = {"benchmark": "top_logprobs", "tokens": tokens, "top_k": arguments.top_k}
    common |= provenance("micota-fast", "numpy")
    results: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(dir=arguments.dir))
    try:
        print(f"{tokens:,} tokens of {len(documents):,} documents, {arguments.top_k} each; {common['machine']}")
        for name, step in STEPS.items():
            figures = step(folder / "store", documents, arguments.top_k)
            figures["tokens_per_s"] = tokens / figures["seconds"]
            if (folder / "store").exists():
                size = sum(path.stat().st_size for path in (folder / "store").iterdir())
                figures["gb_per_million_tokens"] = size / tokens / 1e3
            results.append({**common, "step": name, **figures})
            print(f"{name:16}  " + "  ".join(f"{key} {value:,.3f}" for key, value in figures.items()), flush=True)
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        append_rows(arguments.json, results)


if __name__ == "__main__":
    main()
