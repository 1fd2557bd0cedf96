"""The same merge by mergekit and by us.

mergekit is run by the interpreter that $MERGEKIT_PYTHON names; its environment holds mergekit 0.1.5. Arithmetic is
float32 in both: `dtype: float32`; mergekit would otherwise compute in bfloat16.
"""

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.merge_arrays import merge_arrays
from helpers.paths import HELPERS
from micota_fast.config.merge import MergeConfig
from micota_fast.merge.merge import merge
from micota_fast.merge.mergekit import MergePlan, read_mergekit

MERGEKIT = os.environ.get("MERGEKIT_PYTHON")
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
RUNNER = HELPERS / "mergekit_runner.py"
SEED, LAYERS = 7, 4
needs_mergekit = pytest.mark.skipif(MERGEKIT is None, reason="$MERGEKIT_PYTHON names no interpreter that has mergekit")
Masks = Callable[[MergePlan, Mapping[str, Tensor]], dict[str, Tensor]]


def make_models(folder: Path) -> Path:
    """Make Qwen2-shaped checkpoints: a base, and two models a little away from it, all in bfloat16."""
    from helpers.checkpoints import make_checkpoint

    for seed, name in enumerate(("base", "a", "b")):
        make_checkpoint(folder / name, seed=seed, num_hidden_layers=LAYERS)
        file = folder / name / "model.safetensors"
        base, own = load_file(folder / "base" / "model.safetensors"), load_file(file)
        near = {k: (v if name == "base" else base[k].float() + 0.05 * v).to(torch.bfloat16) for k, v in own.items()}
        save_file(near, file, metadata={"format": "pt"})
    return folder


def write_config(models: Path, folder: Path, method: str, changes: dict[str, Any]) -> Path:
    """Write folder/merge.yaml; a change to None takes a key out."""
    content = {"merge_method": method, "base_model": "base", "dtype": "float32", "out_dtype": "bfloat16"} | changes
    text = yaml.safe_dump({key: value for key, value in content.items() if value is not None})
    for name in ("base", "a", "b"):  # mergekit takes a bare name for the hub's
        text = text.replace(f"model: {name}\n", f"model: {models / name}\n")
    (folder / "merge.yaml").write_text(text)
    return folder / "merge.yaml"


def ours_and_theirs(
    models: Path, folder: Path, method: str, changes: dict[str, Any], masks: Masks | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return every tensor of our result and of mergekit's, which takes the masks "TENSOR|INPUT" that `masks` gives."""
    config = write_config(models, folder, method, changes)
    merge(MergeConfig(config=str(config), out=str(folder / "ours"), seed=SEED))
    ours = load_file(folder / "ours" / "model.safetensors")
    save_file(masks(read_mergekit(config), ours) if masks is not None else {}, folder / "masks.safetensors")
    theirs = by_mergekit(folder)
    assert theirs.keys() == ours.keys()
    return ours, theirs


def by_mergekit(folder: Path) -> dict[str, Tensor]:
    """Return mergekit's result of folder/merge.yaml.

    Masks come from folder/masks.safetensors, or else are its own and kept there. The probabilities of its draws are
    kept in folder/probabilities.safetensors.
    """
    command = [MERGEKIT, str(RUNNER), "merge.yaml", "theirs", "masks.safetensors", "probabilities.safetensors"]
    done = subprocess.run(command, cwd=folder, env=OFFLINE, capture_output=True, text=True)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return load_file(folder / "theirs" / "model.safetensors")


def assert_near(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], ulps: int, share: float) -> None:
    """Check that bfloat16 results differ by at most `ulps`, and in less than a `share` of their elements."""
    apart = torch.cat([_ulps(theirs[name], ours[name]) for name in theirs])
    print(f"{int((apart > 0).sum())} of {apart.numel()} elements differ, by {int(apart.max())} ulp at most")
    assert apart.max() <= ulps
    assert (apart > 0).float().mean() < share


def assert_same_moments(folder: Path, method: str, theirs: str, density: float, **own: float) -> None:
    """Check that the elements of a sparsified task vector have mergekit's expectation and variance over seeds.

    Args:
        folder: for files.
        method: ours, which sparsifies, adds up and rescales by l1.
        theirs: mergekit's name of the way in which it sparsifies.
        own: what the method takes besides the density.
    """
    delta = torch.randn(400, generator=torch.Generator().manual_seed(0))
    save_file({"delta": delta}, folder / "in.safetensors")
    options = json.dumps({"density": density, **own})
    command = [MERGEKIT, str(RUNNER), "sparsify", "in.safetensors", "out.safetensors", theirs, options]
    subprocess.run(command, cwd=folder, env=OFFLINE, check=True, capture_output=True)  # type: ignore[arg-type]
    moments = load_file(folder / "out.safetensors")
    base, of_models = np.zeros(400, np.float32), {name: [value] for name, value in own.items()}
    runs = [
        merge_arrays(method, base, [delta.numpy()], [1.0], [density], rescale="l1", seed=seed, own=of_models)
        for seed in range(2000)
    ]
    ours = torch.from_numpy(np.stack(runs)).double()
    error = moments["sd"] * (2 / 2000) ** 0.5  # of the difference of two means
    assert ((ours.mean(0) - moments["mean"]) / error).abs().max() < 4.5
    assert (ours.std(0) / moments["sd"] - 1).abs().max() < 0.12


def _ulps(one: Tensor, other: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between."""

    def place(tensor: Tensor) -> Tensor:
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(one) - place(other)).abs().flatten()
