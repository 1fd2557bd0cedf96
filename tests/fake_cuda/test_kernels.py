"""Compilers on a training step for GPUs that are not here: torch.compile's graphs, and Triton's launches."""

from pathlib import Path

import pytest

from fake_cuda.start import needs_compiler, run_scene
from helpers.cubins import SHARED_LIMIT

pytestmark = needs_compiler

CHIPS = (90, 100, 120)  # H100, B200, RTX 5090
OURS = {"softmax_rows", "grad_hidden_kernel", "grad_weight_kernel", "multiply_kernel"}
LIGERS = {
    "_rms_norm_forward_kernel",
    "_rms_norm_backward_kernel",
    "_triton_rope",
    "_swiglu_forward_kernel",
    "_swiglu_backward_kernel",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "offload", "modes"),
    [
        ("varlen", False, ["none", "selective", "full"]),
        ("flash 4", False, ["selective"]),
        ("varlen", True, ["selective"]),
    ],
    ids=["varlen", "flash 4", "offload"],
)
def test_one_graph_serves_all_blocks_and_packs(
    attention: str, offload: bool, modes: list[str], qwen2_checkpoint: Path
) -> None:
    """That FlashAttention 2's and 3's own functions can be traced is up to their releases."""
    checkpoint = str(qwen2_checkpoint)
    found = run_scene("graphs", checkpoint=checkpoint, attention=attention, modes=modes, offload=offload)
    assert found["attention"].startswith("varlen" if attention == "varlen" else "flash, FlashAttention 4")
    for mode in modes:
        # After each of three packs.
        gradients = ["cpu" if offload else "cuda:0"]
        assert found[mode] == {"graphs": [1, 1, 1], "breaks": [], "backward": 1, "gradients": gradients}, mode


@pytest.mark.slow
def test_every_launch_of_a_step_compiles_without_spills(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    models = ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"]
    found = run_scene("launches", tokenizer=str(qwen2_checkpoint), folder=str(tmp_path), chips=CHIPS, models=models)
    assert found["counts"].keys() == OURS | LIGERS
    for chip in CHIPS:
        here = [kernel for kernel in found["compiled"] if kernel["chip"] == chip]
        assert {kernel["name"] for kernel in here} == OURS | LIGERS
        for kernel in here:
            assert kernel["spilled"] == 0, kernel
            assert kernel["shared"] <= SHARED_LIMIT[chip], kernel
