"""RoPE in config.json: every spelling is read alike, kept when saving, and refused where two places disagree."""

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.model.rope import rope_frequencies
from micota_fast.model.rope_config import RopeConfig

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
DEFAULT = {"rope_type": "default", "rope_theta": 1e6}


def rope_of(**keys: Any) -> RopeConfig:
    return ModelConfig.from_dict({**SHAPE, **keys}, "config.json").rope


def saved(**keys: Any) -> dict[str, Any]:
    """The config.json that is written for a model that was read from these keys, as a reader gets it."""
    return json.loads(json.dumps(ModelConfig.from_dict({**SHAPE, **keys}).to_dict("float32")))


@st.composite
def spellings(draw: st.DrawFn) -> dict[str, Any]:
    """RoPE keys of a config.json that mean one thing, spelt in any way."""
    rope_type = draw(st.sampled_from(("default", "linear", "llama3", "yarn")))
    theta = draw(st.sampled_from((10000.0, 1000000, 5e5)))
    d: dict[str, Any] = {"rope_type": rope_type}
    if rope_type != "default":
        # 4 is also what max_position_embeddings and the original one make, which counts if YaRN's is null
        d["factor"] = draw(st.sampled_from((2, 4.0, 1.5, *((None,) if rope_type == "yarn" else ()))))
    if rope_type == "llama3":
        d |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from((2.0, 4.0)))}
    if rope_type == "yarn":
        for key, values in (("beta_fast", (16.0, 32)), ("attention_factor", (1.25,)), ("truncate", (True, False))):
            if draw(st.booleans()):
                d[key] = draw(st.sampled_from(values))
        if draw(st.booleans()):
            d |= {"mscale": 1.0, "mscale_all_dim": 0.5}
    keys: dict[str, Any] = {}
    if rope_type in ("llama3", "yarn"):
        place = draw(st.sampled_from(("inside", "top", "both", "nowhere")))
        if place in ("inside", "both"):
            d["original_max_position_embeddings"] = 128
        if place in ("top", "both"):
            keys["original_max_position_embeddings"] = 128
    names = draw(st.sampled_from(("rope_scaling", "rope_parameters", "both", "with default")))
    for name in ("rope_scaling", "rope_parameters"):
        if names in (name, "both") or (names == "with default" and name == "rope_scaling"):
            keys[name] = copy.deepcopy(d)
            kind = draw(st.sampled_from(("rope_type", "type", "both")))
            if kind != "rope_type":
                keys[name]["type"] = rope_type
            if kind == "type":
                del keys[name]["rope_type"]
        elif draw(st.booleans()):
            keys[name] = draw(st.sampled_from((None, {})))
    if names == "with default":
        keys["rope_parameters"] = {"rope_type": "default"}
    # transformers loses a theta that only `rope_parameters` has if `rope_scaling` takes precedence; we do not.
    holds = "rope_parameters" if names == "rope_parameters" else "rope_scaling"
    stated = draw(st.sampled_from(("top", holds, "everywhere")))
    if stated in ("top", "everywhere"):
        keys["rope_theta"] = theta
    for name in ("rope_scaling", "rope_parameters"):
        if keys.get(name) and stated in (name, "everywhere"):
            keys[name]["rope_theta"] = theta
    return keys


def by_transformers(config: dict[str, Any]) -> tuple[torch.Tensor, float]:
    rotary = Qwen2RotaryEmbedding(Qwen2Config(**copy.deepcopy(config)))
    return rotary.inv_freq, rotary.attention_scaling


@given(spellings())
@settings(max_examples=300, deadline=None)
def test_what_is_read_is_what_is_saved_for_every_reader(keys: dict[str, Any]) -> None:
    rope = rope_of(**keys)
    after = saved(**keys)
    assert ModelConfig.from_dict(after).rope == rope
    without_new = {key: value for key, value in after.items() if key != "rope_parameters"}
    assert ModelConfig.from_dict(without_new).rope == rope, "transformers 4 and what reads as it does"
    expected, factor = rope_frequencies(rope, 32)
    for config in ({**SHAPE, **keys}, after):
        theirs, their_factor = by_transformers(config)
        torch.testing.assert_close(theirs, expected)
        assert their_factor == pytest.approx(factor)


