"""Against mergekit itself, run by the interpreter that $MERGEKIT_PYTHON names (its environment holds mergekit 0.1.5).

Both read the same file. Arithmetic is float32 in both: `dtype: float32`; mergekit would else compute in bfloat16.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.merge_reference import mask, merged
from helpers.paths import HELPERS
from micota_fast.config.merge import MergeConfig
from micota_fast.merge import kernels
from micota_fast.merge.merge import merge
from micota_fast.merge.mergekit import read_mergekit
from micota_fast.merge.methods import keep_limit, mask_key
from micota_fast.merge.settings import depth_of

MERGEKIT = os.environ.get("MERGEKIT_PYTHON")
pytestmark = pytest.mark.skipif(MERGEKIT is None, reason="$MERGEKIT_PYTHON names no interpreter that has mergekit")
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
RUNNER = HELPERS / "mergekit_runner.py"
TWO = [
    {"model": "a", "parameters": {"weight": 0.6, "density": 0.5}},
    {"model": "b", "parameters": {"weight": 0.4, "density": 0.3}},
]
WEIGHTS = [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 0.6), ("b", -0.4))]
BY_PLACE = {
    "models": [
        {
            "model": "a",
            "parameters": {
                "weight": [{"filter": "mlp", "value": [0, 0.9]}, {"value": 0.4}],
                "density": [0.1, 0.5, 0.9],
            },
        },
        {"model": "b", "parameters": {"weight": [0.2, 1.0], "density": {"filter": "q_proj", "value": 0.7}}},
    ],
    "parameters": {
        "density": [{"filter": "self_attn", "value": [0.2, 0.8]}, {"value": 0.35}],
        "normalize": [False, True],
        "lambda": [{"filter": "mlp", "value": 1.3}, {"value": 0.8}],
    },
}
SLERP = {
    "models": [{"model": "a"}],
    "parameters": {
        "t": [
            {"filter": "self_attn", "value": [0, 0.5, 0.3]},
            {"filter": "mlp", "value": [1, 0.5, 0.7, 0.2]},
            {"value": 0.4},
        ]
    },
}
# name -> (method, what the file says, is every bit the same?)
DETERMINISTIC: dict[str, tuple[str, dict[str, Any], bool]] = {
    # mergekit fuses linear's products and sums where the CPU can, and adds up slerp's products in float32.
    "linear": ("linear", {"models": WEIGHTS, "parameters": {"normalize": False}, "base_model": None}, False),
    "linear with a base": ("linear", {"models": WEIGHTS, "parameters": {"weight": 0.7}}, False),
    "slerp": ("slerp", SLERP, False),
    "task arithmetic": ("task_arithmetic", {"models": WEIGHTS, "parameters": {"lambda": 0.7}}, True),
    "task arithmetic, normalized": ("task_arithmetic", {"models": WEIGHTS, "parameters": {"normalize": True}}, True),
    "ties": ("ties", {"models": TWO}, True),
    "ties by place": ("ties", BY_PLACE, True),
    "ties, rescaled": ("ties", {"models": TWO, "parameters": {"rescale": True}}, False),
    "dare_ties, dense": ("dare_ties", {"models": WEIGHTS}, True),
    "dare_linear, dense": ("dare_linear", {"models": WEIGHTS, "parameters": {"normalize": 1.0}}, True),
}
DARE = {
    "dare_linear": ("dare_linear", {"models": TWO}),
    "dare_ties": ("dare_ties", {"models": TWO}),
    "dare_ties by place": ("dare_ties", BY_PLACE),
    "dare_ties, not rescaled": ("dare_ties", {"models": TWO, "parameters": {"rescale": False, "normalize": True}}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-shaped: a base, and two models a little away from it, all in bfloat16."""
    from helpers.checkpoints import make_checkpoint

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "a", "b")):
        make_checkpoint(folder / name, seed=seed, num_hidden_layers=4)
        file = folder / name / "model.safetensors"
        base, own = load_file(folder / "base" / "model.safetensors"), load_file(file)
        near = {k: (v if name == "base" else base[k].float() + 0.05 * v).to(torch.bfloat16) for k, v in own.items()}
        save_file(near, file, metadata={"format": "pt"})
    return folder


def write_config(models: Path, folder: Path, method: str, changes: dict[str, Any]) -> Path:
    """folder/merge.yaml; a change to None takes a key out."""
    content = {"merge_method": method, "base_model": "base", "dtype": "float32", "out_dtype": "bfloat16"} | changes
    text = yaml.safe_dump({key: value for key, value in content.items() if value is not None})
    for name in ("base", "a", "b"):  # mergekit takes a bare name for the hub's
        text = text.replace(f"model: {name}\n", f"model: {models / name}\n")
    (folder / "merge.yaml").write_text(text)
    return folder / "merge.yaml"


