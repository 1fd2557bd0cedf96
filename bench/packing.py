"""How fast are documents packed, how full are the packs, and how even is the work that they make for ranks?

    .venv/bin/python bench/packing.py [--quick] [--json FILE]

Packing: lengths log-uniform in 50..capacity, and log-normal as those of long chains of thought are, seed 0. "lengths"
packs those alone; "laid out" makes the tensors of every pack as well, which is what TRL's `pack_dataset` (strategy
"bfd") does to an Arrow table of token lists: as its trainer calls it, a thousand rows at a time, and on the whole table
at once. All run in this process in turn; where TRL is not installed its rows say so. "an epoch" is what a trainer does
at its start: shuffle, pack, shuffle the packs, and work out the idle share. Numba's compilation is not counted.

Load balancing: the share of the time that eight ranks spend waiting for the slowest in each micro-step, by the FLOPs
of the model: packs assigned in turn, packs assigned by cost (what PackedSteps does), and, as an idea, packs of similar
cost gathered into the same step.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from machine import provenance
from numpy.typing import NDArray

from micota_fast.data.batches import PackedSteps, packed_batch
from micota_fast.data.load_balancing import attention_parity, idle_share, pack_costs
from micota_fast.data.packing import pack
from micota_fast.data.tokenise import Documents
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder

CAPACITY = 16384
WORLD = 8
LENGTHS = {  # median and sigma of a log-normal distribution; documents over the capacity are dropped
    "long": (4000, 0.8),
    "narrow": (4000, 0.5),
    "short": (300, 0.7),
}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768, "hidden_act": "silu"}
MODELS = {
    "Qwen2.5-1.5B": QWEN
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    "Qwen2.5-7B": QWEN
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}


def lengths_of(kind: str, n: int) -> NDArray[np.int64]:
    """n document lengths, in tokens."""
    random = np.random.default_rng(0)
    if kind == "log-uniform":
        return np.exp(random.uniform(np.log(50), np.log(CAPACITY), n)).astype(np.int64)
    median, sigma = LENGTHS[kind]
    drawn = np.exp(random.normal(np.log(median), sigma, 2 * n)).astype(np.int64)
    return drawn[(drawn >= 30) & (drawn <= CAPACITY)][:n]


def blank_documents(lengths: NDArray[np.int64]) -> Documents:
    """Documents of these lengths; all their tokens are one and the same, which takes no memory."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids, supervised = (np.broadcast_to(value, offsets[-1:]) for value in (np.int32(0), np.True_))
    return Documents(ids, supervised, offsets, len(lengths), dropped=0, truncated=0, rejected=0, rejects_path=None)


def packed_lengths(lengths: NDArray[np.int64]) -> Callable[[], int]:
    """Packs; returns the number of packs, as all of these do."""
    return lambda: len(pack(lengths, CAPACITY)[1]) - 1


def laid_out(lengths: NDArray[np.int64]) -> Callable[[], int]:
    """Packs, and makes the tensors of every pack."""
    documents = blank_documents(lengths)

    def run() -> int:
        order, offsets = pack(lengths, CAPACITY)
        return sum(1 for doc_ids in np.split(order, offsets[1:-1]) if packed_batch(documents, doc_ids))

    return run


def an_epoch(lengths: NDArray[np.int64]) -> Callable[[], int]:
    """Everything that is done once an epoch, and the idle share."""
    documents = blank_documents(lengths)
    return lambda: PackedSteps(documents, CAPACITY, 8 * WORLD, 0, WORLD, parity_tokens=70_000).n_packs


def trl(lengths: NDArray[np.int64], whole: bool) -> Callable[[], int] | None:
    """TRL; None if it is not installed."""
    try:
        from datasets import Dataset, disable_progress_bars
        from trl import pack_dataset
    except ImportError:
        return None
    disable_progress_bars()
    table = Dataset.from_dict({"input_ids": [np.zeros(length, np.int32) for length in lengths]})
    batch = {"batch_size": len(lengths)} if whole else {}
    return lambda: len(pack_dataset(table, CAPACITY, "bfd", map_kwargs=batch))


