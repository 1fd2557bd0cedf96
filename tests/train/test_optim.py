"""AdamW's groups, schedule and clipping; steps that a gradient that is not finite leaves without effect; freezing."""

import dataclasses
import fnmatch
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.ranks import run_ranks
from helpers.training_runs import checkpoint_steps, finish, kill, metrics, start_training, train_config, wait_until
from micota_fast.config.train import TrainConfig
from micota_fast.errors import InputError
from micota_fast.model.safetensors_io import load_model
from micota_fast.train.loop import train
from micota_fast.train.optim import clip_gradients, learning_rate, make_optimizer, step_if_finite
from micota_fast.train.packed_loss import PackedLoss
from micota_fast.train.parallel import local_part, parallelize
from micota_fast.train.trainable import freeze
from micota_fast.train.world import World

NAN, INF = math.nan, math.inf


def test_learning_rate_schedule() -> None:
    config = TrainConfig(model="", data="", out="", lr=1.0, warmup_ratio=0.2, min_lr_ratio=0.1)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert rates == pytest.approx([0.5, 1.0, *cosine])
    assert cosine[4] == pytest.approx(0.55)
    assert learning_rate(0, 1, dataclasses.replace(config, warmup_ratio=1.0)) == 1.0
    assert learning_rate(0, 1, dataclasses.replace(config, warmup_ratio=0.0)) == 1.0


def test_groups_and_clipping(qwen2_checkpoint: Path) -> None:
    config = TrainConfig(model="", data="", out="", weight_decay=0.3)
    model = load_model(qwen2_checkpoint, torch.float32)
    decayed, others = make_optimizer(model, config).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert others["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    norm = 0.5 * math.sqrt(model.num_params())
    assert float(clip_gradients(model, 1.0)) == pytest.approx(norm)
    assert float(clip_gradients(model, 5.0)) == pytest.approx(1.0, rel=1e-5)
    assert float(clip_gradients(model, 5.0)) == pytest.approx(1.0, rel=1e-5), "below the limit nothing is scaled"
    assert float(clip_gradients(model, INF)) == pytest.approx(1.0, rel=1e-5)


def step(model: PackedLoss, optimizer: torch.optim.AdamW, seed: int, loss: float, norm: float) -> None:
    """One step with random gradients, a NaN among them where loss or norm is not finite."""
    for number, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * seed + number)
        p.grad = torch.zeros_like(p)
        local_part(p.grad).copy_(torch.randn(local_part(p).shape, generator=generator))
        if not math.isfinite(loss + norm):
            local_part(p.grad).view(-1)[:1] = NAN
    step_if_finite(optimizer, torch.tensor(loss), torch.tensor(norm))


def state_of(model: PackedLoss, optimizer: torch.optim.AdamW) -> list[Tensor]:
    """Copies of this rank's weights, moments and counts of steps."""
    moments = (optimizer.state[p][key] for p in model.parameters() for key in ("step", "exp_avg", "exp_avg_sq"))
    return [local_part(x).detach().clone() for x in (*model.parameters(), *moments)]


