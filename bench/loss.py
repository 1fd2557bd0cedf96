"""How fast is the loss, how much memory does it take, and how exact is it, next to the others?

    .venv/bin/python bench/loss.py [--quick | --full] [--json FILE]

Cases: shapes of real models, numbers of tokens, shares of masked tokens, random and trained-like logits, and how many
tokens a teacher's distributions have ("top"). By default a base case and each of these varied from it; --full: all
combinations; --quick: three cases. On a GPU the default stops after BUDGET_S and names the cases it has not reached.
Without a GPU small shapes are run, in float32 and bfloat16.

Where there is a teacher, our loss of hard targets runs next to those of distributions: of the teacher's likeliest
tokens with a bucket of all others, the same mixed with hard targets at a temperature of 2, and of the whole teacher,
whose hidden states such a contestant is given and whose logits it makes within its time.

The contestants of a case take turns in one process. Of each:

- forward (with gradients wanted, so the fused losses do the gradients' work in it), backward, both: median of the runs;
- "of GEMMs": time of both over that of the three products which no loss can do without, hidden @ weight.T and the two
  for the gradients, measured alike over the supervised rows alone ("bare GEMMs");
- useful TFLOP/s: 6 * supervised * H * V over the time of both;
- memory: highest sum of allocations above the inputs, and above inputs and gradients;
- relative error (L2) of loss and gradients to a float64 reference on the same rounded inputs, on a case of at most
  ERROR_TOKENS tokens that is made alike.

One that is not installed or cannot run here is listed as absent, with the reason; one that fails or runs out of memory
is a line saying so. Rows are appended to FILE case by case, so a run that dies keeps what it has. On a GPU set
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, as scripts/bench_gpu.sh does: contestants of very different sizes take
turns, and without it they pay for the return of each other's cached memory.
"""

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loss_cases import SHAPES, Case, Inputs, grid, inputs
from loss_contestants import CONTESTANTS, GEMMS, Forward, Target, available, backward, targets_of
from machine import append_rows, provenance
from torch import Tensor

from micota_fast.kernels.reference import dense_linear_cross_entropy

BUDGET_S = 400
ERROR_TOKENS = 1024
PACKAGES = ("micota-fast", "torch", "triton", *sorted({c.package for c in CONTESTANTS} - {"micota-fast", "torch"}))

Row = dict[str, Any]


