"""The decoder computes what transformers computes: families, RoPE types, dtypes, gradients, packing, caching."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers.checkpoints import VOCAB_SIZE, make_checkpoint
from micota_fast.errors import InputError
from micota_fast.model import config
from micota_fast.model.attention import PackedAttention
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder
from micota_fast.model.rope import RotaryEmbedding
from micota_fast.model.safetensors_io import init_random, load_model

# Families by their `model_type` in transformers, with settings that the decoder needs; and options that are theirs.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": None},
}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"tie_word_embeddings": False}),
    ("qwen2", {"num_key_value_heads": 4}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),  # of 2: never reached
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    ("llama", {"rms_norm_eps": 0.1}),
    ("mistral", {"head_dim": 32}),  # as Mistral-Nemo has it: not hidden_size / heads
    ("mistral", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
]
THETA = {"rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", **THETA},
    "linear": {"rope_type": "linear", "factor": 3.0, **THETA},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        **THETA,
    },
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.7},
    "yarn-mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn-no-factor": {**YARN, "factor": None},
}
# Beyond the 64 tokens of the original context, where the scalings differ from the default.
LENGTH = 160


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each family. Do not write to it."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param, **FAMILIES[request.param])


def token_ids(length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def packed_logits(model: Decoder, documents: list[Tensor]) -> list[Tensor]:
    """Logits of each document, all of them computed in one packed batch."""
    lengths = [len(document) for document in documents]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    hidden_TH = model(torch.cat(documents), position_ids, PackedAttention(cu_seqlens, lengths))
    return list((hidden_TH @ model.lm_head_weight.T).split(lengths))


def hf_model(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()


def assert_same_logits(checkpoint: Path) -> None:
    ids = token_ids(LENGTH)
    with torch.no_grad():
        ours = packed_logits(load_model(checkpoint), [ids])[0]
        theirs = hf_model(checkpoint)(ids[None]).logits[0]
    assert theirs.std() > 0.3  # logits that all but vanish would agree whatever we computed
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_every_family_is_compared() -> None:
    assert {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] for family in FAMILIES} == set(config.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES)
def test_logits_equal_transformers(tmp_path: Path, family: str, rope: str) -> None:
    assert_same_logits(make_checkpoint(tmp_path, family, rope_parameters=ROPES[rope], **FAMILIES[family]))


@pytest.mark.parametrize(("family", "overrides"), OPTIONS, ids=str)
def test_logits_equal_transformers_with_options(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    assert_same_logits(make_checkpoint(tmp_path, family, **FAMILIES[family], **overrides))


def test_a_sliding_window_of_mistral_is_refused(tmp_path: Path) -> None:
    """Also the one of 4096 tokens that transformers takes where the key is missing."""
    checkpoint = make_checkpoint(tmp_path, "mistral", sliding_window=8)
    with pytest.raises(InputError, match=r"config\.json: sliding_window: .*of 8 tokens\) is not supported"):
        load_model(checkpoint)
    path = checkpoint / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "sliding_window"}))
    with pytest.raises(InputError, match=r"sliding_window: .*of 4096 tokens"):
        load_model(checkpoint)


def test_gradients_equal_transformers(checkpoint: Path) -> None:
    ids = token_ids(48)
    ours, theirs = load_model(checkpoint), hf_model(checkpoint)
    F.cross_entropy(packed_logits(ours, [ids])[0][:-1], ids[1:]).backward()
    F.cross_entropy(theirs(ids[None]).logits[0, :-1], ids[1:]).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert [name for name, _ in ours.named_parameters()] == list(expected)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_packed_documents_have_the_logits_they_have_alone(checkpoint: Path) -> None:
    model = load_model(checkpoint, torch.float64)
    documents = [token_ids(length, seed) for seed, length in enumerate([7, 1, 33, 12, 33, 2])]
    with torch.no_grad():
        packed = packed_logits(model, documents)
        for document, logits in zip(documents, packed, strict=True):
            torch.testing.assert_close(logits, packed_logits(model, [document])[0], atol=1e-12, rtol=0)
        documents[2] = token_ids(33, seed=99)
        changed = packed_logits(model, documents)
    same = [torch.equal(before, after) for before, after in zip(packed, changed, strict=True)]
    assert same == [True, True, False, True, True, True]


def test_float64_equals_transformers_in_float64(checkpoint: Path) -> None:
    ids = token_ids(40)
    with torch.no_grad():
        ours = packed_logits(load_model(checkpoint, torch.float64), [ids])[0]
        theirs = hf_model(checkpoint, torch.float64)(ids[None]).logits[0]
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # their norms are computed in fp32


def test_bfloat16_is_as_near_to_float32_as_transformers_is(checkpoint: Path) -> None:
    ids = token_ids(64)
    with torch.no_grad():
        exact = packed_logits(load_model(checkpoint, torch.float32), [ids])[0]
        ours = packed_logits(load_model(checkpoint, torch.bfloat16), [ids])[0]
        theirs = hf_model(checkpoint, torch.bfloat16)(ids[None]).logits[0]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).pow(2).mean() < 1.3 * (theirs - exact).pow(2).mean()


def test_one_token_at_a_time_with_cached_keys_equals_the_whole(qwen3_checkpoint: Path) -> None:
    model = load_model(qwen3_checkpoint, torch.float64)
    ids = token_ids(20)
    cached: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(layer: int, q_TNd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        if layer in cached:
            k_TKd, v_TKd = torch.cat((cached[layer][0], k_TKd)), torch.cat((cached[layer][1], v_TKd))
        cached[layer] = k_TKd, v_TKd
        q, k, v = (x.transpose(0, 1)[None] for x in (q_TNd, k_TKd, v_TKd))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1)

    with torch.no_grad():
        steps = [
            model(ids[t : t + 1], torch.tensor([t]), lambda layer: partial(attend, layer)) @ model.lm_head_weight.T
            for t in range(20)
        ]
        whole = packed_logits(model, [ids])[0]
    torch.testing.assert_close(torch.cat(steps), whole, atol=1e-10, rtol=0)


def test_positions_decide_not_places(qwen2_checkpoint: Path) -> None:
    """Only differences of positions matter, and a wrong position changes the result."""
    model = load_model(qwen2_checkpoint, torch.float64)
    ids, positions = token_ids(12), torch.arange(12)
    attend = PackedAttention(torch.tensor([0, 12], dtype=torch.int32), [12])
    with torch.no_grad():
        hidden = model(ids, positions, attend)
        torch.testing.assert_close(model(ids, positions + 100, attend), hidden, atol=1e-4, rtol=0)
        assert (model(ids, positions * 2, attend) - hidden).abs().max() > 0.01


def test_frequencies_survive_a_change_of_dtype_and_the_meta_device(llama_checkpoint: Path) -> None:
    shape = ModelConfig.from_checkpoint(llama_checkpoint)
    expected = RotaryEmbedding(shape.rope, shape.head_dim).inv_freq.clone()
    with torch.device("meta"):
        model = Decoder(shape)
    model = model.to("meta").to_empty(device="cpu").to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)
    assert not [name for name in model.state_dict() if "inv_freq" in name]


def test_counts(checkpoint: Path) -> None:
    model, theirs = load_model(checkpoint), hf_model(checkpoint)
    assert model.num_params() == theirs.num_parameters()
    assert model.lm_head_weight.shape == (VOCAB_SIZE, 64)
    assert (model.lm_head_weight is model.model.embed_tokens.weight) == theirs.config.tie_word_embeddings
    # A matrix of n weights costs 2n FLOPs forward and 4n backward. An untied embedding is looked up.
    products = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    others = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    if not theirs.config.tie_word_embeddings:
        products -= VOCAB_SIZE * 64
    assert model.flops_per_token(0) == 6 * (products + others)
    c = model.config
    # q @ k.T and p @ v: 2 FLOPs a channel each, forward; twice that backward; half the keys lie in the future.
    assert (
        model.flops_per_token(10) - model.flops_per_token(0) == 6 * 2 * c.num_attention_heads * c.head_dim * 10 / 2 * 2
    )


def test_random_initialisation(qwen2_checkpoint: Path) -> None:
    shape = ModelConfig.from_checkpoint(qwen2_checkpoint)
    model, again, other = init_random(shape, 3), init_random(shape, 3), init_random(shape, 4)
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(model.lm_head_weight, other.lm_head_weight)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith(".bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        else:
            assert parameter.mean().abs() < 0.002, name
            assert parameter.std().item() == pytest.approx(shape.initializer_range, rel=0.05), name
    rounded = init_random(shape, 3, "bfloat16")
    assert torch.equal(rounded.lm_head_weight, model.lm_head_weight.bfloat16())


def test_blocks_can_be_recomputed_in_backward(qwen2_checkpoint: Path) -> None:
    """Recomputing each block in backward leaves the gradients as they are."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, recomputing = load_model(qwen2_checkpoint), load_model(qwen2_checkpoint)
    for i, block in enumerate(recomputing.model.layers):
        recomputing.model.layers[i] = checkpoint_wrapper(block)
    ids = token_ids(24)
    for model in (plain, recomputing):
        packed_logits(model, [ids[:9], ids[9:]])[0].square().sum().backward()
    for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
