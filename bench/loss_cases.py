"""The cases of bench/loss.py: shapes, masks, and logits that are random or like a trained model's."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100

# hidden_size and vocab_size (rows of the output matrix, padding included) from the checkpoints' config.json.
SHAPES = {
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-3B": (2048, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3-8B": (4096, 128256),
    # For a CPU.
    "SmolLM2-135M": (576, 49152),
    "small": (256, 16384),
    "tiny": (64, 2000),
}

# How certain trained models are: quantiles of 1 - p, p being the target's probability, as bench/row_filter.py measured
# them over 2,048 supervised tokens. A weak model and a sure one, since what `row_filter` saves is theirs to decide:
# - smollm2: SmolLM2-135M-Instruct (as scripts/smollm_checkpoint.py makes it, 4-bit weights) on its own greedy answers
#   to the first 80 GSM8K training problems (up to 256 tokens each);
# - micro-teacher: the shipped micro teacher on new long answers of its world. No large model has been measured.
MISS_AT = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
MISS_QUANTILES: dict[str, tuple[float, ...]] = {
    "smollm2": (9.0e-5, 6.3e-4, 2.2e-3, 0.011, 0.027, 0.065, 0.12, 0.21, 0.34, 0.46, 0.61, 0.70, 0.83),
    "micro-teacher": (
        4.7e-6,
        1.2e-5,
        1.9e-5,
        3.4e-5,
        5.8e-5,
        1.1e-4,
        2.8e-4,
        4.1e-4,
        9.1e-4,
        1.9e-3,
        7.1e-3,
        0.029,
        0.78,
    ),
}


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        masked: share of the tokens without loss.
        logits: "random" or a key of MISS_QUANTILES.
        top: how many tokens of a teacher's distribution are given at each; 0: there is no teacher.
    """

    model: str
    tokens: int
    masked: float = 0.0
    logits: str = "random"
    dtype: torch.dtype = torch.bfloat16
    top: int = 0

    @property
    def label(self) -> str:
        """The case in one word a property, as the table shows it."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.model:12} {self.tokens:>6} {self.masked:>4.0%} {self.logits:13} {kind:8} {self.top:>3}"


@dataclass(frozen=True)
class Teacher:
    """A teacher with the student's output matrix, and the likeliest tokens of its distributions."""

    hidden: Tensor  # [N, H]
    ids: Tensor  # [N, K] int64
    logprobs: Tensor  # [N, K] float32


@dataclass(frozen=True)
class Inputs:
    """What a loss is given; `hidden` and `weight` want gradients."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N] int64, IGNORE_INDEX where masked
    n_supervised: int
    teacher: Teacher | None = None


def grid(device: str, quick: bool, full: bool) -> list[Case]:
    """The cases to run: a base case and each axis varied from it, or (`full`) every combination."""
    if quick:
        base = Case("Qwen2.5-0.5B", 8192) if device == "cuda" else Case("tiny", 256, dtype=torch.float32)
        varied = replace(base, masked=0.3, logits="micro-teacher")
        return [base, varied, replace(varied, top=32)]
    if device == "cuda":
        base = Case("Qwen2.5-7B", 8192)
        models = [name for name in SHAPES if name.startswith(("Qwen", "Llama"))]
        tokens, dtypes = [8192, 16384, 32768], [torch.bfloat16]
    else:
        base = Case("small", 1024, dtype=torch.float32)
        models = ["small", "SmolLM2-135M"]
        tokens, dtypes = [1024, 2048], [torch.float32, torch.bfloat16]
    axes: dict[str, list[Any]] = {
        "masked": [0.0, 0.3, 0.7],
        "logits": ["random", *MISS_QUANTILES],
        "model": models,
        "tokens": tokens,
        "dtype": dtypes,
        "top": [0, 32, 128],
    }
    if full:
        return [Case(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    varied = [replace(base, **{axis: value}) for axis, values in axes.items() for value in values]
    return [base, *(case for case in varied if case != base)]


def inputs(case: Case, device: str) -> Inputs:
    """The tensors of a case; the same ones every time on one kind of device.

    The rows of `weight` have a length of about 1, and random logits a deviation of 1. For trained-like ones, hidden is
    s * weight[target] / |weight[target]|² plus noise at right angles to it, so that s is the target's logit. The other
    logits are then normal with variance |hidden|² / H, about 1 + s² / H, and their exponentials sum up to about
    V * exp(variance / 2); s is solved for so that p comes out as drawn (at "tiny", with an H of 64, 1 - p is off by
    factors of up to 1.7, at "small" by less than 1.33).
    """
    h, v = SHAPES[case.model]
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(v, h, generator=generator, device=device).div_(math.sqrt(h)).to(case.dtype)
    hidden = torch.randn(case.tokens, h, generator=generator, device=device)
    targets = torch.randint(0, v, (case.tokens,), generator=generator, device=device)
    if case.logits != "random":
        odds = torch.from_numpy(_log_odds(case)).to(device, torch.float32)
        wanted = odds + math.log(v) + 0.5  # the target's logit, but for s² / 2H
        s = h - (h * h - 2 * h * wanted).sqrt()
        along = weight[targets].float()
        length2 = along.square().sum(1, keepdim=True)
        hidden += along * ((s.unsqueeze(1) - (hidden * along).sum(1, keepdim=True)) / length2)
    masked = torch.from_numpy(_prompts(case))
    targets[masked.to(device)] = IGNORE_INDEX
    return Inputs(
        hidden.to(case.dtype).requires_grad_(),
        weight.requires_grad_(),
        targets,
        case.tokens - int(masked.sum()),
        _teacher(hidden.detach(), weight.detach(), case, generator) if case.top else None,
    )


def _teacher(hidden: Tensor, weight: Tensor, case: Case, generator: torch.Generator) -> Teacher:
    """A teacher that thinks much as the student does: half a deviation away from it in every channel."""
    noise = torch.randn(hidden.shape, generator=generator, device=hidden.device)
    teacher = (hidden + 0.5 * noise).to(case.dtype)
    tops = [(rows @ weight.T).float().log_softmax(1).topk(case.top) for rows in teacher.split(1024)]
    return Teacher(teacher, torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops]))


def _log_odds(case: Case) -> np.ndarray:
    """log(p / (1 - p)) of each token [N] in mixed order: the measured quantiles, log-odds in between being linear."""
    miss = np.array(MISS_QUANTILES[case.logits])
    at = np.random.default_rng(1).permutation(case.tokens) + 0.5
    return np.interp(at / case.tokens, MISS_AT, np.log1p(-miss) - np.log(miss))


def _prompts(case: Case) -> np.ndarray:
    """Which tokens carry no loss, bool [N]: the beginning of each document, as in packs of prompts and answers."""
    masked = np.zeros(case.tokens, dtype=bool)
    for start, stop in _documents(case.tokens):
        masked[start : start + round(case.masked * (stop - start))] = True
    return masked


def _documents(tokens: int) -> Iterator[tuple[int, int]]:
    """Begin and end of documents of log-uniform lengths, 1/64 to 1/4 of all, that fill the tokens."""
    random = np.random.default_rng(2)
    start = 0
    while start < tokens:
        stop = min(tokens, start + round(tokens / np.exp(random.uniform(np.log(4), np.log(64)))))
        yield start, stop
        start = stop
