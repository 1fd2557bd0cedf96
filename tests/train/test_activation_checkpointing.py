"""Activation checkpointing: the same bits come out, what runs a second time is counted, and what is kept is weighed."""

import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.training_runs import metrics, train_config
from micota_fast.config.train import TrainConfig
from micota_fast.model.config import ModelConfig
from micota_fast.model.safetensors_io import init_random, load_model
from micota_fast.train.loop import train
from micota_fast.train.packed_loss import PackedLoss
from micota_fast.train.parallel import parallelize
from micota_fast.train.world import World

How = Literal["none", "selective", "full"]
HOW: tuple[How, ...] = ("none", "selective", "full")
FAMILIES = ["qwen2", "qwen3", "llama"]
LENGTHS = [30, 1, 50, 19]
TOKENS = sum(LENGTHS)


def prepared(model: PackedLoss, how: How) -> PackedLoss:
    config = TrainConfig(model="", data="", out="", dtype="float32", activation_checkpointing=how)
    parallelize(model, config, World(0, 1, torch.device("cpu")))
    return model


def loss_of(model: PackedLoss) -> Tensor:
    """Of random tokens in four documents."""
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(model.decoder.config.vocab_size, (TOKENS,), generator=generator)
    positions_T = torch.cat([torch.arange(length) for length in LENGTHS])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    loss: Tensor = model(ids_T, positions_T, ids_T.roll(-1), None, cu_seqlens, LENGTHS, TOKENS, float(TOKENS))
    return loss


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen2", "float32"),
        pytest.param("qwen2", "bfloat16", marks=pytest.mark.slow),
        ("qwen3", "bfloat16"),
        pytest.param("llama", "float32", marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_come_out(family: str, dtype: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    results = []
    for how in HOW:
        checkpoint = request.getfixturevalue(f"{family}_checkpoint")
        options = {"dtype": dtype, "max_steps": 3, "activation_checkpointing": how}
        config = train_config(checkpoint, tmp_path, out=str(tmp_path / how), **options)
        train(config)
        results.append((metrics(config), load_file(tmp_path / how / "model" / "model.safetensors")))
    (rows, weights), *others = results
    for other_rows, other_weights in others:
        assert other_rows == rows
        assert all(torch.equal(tensor, weights[name]) for name, tensor in other_weights.items())


class Operations(TorchDispatchMode):
    """Counts the operations that run, and notes which tensors products take."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.factors: Counter[int] = Counter()  # by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.count[name] += 1
        if name in ("aten::mm", "aten::addmm"):
            self.factors.update(x.data_ptr() for x in args)
        return func(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return self.count["aten::mm"] + self.count["aten::addmm"]

    @property
    def attentions(self) -> int:
        return self.count["micota::cpu_attention"]


def backward(checkpoint: Path, how: How) -> tuple[Operations, PackedLoss]:
    model = prepared(PackedLoss(load_model(checkpoint, torch.float32), "sdpa"), how)
    with Operations() as forward:
        loss = loss_of(model)
    layers = model.decoder.config.num_hidden_layers
    assert (forward.products, forward.attentions) == (7 * layers, layers), "the forward pass runs all of it once"
    with Operations() as operations:
        loss.backward()
    assert operations.count["micota::cpu_attention_backward"] == layers
    return operations, model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_backward_pass_runs_again(family: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(f"{family}_checkpoint")
    plain, _ = backward(checkpoint, "none")
    selective, model = backward(checkpoint, "selective")
    full, _ = backward(checkpoint, "full")
    blocks = model.decoder.model.layers
    assert (plain.products, plain.attentions) == (2 * 7 * len(blocks), 0)

    assert selective.products - plain.products == len(blocks)
    assert selective.attentions == 0
    for block in blocks:
        # Each weight is a factor of its input's gradient; gate's alone is one once more.
        uses = {name: selective.factors[p.data_ptr()] for name, p in block.named_parameters() if p.ndim == 2}
        assert uses == {name: 2 if name == "mlp.gate_proj.weight" else 1 for name in uses}

    # All but the block's last product, whose result the backward pass has no use for.
    assert full.products - plain.products == 6 * len(blocks)
    assert full.attentions == len(blocks)


def bytes_kept(config: ModelConfig, how: How) -> int:
    """Live allocations between forward and backward pass, from the profiler's record of the CPU allocator."""
    model = prepared(PackedLoss(init_random(config, seed=0), "sdpa"), how)
    loss_of(model).backward()  # what is allocated once and stays
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = loss_of(model)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del loss
    return kept


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])]
)
def test_what_is_kept_between_the_passes(family: str, request: pytest.FixtureRequest) -> None:
    config = ModelConfig.from_checkpoint(request.getfixturevalue(f"{family}_checkpoint"))
    H, N, K, d = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def a_layer(how: How) -> float:
        """Values a token."""
        more, fewer = (bytes_kept(replace(config, num_hidden_layers=n), how) for n in (4, 2))
        return (more - fewer) / 2 / TOKENS / 4

    none, selective, full = map(a_layer, HOW)
    assert full == H, "the input"
    # Input, q, k, v, attention and the logarithm of its sums, o, up.
    assert selective == H + (N + 2 * K) * d + N * d + N + H + config.intermediate_size
    assert none > selective + 2 * config.intermediate_size, "gate and what it is multiplied to"
