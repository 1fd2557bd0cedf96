"""Load balancing: which rank runs which pack in which micro-step, so that ranks have equal work.

Under FSDP all ranks meet in every layer of every micro-step, so a micro-step lasts as long as its costliest pack. The
packs of a step are sorted by cost, and each group of `world` packs in turn makes a micro-step, the costliest first. No
other assignment takes less time: sort the micro-steps of any assignment by their costliest pack. The first m hold at
most m * world packs, so the costliest pack of the next one costs at least as much as the pack that follows the
m * world costliest of all. Here it is exactly that pack.

Within a micro-step the costlier pack goes to the rank that has had less work. By the argument above that saves no time.
It evens out the ranks' totals, to the extent that one rank can run ahead of another.

The shuffle decides which packs a step takes. Putting packs of similar cost into the same step would balance even one
pack per rank, but the gradient of a step would then come from documents of similar length. Measured with the micro
models at eight packs per step, its variance is 3 to 5 times that of shuffled steps.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def attention_parity(flops_per_token: Callable[[float], float]) -> float:
    """Return the document length, in tokens, at which attention takes as many FLOPs as the matrix products.

    Args:
        flops_per_token: FLOPs for one token as a function of its document's length in tokens: a constant for the matrix
            products plus attention in proportion to the length. See `Decoder.flops_per_token`.
    """
    products = flops_per_token(0)
    return products / (flops_per_token(1) - products)


def pack_costs(
    lengths_D: NDArray[np.int64], pack_offsets: NDArray[np.int64], parity_tokens: float
) -> NDArray[np.float64]:
    """Return the work in each pack, [P], in units of one token's matrix products.

    A document of n tokens costs n + n²/parity_tokens. The sums are over integers, so every machine gets the same bits.

    Args:
        lengths_D: tokens of each document, pack after pack.
        pack_offsets: where each pack begins in `lengths_D`, and D; [P+1], no pack empty.
        parity_tokens: see `attention_parity`; infinite: attention costs nothing.
    """
    tokens_P = np.add.reduceat(lengths_D, pack_offsets[:-1])
    return tokens_P + np.add.reduceat(lengths_D**2, pack_offsets[:-1]) / parity_tokens


def assign_packs(costs_P: NDArray[np.float64], world: int) -> NDArray[np.int64]:
    """Return the pack that each rank runs in each micro-step, [ceil(P/world), world]; -1 in the last one: none."""
    packs_MR = np.full((math.ceil(len(costs_P) / world), world), -1)
    packs_MR.ravel()[: len(costs_P)] = np.argsort(-costs_P, kind="stable")
    work_R = np.zeros(world)
    for packs_R in packs_MR:
        packs_R[np.argsort(work_R, kind="stable")] = packs_R.copy()
        work_R += np.where(packs_R >= 0, costs_P[packs_R], 0)
    return packs_MR


def idle_share(costs_P: NDArray[np.float64], packs_per_step: int, world: int) -> float:
    """Return the share of the ranks' time spent waiting for the slowest, 0 to 1, at `packs_per_step` packs per step."""
    packs_per_step = min(packs_per_step, len(costs_P))
    costs_SP = np.zeros((math.ceil(len(costs_P) / packs_per_step), packs_per_step))
    costs_SP.ravel()[: len(costs_P)] = costs_P
    costs_SP.sort(axis=1)
    time = costs_SP[:, ::-1][:, ::world].sum()
    return max(0.0, 1 - float(costs_P.sum() / (world * time)))
