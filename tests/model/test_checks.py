"""Hostile and unusual checkpoints: named before anything of the size that they state is built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.checkpoints import edit_config, edit_tensors
from helpers.waiting import soon
from micota_fast.errors import InputError
from micota_fast.model.checks import checked_config
from micota_fast.model.config import ModelConfig
from micota_fast.model.safetensors_io import check_savable, load_model, save_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@pytest.mark.parametrize("value", [0, -1, True, 4.0, "64", [64], {}, 10**12, 10**299], ids=repr)
@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_none_is_named(copy: Path, key: str, value: Any) -> None:
    edit_config(copy, **{key: value})
    with soon(), pytest.raises(InputError, match=rf"config\.json: {key}: ") as error:
        load_model(copy)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 10**9},
            rf"tensor {EMBEDDING} has shape \[320, 64\]; .*\[1000000000, 64\] \(vocab_size, hidden_size\)",
        ),
        ({"hidden_size": 2**20}, rf"tensor {EMBEDDING} .*\[320, 1048576\] \(vocab_size, hidden_size\)"),
        (
            {"intermediate_size": 10**9},
            r"mlp\.gate_proj\.weight .*calls for \[1000000000, 64\] \(intermediate_size, hidden_size\)",
        ),
        (
            {"num_attention_heads": 2**20, "head_dim": 16},
            rf"{Q_PROJ} .*\(num_attention_heads x head_dim, hidden_size\)",
        ),
        ({"num_key_value_heads": 4}, r"k_proj\.weight .*\(num_key_value_heads x head_dim, hidden_size\)"),
        ({"num_hidden_layers": 10**9}, r"config\.json: num_hidden_layers: too large; expected at most 10,000"),
        ({"num_hidden_layers": 9000}, r"config\.json: num_hidden_layers: 9,000, but .* holds 2"),
        (
            {"hidden_size": 2**30, "intermediate_size": 2**30},
            r"config\.json: .*hidden_size.* parameters; one of them is wrong",
        ),
        ({"tie_word_embeddings": False}, rf"tensor {HEAD} is missing; .*config\.json calls for it"),
        ({"layer_types": 5}, "layer_types: expected a list, found 5"),
        ({"layer_types": [5]}, "layer_types: 5 is not supported"),
        ({"use_sliding_window": 1}, "use_sliding_window: expected true or false, found 1"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": "x"},
            "max_window_layers: expected an integer, found 'x'",
        ),
        ({"rms_norm_eps": float("nan")}, r"config\.json:\d+: .*NaN"),
        ({"rms_norm_eps": float("inf")}, r"config\.json:\d+: .*Infinity"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: expected a positive number, found -1.0"),
        ({"initializer_range": "wide"}, "initializer_range: expected a positive number, found 'wide'"),
        ({"dtype": 5}, "dtype: '5' is not supported; supported are auto, float32, bfloat16"),
        ({"dtype": "float8_e4m3fn"}, "dtype: 'float8_e4m3fn' is not supported"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype: .* is not supported"),
        ({"architectures": [["Qwen2ForCausalLM"]]}, "architectures: .* is not supported"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_config_that_is_not_of_these_weights_is_named(copy: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(copy, **changes)
    with soon(), pytest.raises(InputError, match=message):
        load_model(copy)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_not_finite_are_named(copy: Path, dtype: torch.dtype, bad: float) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    load_model(copy)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ][3, 5] = bad

    edit_tensors(copy, spoil)
    kind = "NaN" if bad != bad else "infinity"
    with pytest.raises(
        InputError, match=rf"model\.safetensors: tensor {Q_PROJ} holds {kind}; this checkpoint is damaged"
    ):
        load_model(copy)


@pytest.mark.parametrize(("stored", "name"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32")])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_dtype_of_auto_is_the_one_of_the_tensors(
    copy: Path, tmp_path: Path, key: str, stored: torch.dtype, name: str
) -> None:
    """It was found out only when a training had ended and was to be saved."""
    edit_config(copy, **{"dtype": None, "torch_dtype": None, key: "auto"})
    edit_tensors(copy, lambda tensors: tensors.update({k: v.to(stored) for k, v in tensors.items()}))
    config = checked_config(copy)
    assert config.dtype_name == name
    check_savable(config, copy)
    model = load_model(copy)
    assert {parameter.dtype for parameter in model.parameters()} == {stored}
    save_checkpoint(model.state_dict(), model.config, copy, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["dtype"] == saved["torch_dtype"] == name


def test_without_weights_auto_says_nothing(copy: Path) -> None:
    edit_config(copy, dtype="auto")
    (copy / "model.safetensors").unlink()
    assert ModelConfig.from_checkpoint(copy).dtype_name is None


def test_what_cannot_be_saved_is_known_before_there_are_weights(copy: Path) -> None:
    config = checked_config(copy)
    check_savable(config, copy, "bfloat16")
    with pytest.raises(
        InputError, match=r"config\.json: dtype 'int8' is not supported; choose one of float32, bfloat16"
    ):
        check_savable(config, copy, "int8")
    with pytest.raises(InputError, match=r"config\.json: text that is not Unicode"):
        check_savable(ModelConfig.from_dict({**config.raw, "note": "\ud800"}), copy)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_tied_head_may_be_stored_in_another_dtype(copy: Path, stored: torch.dtype) -> None:
    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16().half().float()  # every dtype holds these
        tensors[HEAD] = tensors[EMBEDDING].to(stored, copy=True)

    edit_tensors(copy, add_head)
    load_model(copy)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD][-1, -1] += 1

    edit_tensors(copy, change)
    with pytest.raises(
        InputError, match=rf"tensor {HEAD} differs from {EMBEDDING}, though .*tie_word_embeddings: true"
    ):
        load_model(copy)
    edit_tensors(copy, lambda tensors: tensors.update({HEAD: tensors[HEAD][:5].clone()}))
    with pytest.raises(InputError, match=f"tensor {HEAD} differs"):
        load_model(copy)


@pytest.mark.parametrize(
    ("wrap", "tool"),
    [
        (lambda name: f"_orig_mod.{name}", r"torch\.compile"),
        (lambda name: f"module.{name}", "DistributedDataParallel"),
        (lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."), "activation checkpointing"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "FSDP"),
    ],
)
def test_wrapped_names_are_explained(copy: Path, wrap: Callable[[str], str], tool: str) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[wrap(name)] = tensors.pop(name)

    edit_tensors(copy, rename)
    with pytest.raises(
        InputError, match=rf"is missing; .*It is there as .*, as {tool}.* names it: .*take `.*` out of all"
    ):
        load_model(copy)


def test_a_lora_adapter_is_explained(copy: Path) -> None:
    (copy / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    takers = "`merge`, `serve`, `generate`, `evaluate` and `score` take it"
    with pytest.raises(InputError, match=rf"neither model\.safetensors.*is a LoRA adapter.*{takers}"):
        load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=rf"config\.json: no such file.*is a LoRA adapter.*{takers}"):
        load_model(copy)


def test_the_weights_of_an_adapter_are_explained(copy: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2, 2)}, copy / "model.safetensors")
    with pytest.raises(InputError, match=rf"{EMBEDDING} is missing.*lora_A\.weight belongs to a LoRA adapter"):
        load_model(copy)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_explained(copy: Path, file: str) -> None:
    (copy / "model.safetensors").rename(copy / file)
    with pytest.raises(InputError, match=rf"only {file}: pickled weights are not read.*save_pretrained\(OUT\)"):
        load_model(copy)


def test_a_header_without_end_is_not_read(copy: Path) -> None:
    with (copy / "model.safetensors").open("r+b") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(2 << 30)  # a hole
    with pytest.raises(InputError, match=r"damaged.*its header: more than .* bytes"):
        load_model(copy)
