"""RMSNorm, RoPE and SwiGLU of Liger-Kernel against torch's own."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from micota_fast.model.pointwise import TORCH, Pointwise, choose_pointwise, liger

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")


def inputs(device: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Arguments of each operation, on packs of 37 tokens with 6 query heads and 2 key heads of 16 channels."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    angles = random(37, 1, 8).detach()
    return {
        "rms_norm": [random(37, 96), random(96)],
        "rotate": [random(37, 6, 16), random(37, 2, 16), angles.cos(), angles.sin()],
        "swiglu": [random(37, 160), random(37, 160)],
    }


def results(pointwise: Pointwise, name: str, tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    operation: Callable[..., Tensor | tuple[Tensor, ...]] = getattr(pointwise, name)
    out = operation(*tensors, *([1e-6] if name == "rms_norm" else []))
    outs = out if isinstance(out, tuple) else (out,)
    wanted = [x for x in tensors if x.requires_grad]
    return [*outs, *torch.autograd.grad(sum(x.float().cos().sum() for x in outs), wanted)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs compiled, in the test below")
def test_ligers_rope_in_the_interpreter() -> None:
    tensors = inputs("cpu", torch.float32)["rotate"]
    before = [x.detach().clone() for x in tensors]
    for ours, theirs in zip(results(TORCH, "rotate", tensors), results(liger(), "rotate", tensors), strict=True):
        torch.testing.assert_close(theirs, ours)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True)), "an input was turned in place"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "rotate", "swiglu"])
def test_ligers_on_a_gpu(name: str, dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs("cuda", dtype)[name]
    for ours, theirs in zip(results(TORCH, name, tensors), results(liger(), name, tensors), strict=True):
        torch.testing.assert_close(theirs, ours, atol=tolerance, rtol=tolerance)


def test_the_choice_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert choose_pointwise(torch.device("cpu"), compiled=False) == (TORCH, "torch (the device is cpu, not cuda)")
    assert choose_pointwise(cuda, compiled=True) == (TORCH, "torch.compile fuses them")
    chosen, reason = choose_pointwise(cuda, compiled=False)
    assert chosen is not TORCH
    assert reason == "liger-kernel"
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rope", None)
    chosen, reason = choose_pointwise(cuda, compiled=False)
    assert chosen is TORCH
    assert "no liger-kernel: ModuleNotFoundError" in reason
