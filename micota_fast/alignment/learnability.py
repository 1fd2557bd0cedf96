"""How much a student must learn from each answer: the learnability score, and what it is compared with.

MiCoTA's analysis looks at perplexity and at length (arXiv 2507.01887). A corpus can be likely token by token and still
be far from the student because its answers are long. The score proposed here combines both: the negative
log-likelihood of a *whole* answer under the untrained student, in nats, averaged over the answers. Less is easier to
learn. It says how far the student has to go, not whether that is worth it: texts without reasoning score well.
bench/learnability.py measures how it ranks corpora compared with the accuracy that training on them gives.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from micota_fast.alignment.results import Distribution, Learnability
from micota_fast.common.schema import ABSENT, Absent
from micota_fast.statistics.quantiles import quantiles

QUANTILES = (1, 10, 25, 50, 75, 90, 99)
MAX_RANK = 100  # ranks are clipped to it in the rank-surprisal ratio; ours
BLOCK = 1 << 25  # logits, and weights converted to float32, that exist at a time: 128 MB each


def learnability(nll_N: NDArray[np.float32], rank_N: NDArray[np.int64], counts_D: NDArray[np.int64]) -> Learnability:
    """Compute the score of a corpus, and two other measures of the same pass over it.

    Args:
        nll_N: negative log-likelihood of each supervised token, nats, D documents one after the other.
        rank_N: rank of each token among all, by likelihood under the student; 1: its first choice.
        counts_D: supervised tokens of each document, at least one.

    Returns:
        `nats_per_answer`: the score, with its distribution over documents. `departures_per_answer`: tokens of an answer
        that are not the student's first choice. `rank_surprisal_ratio`: sum of ranks, each at most MAX_RANK, over the
        sum of nll (arXiv 2601.14249, where less is better, too: tokens that are unlikely, yet high in rank). `top1`:
        share of all tokens that are the student's first choice, given the right ones before them.
    """
    starts_D = np.cumsum(counts_D) - counts_D
    return Learnability(
        nats_per_answer=distribution(np.add.reduceat(nll_N, starts_D, dtype=np.float64)),
        departures_per_answer=distribution(np.add.reduceat(rank_N > 1, starts_D, dtype=np.int64)),
        top1=float((rank_N == 1).mean()),
        rank_surprisal_ratio=float(np.minimum(rank_N, MAX_RANK).sum() / nll_N.sum(dtype=np.float64)),
    )


def distribution(values_D: NDArray[Any], total: int | Absent = ABSENT) -> Distribution:
    """Describe a quantity of the D documents."""
    mean, sd = float(values_D.mean()), float(values_D.std())
    return Distribution(total=total, mean=mean, sd=sd, **quantiles(values_D, QUANTILES))


def target_ranks(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    """Rank each target among all tokens by its logit: 1 + the number of strictly greater logits. [N], int64.

    Logits are float32 and exist for one block of the vocabulary at a time. This is a second product with the head, in
    float32, so it costs as much as the loss's, or more if that computes in bfloat16.

    Args:
        hidden_NH: last hidden states at the positions before the targets, any float dtype.
        weight_VH: the language model head.
        targets_N: the tokens that follow, int64.
    """
    ranks_N = torch.ones_like(targets_N)
    width = max(1, BLOCK // max(1, *hidden_NH.shape))
    hidden_NH = hidden_NH.float()
    target_logits_N = torch.einsum("nh,nh->n", hidden_NH, weight_VH[targets_N].float())
    for start in range(0, len(weight_VH), width):
        logits_NV = hidden_NH @ weight_VH[start : start + width].float().T
        # Summed in another order, a target's logit could be greater than itself.
        columns_V = torch.arange(start, start + logits_NV.shape[1], device=targets_N.device)
        greater_NV = (logits_NV > target_logits_N[:, None]) & (columns_V != targets_N[:, None])
        ranks_N += greater_NV.sum(1)
    return ranks_N
