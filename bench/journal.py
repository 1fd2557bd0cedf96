"""What does keeping a corpus cost next to generating it: its journal, and the file of problems?

    .venv/bin/python bench/journal.py [--part journal|problems] [--rows N] [--quick] [--dir DIR] [--json FILE]

N rows of 280 bytes (4 samples per problem, shuffled within windows of 10,000) are appended to a journal, with an
fsync every 2 s; the journal is taken up again, read in the order of the problems, and taken up without its index. A
file of N problems of 300 bytes is opened without a cache, making one, and with it, and then read through. Each step has
a process of its own, whose peak resident memory and, of that at its end, anonymous memory are given: the rest is the
program itself and pages of the mapped index, which the kernel takes back at need. Files are read from the page cache.
Everything is removed afterwards.
"""

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from machine import append_rows, provenance

from micota_fast.generation.journal import Journal
from micota_fast.generation.problem_file import ProblemFile

SAMPLES, WINDOW = 4, 10_000
ROW = {
    "id": "problem-0000000",
    "sample": 0,
    "problem": "What is 17 + 25?",
    "answer": "42",
    "completion": r"17 + 25 = 42, so the answer is \boxed{42}.",
    "finish_reason": "stop",
    "prompt_tokens": 31,
    "completion_tokens": 18,
    "seed": 123456789,
    "correct": True,
    "model": "teacher",
    "rejected": None,
}


def append(folder: Path, rows: int) -> dict[str, float]:
    generator = np.random.default_rng(0)
    order = np.concatenate([generator.permutation(range(s, min(s + WINDOW, rows))) for s in range(0, rows, WINDOW)])
    order = order.astype(np.uint32)
    with Journal(folder / "journal", {}) as journal:
        started = time.perf_counter()
        for start in range(0, rows, WINDOW):
            for i in order[start : start + WINDOW].tolist():
                journal.append(i // SAMPLES, i % SAMPLES, 1, 18, 31, ROW)
        seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in (folder / "journal").glob("*.jsonl"))
    return {"seconds": seconds, "us_each": seconds / rows * 1e6, "bytes_each": size / rows}


def take_up(folder: Path, rows: int) -> dict[str, float]:
    started = time.perf_counter()
    with Journal(folder / "journal", {}) as journal:
        seconds = time.perf_counter() - started
        assert len(journal) == rows
    return {"seconds": seconds}


def read_in_order(folder: Path, rows: int) -> dict[str, float]:
    with Journal(folder / "journal", {}) as journal:
        started = time.perf_counter()
        entries = journal.entries
        order = np.lexsort((entries["sample"], entries["problem"]))
        sorted_s = time.perf_counter() - started
        assert sum(1 for _ in journal.rows(order)) == rows
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "of_it_sorting_s": sorted_s, "us_each": seconds / rows * 1e6}


def take_up_without_index(folder: Path, rows: int) -> dict[str, float]:
    (folder / "journal" / "index.bin").unlink()
    return take_up(folder, rows)


def write_problems(folder: Path, rows: int) -> dict[str, float]:
    def lines() -> Iterator[str]:
        for i in range(rows):
            yield f'{{"id": "train-{i}", "problem": "{"What is 1 + 1? " * 16}", "answer": "2", "level": {i % 5 + 1}}}\n'

    with (folder / "problems.jsonl").open("w") as file:
        file.writelines(lines())
    return {"bytes_each": (folder / "problems.jsonl").stat().st_size / rows}


def open_problems(folder: Path, rows: int) -> dict[str, float]:
    started = time.perf_counter()
    with ProblemFile(folder / "problems.jsonl", cache=folder / "cache") as problems:
        seconds = time.perf_counter() - started
        assert len(problems) == rows
    return {"seconds": seconds, "us_each": seconds / rows * 1e6}


def read_problems(folder: Path, rows: int) -> dict[str, float]:
    with ProblemFile(folder / "problems.jsonl", cache=folder / "cache") as problems:
        started = time.perf_counter()
        assert sum(1 for _ in problems) == rows
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "us_each": seconds / rows * 1e6}


Step = Callable[[Path, int], dict[str, float]]
PARTS: dict[str, list[tuple[str, Step]]] = {
    "journal": [
        ("append", append),
        ("take up", take_up),
        ("read in order", read_in_order),
        ("take up without index", take_up_without_index),
    ],
    "problems": [
        ("write", write_problems),
        ("open, no cache yet", open_problems),
        ("open, cache there", open_problems),
        ("read through", read_problems),
    ],
}


def measure(step: Step, folder: Path, rows: int) -> dict[str, float]:
    figures = step(folder, rows)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {**figures, "peak_rss_mb": peak_mb, "end_rss_anon_mb": int(status["RssAnon"].split()[0]) / 1024}


def main() -> None:
    """Measure, print a table, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this; can be repeated")
    parser.add_argument("--rows", type=int, default=10_000_000, metavar="N", help="rows and problems (10 million)")
    parser.add_argument("--quick", action="store_true", help="200,000 rows: seconds")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the files go (default: the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows here")
    arguments = parser.parse_args()
    rows = 200_000 if arguments.quick else arguments.rows
    common = {"benchmark": "journal", "rows": rows, **provenance("micota-fast", "numpy")}
    results: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(dir=arguments.dir))
    try:
        print(f"{rows:,} rows; {common['machine']}")
        for part in arguments.part or PARTS:
            for name, step in PARTS[part]:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    figures = pool.submit(measure, step, folder, rows).result()
                results.append({**common, "part": part, "step": name, **figures})
                said = "  ".join(f"{key} {value:,.2f}" for key, value in figures.items())
                print(f"{part:8}  {name:21}  {said}", flush=True)
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        append_rows(arguments.json, results)


if __name__ == "__main__":
    main()
