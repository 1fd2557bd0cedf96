"""What a stage costs, and what writing answers takes: the arithmetic of a plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from micota_fast.config.generation import SamplingSettings
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder
from micota_fast.planning.assumptions import GPU, Assumptions
from micota_fast.serve import sglang

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass
class Cost:
    """Of one stage."""

    stage: str
    verb: str
    tokens: float = 0  # read and written; in training those of all epochs
    flops: float = 0
    hours: float | None = None  # None: on a CPU, where time is not estimated, or at a server that runs already
    gpus: int = 0
    memory: float = 0  # bytes that each GPU (or process) must have at least
    disk: float = 0  # bytes that stay
    passing: float = 0  # bytes more on the disk while it runs
    how: str = ""
    done: bool = False
    too_big: str = ""  # why it cannot run on this GPU


@dataclass
class Corpus:
    """Rows of a prompt and an answer, mean tokens of each, and of the document that a token lies in, over tokens."""

    rows: float
    prompt: float
    answer: float
    context: float
    counted: bool = False  # by what a finished stage has left, not assumed

    @property
    def tokens(self) -> float:
        return self.rows * (self.prompt + self.answer)


class Model(NamedTuple):
    config: ModelConfig
    answer: float  # mean tokens of its answers
    folder: str  # of the checkpoint whose tokenizer it has

    @property
    def width(self) -> int:
        """Bytes of a stored value."""
        return BYTES.get(self.config.dtype_name or "float32", 4)


@cache
def _figures(config: ModelConfig) -> tuple[int, float, float]:
    """Parameters, and FLOPs to train on one token of a document: constant, and for each token of its length."""
    with torch.device("meta"):
        decoder = Decoder(config)
    constant = decoder.flops_per_token(0)
    return decoder.num_params(), constant, decoder.flops_per_token(1) - constant


def parameters(config: ModelConfig) -> int:
    """Of a model of these shapes."""
    return _figures(config)[0]


def train_flops(config: ModelConfig, tokens: float, context: float) -> float:
    """Forward and backward, by `Decoder.flops_per_token`; a third of it is the forward pass."""
    _, constant, each = _figures(config)
    return tokens * (constant + each * context)


def recomputed_flops(config: ModelConfig, tokens: float, context: float, how: str) -> float:
    """FLOPs that activation checkpointing (`train.recompute`) adds to `train_flops`: what is computed a second time.

    full: the forward pass of all blocks; selective: of the matrix products one, the gate's.
    """
    if how == "full":
        head = 2 * config.vocab_size * config.hidden_size
        return train_flops(config, tokens, context) / 3 - tokens * head
    gates = config.num_hidden_layers * config.hidden_size * config.intermediate_size
    return 2.0 * tokens * gates if how == "selective" else 0.0


def answering(
    cost: Cost, model: Model, s: SamplingSettings, sets: Sequence[Corpus], gpu: GPU | None, assumed: Assumptions
) -> None:
    """Fill in what it takes to write the answers of `sets`, one set after the other, by one start of the servers.

    Decoding reads the weights and the KV cache of all running answers once a token (Pope et al., arXiv 2211.05102,
    section 2); the batch is what memory, concurrency and the set allow. At the end of a set one answer runs alone to
    the limit, as greedy ones do that repeat themselves.
    """
    serve, config = s.serve, model.config
    width = model.width if serve.dtype == "auto" else BYTES[serve.dtype]
    weights = parameters(config) * width
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * width
    longest = max(corpus.prompt for corpus in sets) + s.max_new_tokens
    rows, written = sum(c.rows for c in sets), sum(c.rows * c.answer for c in sets)
    cost.tokens = sum(corpus.tokens for corpus in sets)
    cost.flops = sum(train_flops(config, corpus.tokens, corpus.context) for corpus in sets) / 3
    counted = "counted" if all(corpus.counted for corpus in sets) else "assumed"
    most = "at most " if getattr(s, "stop_after_accepted", None) is not None and counted == "assumed" else ""
    cost.how = f"{most}{rows:,.0f} answers of {two(written / max(1, rows))} tokens ({counted})"
    if s.url is not None:
        cost.how += f", at {s.url if isinstance(s.url, str) else ' '.join(s.url)}"
        return
    cost.memory = weights / serve.tp + longest * kv / serve.tp
    if gpu is None or "cpu" in (sglang.argument(serve, "--device"), serve.device):
        return
    copies = serve.replicas * serve.dp
    cost.gpus = serve.replicas * sglang.gpus_needed(serve)
    room = assumed.serve_memory * gpu.memory * serve.tp - weights
    if room < longest * kv:
        usable = assumed.serve_memory * gpu.memory / 1e9
        cost.too_big = f"{cost.memory / 1e9:.0f} GB on each of {serve.tp}, where {usable:.0f} can be used (`serve.tp`)"
        return
    flops, read = gpu.flops * assumed.prefill_mfu * serve.tp, gpu.bandwidth * assumed.decode_bandwidth * serve.tp
    seconds, batches = assumed.startup_s, []
    for corpus in sets:
        context = corpus.prompt + corpus.answer  # of a running answer: long ones run longest
        at_once = s.concurrency / serve.dp if serve.engine == "sglang" else serve.max_running
        batch = max(1.0, min(at_once, corpus.rows / copies, room / (context * kv)))
        step = max((weights + batch * context * kv) / read, batch * train_flops(config, 1, 2 * context) / 3 / flops)
        prefill = train_flops(config, corpus.rows * corpus.prompt, corpus.prompt) / 3 / (copies * flops)
        alone = s.max_new_tokens * (weights + longest * kv / 2) / read
        seconds += prefill + corpus.rows * corpus.answer / (copies * batch) * step + alone
        batches.append(batch)
    cost.hours = seconds / 3600
    cost.how += f", {max(batches):,.0f} at once on each of {copies}" if copies > 1 else f", {max(batches):,.0f} at once"


def two(value: float) -> str:
    """Two significant digits, with commas."""
    if value <= 0 or not math.isfinite(value):
        return "0"
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"
