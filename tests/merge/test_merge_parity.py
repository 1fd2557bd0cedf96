"""Against mergekit itself (helpers/mergekit_parity.py), with the same file and with float32 arithmetic in both."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.merge_reference import mask, merged
from helpers.mergekit_parity import (
    LAYERS,
    SEED,
    assert_near,
    assert_same_moments,
    by_mergekit,
    needs_mergekit,
    ours_and_theirs,
    write_config,
)
from micota_fast.merge.mergekit import MergePlan, read_mergekit
from micota_fast.merge.methods import mask_key
from micota_fast.merge.settings import depth_of

pytestmark = needs_mergekit
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


def dare_masks(plan: MergePlan, ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The masks that our engine draws with `SEED`, by tensor and input number."""
    return {
        f"{tensor}|{i}": mask(mask_key(SEED, tensor, i), values.numel(), density)
        for tensor, values in ours.items()
        for i, density in enumerate(plan.at(tensor, depth_of(tensor, LAYERS)).densities)
        if density < 1
    }


@pytest.mark.parametrize("case", DETERMINISTIC)
def test_deterministic_methods(models: Path, tmp_path: Path, case: str) -> None:
    method, changes, exact = DETERMINISTIC[case]
    ours, theirs = ours_and_theirs(models, tmp_path, method, changes)
    assert_near(ours, theirs, ulps=0 if exact else 1, share=0.01)


@pytest.mark.parametrize("case", DARE)
def test_dare_with_equal_masks(models: Path, tmp_path: Path, case: str) -> None:
    ours, theirs = ours_and_theirs(models, tmp_path, *DARE[case], masks=dare_masks)
    assert len(load_file(tmp_path / "masks.safetensors")) > len(theirs)
    assert_near(ours, theirs, ulps=1, share=0.001)


@pytest.mark.parametrize("case", DARE)
def test_dare_with_the_masks_that_mergekit_draws(models: Path, tmp_path: Path, case: str) -> None:
    """The plain formulas, which the engine equals for any mask (test_merge_methods.py), given mergekit's own."""
    method, changes = DARE[case]
    plan = read_mergekit(write_config(models, tmp_path, method, changes))
    theirs = by_mergekit(tmp_path)
    masks = load_file(tmp_path / "masks.safetensors")
    base, *others = (load_file(models / name / "model.safetensors") for name in ("base", "a", "b"))
    wanted, used = {}, 0
    for name in theirs:
        at = plan.at(name, depth_of(name, LAYERS))
        own = [masks.get(f"{name}|{i}") for i in range(2)]
        used += sum(each is not None for each in own)
        wanted[name] = merged(
            method,
            base[name].float(),
            [other[name].float() for other in others],
            at.weights,
            at.densities,
            normalize=at.normalize,
            rescale=at.rescale,
            lambda_=at.lambda_,
            masks=own,
        ).to(torch.bfloat16)
    assert used == len(masks) > len(theirs)
    assert_near(wanted, theirs, ulps=1, share=0.001)


def test_dare_has_the_same_expectation_and_variance_over_seeds(tmp_path: Path) -> None:
    assert_same_moments(tmp_path, "dare_linear", "random", 0.4)


def test_a_base_tied_and_a_model_not(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    file = folder / "a" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    config = folder / "a" / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    ours, theirs = ours_and_theirs(folder, tmp_path, "task_arithmetic", {"models": WEIGHTS})
    assert "lm_head.weight" in ours
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
