"""The FlashAttention packages without their kernels: what we call, with the parameters that the releases have.

Signatures were read from the sources of the releases named here, which nothing of this project has run on a GPU. A call
that does not fit them fails. The operators have the names of the real ones, by which selective checkpointing knows
them, and allocate what the real ones return and, in version 4's backward pass, sum in.
"""

import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# From `flash_attn/flash_attn_interface.py` of the sources of flash-attn 2.8.3.post2.
VERSION_2 = """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
block_table=None"""
# From `hopper/flash_attn_interface.py` (flash-attn-3 3.0.0.b1) of the same sources.
VERSION_3 = """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0"""
# From `flash_attn/cute/interface.py` of the wheel of flash-attn-4 4.0.0b36: `_flash_attn_fwd` and `_flash_attn_bwd`.
VERSION_4 = """q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False,
softcap=None, window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None,
k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
disable_scheduler_metadata=False, gather_bwd_recompute_p=False"""
VERSION_4_BACKWARD = """q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False,
num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2,
AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None,
seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
dlse=None, learnable_sink=None"""
VERSIONS = ("flash 2", "flash 3", "flash 4")


def signature(parameters: str) -> inspect.Signature:
    """Return the signature of a function with these parameters."""
    namespace: dict[str, Any] = {}
    exec(f"def function({parameters}): ...", namespace)
    return inspect.signature(namespace["function"])


def with_signature(parameters: str, function: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """Return a function of these parameters that calls `function` with all arguments by name."""
    expected = signature(parameters)

    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = expected.bind(*args, **kwargs)
        bound.apply_defaults()
        return function(bound.arguments)

    checked.__signature__ = expected  # type: ignore[attr-defined]
    return checked


def install(version: str) -> None:
    """Make one of `VERSIONS` importable; the others are absent. Needs torch, and the fake device."""
    if version == "flash 4":
        forward = with_signature(VERSION_4, _forward_4)
        backward = with_signature(VERSION_4_BACKWARD, _backward_4)
        # A folder `cute` is what tells that version 4 is there; this package's own has one for that purpose.
        package = _module("flash_attn", __path__=[_folder_with_cute()])
        package.__spec__.submodule_search_locations = package.__path__  # type: ignore[union-attr]
        _module("flash_attn.cute", __path__=[])
        _module("flash_attn.cute.interface", _flash_attn_fwd=forward, _flash_attn_bwd=backward)
    elif version == "flash 3":
        attend = _operators("flash_attn_3::fwd", "flash_attn_3::bwd")
        _module("flash_attn_interface", flash_attn_varlen_func=with_signature(VERSION_3, attend))
    else:
        names = ("flash_attn::_flash_attn_varlen_forward", "flash_attn::_flash_attn_varlen_backward")
        _module("flash_attn", flash_attn_varlen_func=with_signature(VERSION_2, _operators(*names)))


def _module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(contents)
    sys.modules[name] = made
    return made


def _folder_with_cute() -> str:
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp(prefix="flash-attn-4-"))
    (folder / "cute").mkdir()
    return str(folder)


def _require_packed_causal(given: dict[str, Any]) -> None:
    q, k, cu_seqlens = given["q"], given["k"], given["cu_seqlens_q"]
    assert given["causal"]
    assert q.is_cuda
    assert cu_seqlens.is_cuda
    assert str(cu_seqlens.dtype) == "torch.int32"
    assert given["cu_seqlens_k"] is cu_seqlens
    assert isinstance(given["max_seqlen_q"], int)
    assert q.shape[1] % k.shape[1] == 0
    assert q.stride(-1) == k.stride(-1) == 1  # else the kernels copy


def _operators(forward_name: str, backward_name: str) -> Callable[[dict[str, Any]], Any]:
    """Register both halves and return the differentiable function of them, as the packages define theirs."""
    import torch
    from torch import Tensor

    def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> list[Tensor]:
        return [torch.empty_like(x) for x in (q, k, v)]

    for name, function in ((forward_name, forward), (backward_name, backward)):
        torch.library.custom_op(name, function, mutates_args=()).register_fake(function)
    operators = [
        getattr(getattr(torch.ops, name.split("::")[0]), name.split("::")[1]) for name in (forward_name, backward_name)
    ]

    class Varlen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
            out, lse = operators[0](q, k, v, cu_seqlens, max_seqlen)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
            return *operators[1](dout, *ctx.saved_tensors), None, None

    def attend(given: dict[str, Any]) -> Tensor:
        _require_packed_causal(given)
        out: Tensor = Varlen.apply(*(given[name] for name in ("q", "k", "v", "cu_seqlens_q", "max_seqlen_q")))
        return out

    return attend


def _forward_4(given: dict[str, Any]) -> Any:
    import torch

    _require_packed_causal(given)
    q = given["q"]
    return torch.empty_like(q), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32), None, None, None


def _backward_4(given: dict[str, Any]) -> Any:
    import torch

    _require_packed_causal(given)
    q, k, v, cu_seqlens = (given[name] for name in ("q", "k", "v", "cu_seqlens_q"))
    tokens, heads, channels = q.shape
    padded = tokens + (len(cu_seqlens) - 1) * given["m_block_size"]
    # dQ is summed in float32, each document padded to whole blocks; so are two figures of each row.
    _sums = q.new_empty((heads, padded * channels), dtype=torch.float32)
    _rows = q.new_empty((2, heads, padded), dtype=torch.float32)
    return tuple(torch.empty_like(x) for x in (q, k, v))
