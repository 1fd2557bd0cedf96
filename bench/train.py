"""How fast does the trainer train, and in how much memory, next to TRL's and a loop written by hand?

    .venv/bin/python bench/train.py [--quick] [--lora] [--trl-python PATH] [--json FILE]

The contestants take turns (A B C A B C ...), each run in a fresh process with this one's environment, all with the same
random weights, documents, learning rate, optimizer (AdamW) and packs per step, every token supervised. A process trains
one pass over the documents to warm up and then the one that is timed, from the end of a step to the end of a step. The
work on the data that a step needs is in that time; imports, loading, packing, checkpoint and export are not.

- tokens/s: real tokens, padding not counted; supervised/s: those with a loss (all but each document's first);
- / CPU s: tokens per second of a processor's work in the timed pass (all threads, waiting in a loop included). Where a
  machine is shared it is the steadier figure: others' work adds to the seconds that pass, hardly to these;
- used: model FLOP/s on real tokens (`Decoder.flops_per_token`), on a GPU over its data sheet's peak for bfloat16 (MFU),
  on a CPU over what a product of two 2,048 x 2,048 matrices of the same type reached in this run ("bare GEMM", the best
  of all turns);
- MiB: on a CPU the most that the process has had resident, imports included (a few hundred MiB, more for TRL); on a GPU
  the most in use on the card above what was in use before, as nvidia-smi has it;
- loss: mean over the steps of the timed pass, to see that all have trained alike;
- leak: how far the logits of a document behind another one in a TRL pack are from those of the same document alone
  (relative L2). It is rounding where documents do not see each other.

Ours is run as its users run it, `python -m micota_fast.train CONFIG.yaml`, and its figures are read from metrics.jsonl.
With --lora, on a CPU: adapters (LoRA) next to the training of all weights, ours and TRL's with peft, for two models in
6 and 4 packs.

TRL is run by the interpreter of --trl-python, as it may live in an environment of its own; on a GPU with flash-attn if
that is installed there. On a CPU all have as many threads as torch has here (OMP_NUM_THREADS says how many).

A contestant that is not installed is listed as absent, with the reason; one that fails is a row saying so, and the
others continue. Rows are appended to FILE case by case.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from machine import append_rows, provenance
from train_contestants import GEMM, Case, Contestant, Prepared, contestants, prepare, run

from micota_fast.common.gpu_specs import peak_flops
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder

Row = dict[str, Any]

CPU_CASE = Case("Qwen2-8M", (256, 1024, 6, 4, 2, 4096, False), (50, 2000), 2048, 4, 16, 8)
LORA_CASES = (
    replace(CPU_CASE, packs=6),
    # At a width of 256 an adapter of rank 16 is a ninth to a fifth of its matrix; this is the width of a real model.
    Case("SmolLM2-135M, 6 of 30 layers", (576, 1536, 6, 9, 3, 49152, True), (50, 2000), 2048, 4, 4, 8),
)
TINY_CASE = Case("Qwen2-tiny", (64, 128, 2, 4, 2, 512, False), (10, 200), 256, 2, 8, 4)
# Shapes of the checkpoints' config.json.
GPU_CASES = (
    Case("Qwen2.5-0.5B", (896, 4864, 24, 14, 2, 151936, True), (500, 16000), 16384, 4, 16, 2),
    Case("Qwen2.5-1.5B", (1536, 8960, 28, 12, 2, 151936, True), (500, 16000), 16384, 4, 16, 2),
    Case("Qwen2.5-3B", (2048, 11008, 36, 16, 2, 151936, True), (500, 16000), 16384, 4, 16, 2),
)
PACKAGES = ("micota-fast", "torch", "transformers", "triton", "flash-attn")


def measure(given: Prepared, running: list[Contestant], device: str, trl_python: str, runs: int) -> dict[str, Row]:
    """Rows by contestant's label. One that fails leaves the race; the runs it had until then do not count."""
    rows: dict[str, Row] = {c.label: {"contestant": c.name, "dtype": c.dtype, "status": "measured"} for c in running}
    results: dict[str, list[Row]] = {c.label: [] for c in running}
    running = list(running)
    for number in range(runs):
        for contestant in list(running):
            print(f"{given.case.model}, run {number + 1} of {runs}: {contestant.label}", file=sys.stderr, flush=True)
            folder = given.folder / "run"
            try:
                results[contestant.label].append(run(contestant, given, device, trl_python, folder))
            except Exception as error:  # a peer may fail in any way; it is a finding, not the end
                reason = str(error)
                status = "out of memory" if "out of memory" in reason.lower() else "failed"
                rows[contestant.label] |= {"status": status, "reason": reason}
                running.remove(contestant)
                print(f"{contestant.label}: {status}: {reason}", file=sys.stderr, flush=True)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    gemm = {c.dtype: max(r["flop_per_s"] for r in results[c.label]) for c in running if c.name == GEMM}
    peaks = gemm if device == "cpu" else {"bfloat16": peak_flops(torch.cuda.get_device_name())}
    for contestant in running:
        if contestant.name == GEMM:
            rows[contestant.label] |= {"flop_per_s": gemm[contestant.dtype]}
        else:
            rows[contestant.label] |= figures(given, results[contestant.label], peaks.get(contestant.dtype))
    return rows


def decoder(case: Case) -> Decoder:
    """Of its shape, without its weights."""
    with torch.device("meta"):
        return Decoder(ModelConfig.from_dict(case.config()))