def timed(name: str, forward: Forward, given: Inputs) -> tuple[float, float, float]:
    """Seconds of forward, backward and both."""
    given.hidden.grad = given.weight.grad = None
    mark: Callable[[], Any] = time.perf_counter
    if given.hidden.is_cuda:
        torch.cuda.synchronize()
        mark = _event
    marks = [mark()]
    output = forward(given)
    marks.append(mark())
    backward(name, output, given)
    marks.append(mark())
    if given.hidden.is_cuda:
        torch.cuda.synchronize()
        first, second = (a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))
    else:
        first, second = marks[1] - marks[0], marks[2] - marks[1]
    return first, second, first + second


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_bytes(name: str, forward: Forward, given: Inputs) -> int:
    """Highest sum of live allocations above the inputs, gradients among them."""
    given.hidden.grad = given.weight.grad = None
    if given.hidden.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        backward(name, forward(given), given)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        backward(name, forward(given), given)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def exact_values(given: Inputs, target: Target) -> list[Tensor]:
    """Loss and gradients by dense logits in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (given.hidden, given.weight))
    loss = dense_linear_cross_entropy(hidden, weight, targets_of(given, target), normalizer=given.n_supervised)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def errors(name: str, forward: Forward, given: Inputs, exact: list[Tensor]) -> Row:
    """Relative errors (L2) of a contestant; of the bare products there are none."""
    if name == GEMMS:
        return {}
    given.hidden.grad = given.weight.grad = None
    loss = forward(given)
    loss.backward()
    keys = ("error_loss", "error_hidden", "error_weight")
    got = (loss.detach(), given.hidden.grad, given.weight.grad)
    return {k: float((a.double() - b).norm() / b.norm()) for k, a, b in zip(keys, got, exact, strict=True)}  # type: ignore[union-attr]


class Race:
    """The contestants of a case that have not failed so far, and the figures of all."""

    def __init__(self, running: dict[str, Forward]) -> None:
        self.running = running
        self.rows: dict[str, Row] = {name: {"status": "measured"} for name in running}

    def each(self, step: Callable[[str, Forward], Row]) -> None:
        """Let each take a step; its figures go into the row. One that raises leaves the race."""
        for name in list(self.running):
            try:
                self.rows[name] |= step(name, self.running[name])
            except torch.OutOfMemoryError:
                self.rows[name] = {"status": "out of memory"}
            except Exception as error:  # a peer may raise anything; it is a finding, not the end
                self.rows[name] = {"status": "failed", "reason": f"{type(error).__name__}: {error}".splitlines()[0]}
            if self.rows[name]["status"] != "measured":
                print(f"{name}: {self.rows[name]}", file=sys.stderr, flush=True)
                del self.running[name]
                _release()


def measure_errors(race: Race, case: Case, device: str) -> None:
    """Relative errors, on a smaller case alike."""
    given = inputs(replace(case, tokens=min(case.tokens, ERROR_TOKENS)), device)
    target_of = {c.name: c.target for c in CONTESTANTS if c.name in race.running}
    exact = {target: exact_values(given, target) for target in dict.fromkeys(target_of.values())}
    race.each(lambda name, forward: errors(name, forward, given, exact[target_of[name]]))


def measure_cost(race: Race, case: Case, device: str, runs: int) -> None:
    """Times and memory."""
    given = inputs(case, device)
    race.each(lambda name, forward: {"warm_up_s": timed(name, forward, given)[2]})  # compiles and tunes
    race.each(lambda name, forward: {"peak_bytes": peak_bytes(name, forward, given)})
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in race.running}

    def run(name: str, forward: Forward) -> Row:
        times[name].append(timed(name, forward, given))
        return {}

    for _ in range(runs):
        race.each(run)
    gradients = sum(x.numel() * x.element_size() for x in (given.hidden, given.weight))
    flop = 6 * given.n_supervised * given.weight.numel()
    floor = statistics.median(both for _, _, both in times[GEMMS]) if GEMMS in race.running else None
    for name in race.running:
        row = race.rows[name]
        for part, seconds in zip(("forward", "backward", "both"), zip(*times[name], strict=True), strict=True):
            row |= {f"{part}_s": statistics.median(seconds), f"{part}_range_s": [min(seconds), max(seconds)]}
        row |= {
            "supervised": given.n_supervised,
            "of_gemms": floor and row["both_s"] / floor,
            "tflop_per_s": flop / row["both_s"] / 1e12,
            "peak_bytes_above_gradients": row["peak_bytes"] - gradients,
        }


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line(where: str, case: Case, name: str, row: Row) -> str:
    """A line of the table."""
    start = f"{where:8} {case.label}  {name:20}"
    if row["status"] != "measured":
        return f"{start}  {row['status']}{': ' + row['reason'] if 'reason' in row else ''}"
    low, high = row["both_range_s"]
    of_gemms, mib = row["of_gemms"] or float("nan"), 1 << 20
    shown = [f"{row[key]:.1e}" for key in ("error_loss", "error_hidden", "error_weight") if key in row]
    return (
        f"{start} {row['forward_s'] * 1e3:9.2f} {row['backward_s'] * 1e3:9.2f} {row['both_s'] * 1e3:9.2f}"
        f" {f'[{low * 1e3:.2f}, {high * 1e3:.2f}]':>20} {of_gemms:8.2f} {row['tflop_per_s']:8.3f}"
        f" {row['peak_bytes'] / mib:9.1f} {row['peak_bytes_above_gradients'] / mib:9.1f}  {'  '.join(shown)}"
    ).rstrip()


HEADING = (
    f"{'':8} {'model':12} {'tokens':>6} {'mask':>4} {'logits':13} {'type':8} {'top':>3}  {'':20} "
    f"{'forward':>9} {'backward':>9} {'both, ms':>9} {'[min, max]':>20} {'of GEMMs':>8} {'TFLOP/s':>8} "
    f"{'MiB':>9} {'- grads':>9}  error: loss, dH, dW"
)


def main() -> None:
    """Measure, append rows, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="three cases, three runs: under a minute")
    size.add_argument("--full", action="store_true", help="every combination")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows here")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = 3 if arguments.quick else 7
    present, absent = available(device)
    common: Row = {
        "benchmark": "loss",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cuda": torch.version.cuda if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "runs": runs,
        **provenance(*PACKAGES),
    }

    def save(rows: list[Row]) -> None:
        if arguments.json:
            append_rows(arguments.json, (common | row for row in rows))

    save([{"contestant": name, "status": "absent", "reason": reason} for name, reason in absent.items()])
    cases = grid(device, arguments.quick, arguments.full)
    where = "CPU" if device == "cpu" else "CUDA"
    lines, started = [], time.perf_counter()
    for number, case in enumerate(cases):
        if device == "cuda" and not arguments.full and time.perf_counter() - started > BUDGET_S:
            lines += [f"{where:8} {case.label}  not reached within {BUDGET_S} s" for case in cases[number:]]
            break
        print(f"{number + 1} of {len(cases)}: {case.label}", file=sys.stderr, flush=True)
        h, v = SHAPES[case.model]
        about: Row = {
            "model": case.model,
            "hidden_size": h,
            "vocab_size": v,
            "tokens": case.tokens,
            "masked": case.masked,
            "logits": case.logits,
            "dtype": str(case.dtype).removeprefix("torch."),
            "top": case.top,
        }
        race = Race({c.name: present[c.name] for c in CONTESTANTS if c.name in present and c.takes_part(case)})
        measure_errors(race, case, device)
        _release()
        measure_cost(race, case, device, runs)
        save([{**about, "contestant": name, **row} for name, row in race.rows.items()])
        by_time = sorted(race.rows.items(), key=lambda item: item[1].get("both_s", float("inf")))
        lines += [line(where, case, name, row) for name, row in by_time]
        _release()
    title = "CPU figures; a GPU's are not measured here" if device == "cpu" else common["device"]
    print(
        f"{title}; {common['machine']}; {common['threads']} threads; torch {torch.__version__}; median of {runs} runs"
    )
    print(*(f"absent: {name}: {reason}" for name, reason in absent.items()), sep="\n")
    print(HEADING)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