PROGRAMS: dict[str, Callable[[NDArray[np.int64]], Callable[[], int] | None]] = {
    "micota, lengths": packed_lengths,
    "micota, laid out": laid_out,
    "micota, an epoch": an_epoch,
    "trl, by the thousand": lambda lengths: trl(lengths, whole=False),
    "trl, whole table": lambda lengths: trl(lengths, whole=True),
}


def packing(cases: list[tuple[str, str, int]], runs: int) -> list[dict[str, object]]:
    """A row for each case of program, kind of lengths, number of documents."""
    made = {(name, kind, n): PROGRAMS[name](lengths_of(kind, n)) for name, kind, n in cases}
    seconds: dict[tuple[str, str, int], list[float]] = {case: [] for case in cases}
    packs: dict[tuple[str, str, int], int] = {}
    pack(lengths_of("long", 100), CAPACITY)  # compiles
    for _ in range(runs):
        for case, run in made.items():
            if run is not None:
                started = time.perf_counter()
                packs[case] = run()
                seconds[case].append(time.perf_counter() - started)
    rows = []
    for case in cases:
        row: dict[str, object] = dict(zip(("program", "lengths", "documents"), case, strict=True))
        head = "{:21} {:12} {:>9,} documents".format(*case)
        if times := seconds[case]:
            least = -(-int(lengths_of(*case[1:]).sum()) // CAPACITY)
            row |= {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}
            row |= {"packs": packs[case], "least_possible": least}
            print(
                f"{head}  {row['median_s']:.4f} s [{min(times):.4f}, {max(times):.4f}]  "
                f"{packs[case]:,} packs, {packs[case] / least - 1:+.4%} over ceil(tokens / capacity)"
            )
        else:
            print(f"{head}  not measured: not installed")
        rows.append(row)
    return rows


def load_balancing(n: int) -> list[dict[str, object]]:
    """A row for each model, kind of lengths and number of packs a rank has in a step."""
    rows: list[dict[str, object]] = []
    for model, shape in MODELS.items():
        with torch.device("meta"):
            parity = attention_parity(Decoder(ModelConfig.from_dict(shape)).flops_per_token)
        for kind in LENGTHS:
            lengths = lengths_of(kind, n)
            order, offsets = pack(lengths, CAPACITY)
            costs = np.random.default_rng(0).permutation(pack_costs(lengths[order], offsets, parity))
            for each in (1, 2, 4, 8):
                row = {
                    "in_turn": idle_share(costs, WORLD, WORLD),  # whichever packs share a micro-step is chance
                    "by_cost": idle_share(costs, each * WORLD, WORLD),
                    "gathered": idle_share(np.sort(costs), each * WORLD, WORLD),
                }
                print(
                    f"{model:13} {kind:7} {each} packs a rank: idle "
                    + ", ".join(f"{how.replace('_', ' ')} {share:.2%}" for how, share in row.items())
                )
                rows.append({"model": model, "parity_tokens": round(parity), "lengths": kind, "documents": n} | row)
                rows[-1] |= {"world": WORLD, "packs_per_step": each * WORLD}
    return rows


def main() -> None:
    """Measure, print, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, three runs: under a minute")
    parser.add_argument("--json", metavar="FILE", help="append the rows here")
    arguments = parser.parse_args()
    runs, few, many = (3, 1000, 100_000) if arguments.quick else (7, 10_000, 1_000_000)
    # TRL takes whole token lists, so its sizes are bounded by memory.
    cases = [(name, kind, few) for name in PROGRAMS if "epoch" not in name for kind in ("log-uniform", "long")]
    cases += [("micota, lengths", kind, many) for kind in ("log-uniform", *LENGTHS)]
    cases += [("micota, an epoch", "log-uniform", many)]
    common = provenance("micota-fast", "trl", "datasets", "numpy", "numba")
    print(f"capacity {CAPACITY:,} tokens; median of {runs} runs [min, max]; {common['machine']}")
    rows = [{"benchmark": "packing"} | row for row in packing(cases, runs)]
    rows += [{"benchmark": "load_balancing"} | row for row in load_balancing(many // 10)]
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row | common) + "\n" for row in rows))


if __name__ == "__main__":
    main()
