"""Sampling parameters as SGLang names them, and the choice of the next token for a batch of requests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_TEMPERATURE = 1e-6  # below it, decoding is greedy, as in SGLang; logits divided by less would overflow
_COPY_STRIDE = 0xD1B54A32D192ED03  # odd and without pattern: no copy meets the seed of a neighbouring request


@dataclass(frozen=True)
class SamplingParams:
    """`sampling_params` of a request, checked by the request parser; defaults are SGLang's."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1  # -1: all
    min_p: float = 0.0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    sampling_seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1

    def for_copy(self, index: int) -> "SamplingParams":
        """The parameters of one of the n answers to a prompt: the first has the seed as given, the others their own."""
        return replace(self, n=1, sampling_seed=self.sampling_seed + index * _COPY_STRIDE)


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Random numbers in [0, 1) that depend on (seed, position) alone: no state, so no order of requests matters.

    SplitMix64's finaliser (Steele, Lea and Flood 2014, figure 14) over seed and counter.
    """
    with np.errstate(over="ignore"):
        x = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64))
        x = _mix(x + np.array(positions, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample(logits_BV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """Next ids, int64 `[B]`.

    Args:
        logits_BV: of the last token of each request.
        params: of each request.
        positions: number of tokens each request has generated so far: the counter of its random numbers.

    Temperature first; then top_k, top_p and min_p each judged on the same sorted probabilities, as SGLang does; then
    one draw by inverting the cumulative distribution. Rows are treated one by one in effect: what a request gets does
    not depend on its neighbours.
    """
    ids_B = logits_BV.argmax(-1)
    drawn = [row for row, p in enumerate(params) if not p.greedy]
    if not drawn:
        return ids_B
    device = logits_BV.device
    chosen = [params[row] for row in drawn]
    u = uniform([p.sampling_seed for p in chosen], [positions[row] for row in drawn])
    u_B1 = torch.from_numpy(u)[:, None].to(device)
    temperature_B1 = torch.tensor([[p.temperature] for p in chosen], dtype=torch.float64, device=device)
    rows_B = torch.tensor(drawn, device=device)
    probs_BV = (logits_BV[rows_B].double() / temperature_B1).softmax(-1)
    if all(p.top_k == -1 and p.top_p == 1.0 and p.min_p == 0.0 for p in chosen):
        ids_B[rows_B] = _invert(probs_BV, u_B1)
        return ids_B
    probs_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    V = probs_BV.shape[1]
    top_k_B1 = torch.tensor([[p.top_k if p.top_k != -1 else V] for p in chosen], device=device)
    top_p_B1 = torch.tensor([[p.top_p] for p in chosen], dtype=torch.float64, device=device)
    min_p_B1 = torch.tensor([[p.min_p] for p in chosen], dtype=torch.float64, device=device)
    before_BV = probs_BV.cumsum(-1) - probs_BV
    # The most likely token always stays: rounding must not leave a row empty.
    dropped_BV = (torch.arange(V, device=device) >= top_k_B1) | (before_BV > top_p_B1)
    dropped_BV |= probs_BV < min_p_B1 * probs_BV[:, :1]
    dropped_BV[:, 0] = False
    picked_B = _invert(probs_BV.masked_fill(dropped_BV, 0.0), u_B1)
    ids_B[rows_B] = order_BV.gather(1, picked_B[:, None])[:, 0]
    return ids_B


def _invert(weights_BV: Tensor, u_B1: Tensor) -> Tensor:
    """Index `[B]` drawn in proportion to the weights, at u of the way through their sum; never one of weight 0."""
    cumulative_BV = weights_BV.cumsum(-1)
    target_B1 = u_B1 * cumulative_BV[:, -1:]
    picked_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
    # u·sum may round up to the sum itself: take the last index with weight.
    last_B = weights_BV.shape[1] - 1 - (weights_BV.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(picked_B, last_B)
