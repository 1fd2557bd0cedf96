"""Sampling parameters as SGLang names them, and the choice of the next token for a batch of requests."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class BadRequest(Exception):
    """A request that can never be answered: HTTP 400 with this message."""


_COPY_STRIDE = 0xD1B54A32D192ED03  # odd and without pattern: no copy meets the seed of a neighbouring request


@dataclass(frozen=True)
class SamplingParams:
    """`sampling_params` of a request; defaults are SGLang's."""

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
        return self.temperature == 0.0 or self.top_k == 1

    def for_copy(self, index: int) -> "SamplingParams":
        """The parameters of one of the n answers to a prompt: the first has the seed as given, the others their own."""
        return replace(self, n=1, sampling_seed=self.sampling_seed + index * _COPY_STRIDE)

    @classmethod
    def parse(cls, values: Any) -> "SamplingParams":
        """Check a JSON object. Without `sampling_seed` a random one is drawn.

        Raises:
            BadRequest: an unknown key, a value of the wrong type or out of range, or a known key whose effect this
                engine does not have.
        """
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            raise BadRequest(f"sampling_params must be an object, got {type(values).__name__}")
        parsed: dict[str, Any] = {}
        for key, value in values.items():
            if key in _NEUTRAL:
                if value is not None and value != _NEUTRAL[key]:
                    raise BadRequest(f"sampling_params.{key} is not supported by this engine (only {_NEUTRAL[key]!r})")
            elif key not in _CHECKS:
                raise BadRequest(f"sampling_params.{key} is unknown; known: {', '.join(sorted({*_CHECKS, *_NEUTRAL}))}")
            elif value is not None:
                parsed[key] = _CHECKS[key](key, value)
        parsed.setdefault("sampling_seed", secrets.randbits(63))
        params = cls(**parsed)
        if params.min_new_tokens > params.max_new_tokens:
            raise BadRequest(f"min_new_tokens {params.min_new_tokens} exceeds max_new_tokens {params.max_new_tokens}")
        return params


def _integer(low: int, *also: int) -> Any:
    def check(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or (value < low and value not in also):
            raise BadRequest(f"{key} must be an integer of at least {low}, got {value!r}")
        return value

    return check


def _number(low: float, high: float, low_allowed: bool = True) -> Any:
    def check(key: str, value: Any) -> float:
        right_type = isinstance(value, int | float) and not isinstance(value, bool)
        if not right_type or not (low <= value <= high) or (value == low and not low_allowed):
            raise BadRequest(f"{key} must be a number in {'[' if low_allowed else '('}{low}, {high}], got {value!r}")
        return float(value)

    return check


def _boolean(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{key} must be true or false, got {value!r}")
    return value


def _strings(key: str, value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise BadRequest(f"{key} must be a non-empty string or a list of them, got {value!r}")
    return tuple(items)


def _ids(key: str, value: Any) -> frozenset[int]:
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise BadRequest(f"{key} must be a list of integers, got {value!r}")
    return frozenset(value)


_CHECKS: dict[str, Any] = {
    "max_new_tokens": _integer(1),
    "min_new_tokens": _integer(0),
    "temperature": _number(0.0, 1e6),
    "top_p": _number(0.0, 1.0, low_allowed=False),
    "top_k": _integer(1, -1),
    "min_p": _number(0.0, 1.0),
    "n": _integer(1),
    "stop": _strings,
    "stop_token_ids": _ids,
    "ignore_eos": _boolean,
    "skip_special_tokens": _boolean,
    "no_stop_trim": _boolean,
    "sampling_seed": _integer(0),
}
# Keys of SGLang that clients send at their defaults, and whose other values would need what this engine lacks.
_NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "spaces_between_special_tokens": True,
    "stop_regex": None,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "logit_bias": None,
    "custom_params": None,
}


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
