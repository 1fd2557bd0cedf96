"""What a training is planned to compute and to write, against a run: all weights, adapters, some frozen."""

import fnmatch
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.training_runs import train_config
from micota_fast.common.gpu_specs import GPUS
from micota_fast.config.recipe import LaunchConfig
from micota_fast.config.train import LoraConfig, TrainConfig
from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import parameter_shapes
from micota_fast.pipeline.stage import Artefact, Stage
from micota_fast.planning.assumptions import Assumptions
from micota_fast.planning.costs import train as plan_training
from micota_fast.planning.planner import Corpus, Cost, Planner
from micota_fast.planning.shapes import known_shapes, parameters, recomputed_flops, train_flops, training
from micota_fast.train.checkpoint import Checkpoints
from micota_fast.train.loop import train

LORA = LoraConfig(rank=4, targets=["q_proj", "v_proj", "down_proj"])
ADAPTERS = 2 * 4 * (64 + 64 + 64 + 32 + 96 + 64)  # layers, rank, in and out of each target


def planned(config: TrainConfig) -> Cost:
    planner = Planner(LaunchConfig(), None, Assumptions(), {}, {})
    planner.corpora[config.data] = Corpus(rows=23, prompt=10, answer=50, context=60)
    return plan_training(planner, Stage("student/a-seed0", "train", config, (Artefact(config.model),), ("model",)))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, ["model"]),
        ({"lora": LORA}, ["adapter"]),
        ({"lora": replace(LORA, merged=True)}, ["adapter", "model"]),
        ({"freeze": ["model.embed_tokens.*", "*.layers.0.*"]}, ["model"]),
    ],
    ids=["full", "adapters", "merged", "frozen"],
)
def test_what_is_written_is_what_was_planned(
    options: dict[str, Any],
    left: list[str],
    qwen2_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Checkpoints, "discard", Checkpoints.wait)
    config = train_config(qwen2_checkpoint, tmp_path, max_steps=2, checkpoint_every=1, **options)
    cost = planned(config)
    train(config)
    copies = sorted((Path(config.out) / "checkpoints").glob("step-*"))
    assert len(copies) == config.keep_checkpoints
    for copy in copies:
        tensors = {name: x for file in copy.glob("*.safetensors") for name, x in load_file(file).items()}
        state = {name: x for name, x in tensors.items() if not name.startswith(("rng.", "optimizer.step."))}
        assert sum(tensor.nbytes for tensor in state.values()) == cost.passing / (config.keep_checkpoints + 1)
    results = [file for name in left for file in (Path(config.out) / name).glob("*.safetensors")]
    tensors_bytes = sum(tensor.nbytes for file in results for tensor in load_file(file).values())
    assert tensors_bytes == cost.disk
    assert {path.name for path in Path(config.out).iterdir() if path.name in ("adapter", "model")} == set(left)


def test_adapters_cost_no_product_for_what_is_frozen(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """Forward and the gradient of the inputs: two products for each frozen weight, three for each adapter's."""
    model = ModelConfig.from_checkpoint(qwen2_checkpoint)
    full, thin = (planned(train_config(qwen2_checkpoint, tmp_path, lora=lora)) for lora in (None, LORA))
    attention = 6 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * 60
    assert full.flops == pytest.approx(full.tokens * (6 * parameters(model) + attention))
    assert thin.flops == pytest.approx(thin.tokens * (4 * parameters(model) + 6 * ADAPTERS + attention))


def test_frozen_weights_cost_no_product_for_their_gradients(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    model = ModelConfig.from_checkpoint(qwen2_checkpoint)
    sizes = {name: shape.numel() for name, shape in parameter_shapes(model).items()}
    full = planned(train_config(qwen2_checkpoint, tmp_path))
    for pattern in ("model.layers.0.*", "model.embed_tokens.*"):
        frozen = sum(size for name, size in sizes.items() if fnmatch.fnmatchcase(name, pattern))
        if pattern == "model.embed_tokens.*" and not model.tie_word_embeddings:
            frozen = 0  # it is only looked up
        some = planned(train_config(qwen2_checkpoint, tmp_path, freeze=[pattern]))
        assert full.flops - some.flops == pytest.approx(2 * frozen * full.tokens), pattern


def test_an_output_matrix_that_is_frozen_has_no_gradient(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    model = ModelConfig.from_checkpoint(qwen2_checkpoint)
    for options, frozen in (({}, False), ({"lora": LORA}, True), ({"freeze": ["model.embed_tokens.*"]}, True)):
        assert training(model, train_config(qwen2_checkpoint, tmp_path, **options)).frozen_head == frozen  # type: ignore[arg-type]


def test_adapters_are_computed_again_with_their_blocks() -> None:
    model = known_shapes("Qwen/Qwen2.5-7B")
    assert model is not None
    for how, thin in (("none", 0), ("selective", 2 * ADAPTERS), ("full", 2 * ADAPTERS)):
        more = recomputed_flops(model, 1, 60, how, ADAPTERS) - recomputed_flops(model, 1, 60, how)
        assert more == pytest.approx(thin), how
    assert recomputed_flops(model, 1, 60, "none", ADAPTERS) == 0 < train_flops(model, 1, 60)


def test_targets_that_the_model_lacks_are_refused_by_the_plan(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`lora\.targets`: 'gate' names no module"):
        planned(train_config(qwen2_checkpoint, tmp_path, lora=LoraConfig(targets=["gate"])))


def test_offload_takes_the_hosts_memory_and_is_counted_there() -> None:
    """Of 7B on four GPUs 16 bytes per parameter, and more as half of them are page-locked, in powers of two."""
    name = "Qwen/Qwen2.5-7B-Instruct"
    settings = TrainConfig(model=name, data="corpus", out="out", pack_tokens=8192, activation_checkpointing="full")
    planner = Planner(LaunchConfig(nproc=4), GPUS["a100-40gb"], Assumptions(), {}, {})
    planner.corpora["corpus"] = Corpus(rows=1000, prompt=100, answer=4000, context=4100)

    def cost(config: TrainConfig) -> Cost:
        return plan_training(planner, Stage("student/a-seed0", "train", config, (Artefact(name),), ("model",)))

    there, away = cost(settings), cost(replace(settings, offload=True))
    assert there.too_big
    assert not away.too_big
    assert (there.host, away.flops, away.passing) == (0, there.flops, there.passing)
    assert 16 * 7_615_616_512 < away.host < 24 * 7_615_616_512
    assert "GB of the host's memory" in away.how
    assert "GB of the host's memory" not in there.how
    assert "AdamW's steps of `offload` on the host" in away.left_out
    # Blocks cross the host's link for both passes, the rest once; all gradients come back. Each rank has a quarter.
    packs, weights, blocks = away.tokens / (8192 * 0.98 * 4), 7_615_616_512, 28 * 233_057_792
    seconds = packs * 4 * (weights + blocks + weights) / 4 / 25e9
    assert there.hours is not None
    assert away.hours == pytest.approx(there.hours + seconds / 3600, rel=1e-4)
    thin = cost(replace(settings, offload=True, lora=LoraConfig()))
    assert 2 * 7_615_616_512 < thin.host < 5 * 7_615_616_512
