"""Packed attention against a dense fp64 reference, and the choice of its backend."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from micota_fast.errors import InputError
from micota_fast.model.attention import PackedAttention, choose_backend, flash_package
from micota_fast.train.activation_checkpointing import checkpoint_activations

LENGTHS = {
    "one": [9],
    "ones": [1, 1, 1],
    "equal": [8, 8, 8],
    "mixed": [3, 40, 1, 17, 40, 2],
    "with empty": [4, 0, 6, 0],
}


def reference(q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: list[int]) -> Tensor:
    """Softmax over the keys of the same document at or before the query, all T x T scores at once."""
    T, N, d = q_TNd.shape
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(T)
    visible = (document[:, None] == document) & (place[:, None] >= place)
    k_TNd, v_TNd = (x.repeat_interleave(N // x.shape[1], dim=1) for x in (k_TKd, v_TKd))
    scores = torch.einsum("snd,tnd->nst", q_TNd, k_TNd) / d**0.5
    return torch.einsum("nst,tnd->snd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v_TNd)


def inputs(lengths: list[int], heads: int, kv_heads: int, head_dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def results(attend: object, tensors: list[Tensor], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Output and gradients of q, k and v, in float64 on the CPU."""
    q, k, v, grad = (x.to(device, dtype) for x in tensors)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)  # type: ignore[operator]
    assert out.dtype == dtype
    out.backward(grad)
    return [x.detach().double().cpu() for x in (out, q.grad, k.grad, v.grad)]


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.06)], ids=str
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_outputs_and_gradients_equal_the_dense_reference(
    lengths: list[int], heads: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    tensors = inputs(lengths, *heads)
    packed = PackedAttention(cu_seqlens(lengths), lengths, "sdpa")
    expected = results(lambda q, k, v: reference(q, k, v, lengths), tensors, torch.float64)
    found = results(lambda q, k, v: packed(0)(q, k, v), tensors, dtype)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_sdpa_reads_nothing_from_the_device() -> None:
    """Meta tensors have no values, so that whatever asks for one fails. FSDP moves every tensor to the device."""
    lengths = LENGTHS["mixed"]
    q, k, v, _ = (x.to("meta") for x in inputs(lengths, 4, 2))
    packed = PackedAttention(cu_seqlens(lengths).to("meta"), lengths, "sdpa", "meta")
    assert packed(0)(q, k, v).shape == q.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("backend", ["flash", "varlen", "sdpa"])
@pytest.mark.parametrize("lengths", [LENGTHS["mixed"], [700, 3, 1300]], ids=str)
def test_backends_on_a_gpu_equal_the_dense_reference(backend: str, lengths: list[int]) -> None:
    try:
        chosen, _ = choose_backend(backend, "cuda", torch.bfloat16, 64)
    except InputError as error:
        pytest.skip(str(error))
    tensors = inputs(lengths, 8, 2, head_dim=64)
    packed = PackedAttention(cu_seqlens(lengths), lengths, chosen, "cuda")
    expected = results(lambda q, k, v: reference(q, k, v, lengths), tensors, torch.float64)
    for a, b in zip(
        results(lambda q, k, v: packed(0)(q, k, v), tensors, torch.bfloat16, "cuda"), expected, strict=True
    ):
        torch.testing.assert_close(a, b, atol=0.06, rtol=0.06)


def test_cpu_takes_sdpa_and_says_why() -> None:
    assert choose_backend("auto", "cpu", torch.float32, 64) == ("sdpa", "the device is cpu, not cuda")
    assert choose_backend("sdpa", torch.device("cpu"), torch.bfloat16, 64) == ("sdpa", "asked for")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flash_kernels_are_for_half_precision(dtype: torch.dtype) -> None:
    backend, reason = choose_backend("auto", "cuda", dtype, 64)
    assert backend == "sdpa"
    assert "bfloat16" in reason


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_a_backend_asked_for_by_name_is_never_replaced(backend: str) -> None:
    with pytest.raises(InputError, match=f"{backend} cannot be used: the device is cpu"):
        choose_backend(backend, "cpu", torch.bfloat16, 64)


@pytest.mark.parametrize("backend", ["flash", "varlen"])
@pytest.mark.parametrize("head_dim", [20, 260])
def test_head_sizes_that_flash_kernels_do_not_take_are_refused(backend: str, head_dim: int) -> None:
    what = f"the model's head_dim is {head_dim}, not a multiple of 8 up to 256"
    with pytest.raises(InputError, match=f"{backend} cannot be used: {what}"):
        choose_backend(backend, "cuda", torch.bfloat16, head_dim)
    assert choose_backend("auto", "cuda", torch.bfloat16, head_dim) == ("sdpa", what)


@pytest.mark.parametrize("two", [True, False])
@pytest.mark.usefixtures("hopper")
def test_a_broken_flash_attention_3_gives_way_to_2_and_is_named(
    two: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    second = "def flash_attn_varlen_func(): ..." if two else "raise RuntimeError('built for another torch')"
    (tmp_path / "flash_attn.py").write_text(second)
    monkeypatch.syspath_prepend(tmp_path)
    backend, reason = choose_backend("auto", "cuda", torch.bfloat16, 64)
    assert backend == "flash" if two else backend != "flash"
    assert ("FlashAttention 2" in reason) == two
    assert "flash_attn_interface is there and fails: OSError: libcudart" in reason or backend == "sdpa"
    if not two:
        with pytest.raises(InputError, match=r"built for another torch; flash_attn_interface is there and fails"):
            choose_backend("flash", "cuda", torch.bfloat16, 64)


# FlashAttention 4 computed by torch, with the parameters of its release 4.0.0b36 in their order.
FLASH_4 = """
import torch

calls = []

def weights(q, k, cu_seqlens):
    T, N, d = q.shape
    document = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
    visible = (document[:, None] == document).tril()
    scores = torch.einsum("snd,tnd->nst", q, k) / d**0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)

def repeated(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)

def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None,
    k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
    disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
):
    assert causal and return_lse and cu_seqlens_q is cu_seqlens_k and qv is None
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    calls.append("forward")
    lse = torch.zeros(q.shape[1], q.shape[0])
    p = weights(q, repeated(k, q), cu_seqlens_q)
    return torch.einsum("nst,tnd->snd", p, repeated(v, q)), lse, None, None, None

def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
    num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
    AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):
    assert causal and lse.shape == (q.shape[1], q.shape[0]) and out.shape == dout.shape == q.shape
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_k.diff().max())
    calls.append("backward")
    p = weights(q, repeated(k, q), cu_seqlens_q)
    dp = torch.einsum("snd,tnd->nst", dout, repeated(v, q))
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / q.shape[2] ** 0.5
    dq = torch.einsum("nst,tnd->snd", ds, repeated(k, q))
    dk, dv = torch.einsum("nst,snd->tnd", ds, q), torch.einsum("nst,snd->tnd", p, dout)
    return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
"""


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU of compute capability 9.0, and a process that has not looked for FlashAttention yet."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    names = [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "flash_attn_interface")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    flash_package.cache_clear()
    yield
    flash_package.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "flash_attn_interface")]:
        del sys.modules[name]


