"""The estimate of a rank's memory against the allocator's own record."""

import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.checkpoints import make_checkpoint
from micota_fast.config.train import LoraConfig, TrainSettings
from micota_fast.model.attention import PackedAttention
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import parameter_shapes
from micota_fast.model.pointwise import TORCH
from micota_fast.model.safetensors_io import load_model
from micota_fast.train.activation_checkpointing import checkpoint_activations
from micota_fast.train.memory import Checkpointing, estimate, kept, longest_pack, moment_bytes, moments, trained_sizes
from micota_fast.train.trainable import trainable_decoder

TOKENS = 512
QWEN_7B = ModelConfig.from_dict(
    {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
)


class Norm(torch.autograd.Function):
    """Keeps its input, as Liger-Kernel's does; torch's own on a CPU keeps more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.rms_norm(x, weight.shape, weight, eps)


class SwiGLU(torch.autograd.Function):
    """Keeps gate and up, as Liger-Kernel's does."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_what_a_block_keeps(family: str, how: Checkpointing, dtype: torch.dtype, tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = load_model(make_checkpoint(tmp_path, family, num_key_value_heads=2, **shape), dtype)
    model.use(replace(TORCH, rms_norm=Norm.apply, swiglu=SwiGLU.apply))
    if how != "none":
        for block in model.model.layers:
            checkpoint_activations(block, how)
    cu_seqlens = torch.tensor([0, 200, TOKENS], dtype=torch.int32)
    ids, positions = torch.arange(TOKENS) % 300, torch.arange(TOKENS)
    attend = PackedAttention(cu_seqlens, [200, 312])
    model(ids, positions, attend)  # what is made once
    gc.collect()  # what an earlier test left must not be freed in between
    with torch.profiler.profile(profile_memory=True) as profile:
        hidden = model(ids, positions, attend)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    live = sum(event.nbytes() for event in events if event.name() == "[memory]")
    assert hidden.requires_grad
    # The final norm's input and result, cos and sin, and small figures beside.
    expected = TOKENS * dtype.itemsize * (4 * kept(model.config, how) + 2 * 256)
    assert live == pytest.approx(expected, rel=0.05 if how != "full" else 0.15)


def test_of_qwen_7b() -> None:
    assert [kept(QWEN_7B, how) * 2 // 1000 for how in ("none", "selective", "full")] == [159, 68, 7]
    one, eight = (moments(QWEN_7B, 16384, n, "selective", torch.bfloat16, "cuda") for n in (1, 8))
    for alone, shared in zip(one, eight, strict=True):
        assert alone.state == pytest.approx(8 * shared.state, rel=1e-9)
    for alone, shared in zip(one[1:], eight[1:], strict=True):  # one process need not gather before the first block
        assert (alone.gathered, alone.activations, alone.loss) == (shared.gathered, shared.activations, shared.loss)
    assert [one[0].state, one[-1].state] == [12 * 7_615_616_512, 16 * 7_615_616_512]


@pytest.mark.parametrize(
    ("tokens", "how", "moment"),
    [
        (16384, "none", "the loss"),
        (32768, "selective", "the backward pass of the last block"),
        (131072, "full", "the backward pass of the last block but one"),
        (16384, "full", "the backward pass of the first block"),
        (2048, "full", "the embedding's gradient"),
    ],
)
def test_each_moment_can_need_most(tokens: int, how: Checkpointing, moment: str) -> None:
    need = estimate(QWEN_7B, tokens, 8, how, torch.bfloat16, "cuda")
    assert need.moment == moment
    assert need.total == max(m.total for m in moments(QWEN_7B, tokens, 8, how, torch.bfloat16, "cuda"))


def test_one_process_in_float32_gathers_nothing() -> None:
    for memory in moments(QWEN_7B, 1024, 1, "none", torch.float32, "cpu"):
        assert memory.gathered == 0


def test_the_longest_pack_is_the_last_that_fits() -> None:
    for shards in (8, 16):
        tokens = longest_pack(QWEN_7B, 76e9, shards, "full")
        assert tokens % 1024 == 0
        totals = [estimate(QWEN_7B, t, shards, "full", torch.bfloat16, "cuda").total for t in (tokens, tokens + 1024)]
        assert totals[0] <= 76e9 < totals[1]
    assert longest_pack(QWEN_7B, 76e9, 1, "full") == 0


def test_soft_targets_take_14_bytes_per_entry_of_a_token_while_there_is_a_loss() -> None:
    hard, soft = (moments(QWEN_7B, 16384, 8, "none", torch.bfloat16, "cuda", top_k=k) for k in (0, 32))
    assert [b.total - a.total for a, b in zip(hard, soft, strict=True)] == [0, 16384 * 32 * 14, 0, 0, 0, 0]
    assert estimate(QWEN_7B, 16384, 8, "none", torch.bfloat16, "cuda", top_k=32) == soft[1]


LORA = LoraConfig(rank=2, targets=["q_proj", "up_proj"])


@pytest.mark.parametrize(
    ("lora", "patterns"),
    [
        (None, []),
        (None, ["*.layers.0.*"]),
        (None, ["model.embed_tokens.*", "*norm*"]),
        (LORA, []),
        (LORA, ["*.layers.0.*"]),
        (LORA, ["*.lora_A.*"]),
    ],
)
def test_what_is_frozen_has_no_gradients_and_no_moments(
    qwen2_checkpoint: Path, lora: LoraConfig | None, patterns: list[str]
) -> None:
    """The names and numbers are those of the model that the trainer builds."""
    model = ModelConfig.from_checkpoint(qwen2_checkpoint)
    decoder, _ = trainable_decoder(TrainSettings(lora=lora, freeze=patterns), model)
    sizes = {name: p.numel() for name, p in decoder.named_parameters() if p.requires_grad}
    assert trained_sizes(model, lora, patterns) == sizes
    trained, untrained = sum(sizes.values()), decoder.num_params() - sum(sizes.values())
    first = moments(model, 1024, 1, "full", torch.bfloat16, "cuda", lora=lora, freeze=patterns)[0]
    frozen_adapters = sum(p.numel() for n, p in decoder.named_parameters() if "lora_" in n and not p.requires_grad)
    stored = 4 if lora is None else 2
    assert first.state == 12 * trained + stored * (untrained - frozen_adapters) + 4 * frozen_adapters


def test_an_output_matrix_that_is_frozen_has_no_gradient_in_the_loss() -> None:
    free, frozen = (
        moments(QWEN_7B, 16384, 8, "full", torch.bfloat16, "cuda", freeze=freeze) for freeze in ([], ["lm_head.*"])
    )
    head = QWEN_7B.vocab_size * QWEN_7B.hidden_size
    assert free[1].loss - frozen[1].loss >= 4 * head
    assert longest_pack(QWEN_7B, 76e9, 8, "full", freeze=["lm_head.*"]) > longest_pack(QWEN_7B, 76e9, 8, "full")


def test_adapters_alone_have_gradients_and_moments() -> None:
    weights, adapters = 7_615_616_512, 40_370_176  # rank 16 on all seven matrices of a block
    lora = LoraConfig(rank=16)
    one = moments(QWEN_7B, 16384, 1, "full", torch.bfloat16, "cuda", lora=lora)
    assert [one[0].state, one[-1].state] == [2 * weights + 12 * adapters, 2 * weights + 16 * adapters]
    four = estimate(QWEN_7B, 16384, 4, "full", torch.bfloat16, "cuda", lora=lora).total
    full = estimate(QWEN_7B, 16384, 4, "full", torch.bfloat16, "cuda").total
    assert four < 0.4 * full
    assert all(memory.loss < 3 << 30 for memory in one), "no gradient of the output matrix"
    assert longest_pack(QWEN_7B, 36e9, 4, "full", lora=lora) > 16384 > longest_pack(QWEN_7B, 36e9, 4, "full")


def test_moments_of_few_bits_are_counted_by_parameter() -> None:
    """As torchao keeps them: small shards, and those that are not of whole blocks, in float32."""
    shapes = [tuple(shape) for shape in parameter_shapes(QWEN_7B).values()]
    for states, bytes_each, block in (("8bit", 1 + 4 / 256, 256), ("4bit", 0.5 + 4 / 128, 128)):
        for shards in (1, 8, 3):
            sizes = [math.ceil(rows / shards) * math.prod(rest) for rows, *rest in shapes]
            whole = [size for size in sizes if size >= 4096 and size % block == 0]
            expected = 2 * bytes_each * sum(whole) + 8 * (sum(sizes) - sum(whole))
            assert moment_bytes(QWEN_7B, shards, None, states) == expected  # type: ignore[arg-type]
    assert moment_bytes(QWEN_7B, 1, LoraConfig(rank=1, targets=["k_proj"]), "8bit") == 28 * 8 * (3584 + 512)


def test_few_bits_save_what_the_moments_were_and_hold_more_in_the_step() -> None:
    shape = QWEN_7B, 1024, 1, "full", torch.bfloat16, "cuda"
    full, few = moments(*shape), moments(*shape, optimizer_states="8bit")  # type: ignore[arg-type]
    saved = moment_bytes(QWEN_7B, 1) - moment_bytes(QWEN_7B, 1, None, "8bit")
    step, *rest = few
    assert [a.total - b.total for a, b in zip(full, rest, strict=True)] == [saved] * len(full)
    assert step.total == rest[-1].state + 8 * QWEN_7B.vocab_size * QWEN_7B.hidden_size
