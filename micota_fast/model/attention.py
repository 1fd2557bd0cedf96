"""Causal attention over packed documents: no token sees another document's, whatever the backend."""

import importlib.util
import inspect
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from micota_fast.errors import InputError
from micota_fast.model.cpu_attention import cpu_attention
from micota_fast.model.flash_attention_4 import flash_attention_4, head_dims

# "flash": the varlen function of FlashAttention 4 (flash_attn.cute), 3 (flash_attn_interface) or 2 (flash_attn).
Backend = Literal["flash", "varlen", "sdpa"]


# How a layer reaches other tokens: takes queries `[T, N, d]`, keys and values `[T, K, d]` of T new tokens (N a multiple
# of K) and returns `[T, N, d]`.
AttendLayer = Callable[[Tensor, Tensor, Tensor], Tensor]
# The same by number of the layer.
Attend = Callable[[int], AttendLayer]

HEAD_DIMS = range(8, 257, 8)  # of FlashAttention 2 and 3, and of torch's kernels, which are those of version 2


def choose_backend(
    requested: str, device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> tuple[Backend, str]:
    """Choose how to attend, once, at start.

    Args:
        requested: "auto", "flash" (FlashAttention 4, 3 or 2), "varlen" (torch.nn.attention.varlen) or "sdpa".
        device: where the model runs.
        dtype: of queries, keys and values.
        head_dim: channels of a head.

    Returns:
        The backend and, for the log, why it was taken.

    Raises:
        InputError: a backend requested by name cannot run here; only "auto" may choose another.
    """
    device = torch.device(device)
    obstacles = {
        "flash": _flash_obstacle(device, dtype, head_dim),
        "varlen": _varlen_obstacle(device, dtype, head_dim),
        "sdpa": None,
    }
    if requested in obstacles:
        if obstacles[requested] is not None:
            raise InputError(f"attention: {requested} cannot be used: {obstacles[requested]}; choose auto or sdpa")
        told = _torch_kernels() if requested == "varlen" else ""
        return requested, f"asked for{told}"  # type: ignore[return-value]
    if requested != "auto":
        raise InputError(f"attention: {requested!r} is unknown; choose auto, flash, varlen or sdpa")
    if obstacles["flash"] is None:
        return "flash", f"{flash_package(device).name} is installed"
    if obstacles["varlen"] is None:
        return "varlen", f"no flash-attn: {obstacles['flash']}{_torch_kernels()}"
    return "sdpa", obstacles["varlen"]


def _no_flash_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}, not cuda"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the dtype is {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    if head_dim not in HEAD_DIMS:
        return f"the model's head_dim is {head_dim}, not a multiple of 8 up to {HEAD_DIMS[-1]}"
    return None


def _flash_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if (reason := _no_flash_kernel(device, dtype, head_dim)) is not None:
        return reason
    try:
        package = flash_package(device)
    except Exception as error:  # absent, or built for another torch or CUDA, which shows as almost anything
        return str(error)
    if head_dim not in package.head_dims:
        return f"{package.name} does not take the model's head_dim of {head_dim} on this GPU"
    return None


class _Flash(NamedTuple):
    """A FlashAttention package that can be imported."""

    name: str  # for the log
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]  # of q, k, v, cu_seqlens, max_seqlen
    head_dims: Collection[int]


@lru_cache
def flash_package(device: torch.device) -> _Flash:
    """Return the newest FlashAttention that is installed and made for this GPU: 4 (Hopper, Blackwell), 3 (Hopper) or 2.

    Raises whatever the import of version 2 raises, with why newer ones were not taken if they are installed.
    """
    major = torch.cuda.get_device_capability(device)[0]
    broken = ""  # built for another torch or CUDA, or without something that it needs, which shows as almost anything
    if head_dims(major) and _has_flash_4():
        try:
            importlib.import_module("flash_attn.cute.interface")
            return _Flash("FlashAttention 4 (flash_attn.cute)", _without_lse, head_dims(major))
        except Exception as error:
            broken += f"; flash_attn.cute is there and fails: {type(error).__name__}: {error}"
    if major == 9 and importlib.util.find_spec("flash_attn_interface"):
        try:
            from flash_attn_interface import flash_attn_varlen_func as flash3

            return _Flash(f"FlashAttention 3 (flash_attn_interface{broken})", _varlen(flash3), HEAD_DIMS)
        except Exception as error:
            broken += f"; flash_attn_interface is there and fails: {type(error).__name__}: {error}"
    try:
        from flash_attn import flash_attn_varlen_func as flash2
    except Exception as error:
        raise ImportError(f"{error}{broken}") from error
    return _Flash(f"FlashAttention 2 (flash_attn{broken})", _varlen(flash2), HEAD_DIMS)


def _has_flash_4() -> bool:
    """Whether the folder of version 4 is there. It lies in that of version 2, which may be broken, so do not import."""
    spec = importlib.util.find_spec("flash_attn")
    return any((Path(folder) / "cute").is_dir() for folder in (spec and spec.submodule_search_locations) or ())


def _without_lse(*arguments: Any) -> Tensor:
    out_TNd: Tensor = flash_attention_4(*arguments)[0]
    return out_TNd


def _varlen(function: Callable[..., Any]) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """The varlen function of version 2 or 3."""

    def attend(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out = function(q_TNd, k_TKd, v_TKd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)
        return out[0] if isinstance(out, tuple) else out  # early releases of version 3 return the lse too

    return attend


def _varlen_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if (reason := _no_flash_kernel(device, dtype, head_dim)) is not None:
        return reason
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return str(error)
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        return f"varlen_attn of torch {torch.__version__} has no window_size"
    return None


def _torch_kernels() -> str:
    """Say which kernels a user has torch run: `activate_flash_attention_impl` replaces those of version 2.

    That switch is theirs. It needs the packages that "flash" calls directly, and by their sources it fits few pairs of
    releases: torch 2.11 refuses a causal window for FA4, torch 2.13 expects two results where flash-attn-4 4.0.0b36
    returns five.
    """
    active = current_flash_attention_impl()
    return "" if active is None else f"; torch runs {active}, as activate_flash_attention_impl was told"


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
    flash = flash_package(cu_seqlens.device).attend

    def attend(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        return flash(q_TNd, k_TKd, v_TKd, cu_seqlens, max_seqlen)

    return attend


def _torch_varlen(cu_seqlens: Tensor, max_seqlen: int) -> AttendLayer:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes grouped heads without being told; later releases want this flag.
    has_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        gqa: dict[str, Any] = {"enable_gqa": q_TNd.shape[1] != k_TKd.shape[1]} if has_flag else {}
        out = varlen_attn(
            q_TNd, k_TKd, v_TKd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **gqa
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
