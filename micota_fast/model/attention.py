"""Causal attention over packed documents: no token sees another document's, whatever the backend."""

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from micota_fast.errors import InputError

Backend = Literal["flash", "varlen", "sdpa"]

# SDPA pads documents of like length to a common one: at most this share of padded over real tokens in a group.
MAX_PADDING = 0.25


class Attend(Protocol):
    """How the decoder reaches other tokens.

    Takes queries `[T, N, d]`, keys and values `[T, K, d]` of T new tokens (N a multiple of K) and returns `[T, N, d]`.
    """

    def __call__(self, layer: int, q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor, /) -> Tensor: ...


def choose_backend(requested: str, device: torch.device | str, dtype: torch.dtype) -> tuple[Backend, str]:
    """Choose how to attend, once, at start.

    Args:
        requested: "auto", "flash" (the flash-attn package), "varlen" (torch.nn.attention.varlen) or "sdpa".
        device: where the model runs.
        dtype: of queries, keys and values.

    Returns:
        The backend and, for the log, why it was taken.

    Raises:
        InputError: a backend asked for by name that cannot run here; only "auto" may choose another.
    """
    device = torch.device(device)
    obstacles = {"flash": _flash_obstacle(device, dtype), "varlen": _varlen_obstacle(device, dtype), "sdpa": None}
    if requested in obstacles:
        if obstacles[requested] is not None:
            raise InputError(f"attention: {requested} cannot be used: {obstacles[requested]}; choose auto or sdpa")
        return requested, "asked for"  # type: ignore[return-value]
    if requested != "auto":
        raise InputError(f"attention: {requested!r} is unknown; choose auto, flash, varlen or sdpa")
    if obstacles["flash"] is None:
        return "flash", f"{_flash_function(device)[1]} is installed"
    if obstacles["varlen"] is None:
        return "varlen", f"no flash-attn: {obstacles['flash']}"
    return "sdpa", obstacles["varlen"]