def both(models: Path, tmp_path: Path, method: str, changes: dict[str, Any]) -> Any:
    """Every tensor of mergekit's result and of ours, and the number of masks that they had in common."""
    config = write_config(models, tmp_path, method, changes)
    merge(MergeConfig(config=str(config), out=str(tmp_path / "ours"), seed=7))
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    masks, plan = {}, read_mergekit(config)
    if method.startswith("dare"):
        for tensor, values in ours.items():
            for i, density in enumerate(plan.at(tensor, depth_of(tensor, 4)).densities):
                if density < 1:
                    masks[f"{tensor}|{i}"] = mask(mask_key(7, tensor, i), values.numel(), density)
    save_file(masks, tmp_path / "masks.safetensors")
    theirs = by_mergekit(tmp_path)
    assert theirs.keys() == ours.keys()
    return theirs, ours, len(masks)


def by_mergekit(folder: Path) -> dict[str, torch.Tensor]:
    """mergekit's result of folder/merge.yaml; DARE's masks come from, or else go to, folder/masks.safetensors."""
    command = [MERGEKIT, str(RUNNER), "merge.yaml", "theirs", "masks.safetensors"]
    done = subprocess.run(command, cwd=folder, env=OFFLINE, capture_output=True, text=True)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return load_file(folder / "theirs" / "model.safetensors")


def ulps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many bfloat16 numbers lie between."""

    def place(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(one) - place(other)).abs().flatten()


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_deterministic_methods(models: Path, tmp_path: Path, case: str) -> None:
    method, changes, exact = DETERMINISTIC[case]
    theirs, ours, masks = both(models, tmp_path, method, changes)
    assert masks == 0
    apart = torch.cat([ulps(theirs[name], ours[name]) for name in theirs])
    print(f"\n{case}: {int((apart > 0).sum())} of {apart.numel()} elements differ, by {int(apart.max())} ulp at most")
    assert apart.max() <= (0 if exact else 1)
    assert (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize("case", DARE)
def test_dare_with_equal_masks(models: Path, tmp_path: Path, case: str) -> None:
    theirs, ours, masks = both(models, tmp_path, *DARE[case])
    assert masks > len(theirs)
    apart = torch.cat([ulps(theirs[name], ours[name]) for name in theirs])
    print(f"\n{case}: {int((apart > 0).sum())} of {apart.numel()} elements differ, by {int(apart.max())} ulp at most")
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.001


@pytest.mark.parametrize("case", DARE)
def test_dare_with_the_masks_that_mergekit_draws(models: Path, tmp_path: Path, case: str) -> None:
    """The plain formulas, which the engine equals for any mask (test_merge_methods.py), given mergekit's own."""
    method, changes = DARE[case]
    plan = read_mergekit(write_config(models, tmp_path, method, changes))
    theirs = by_mergekit(tmp_path)
    masks = load_file(tmp_path / "masks.safetensors")
    base, *others = (load_file(models / name / "model.safetensors") for name in ("base", "a", "b"))
    apart, used = [], 0
    for name, result in theirs.items():
        at = plan.at(name, depth_of(name, 4))
        own = [masks.get(f"{name}|{i}") for i in range(2)]
        used += sum(each is not None for each in own)
        wanted = merged(
            method,
            base[name].float(),
            [other[name].float() for other in others],
            at.weights,
            at.densities,
            normalize=at.normalize,
            rescale=at.rescale,
            lambda_=at.lambda_,
            masks=own,
        )
        apart.append(ulps(result, wanted.to(torch.bfloat16)))
    assert used == len(masks) > len(theirs)
    elements = torch.cat(apart)
    print(f"\n{case}: {int((elements > 0).sum())} of {elements.numel()} differ, by {int(elements.max())} ulp at most")
    assert elements.max() <= 1
    assert (elements > 0).float().mean() < 0.001


def test_dare_has_the_same_expectation_and_variance_over_seeds(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(400, generator=generator)
    save_file({"delta": delta}, tmp_path / "in.safetensors")
    command = [MERGEKIT, str(RUNNER), "sparsify", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    subprocess.run(command, env=OFFLINE, check=True, capture_output=True)  # type: ignore[arg-type]
    theirs = load_file(tmp_path / "out.safetensors")
    runs, words, limit = [], np.empty(400, np.uint32), np.uint32(keep_limit(0.4))
    for seed in range(2000):
        kernels.random_words(mask_key(seed, "w", 0), 0, words)
        kept, before, after = delta.numpy().copy(), np.zeros(400), np.zeros(400)
        kernels.add_magnitudes_at_random(kept, words, limit, before, after)
        kernels.drop_at_random(kept, words, limit, np.float32(before.sum() / after.sum()))
        runs.append(torch.from_numpy(kept))
    ours = torch.stack(runs).double()
    error = theirs["sd"] * (2 / 2000) ** 0.5  # of the difference of two means
    assert ((ours.mean(0) - theirs["mean"]) / error).abs().max() < 4.5
    assert (ours.std(0) / theirs["sd"] - 1).abs().max() < 0.12


def test_a_base_tied_and_a_model_not(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    file = folder / "a" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    config = folder / "a" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    theirs, ours, _ = both(folder, tmp_path, "task_arithmetic", {"models": WEIGHTS})
    assert "lm_head.weight" in ours
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
