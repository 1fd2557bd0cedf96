"""Packed attention against a dense fp64 reference, and the choice of its backend."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from micota_fast.errors import InputError
from micota_fast.model.attention import PackedAttention, _flash_function, choose_backend

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
        chosen, _ = choose_backend(backend, "cuda", torch.bfloat16)
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
    assert choose_backend("auto", "cpu", torch.float32) == ("sdpa", "the device is cpu, not cuda")
    assert choose_backend("sdpa", torch.device("cpu"), torch.bfloat16) == ("sdpa", "asked for")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flash_kernels_are_for_half_precision(dtype: torch.dtype) -> None:
    backend, reason = choose_backend("auto", "cuda", dtype)
    assert backend == "sdpa"
    assert "bfloat16" in reason


@pytest.mark.parametrize("backend", ["flash", "varlen"])
def test_a_backend_asked_for_by_name_is_never_replaced(backend: str) -> None:
    with pytest.raises(InputError, match=f"{backend} cannot be used: the device is cpu"):
        choose_backend(backend, "cpu", torch.bfloat16)


@pytest.mark.parametrize("two", [True, False])
def test_a_broken_flash_attention_3_gives_way_to_2_and_is_named(
    two: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libcudart.so.13: cannot open')")
    second = "def flash_attn_varlen_func(): ..." if two else "raise RuntimeError('built for another torch')"
    (tmp_path / "flash_attn.py").write_text(second)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn_interface", "flash_attn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _flash_function.cache_clear()
    try:
        backend, reason = choose_backend("auto", "cuda", torch.bfloat16)
        assert backend == "flash" if two else backend != "flash"
        assert ("FlashAttention 2" in reason) == two
        assert "flash_attn_interface is there and fails: OSError: libcudart" in reason or backend == "sdpa"
        if not two:
            with pytest.raises(InputError, match=r"built for another torch; flash_attn_interface is there and fails"):
                choose_backend("flash", "cuda", torch.bfloat16)
    finally:
        _flash_function.cache_clear()
        sys.modules.pop("flash_attn", None)


def test_unknown_backend() -> None:
    with pytest.raises(InputError, match="'eager' is unknown; choose auto, flash, varlen or sdpa"):
        choose_backend("eager", "cpu", torch.float32)
