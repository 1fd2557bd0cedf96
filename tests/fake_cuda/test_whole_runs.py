"""The whole of `train()` on fake CUDA ranks: documents, steps, reports, validation, checkpoints, resume, export."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fake_cuda.start import needs_compiler, run_scene
from fake_cuda.test_waits import ALLOWED, ALLOWED_WITH_OFFLOAD, unexpected

pytestmark = [pytest.mark.slow, needs_compiler]


def test_a_run_on_eight_ranks_waits_only_where_it_says_so(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """Rank 0's part of it: what its files hold is zeros where it comes from a device."""
    run = run_scene("whole_run", checkpoint=str(qwen2_checkpoint), folder=str(tmp_path))
    assert run["finished"], run["said"]
    assert unexpected(run["waits"]) == []
    times = {(phase, what): count for phase, what, _, count in run["waits"]}
    assert times["report", "cuda.synchronize"] == 4  # steps 2 and 4, 3 for its validation, and 5 as the last
    assert times["validation", "item"] == 2
    assert times["checkpoint_0", "Event.synchronize"] == 4  # steps 2, 3, 4 and 5
    out = tmp_path / "out"
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 5]
    assert json.loads((out / "summary.json").read_text())["processes"] == 8
    assert not (out / "checkpoints").exists()
    source, trained = (load_file(folder / "model.safetensors") for folder in (qwen2_checkpoint, out / "model"))
    assert {name: (x.shape, x.dtype) for name, x in trained.items()} == {
        name: (x.shape, x.dtype) for name, x in source.items()
    }
    assert "memory: " in run["said"]
    assert "norms, rotation and SwiGLU: liger-kernel" in run["said"]


@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offload"])
def test_a_run_that_is_stopped_resumes_and_loads_its_best_weights(
    offload: bool, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    run = run_scene("resumed_run", checkpoint=str(qwen2_checkpoint), folder=str(tmp_path), offload=offload)
    assert run["finished"] == [False, True], run["said"]
    assert unexpected(run["waits"], ALLOWED_WITH_OFFLOAD if offload else ALLOWED) == []
    assert run["checkpoints"] == [2, 3]
    assert "resuming after step 3" in run["said"]
    # Losses are all alike here, so three validations without a lower one follow the first, after step 2.
    assert run["steps"] == 8
    assert "The weights are those after step 2 of 8, the best on held-out rows." in run["said"]