@pytest.fixture
def flash_4(hopper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Version 4, in a folder of that name without version 2, as its wheel alone leaves it; 3 is there as well."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text(FLASH_4)
    (tmp_path / "flash_attn_interface.py").write_text("def flash_attn_varlen_func(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("flash_attn.cute.interface")


@pytest.mark.usefixtures("flash_4")
@pytest.mark.parametrize(
    ("capability", "head_dim", "taken"),
    [(9, 64, 4), (9, 256, 4), (10, 128, 4), (10, 256, 4), (10, 192, None), (8, 64, None), (12, 64, None)],
)
def test_flash_attention_4_is_for_hopper_and_blackwell_and_some_head_sizes(
    capability: int, head_dim: int, taken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    backend, reason = choose_backend("auto", "cuda", torch.bfloat16, head_dim)
    if taken:
        assert (backend, reason) == ("flash", "FlashAttention 4 (flash_attn.cute) is installed")
    else:
        assert backend == "varlen"
        assert "head_dim of 192" in reason if capability == 10 else "flash_attn_varlen_func" in reason


@pytest.mark.usefixtures("hopper")
def test_a_broken_flash_attention_4_gives_way_to_3_and_is_named(flash_4: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("import cutlass_that_is_not_there")
    for name in ("flash_attn.cute.interface", "flash_attn.cute", "flash_attn"):
        del sys.modules[name]  # for good: `monkeypatch` would put it back after `hopper` has cleaned up
    importlib.invalidate_caches()
    backend, reason = choose_backend("auto", "cuda", torch.bfloat16, 64)
    assert backend == "flash"
    assert reason.startswith(
        "FlashAttention 3 (flash_attn_interface; flash_attn.cute is there and fails: ModuleNotFound"
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS["equal"], LENGTHS["mixed"]], ids=str)
def test_flash_attention_4_as_wired_equals_the_dense_reference(
    lengths: list[int], compiled: bool, flash_4: ModuleType
) -> None:
    tensors = inputs(lengths, 4, 2)
    attend = PackedAttention(cu_seqlens(lengths), lengths, "flash")(0)
    if compiled:  # as one operation: the whole of a block stays one graph
        attend = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    expected = results(lambda q, k, v: reference(q, k, v, lengths), tensors, torch.float64)
    for a, b in zip(results(attend, tensors, torch.float32), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert flash_4.calls == ["forward", "backward"]


def test_selective_checkpointing_keeps_the_result_of_flash_attention_4(flash_4: ModuleType) -> None:
    q, k, v, grad = (x.float().requires_grad_() for x in inputs([5, 3], 4, 2))
    attend = PackedAttention(cu_seqlens([5, 3]), [5, 3], "flash")(0)
    block = torch.nn.Module()
    block.forward = lambda q, k, v: attend(q, k, v).tanh()  # type: ignore[method-assign]
    checkpoint_activations(block, "selective")
    block(q, k, v).backward(grad)
    assert flash_4.calls == ["forward", "backward"]


@pytest.mark.parametrize("release", ["2.11", "2.13"])
def test_varlen_tells_torch_of_grouped_heads_where_torch_asks(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Release 2.11 takes them without a flag, and has none."""
    told: list[dict[str, Any]] = []

    def without_flag(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        return_aux: Any = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        told.append({"max": (max_q, max_k), "window": window_size})
        return query

    def with_flag(*args: Any, enable_gqa: bool = False, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        told.append({"max": args[5:7], "window": window_size, "gqa": enable_gqa})
        return args[0]

    monkeypatch.setattr(varlen, "varlen_attn", without_flag if release == "2.11" else with_flag)
    assert choose_backend("varlen", "cuda", torch.bfloat16, 64) == ("varlen", "asked for")
    q, k, v, _ = inputs([5, 3], 4, 2)
    assert PackedAttention(cu_seqlens([5, 3]), [5, 3], "varlen")(0)(q, k, v) is q
    assert told == [{"max": (5, 5), "window": (-1, 0)} | ({} if release == "2.11" else {"gqa": True})]


def test_the_log_names_the_kernels_that_torch_was_told_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("micota_fast.model.attention.current_flash_attention_impl", lambda: "FA3")
    _, reason = choose_backend("varlen", "cuda", torch.bfloat16, 64)
    assert reason == "asked for; torch runs FA3, as activate_flash_attention_impl was told"


def test_unknown_backend() -> None:
    with pytest.raises(InputError, match="'eager' is unknown; choose auto, flash, varlen or sdpa"):
        choose_backend("eager", "cpu", torch.float32, 64)