def test_yarn_added_to_a_file_of_transformers_5_is_kept() -> None:
    """As model cards tell users to write it: it was read as YaRN and saved without."""
    keys = {"rope_theta": 1e6, "rope_parameters": DEFAULT}
    keys["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert rope_of(**keys) == RopeConfig("yarn", 1e6, 4.0, 128)
    after = saved(**keys)
    assert after["rope_parameters"] == after["rope_scaling"] == {**YARN, "rope_theta": 1e6}


@pytest.mark.parametrize("keys", [{"rope_scaling": {**YARN}}, {"rope_parameters": {**YARN}, "rope_theta": 1e4}])
def test_a_factor_that_the_lengths_give_is_saved_as_all_readers_need_it(keys: dict[str, Any]) -> None:
    for holder in ("rope_scaling", "rope_parameters"):
        if holder in keys:
            del keys[holder]["factor"]
    after = saved(**keys)
    assert after["rope_scaling"]["factor"] == 4.0
    Qwen2Config(**after)
    assert ModelConfig.from_dict(after).rope == rope_of(**keys) == RopeConfig("yarn", 1e4, 4.0, 128)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope_parameters": DEFAULT, "rope_theta": 3e5},
            r"rope_theta: 300000.0, but rope_parameters\.rope_theta is 1000000.0",
        ),
        (
            {"rope_scaling": {**YARN, "rope_theta": 5.0}, "rope_parameters": DEFAULT},
            r"rope_scaling\.rope_theta: 5.0, but rope_parameters\.rope_theta",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {**YARN, "factor": 2.0}},
            "rope_scaling: its factor is 4.0, but that of rope_parameters is 2.0",
        ),
        (
            {"rope_scaling": {"type": "default"}, "rope_parameters": YARN},
            "rope_scaling: its rope_type is default, but that of rope_parameters is yarn",
        ),
        (
            {"rope_scaling": {**YARN, "type": "linear"}},
            r"rope_scaling\.rope_type: 'yarn', but rope_scaling\.type is 'linear'",
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            r"original_max_position_embeddings: 64, but rope_scaling\.original_max_position_embeddings is 128",
        ),
        ({"rope_scaling": {**YARN, "attn_factor": 0.878}}, r"rope_scaling\.attn_factor: .*`attention_factor`"),
        (
            {"rope_scaling": {**YARN, "extrapolation_factor": 1.0}},
            r"rope_scaling\.extrapolation_factor: unknown; known here: attention_factor, beta_fast",
        ),
        ({"rope_parameters": {"full_attention": DEFAULT}}, r"rope_parameters\.full_attention: unknown"),
        ({"rope_ratio": 4}, "rope_ratio: 4 is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved: True is not supported"),
        ({"rope_theta": float("nan")}, "rope_theta: expected a positive number, found nan"),
        ({"rope_theta": float("inf")}, "rope_theta: expected a positive number, found inf"),
        ({"rope_theta": 10**400}, "rope_theta: expected a positive number"),
        ({"rope_scaling": {**YARN, "factor": -4.0}}, r"rope_scaling\.factor: expected a positive number, found -4.0"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling\.rope_type: \['yarn'\] is not supported"),
        (
            {"rope_scaling": {"factor": 4.0}},
            r"rope_scaling\.rope_type: is missing, but rope_scaling\.factor is 4\.0; say",
        ),
        (
            {"rope_parameters": {**YARN, "rope_type": "default"}},
            r"rope_parameters\.rope_type: is 'default', but rope_parameters\.factor is 4\.0",
        ),
        ({"rope_scaling": {**YARN, "rope_type": None}}, r"rope_scaling\.rope_type: is missing, but"),
        ({"rope_scaling": 5}, "rope_scaling: expected an object, found int"),
    ],
    ids=str,
)
def test_what_disagrees_or_is_not_known_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"^config\.json: {message}"):
        rope_of(**keys)


def test_keys_that_turn_nothing_on_are_accepted() -> None:
    """As SmolLM2 has them."""
    assert rope_of(rope_interleaved=False, rope_scaling=None, rope_theta=130000) == RopeConfig(rope_theta=130000.0)
