"""How fast are documents packed, and how full are the packs?

    .venv/bin/python bench/packing.py [--quick] [--json FILE]

Documents are log-uniform in 50..capacity tokens, seed 0. TRL's `pack_dataset` (strategy "bfd", on an Arrow table of
token lists, as its trainer calls it) is run on the same lengths where it is installed, in the same process, alternating
with ours; elsewhere its row says so. Numba's compilation is not counted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from machine import provenance

from micota_fast.data.packing import pack

CAPACITY = 16384


def lengths_of(n: int) -> np.ndarray:
    """n document lengths, int64, log-uniform."""
    return np.exp(np.random.default_rng(0).uniform(np.log(50), np.log(CAPACITY), n)).astype(np.int64)


def ours(n: int) -> Callable[[], int]:
    """Packs `n` documents; returns the number of packs."""
    lengths = lengths_of(n)
    pack(lengths[:100], CAPACITY)  # compiles
    return lambda: len(pack(lengths, CAPACITY)[1]) - 1


def trl(n: int) -> Callable[[], int] | None:
    """The same by TRL; None where it is not installed."""
    try:
        from datasets import Dataset
        from trl import pack_dataset
    except ImportError:
        return None
    table = Dataset.from_dict({"input_ids": [np.zeros(length, np.int32) for length in lengths_of(n)]})
    return lambda: len(pack_dataset(table, CAPACITY, "bfd"))


def main() -> None:
    """Measure, print a table, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, three runs: under a minute")
    parser.add_argument("--json", metavar="FILE", help="append the rows here")
    arguments = parser.parse_args()
    runs = 3 if arguments.quick else 7
    # TRL takes whole token lists, so its sizes are bounded by memory.
    cases = [("micota", 10_000), ("trl", 10_000), ("micota", 1_000_000)]
    if arguments.quick:
        cases = [("micota", 10_000), ("trl", 1_000), ("micota", 100_000)]
    made = {case: {"micota": ours, "trl": trl}[case[0]](case[1]) for case in cases}
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    packs: dict[tuple[str, int], int] = {}
    for _ in range(runs):
        for case, run in made.items():
            if run is not None:
                started = time.perf_counter()
                packs[case] = run()
                seconds[case].append(time.perf_counter() - started)
    common = {"benchmark": "packing", **provenance("micota-fast", "trl", "numpy", "numba")}
    rows = []
    print(f"capacity {CAPACITY:,} tokens; median of {runs} runs [min, max]; {common['machine']}")
    for name, n in cases:
        row: dict[str, object] = {
            "program": name,
            "documents": n,
        }
        times = seconds[name, n]
        if times:
            bound = -(-int(lengths_of(n).sum()) // CAPACITY)
            row |= {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}
            row |= {"packs": packs[name, n], "least_possible": bound}
            print(
                f"{name:8} {n:>9,} documents  {row['median_s']:.4f} s [{min(times):.4f}, {max(times):.4f}]  "
                f"{packs[name, n]:,} packs, {packs[name, n] / bound - 1:+.3%} over ceil(tokens / capacity)"
            )
        else:
            print(f"{name:8} {n:>9,} documents  not measured: not installed")
        rows.append(common | row)
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
