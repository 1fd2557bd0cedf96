"""Soft and reverse targets made up for tests of the loss, with all that they may hold."""

from typing import Any

import torch
from torch import Tensor

from micota_fast.kernels import ReverseTargets, SoftTargets


def soft_targets(
    n: int,
    v: int,
    k: int,
    *,
    ignored: float = 0.0,
    absent: float = 0.0,
    hard: bool = False,
    peaked: float = 2.0,
    seed: int = 0,
    **options: Any,
) -> SoftTargets:
    """The k likeliest of v tokens under random teachers, float32.

    Args:
        ignored: share of ignored rows.
        absent: share of entries that are absent, none of them the first of its row.
        hard: whether there are hard targets, which then say what is ignored; some are among the k tokens.
        peaked: deviation of the teacher's logits.
        options: further fields.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator, dtype=torch.float64) * peaked
    logprobs, ids = logits.log_softmax(1).topk(k, dim=1)
    gone = torch.rand(n, k, generator=generator) < absent
    gone[:, :1] = False
    ids = ids.masked_fill(gone, -100)
    logprobs = logprobs.float().masked_fill(gone, torch.nan)  # which nobody reads
    out = torch.rand(n, generator=generator) < ignored
    targets: Tensor | None = None
    if hard:
        targets = ids[:, 0].where(
            torch.rand(n, generator=generator) < 0.5, torch.randint(0, v, (n,), generator=generator)
        )
        targets = targets.masked_fill(out, -100)
    else:
        ids = ids.masked_fill(out.unsqueeze(1), -100)
    return SoftTargets(ids, logprobs, targets, **options)


def reverse_targets(
    n: int, v: int, *, ignored: float = 0.0, absent: float = 0.0, seed: int = 0, **options: Any
) -> ReverseTargets:
    """Tokens of v with log-probabilities of random teachers, float32; `ignored` and `absent` are shares of rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, v, (n,), generator=generator)
    logprobs = (torch.randn(n, v, generator=generator) * 2).log_softmax(1)[torch.arange(n), tokens]
    logprobs = logprobs.masked_fill(torch.rand(n, generator=generator) < absent, torch.nan)
    tokens = tokens.masked_fill(torch.rand(n, generator=generator) < ignored, -100)
    return ReverseTargets(tokens, logprobs, **options)


def inputs(n: int, h: int = 5, v: int = 23, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states [n, h] and a weight [v, h]."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(m, h, generator=generator, dtype=torch.float64) for m in (n, v))
    return hidden.to(dtype), weight.to(dtype)
