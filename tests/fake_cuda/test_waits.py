"""A training step never waits for the device, whatever it is made of; `train()` runs, on eight fake CUDA ranks."""

from pathlib import Path
from typing import Any

import pytest

from fake_cuda.flash import VERSIONS
from fake_cuda.scenes import FEATURES, LOW_BITS
from fake_cuda.start import needs_compiler, run_scene

pytestmark = needs_compiler

MODES = ("none", "selective", "full")
# All the waits that a run may have: phase, what, where. None is in "data", "forward", "backward" or "optimizer".
ALLOWED = {
    ("start", "copy to device", "model/rope.py:_apply"),
    ("start", "copy to device", "model/safetensors_io.py:set_parameter"),
    ("start", "copy to device", "train/loop.py:_train"),  # session.py's, for FSDP
    ("start", "copy to device", "train/checkpoint.py:load"),
    ("report", "item", "train/meters.py:report"),
    ("report", "cuda.synchronize", "train/stopwatch.py:read"),
    ("validation", "item", "train/validation.py:measure"),
    ("checkpoint", "cudaHostRegister", "train/staging.py:__init__"),
    ("checkpoint_0", "Event.synchronize", "train/checkpoint.py:_write"),  # the writer's thread
    # After the last step the phase does not change any more.
    ("checkpoint", "cudaHostUnregister", "train/staging.py:close"),
    ("checkpoint", "copy to device", "train/checkpoint.py:load"),  # the best weights
    ("checkpoint", "copy to host", "model/safetensors_io.py:_write_weights"),
}
# With offload the optimizer's step is the host's, which waits for gradients and loss. Not in "data" and "forward":
# weights go to the device while it computes. What FSDP does in autograd's threads has none of our functions above it.
ALLOWED_WITH_OFFLOAD = ALLOWED | {
    ("start", "copy to device", "train/prepare.py:load_initial_weights"),  # of buffers
    ("backward", "Event.synchronize", ""),  # gradients have arrived
    ("backward", "copy to host", ""),  # those of a further micro-step, which are added to what has arrived
    ("optimizer", "copy to host", "train/optim.py:step_if_finite"),
    ("report", "copy to host", "train/meters.py:record"),
}
# With moments of few bits the host itself decides whether to step, once per step: torchao's step reads no flag on the
# device. Its rate and count of steps are tensors of the host, which wait for nothing.
DECIDES = ("optimizer", "item", "train/optim.py:step_if_finite")
# In the first step torchao makes a table of 256 values for each quantised moment.
MAKES_TABLES = ("optimizer", "copy to device", "train/low_bit_adamw.py:step")


def unexpected(waits: list[list[Any]], allowed: set[tuple[str, str, str]] = ALLOWED) -> list[list[Any]]:
    return [wait for wait in waits if tuple(wait[:3]) not in allowed]


def test_the_watch_sees_each_kind_of_wait_and_nothing_else() -> None:
    from fake_cuda.controls import NO_WAIT, WAITS

    found = run_scene("controls")
    assert found.keys() == WAITS.keys() | NO_WAIT.keys()
    assert [name for name in WAITS if not found[name]] == []
    assert {name: found[name] for name in NO_WAIT if found[name]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["varlen", "sdpa", *VERSIONS])
def test_a_step_never_waits_for_the_device(attention: str, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """With one attention in all combinations; with the others every feature once and every mode several times."""
    features = [feature for feature in FEATURES if feature != LOW_BITS]
    cells = [[mode, feature] for mode in MODES for feature in features]
    if attention != "varlen":
        cells = [[MODES[i % len(MODES)], feature] for i, feature in enumerate(features)]
    found = run_scene("steps", checkpoint=str(qwen2_checkpoint), folder=str(tmp_path), attention=attention, cells=cells)
    assert len(found) == len(cells)
    for cell, seen in found.items():
        offload = "offload" in cell
        assert unexpected(seen["waits"], ALLOWED_WITH_OFFLOAD if offload else ALLOWED) == [], cell
        waits = {tuple(wait[:3]): wait[3] for wait in seen["waits"]}
        assert waits["report", "cuda.synchronize", "train/stopwatch.py:read"] == 1, cell  # in one of two steps
        copied = waits.get(("backward", "copy to host", ""), 0)
        assert (copied > 0) == (offload and "micro" in cell), "only the gradients that are added to others wait"
        assert (("backward", "Event.synchronize", "") in waits) == offload, cell
        assert (("checkpoint", "cudaHostRegister", "train/staging.py:__init__") in waits) != offload, cell
        assert seen["attention"] == attention, cell
        assert (seen["dummies"] > 0) == ("dummy" in cell), cell
        assert (seen["launches"].get("grad_weight_kernel", 0) > 0) == ("row filter" in cell), cell
        assert seen["micro_steps"] == (2 if "micro" in cell or "dummy" in cell else 1), cell
        assert (seen["frozen"] > 0) == ("freeze" in cell), cell
        assert seen["replicas"] == (2 if "hybrid" in cell else 1), cell


@pytest.mark.slow
def test_with_moments_of_8_bits_the_host_waits_once_per_step_to_decide(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """Whatever attention and activation checkpointing are, so one of each will do."""
    [seen] = run_scene(
        "steps",
        checkpoint=str(qwen2_checkpoint),
        folder=str(tmp_path),
        attention="sdpa",
        cells=[["none", LOW_BITS]],
    ).values()
    assert unexpected(seen["waits"], ALLOWED | {DECIDES, MAKES_TABLES}) == []
    waits = {tuple(wait[:3]): wait[3] for wait in seen["waits"]}
    steps, quantised = 2, 11  # the embedding and, in each of two layers, five of seven matrices
    assert waits[DECIDES] == steps
    assert waits[MAKES_TABLES] == 2 * quantised, "none in the second step"
    assert seen["replicas"] == 8, "the parameters are whole"