def figures(given: Prepared, results: list[Row], peak: float | None) -> Row:
    """A contestant's figures over its runs."""
    speeds = [given.tokens / seconds for result in results for seconds in result["pass_s"]]
    flop_per_token = decoder(given.case).flops_per_token(given.mean_context)
    speed = statistics.median(speeds)
    memory = [result["peak_device_bytes"] or result["peak_rss_bytes"] for result in results]
    return results[-1] | {
        **{key: [x for result in results for x in result[key]] for key in ("pass_s", "pass_cpu_s")},
        "tokens_per_s": speed,
        "tokens_per_s_range": [min(speeds), max(speeds)],
        "tokens_per_cpu_s": statistics.median(given.tokens / cpu for result in results for cpu in result["pass_cpu_s"]),
        "supervised_per_s": speed * given.supervised / given.tokens,
        "flop_per_token": flop_per_token,
        "peak_flop_per_s": peak,
        "utilisation": peak and speed * flop_per_token / peak,
        "peak_bytes": None if None in memory else max(memory),
    }


def line(row: Row, trl: Row | None) -> str:
    """A line of the table; `trl` is TRL's packed row in the same type."""
    start = f"{row['contestant']:18} {row['dtype']:8}"
    if row["status"] != "measured":
        return f"{start} {row['status']}: {row.get('reason', '')}"
    if row["contestant"] == GEMM:
        return f"{start} {row['flop_per_s'] / 1e9:.1f} GFLOP/s"
    low, high = row["tokens_per_s_range"]
    used = f"{row['utilisation']:.1%}" if row["utilisation"] else "unknown"
    against = f"{row['tokens_per_s'] / trl['tokens_per_s']:.2f}" if trl else "-"
    mib = f"{row['peak_bytes'] / (1 << 20):,.0f}" if row["peak_bytes"] else "unknown"
    notes = [str(row["attention"])]
    notes += [f"{row['padding']:.0%} padding"] if row.get("padding") else []
    notes += [f"leak {row['leak']:.1e}"] if "leak" in row else []
    return (
        f"{start} {row['tokens_per_s']:>9,.0f} {f'[{low:,.0f}, {high:,.0f}]':>18} {row['supervised_per_s']:>12,.0f}"
        f" {against:>8} {row['tokens_per_cpu_s']:>8,.0f} {used:>8} {mib:>8} {row['loss']:>7.4f}  {'; '.join(notes)}"
    )


COLUMNS = "tokens/s", "[min, max]", "supervised/s", "/ packed", "/ CPU s", "used", "MiB", "loss"
HEADING = " ".join([" " * 27, *(f"{name:>{n}}" for name, n in zip(COLUMNS, (9, 18, 12, 8, 8, 8, 8, 7), strict=True))])


def main() -> None:
    """Measure, append rows, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one run: about a minute")
    parser.add_argument("--lora", action="store_true", help="adapters next to all weights, on a CPU")
    parser.add_argument("--trl-python", default=sys.executable, metavar="PATH", help="interpreter that has TRL")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows here")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not arguments.lora else "cpu"
    runs = 1 if arguments.quick else 3
    cases = (TINY_CASE,) if arguments.quick else GPU_CASES if device == "cuda" else (CPU_CASE,)
    if arguments.lora and not arguments.quick:
        cases = LORA_CASES
    present, absent = contestants(device, arguments.trl_python, arguments.lora)
    if arguments.quick:
        present = [c for c in present if not c.options.get("compile")]  # which takes longer than all the rest
    common: Row = {
        "benchmark": "train",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cuda": torch.version.cuda if device == "cuda" else None,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "runs": runs,
        **provenance(*PACKAGES),
    }

    def save(rows: list[Row]) -> None:
        if arguments.json:
            append_rows(arguments.json, (common | row for row in rows))

    save([{"contestant": name, "status": "absent", "reason": reason} for name, reason in absent.items()])
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    # One GPU, which is the one that nvidia-smi is asked about: of several, transformers' trainer would use all.
    os.environ["CUDA_VISIBLE_DEVICES"] = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    lines = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
            given = prepare(case, Path(folder))
            rows = measure(given, present, device, arguments.trl_python, runs)
        about: Row = {**asdict(case), "tokens": given.tokens, "supervised": given.supervised, "steps": given.steps}
        save([{**about, **row} for row in rows.values()])
        by_speed = sorted(rows.values(), key=lambda row: -row.get("tokens_per_s", float("inf")))
        trl = {r["dtype"]: r for r in by_speed if r["contestant"] == "trl packed" and r["status"] == "measured"}
        lines += [
            f"{case.model}: {decoder(case).num_params():,} parameters; {len(given.lengths)} documents of "
            f"{min(given.lengths)} to {max(given.lengths)} tokens, {given.tokens:,} a pass; packs of "
            f"{case.pack_tokens:,}, {case.packs_per_step} a step; / packed: over TRL's packed in the same type",
            *(line(row, trl.get(row["dtype"])) for row in by_speed),
        ]
    title = "CPU figures; a GPU's are not measured here" if device == "cpu" else common["device"]
    print(f"{title}; {common['machine']}; torch {torch.__version__}; median of {runs} runs")
    print(*(f"absent: {name}: {reason}" for name, reason in absent.items()), sep="\n")
    print(HEADING)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
