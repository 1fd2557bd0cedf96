"""What does the loss's `row_filter` leave out on a trained model, and what does it cost?

    .venv/bin/python bench/row_filter.py [--checkpoint DIR --rows FILE ...] [--quick] [--json FILE]

Documents are packed and run through our own decoder; the supervised positions' hidden states and the output matrix then
go through the loss with each row_filter. Printed for each: the share of rows left out (those whose target has a
probability p of at least 1 - row_filter), the relative error (L2) of both gradients against row_filter = 0, the bound
on it that the loss documents, and the time of forward and backward, runs alternating. Quantiles of 1 - p come from the
logits in float64, as float32 cannot tell small ones from 0.

Without --checkpoint the shipped micro checkpoints are measured, each on new text of a kind that it has learned:
the student on short answers, the assistant on answers of every length, the teacher on long ones. A FILE holds rows
of any format that training takes; where they are answers of the checkpoint itself (`micota generate`), the figures are
those of a model on its own chain of thought.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import append_rows, provenance
from torch import Tensor

from micota_fast.chat.encoding import Chat
from micota_fast.common.records import write_rows
from micota_fast.config.generation import ChatConfig
from micota_fast.data.batches import IGNORE_INDEX, packed_batch
from micota_fast.data.packing import pack
from micota_fast.data.tokenise import load_documents
from micota_fast.kernels import linear_cross_entropy
from micota_fast.micro import build
from micota_fast.model.attention import PackedAttention, choose_backend
from micota_fast.model.folder import resolve_checkpoint
from micota_fast.model.safetensors_io import load_model

FILTERS = (1e-4, 1e-3, 1e-2)
QUANTILES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
PACK_TOKENS = 2048
MICRO_TEXT = {"student": "mostly-short", "assistant": "broad", "teacher": "long"}
MICRO_SEED = 9  # of no training corpus

Head = tuple[Tensor, Tensor, Tensor]  # hidden [N, H], weight [V, H], targets [N], all supervised


@torch.no_grad()
def head_inputs(checkpoint: Path, rows: Path, limit: int, device: str, dtype: torch.dtype) -> Head:
    """What the loss sees of the first documents that together have `limit` supervised tokens (all, where fewer)."""
    chat = Chat.from_checkpoint(checkpoint, ChatConfig(system=None))
    documents = load_documents(rows, chat, PACK_TOKENS, "drop")
    model = load_model(checkpoint, dtype, device).eval()
    backend, _ = choose_backend("auto", device, dtype, model.config.head_dim)
    first = int(np.searchsorted(np.cumsum(documents.n_targets), limit)) + 1
    order, pack_offsets = pack(documents.lengths[:first], PACK_TOKENS)
    hidden, targets = [], []
    for doc_ids in np.split(order, pack_offsets[1:-1]):
        batch = packed_batch(documents, doc_ids)
        attend = PackedAttention(batch.cu_seqlens, batch.lengths, backend, torch.device(device))
        hidden_TH = model(batch.input_ids.to(device), batch.position_ids.to(device), attend)
        supervised = (batch.targets != IGNORE_INDEX).nonzero().squeeze(1)  # positions, known to the host
        hidden.append(hidden_TH[supervised.to(device)])
        targets.append(batch.targets[supervised].to(device))
    return torch.cat(hidden)[:limit], model.lm_head_weight.detach(), torch.cat(targets)[:limit]


def gradients(head: Head, row_filter: float) -> tuple[Tensor, Tensor, float]:
    """Gradients of the mean loss by hidden and weight, and the seconds that forward and backward took."""
    hidden, weight, targets = head
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    _synchronise(hidden)
    started = time.perf_counter()
    linear_cross_entropy(
        hidden, weight, targets, normalizer=len(targets), n_supervised=len(targets), row_filter=row_filter
    ).backward()
    _synchronise(hidden)
    seconds = time.perf_counter() - started
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad, seconds


def bounds(head: Head, left_out_N: Tensor, row_filter: float) -> tuple[float, float]:
    """The most that leaving rows out can change the two gradients of the mean loss, L2 norms."""
    hidden, weight, targets = head
    lengths_V = weight.float().norm(dim=1)
    each_N = row_filter * (lengths_V[targets] + lengths_V.max()) * left_out_N / len(targets)
    rows_N = row_filter * 2**0.5 * hidden.float().norm(dim=1) * left_out_N / len(targets)
    return float(each_N.norm()), float(rows_N.sum())


def measure(head: Head, runs: int) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Of these inputs: the quantiles of 1 - p, and the figures of each filter."""
    hidden, weight, targets = head
    with torch.no_grad():
        nll_N = linear_cross_entropy(hidden.double(), weight.double(), targets, reduction="none")
    miss_N = -torch.expm1(-nll_N)
    about: dict[str, Any] = {
        "supervised": len(targets),
        "hidden_size": weight.shape[1],
        "vocab_size": weight.shape[0],
        "nll": float(nll_N.mean()),
        "miss_quantiles": {q: float(torch.quantile(miss_N, q)) for q in QUANTILES},
    }
    exact_hidden, exact_weight, _ = gradients(head, 0.0)  # warms up
    seconds: dict[float, list[float]] = {row_filter: [] for row_filter in (0.0, *FILTERS)}
    for _ in range(runs):
        for row_filter, times in seconds.items():
            times.append(gradients(head, row_filter)[2])
    rows = []
    for row_filter, times in seconds.items():
        grad_hidden, grad_weight, _ = gradients(head, row_filter)
        left_out_N = miss_N <= row_filter if row_filter else torch.zeros_like(miss_N, dtype=torch.bool)
        bound_hidden, bound_weight = bounds(head, left_out_N, row_filter)
        rows.append(
            {
                "row_filter": row_filter,
                "share_left_out": float(left_out_N.double().mean()),
                "error_hidden": _relative(grad_hidden - exact_hidden, exact_hidden),
                "error_weight": _relative(grad_weight - exact_weight, exact_weight),
                "bound_hidden": bound_hidden / float(exact_hidden.float().norm()),
                "bound_weight": bound_weight / float(exact_weight.float().norm()),
                "median_s": statistics.median(times),
                "min_s": min(times),
                "max_s": max(times),
            }
        )
    return about, rows


