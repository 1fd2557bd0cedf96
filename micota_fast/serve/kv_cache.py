"""Keys and values of the running sequences, and the attention of one new token of each to all of its own."""

from functools import partial
from typing import Literal

import numba
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from micota_fast.model.attention import AttendLayer, PackedAttention
from micota_fast.model.config import ModelConfig

# Shape suffixes as in the decoder: T tokens, N query heads, K key-value heads, d channels of a head; B sequences,
# S slots, L positions.

BLOCK = 64  # positions; lengths are rounded up to a multiple, so that few different shapes occur

DecodeBackend = Literal["numba", "sdpa"]


def choose_decode_backend(device: torch.device, dtype: torch.dtype) -> tuple[DecodeBackend, str]:
    """How the decode step attends, chosen once at start: the backend and, for the log, why."""
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        return "numba", "compiled loops read each sequence's own length; SDPA would read the longest for all"
    return "sdpa", f"the compiled loops are for float32 and float64 on a CPU, this is {dtype} on {device.type}"


class KVCache:
    """Slots 0 to B-1 hold the B running sequences without a gap; slot b's positions 0 to length-1 are valid.

    `k[layer]` and `v[layer]` are `[S, K, L, d]`; for the compiled loops, positions lie side by side in memory, else
    channels do. The cache grows by doubling, in slots and in positions, when `reserve` asks for more, and beyond
    `max_tokens` (S·L) only to what is asked for.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, backend: DecodeBackend) -> None:
        self.layers = config.num_hidden_layers
        self._shape = config.num_key_value_heads, config.head_dim
        self._device, self._dtype, self._backend = device, dtype, backend
        self.slots = self.capacity = 0
        self.max_tokens = 0
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self._arrays: list[tuple[NDArray[np.floating], NDArray[np.floating]]] = []

    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token over all layers."""
        K, d = self._shape
        return 2 * self.layers * K * d * self._dtype.itemsize

    def reserve(self, slots: int, length: int, used: int) -> None:
        """Make room for `slots` sequences of `length` tokens; the first `used` slots keep what they hold of that."""
        if slots <= self.slots and length <= self.capacity:
            return
        S = self.slots if slots <= self.slots else max(slots, 2 * self.slots)
        L = self.capacity if length <= self.capacity else max(round_up(length), 2 * self.capacity)
        if self.max_tokens < S * L:  # many short sequences before, few long ones now
            S, L = slots, round_up(length)
        K, d = self._shape
        kept = min(L, self.capacity)
        try:
            for layer in range(self.layers):
                for tensors in (self.k, self.v):
                    grown = self._empty(S, K, L, d)
                    if layer < len(tensors):
                        grown[:used, :, :kept] = tensors[layer][:used, :, :kept]
                        tensors[layer] = grown
                    else:
                        tensors.append(grown)
            self.slots, self.capacity = S, L
        except BaseException:  # memory ran out: some layers have the new size and others the old one
            self.slots, self.capacity = min(S, self.slots), min(L, self.capacity)
            raise
        finally:
            if self._backend == "numba":
                self._arrays = [(k.mT.numpy(), v.mT.numpy()) for k, v in zip(self.k, self.v, strict=False)]

    def _empty(self, S: int, K: int, L: int, d: int) -> Tensor:
        if self._backend == "numba":
            return torch.empty(S, K, d, L, device=self._device, dtype=self._dtype).mT
        # Zeros: SDPA multiplies surplus positions by a weight of 0, and 0 times a NaN left in memory is NaN.
        return torch.zeros(S, K, L, d, device=self._device, dtype=self._dtype)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a sequence of `length` tokens into another slot."""
        for x in (*self.k, *self.v):
            x[target, :, :length] = x[source, :, :length]

    def prefill(self, slots_T: Tensor, position_ids_T: Tensor, attend_packed: PackedAttention) -> "PrefillAttention":
        """`attend` for whole prompts, packed."""
        return PrefillAttention(self, slots_T, position_ids_T, attend_packed)

    def decode(self, lengths: NDArray[np.int64], first: int = 0) -> "NumbaDecode | SDPADecode":
        """`attend` for one new token of each of B slots from `first` on; `lengths[b]` tokens are there before it."""
        slots = slice(first, first + len(lengths))
        if self._backend == "numba":
            return NumbaDecode([(k[slots], v[slots]) for k, v in self._arrays], lengths)
        return SDPADecode([(k[slots], v[slots]) for k, v in zip(self.k, self.v, strict=True)], lengths)


class PrefillAttention:
    """Attend within packed prompts and keep their keys and values."""

    def __init__(self, cache: KVCache, slots_T: Tensor, position_ids_T: Tensor, attend_packed: PackedAttention) -> None:
        self._cache, self._slots_T, self._position_ids_T, self._packed = cache, slots_T, position_ids_T, attend_packed

    def __call__(self, layer: int, /) -> AttendLayer:
        return partial(self._attend, layer)

    def _attend(self, layer: int, q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        self._cache.k[layer][self._slots_T, :, self._position_ids_T] = k_TKd
        self._cache.v[layer][self._slots_T, :, self._position_ids_T] = v_TKd
        return self._packed(layer)(q_TNd, k_TKd, v_TKd)


class SDPADecode:
    """Decode attention in torch: all sequences at the longest one's length, the surplus masked."""

    def __init__(self, tensors: list[tuple[Tensor, Tensor]], lengths: NDArray[np.int64]) -> None:
        self._tensors = tensors
        device, capacity = tensors[0][0].device, tensors[0][0].shape[2]
        self._L = min(round_up(int(lengths.max()) + 1), capacity)
        self._slots_B = torch.arange(len(lengths), device=device)
        self._lengths_B = torch.from_numpy(lengths).to(device)
        self._mask_B11L = (torch.arange(self._L, device=device) <= self._lengths_B[:, None])[:, None, None, :]

    def __call__(self, layer: int, /) -> AttendLayer:
        return partial(self._attend, layer)

    def _attend(self, layer: int, q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        k, v = self._tensors[layer]
        k[self._slots_B, :, self._lengths_B] = k_TKd
        v[self._slots_B, :, self._lengths_B] = v_TKd
        B, N, d = q_TNd.shape
        # The query heads that share a key head stand as its rows: no key is copied, and products have more rows.
        q_BKGd = q_TNd.view(B, k.shape[1], -1, d)
        k_BKLd, v_BKLd = k[:, :, : self._L], v[:, :, : self._L]
        return F.scaled_dot_product_attention(q_BKGd, k_BKLd, v_BKLd, attn_mask=self._mask_B11L).reshape(B, N, d)


class NumbaDecode:
    """Decode attention in compiled loops on a CPU, each sequence at its own length."""

    def __init__(
        self, arrays: list[tuple[NDArray[np.floating], NDArray[np.floating]]], lengths: NDArray[np.int64]
    ) -> None:
        self._arrays, self._lengths = arrays, lengths

    def __call__(self, layer: int, /) -> AttendLayer:
        return partial(self._attend, layer)

    def _attend(self, layer: int, q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        k, v = self._arrays[layer]
        out_TNd = torch.empty_like(q_TNd)
        _attend_one(q_TNd.numpy(), k_TKd.numpy(), v_TKd.numpy(), k, v, self._lengths, out_TNd.numpy())
        return out_TNd


@numba.njit(cache=True, nogil=True, fastmath=True)
def _attend_one(q, k_new, v_new, k, v, lengths, out):  # type: ignore[no-untyped-def]
    """out[b] = softmax(q[b] · k[b, :lengths[b]+1] / sqrt(d)) · v; writes the new key and value at lengths[b] first.

    q, out [B, N, d]; k_new, v_new [B, K, d]; k, v [S, K, d, L]; lengths int64 [B]. The innermost loops run along
    positions, which lie side by side, so the compiler vectorises them whatever d is. A sequence's sums run over its own
    positions alone: its result does not depend on the others.
    """
    B, N, d = q.shape
    K = k.shape[1]
    G = N // K
    scale = q.dtype.type(1.0 / np.sqrt(d))
    zero = q.dtype.type(0.0)
    row = np.empty(k.shape[3], q.dtype)
    for b in range(B):
        n = lengths[b] + 1
        for h in range(K):
            for i in range(d):
                k[b, h, i, n - 1] = k_new[b, h, i]
                v[b, h, i, n - 1] = v_new[b, h, i]
            keys, values = k[b, h], v[b, h]
            for g in range(h * G, h * G + G):
                row[:n] = zero
                for i in range(d):
                    x = q[b, g, i] * scale
                    for t in range(n):
                        row[t] += x * keys[i, t]
                top = row[0]
                for t in range(n):
                    top = max(top, row[t])
                for t in range(n):
                    row[t] = np.exp(row[t] - top)
                total = zero
                for t in range(n):
                    total += row[t]
                for i in range(d):
                    acc = zero
                    for t in range(n):
                        acc += row[t] * values[i, t]
                    out[b, g, i] = acc / total


def round_up(length: int) -> int:
    """The next multiple of BLOCK."""
    return -(-length // BLOCK) * BLOCK
