"""Which rank runs which pack when, so that ranks have equal work.

Under FSDP all ranks meet in every layer of every micro-step, so a micro-step lasts as long as its costliest pack. The
packs of a step are sorted by cost, and each `world` of them in turn make a micro-step, the costliest first. No other
deal takes less time: of the micro-steps of any deal, sorted by their costliest pack, the first m hold m * world packs
at most, so the next one's costliest is no cheaper than the pack that follows the m * world costliest of all; here it is
that pack.

Within a micro-step the costlier pack goes to the rank that has had less to do. By the above that saves no time; it
evens out the ranks' sums, for as far as one rank can run ahead of another.

Which packs a step takes is left to the shuffle. Packs of like cost in the same step would be dealt evenly even where
there is one pack a rank, but a step's gradient would then be that of documents of like length. Measured with the micro
models, eight packs a step: its variance is 3 to 5 times that of shuffled steps.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def attention_parity(flops_per_token: Callable[[float], float]) -> float:
    """Length of the document, in tokens, for which a model's attention takes as many FLOPs as its matrix products.

    Args:
        flops_per_token: FLOPs for one token of a document, of that document's length in tokens: a constant for the
            matrix products and a share of attention in proportion to the length. `Decoder.flops_per_token`.
    """
    products = flops_per_token(0)
    return products / (flops_per_token(1) - products)


def pack_costs(
    lengths_D: NDArray[np.int64], pack_offsets: NDArray[np.int64], parity_tokens: float
) -> NDArray[np.float64]:
    """Work in each pack, [P], in units of one token's matrix products: a document of n tokens is n + n²/parity_tokens.

    Sums are of integers, so every machine works out the same bits.

    Args:
        lengths_D: tokens of each document, pack after pack.
        pack_offsets: where each pack begins in them, and D; [P+1], no pack empty.
        parity_tokens: see `attention_parity`; infinite: attention costs nothing.
    """
    tokens_P = np.add.reduceat(lengths_D, pack_offsets[:-1])
    return tokens_P + np.add.reduceat(lengths_D**2, pack_offsets[:-1]) / parity_tokens


def deal(costs_P: NDArray[np.float64], world: int) -> NDArray[np.int64]:
    """The pack that each rank runs at each micro-step, [ceil(P/world), world]; -1: none, and only in the last one."""
    packs_MR = np.full((math.ceil(len(costs_P) / world), world), -1)
    packs_MR.ravel()[: len(costs_P)] = np.argsort(-costs_P, kind="stable")
    work_R = np.zeros(world)
    for packs_R in packs_MR:
        packs_R[np.argsort(work_R, kind="stable")] = packs_R.copy()
        work_R += np.where(packs_R >= 0, costs_P[packs_R], 0)
    return packs_MR


def idle_share(costs_P: NDArray[np.float64], packs_per_step: int, world: int) -> float:
    """Share of the ranks' time spent waiting for the slowest, 0 to 1, where each `packs_per_step` in turn are dealt."""
    packs_per_step = min(packs_per_step, len(costs_P))
    costs_SP = np.zeros((math.ceil(len(costs_P) / packs_per_step), packs_per_step))
    costs_SP.ravel()[: len(costs_P)] = costs_P
    costs_SP.sort(axis=1)
    time = costs_SP[:, ::-1][:, ::world].sum()
    return max(0.0, 1 - float(costs_P.sum() / (world * time)))