def cases(arguments: argparse.Namespace, aside: Path) -> Iterator[tuple[str, str, Path, Path]]:
    """Names of model and text, the checkpoint's folder, and the file of rows."""
    if arguments.checkpoint:
        folder = resolve_checkpoint(arguments.checkpoint)
        yield from ((folder.name, rows.stem, folder, rows) for rows in arguments.rows)
        return
    for name, kind in MICRO_TEXT.items():
        rows = aside / f"{kind}.jsonl"
        write_rows(rows, build.corpus(kind, 400, MICRO_SEED))
        yield f"micro {name}", f"{kind} answers", build.HERE / "checkpoints" / name, rows


def _relative(error: Tensor, exact: Tensor) -> float:
    return float(error.double().norm() / exact.double().norm())


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print a table, append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint in Hugging Face layout")
    parser.add_argument("--rows", type=Path, nargs="+", metavar="FILE", help="the texts to measure it on, JSONL")
    parser.add_argument("--quick", action="store_true", help="few tokens, three runs: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows here")
    arguments = parser.parse_args()
    if (arguments.checkpoint is None) != (arguments.rows is None):
        parser.error("--checkpoint and --rows go together")
    limit, runs = (512, 3) if arguments.quick else (2048, 5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    common: dict[str, Any] = {
        "benchmark": "row_filter",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "runs": runs,
        **provenance("micota-fast", "torch", "triton"),
    }
    rows: list[dict[str, Any]] = []
    lines = []
    with tempfile.TemporaryDirectory() as aside:
        for model, text, checkpoint, file in cases(arguments, Path(aside)):
            about, figures = measure(head_inputs(checkpoint, file, limit, device, dtype), runs)
            rows += [{**common, "model": model, "text": text, **about, **figure} for figure in figures]
            quantiles = "  ".join(f"{q:g}: {miss:.1e}" for q, miss in about["miss_quantiles"].items())
            lines.append(f"{model} on {text}, {about['supervised']:,} tokens: quantiles of 1 - p  {quantiles}")
    print(f"{'CPU' if device == 'cpu' else common['device']} figures, {common['dtype']}; {common['machine']}")
    print(*lines, sep="\n")
    print(f"errors and bounds are relative to row_filter = 0; median of {runs} runs [min, max]")
    width = max(len(f"{row['model']} on {row['text']}") for row in rows)
    print(f"{'':{width}}  filter  left out  d hidden (bound)     d weight (bound)     forward + backward, ms")
    for row in rows:
        print(
            f"{row['model']} on {row['text']:{width - len(row['model']) - 4}}  {row['row_filter']:<6g}"
            f"  {row['share_left_out']:8.1%}  {row['error_hidden']:.1e} ({row['bound_hidden']:.1e})"
            f"    {row['error_weight']:.1e} ({row['bound_weight']:.1e})"
            f"    {row['median_s'] * 1e3:.1f} [{row['min_s'] * 1e3:.1f}, {row['max_s'] * 1e3:.1f}]"
        )
    if arguments.json:
        append_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