def _skips(world: World, checkpoint: Path) -> None:
    """Sound steps with bad ones before, between and after them are the sound ones alone, bit for bit."""
    results = []
    config = TrainConfig(model="", data="", out="", dtype="float32", lr=0.01, weight_decay=0.1)
    for bad in ([], [(NAN, 1.0), (INF, 1.0), (-INF, 1.0), (1.0, NAN), (1.0, INF), (NAN, NAN), (INF, INF)]):
        model = PackedLoss(load_model(checkpoint, torch.float32), "sdpa")
        parallelize(model, config, world)
        optimizer = make_optimizer(model, config)
        for seed in range(3):
            for loss, norm in bad:
                step(model, optimizer, 10 + seed, loss, norm)
            step(model, optimizer, seed, 2.0, 1.0)
            if bad:
                before = state_of(model, optimizer)
                step(model, optimizer, 20 + seed, *bad[seed])
                assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer), strict=True))
        assert all(int(optimizer.state[p]["step"]) == 3 for p in model.parameters())
        results.append(state_of(model, optimizer))
    assert all(torch.isfinite(x).all() for x in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_that_is_not_finite_changes_nothing(qwen2_checkpoint: Path) -> None:
    _skips(World(0, 1, torch.device("cpu")), qwen2_checkpoint)


def test_a_step_that_is_not_finite_changes_nothing_in_shards(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(2, _skips, tmp_path / "log", qwen2_checkpoint)


def frozen_in(checkpoint: Path, patterns: list[str]) -> tuple[set[str], int]:
    """Names that are frozen, and how many values it says there are."""
    model = load_model(checkpoint, torch.float32)
    values = freeze(model, patterns)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert values == sum(p.numel() for p in frozen.values())
    return set(frozen), values


def test_freezing_by_name_and_pattern(llama_checkpoint: Path) -> None:
    assert frozen_in(llama_checkpoint, []) == (set(), 0)
    assert frozen_in(llama_checkpoint, ["lm_head.weight"])[0] == {"lm_head.weight"}
    norms, _ = frozen_in(llama_checkpoint, ["*norm.weight"])
    assert len(norms) == 2 * 2 + 1
    first, _ = frozen_in(llama_checkpoint, ["model.layers.[0].*", "model.layers.0.mlp.*"])
    assert len(first) == 9
    assert all(name.startswith("model.layers.0.") for name in first)


def test_freezing_that_cannot_be_meant(llama_checkpoint: Path, qwen2_checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"'model\.embed_token' matches no .* names are model\.embed_tokens\.weight,"):
        frozen_in(llama_checkpoint, ["model.embed_token"])
    with pytest.raises(InputError, match=r"'lm_head\.weight' matches no parameter"):  # tied: it has none
        frozen_in(qwen2_checkpoint, ["lm_head.weight"])
    with pytest.raises(InputError, match="leaves no parameter to train"):
        frozen_in(llama_checkpoint, ["*.layers.*", "*"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {"freeze": ["model.embed_tokens.*"]}),  # the output matrix too: they are tied
        ("llama", {"freeze": ["*embed_tokens*", "*.layers.0.*"], "activation_checkpointing": "selective"}),
        ("qwen2", {"freeze": ["*embed_tokens*", "*_proj.*"], "activation_checkpointing": "full"}),  # norms alone train
    ],
    ids=str,
)
def test_training_with_frozen_parameters(
    family: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(f"{family}_checkpoint")
    options |= {"weight_decay": 0.1, "epochs": 4, "checkpoint_every": 2}
    one, two, killed = (train_config(checkpoint, tmp_path, out=str(tmp_path / n), **options) for n in ("1", "2", "k"))
    train(one)
    finish(start_training(two, world=2), two)
    processes = start_training(killed, world=2)
    wait_until(lambda: bool(checkpoint_steps(killed)), processes)
    kill(processes)
    finish(start_training(killed, world=2), killed)
    assert "resuming after step" in Path(f"{killed.out}.log").read_text()

    before, after, sharded, resumed = (
        load_file(folder / "model.safetensors") for folder in (checkpoint, *(tmp_path / n / "model" for n in "12k"))
    )
    frozen = {name for name in before if any(fnmatch.fnmatch(name, pattern) for pattern in options["freeze"])}
    assert f"frozen: {sum(before[name].numel() for name in frozen):,} of " in Path(f"{two.out}.log").read_text()
    assert 0 < len(frozen) < len(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name in frozen)
        assert torch.equal(sharded[name], tensor) == (name in frozen)
        torch.testing.assert_close(sharded[name], after[name], rtol=0, atol=2e-5)
        assert torch.equal(resumed[name], sharded[name])
    assert metrics(killed) == metrics(two)
    assert [row["loss"] for row in metrics(two)] == pytest.approx([row["loss"] for row in metrics(one)], abs=1e-5)


def test_the_norm_that_is_clipped_is_that_of_what_trains(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    rows = []
    for name, frozen in (("all", []), ("most", ["*embed_tokens*"])):
        config = train_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / name), freeze=frozen, max_steps=1)
        train(config)
        rows += metrics(config)
    assert rows[0]["loss"] == rows[1]["loss"]
    assert 0 < rows[1]["grad_norm"] < 0.99 * rows[0]["grad_norm"]
