"""Tiny Hugging Face checkpoints for tests, made on the spot with transformers. Nothing is downloaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

# As Qwen2.5-Instruct has them: documents end with the first, turns with the third.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 320
REMOVED = "REMOVED"  # in place of a key's value, for `edit_config`

CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

# Settings by transformers' `model_type`, where the common ones do not do.
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 24},  # not hidden_size / heads, as in Qwen3-0.6B
}


def make_checkpoint(directory: Path | str, family: str = "qwen2", *, seed: int = 0, **overrides: Any) -> Path:
    """Write a checkpoint folder: config.json, model.safetensors, tokenizer files and generation_config.json.

    Args:
        directory: made if need be.
        family: of the model, as transformers names it under `model_type`: "qwen2", "llama".
        seed: of the weights. All are random, biases and norms too, so that leaving one out changes the logits.
        overrides: for the configuration class of the family, such as `num_hidden_layers=1`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = make_hf_model(family, seed=seed, **overrides)
    model.save_pretrained(directory)
    make_tokenizer(directory)
    GenerationConfig(eos_token_id=[2, 0], pad_token_id=0, do_sample=False).save_pretrained(directory)
    return directory


def make_hf_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The transformers model that `make_checkpoint` saves."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": 2,
        **_OF_FAMILY.get(family, {}),
        **overrides,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0.0, 0.1)
            elif name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.1)
            else:
                parameter.normal_(0.0, 0.1)  # wide enough that attention is far from uniform
    return model


def make_tokenizer(directory: Path | str) -> Tokenizer:
    """Write tokenizer.json (byte-level BPE, ids below VOCAB_SIZE) and tokenizer_config.json with a ChatML template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["system user assistant You are a helpful assistant. the answer is \\boxed{42}. 1 + 2 = 3 so we get"] * 4
    tokenizer.train_from_iterator(text, trainer)
    directory = Path(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return tokenizer


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of config.json; those that become REMOVED go."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != REMOVED}))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `change` to the tensors of a checkpoint of one file, by name."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