def _no_flash_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the dtype is {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    return None


def _flash_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if (reason := _no_flash_kernel(device, dtype)) is not None:
        return reason
    try:
        _flash_function(device)
    except ImportError as error:
        return str(error)
    return None


@lru_cache
def _flash_function(device: torch.device) -> tuple[Callable[..., Any], str]:
    """The package's varlen function: FlashAttention 3, which is for Hopper alone, or 2."""
    if torch.cuda.get_device_capability(device)[0] == 9 and importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_varlen_func as flash3

        return flash3, "FlashAttention 3 (flash_attn_interface)"
    from flash_attn import flash_attn_varlen_func as flash2

    return flash2, "FlashAttention 2 (flash_attn)"


def _varlen_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if (reason := _no_flash_kernel(device, dtype)) is not None:
        return reason
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return str(error)
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return f"varlen_attn of torch {torch.__version__} has no window_size or no enable_gqa"
    return None


class PackedAttention:
    """`attend` for whole packed documents. One object a batch: what depends on lengths alone is worked out once.

    Args:
        cu_seqlens: int32 `[B+1]`, where each document starts, and the end; on the device of the queries. With "sdpa"
            the lengths are needed on the host, so pass a CPU tensor to avoid a wait for the device.
        max_seqlen: the longest document, a host integer.
        backend: as chosen by `choose_backend`.
        device: of the queries; by default that of `cu_seqlens`. Only "sdpa" allows them to differ.
    """

    def __init__(
        self, cu_seqlens: Tensor, max_seqlen: int, backend: Backend = "sdpa", device: torch.device | str | None = None
    ) -> None:
        device = cu_seqlens.device if device is None else torch.device(device)
        self._attend: Callable[[Tensor, Tensor, Tensor], Tensor]
        if backend == "sdpa":
            self._attend = _GroupedSDPA(cu_seqlens.tolist(), device)
        elif backend == "varlen":
            self._attend = _torch_varlen(cu_seqlens, max_seqlen)
        elif backend == "flash":
            self._attend = _flash_varlen(cu_seqlens, max_seqlen, _flash_function(device)[0])
        else:
            raise ValueError(f"unknown attention backend {backend!r}")

    def __call__(self, layer: int, q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor, /) -> Tensor:
        """Causal attention within each document, scores scaled by 1/sqrt(d). The layer makes no difference here."""
        return self._attend(q_TNd, k_TKd, v_TKd)


def _torch_varlen(cu_seqlens: Tensor, max_seqlen: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    def attend(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        gqa = q_TNd.shape[1] != k_TKd.shape[1]
        out = varlen_attn(
            q_TNd, k_TKd, v_TKd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), enable_gqa=gqa
        )
        assert isinstance(out, Tensor)
        return out

    return attend


def _flash_varlen(
    cu_seqlens: Tensor, max_seqlen: int, function: Callable[..., Any]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        out = function(q_TNd, k_TKd, v_TKd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)
        return out[0] if isinstance(out, tuple) else out  # early releases of version 3 return the lse too

    return attend


class _GroupedSDPA:
    """Documents of like length side by side in right-padded batches, one call of SDPA each.

    A causal mask already hides padding on the right from real tokens, so no mask is built. Row r of the padded
    layout copies token `source[r]`, or a row of zeros where it is padding; token t lies in row `slot[t]`.
    """

    def __init__(self, cu_seqlens: list[int], device: torch.device) -> None:
        starts = torch.tensor(cu_seqlens[:-1])
        lengths = torch.tensor(cu_seqlens).diff()
        self.shapes: list[tuple[int, int]] = []
        sources = []
        for members in group_by_length(lengths.tolist(), MAX_PADDING):
            offset = torch.arange(int(lengths[members[0]]))
            chosen = torch.tensor(members)
            rows = starts[chosen, None] + offset
            sources.append(torch.where(offset < lengths[chosen, None], rows, cu_seqlens[-1]).flatten())
            self.shapes.append((len(members), len(offset)))
        source = torch.cat(sources) if sources else torch.empty(0, dtype=torch.int64)
        slot = torch.empty(cu_seqlens[-1] + 1, dtype=torch.int64)
        slot[source] = torch.arange(len(source))
        self.source, self.slot = source.to(device), slot[:-1].to(device)

    def __call__(self, q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        T, N, d = q_TNd.shape
        gqa = k_TKd.shape[1] != N
        outs = []
        for q, k, v in zip(*(self._padded(x) for x in (q_TNd, k_TKd, v_TKd)), strict=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
            outs.append(out.transpose(1, 2).reshape(-1, N * d))
        return _Permute.apply(torch.cat(outs), self.slot, self.source).view(T, N, d)

    def _padded(self, x_TNd: Tensor) -> list[Tensor]:
        """`[b, N, L, d]` for each group of documents."""
        N, d = x_TNd.shape[1:]
        rows = _Permute.apply(x_TNd.flatten(1), self.source, self.slot)
        parts = rows.split([b * L for b, L in self.shapes])
        return [part.view(b, L, N, d).transpose(1, 2) for part, (b, L) in zip(parts, self.shapes, strict=True)]


class _Permute(torch.autograd.Function):
    """Rows `x[index]`, where the index one past the end stands for a row of zeros.

    `inverse` undoes `index`, so that the gradient is a gather too; autograd's own, a scatter-add, is the slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _rows(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        index, inverse = ctx.saved_tensors
        return _rows(grad, inverse), None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return torch.cat((x, x.new_zeros(1, x.shape[1]))).index_select(0, index)


def group_by_length(lengths: list[int], max_padding: float) -> list[list[int]]:
    """Partition documents, longest first, so that padding each group to its longest adds at most `max_padding` of it.

    Documents of length 0 are left out. Returns lists of indices; the first of each is its longest.
    """
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    longest = real = 0
    for i in order:
        if groups and longest * (len(groups[-1]) + 1) <= (1 + max_padding) * (real + lengths[i]):
            groups[-1].append(i)
            real += lengths[i]
        else:
            groups.append([i])
            longest = real = lengths[i]
    return groups
