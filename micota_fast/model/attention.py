"""Causal attention over packed documents: no token sees another document's, whatever the backend."""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from micota_fast.errors import InputError
from micota_fast.model.cpu_attention import cpu_attention

# "flash": the varlen function of FlashAttention 3 (flash_attn_interface) or 2 (flash_attn); 4 is not supported.
Backend = Literal["flash", "varlen", "sdpa"]


# How a layer reaches other tokens: takes queries `[T, N, d]`, keys and values `[T, K, d]` of T new tokens (N a multiple
# of K) and returns `[T, N, d]`.
AttendLayer = Callable[[Tensor, Tensor, Tensor], Tensor]
# The same by number of the layer.
Attend = Callable[[int], AttendLayer]


def choose_backend(requested: str, device: torch.device | str, dtype: torch.dtype) -> tuple[Backend, str]:
    """Choose how to attend, once, at start.

    Args:
        requested: "auto", "flash" (FlashAttention 3 or 2), "varlen" (torch.nn.attention.varlen) or "sdpa".
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
    except Exception as error:  # absent, or built for another torch or CUDA, which shows as almost anything
        return str(error)
    return None


@lru_cache
def _flash_function(device: torch.device) -> tuple[Callable[..., Any], str]:
    """The varlen function of FlashAttention 3, which is for Hopper alone, or 2, and how to call it in the log.

    Raises whatever the import of version 2 raises, with why 3 was not taken where it is installed.
    """
    why_not_3 = ""
    if importlib.util.find_spec("flash_attn_interface") and torch.cuda.get_device_capability(device)[0] == 9:
        try:
            from flash_attn_interface import flash_attn_varlen_func as flash3

            return flash3, "FlashAttention 3 (flash_attn_interface)"
        except Exception as error:  # built for another torch or CUDA, which shows as almost anything
            why_not_3 = f"; flash_attn_interface is there and fails: {type(error).__name__}: {error}"
    try:
        from flash_attn import flash_attn_varlen_func as flash2
    except Exception as error:
        raise ImportError(f"{error}{why_not_3}") from error
    return flash2, f"FlashAttention 2 (flash_attn{why_not_3})"


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
    """`attend` for whole packed documents. One object per batch: what depends only on lengths is worked out once.

    Args:
        cu_seqlens: int32 `[B+1]`: where each document starts, and the end; copied to `device` if it is not there yet.
        lengths: tokens of each document, `[B]`. Python integers, so that nothing asks the device for them.
        backend: as chosen by `choose_backend`.
        device: of the queries; by default that of `cu_seqlens`.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        lengths: Sequence[int],
        backend: Backend = "sdpa",
        device: torch.device | str | None = None,
    ) -> None:
        device = cu_seqlens.device if device is None else torch.device(device)
        self._attend: AttendLayer
        if backend == "sdpa":
            self._attend = _on_cpu(cu_seqlens) if device.type == "cpu" else _sdpa_per_document(lengths)
        elif backend == "varlen":
            self._attend = _torch_varlen(cu_seqlens.to(device), max(lengths))
        elif backend == "flash":
            self._attend = _flash_varlen(cu_seqlens.to(device), max(lengths))
        else:
            raise ValueError(f"unknown attention backend {backend!r}")

    def __call__(self, layer: int, /) -> AttendLayer:
        """Causal attention within each document, scores scaled by 1/sqrt(d). The layer makes no difference here."""
        return self._attend


def _flash_varlen(cu_seqlens: Tensor, max_seqlen: int) -> AttendLayer:
    function, _ = _flash_function(cu_seqlens.device)

    def attend(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        out = function(q_TNd, k_TKd, v_TKd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)
        return out[0] if isinstance(out, tuple) else out  # early releases of version 3 return the lse too

    return attend


def _torch_varlen(cu_seqlens: Tensor, max_seqlen: int) -> AttendLayer:
    from torch.nn.attention.varlen import varlen_attn

    def attend(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        gqa = q_TNd.shape[1] != k_TKd.shape[1]
        out = varlen_attn(
            q_TNd, k_TKd, v_TKd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), enable_gqa=gqa
        )
        assert isinstance(out, Tensor)
        return out

    return attend


def _sdpa_per_document(lengths: Sequence[int]) -> AttendLayer:
    """Call torch's SDPA once per document: for GPUs, in types that FlashAttention does not take."""
    lengths = [length for length in lengths if length]

    def attend(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        gqa = q_TNd.shape[1] != k_TKd.shape[1]
        documents = zip(*(x.transpose(0, 1)[None].split(lengths, dim=2) for x in (q_TNd, k_TKd, v_TKd)), strict=True)
        outs = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa) for q, k, v in documents]
        return torch.cat([out.transpose(1, 2) for out in outs], dim=1)[0]

    return attend


def _on_cpu(cu_seqlens: Tensor) -> AttendLayer:
    def attend(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        out_TNd: Tensor = cpu_attention(q_TNd, k_TKd, v_TKd, cu_seqlens)[0]
        return out_TNd

    return attend
