"""The shapes of a checkpoint that need not be here, and what follows from them: parameters and FLOPs.

Shapes are those of its folder, of the hub's cache, known by name, or of the hub.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from micota_fast.common.json_io import read_json
from micota_fast.config.train import LoraConfig, TrainSettings
from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.planning.machine import http_status, within

HUB_TIMEOUT_S = 10.0
# Qwen2.5 technical report (arXiv 2412.15115), table 1, and the models' config.json: hidden and intermediate size,
# layers, query heads, key-value heads, vocabulary, whether the embedding is the output matrix too.
_QWEN25 = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
_KNOWN = re.compile(r"Qwen/Qwen2\.5-(?:Math-|Coder-)?([\d.]+B)(?:-Instruct)?|deepseek-ai/DeepSeek-R1-Distill-Qwen-(.+)")


def known_shapes(name: str) -> ModelConfig | None:
    """Return the shapes of a Qwen2.5 or an R1-Distill-Qwen model of the hub; None for others.

    The distilled ones are Qwen2.5 models trained further (arXiv 2501.12948, table 6); that of 1.5B has an output matrix
    of its own (its config.json).
    """
    found = _KNOWN.fullmatch(name)
    size = found and (found[1] or found[2])
    if size not in _QWEN25:
        return None
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = _QWEN25[size]
    return ModelConfig.from_dict(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied and not name.startswith("deepseek-ai/"),
            "dtype": "bfloat16",
        },
        name,
    )


def shapes_of(location: str) -> ModelConfig:
    """Return the shapes of a checkpoint's folder, or of a name on the hub, within `HUB_TIMEOUT_S`.

    Raises:
        InputError: the folder or its config.json is missing or bad; or the hub did not give a model's config.json.
    """
    if Path(location).is_dir():
        return ModelConfig.from_checkpoint(location)
    if location.count("/") != 1 or location.startswith(("/", ".")):
        raise InputError(f"{location}: no such folder, so the model's shapes are not known")
    if (file := cached_on_disk(location)) is not None:
        return ModelConfig.from_checkpoint(file.parent)
    if (known := known_shapes(location)) is not None:
        return known
    import huggingface_hub
    from huggingface_hub import constants

    try:
        if not constants.HF_HUB_OFFLINE:
            http_status(constants.ENDPOINT, "HEAD")  # huggingface_hub would try for a minute, and say so each time
        file = Path(within(HUB_TIMEOUT_S, lambda: huggingface_hub.hf_hub_download(location, "config.json")))
    except (OSError, ValueError, RuntimeError) as error:  # what the hub raises derives from one of these
        raise InputError(
            f"{location}: its config.json is not here, and the hub did not give it ({_first_line(error)}); name a "
            f"folder that contains it, or run this with a network"
        ) from None
    return ModelConfig.from_checkpoint(file.parent)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cached_on_disk(name: str, file: str = "config.json") -> Path | None:
    """Return a file of a hub model in the local cache; None if it is not there."""
    import huggingface_hub

    found: Any = huggingface_hub.try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def weights_cached(name: str) -> bool:
    """Return whether the local cache contains all of a hub model's weights, not only its config.json."""
    if cached_on_disk(name, "model.safetensors") is not None:
        return True
    index = cached_on_disk(name, "model.safetensors.index.json")
    if index is None:
        return False
    try:
        shards = set(read_json(index)["weight_map"].values())
    except (InputError, KeyError, TypeError, AttributeError):  # damaged: it must be fetched again
        return False
    return all(cached_on_disk(name, shard) is not None for shard in shards)


@cache
def _figures(config: ModelConfig) -> tuple[int, float, float]:
    """Return parameters, and FLOPs to train on one token of a document: constant, and for each token of its length.

    They are counted on the trainer's own decoder, built without memory, so that no formula can drift from it.
    """
    import torch  # takes seconds, and whatever is wrong with a recipe is found before

    from micota_fast.model.decoder import Decoder

    with torch.device("meta"):
        decoder = Decoder(config)
    constant = decoder.flops_per_token(0)
    return decoder.num_params(), constant, decoder.flops_per_token(1) - constant


def parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a model of these shapes."""
    return _figures(config)[0]


def train_flops(config: ModelConfig, tokens: float, context: float) -> float:
    """Return FLOPs of forward and backward, by `Decoder.flops_per_token`; a third of it is the forward pass."""
    _, constant, each = _figures(config)
    return tokens * (constant + each * context)


class Training(NamedTuple):
    """What of a model is trained, and what that costs.

    Attributes:
        trained: parameters that have gradients and moments.
        adapters: parameters of LoRA's adapters.
        frozen_head: whether the output matrix has no gradient.
        constant: FLOPs to train on one token of a document, besides those for each token of its length.
        each: FLOPs for each token of its length.
    """

    trained: int
    adapters: int
    frozen_head: bool
    constant: float
    each: float

    def flops(self, tokens: float, context: float) -> float:
        """Return the FLOPs of forward and backward of `tokens` tokens in documents of `context` on average."""
        return tokens * (self.constant + self.each * context)


def training(config: ModelConfig, settings: TrainSettings) -> Training:
    """Count what `lora` and `freeze` leave to train, on the decoder that the trainer builds.

    Raises:
        InputError: either names what the model does not have.
    """
    lora = settings.lora
    chosen = None if lora is None else (lora.rank, tuple(lora.targets))
    return _training(config, chosen, tuple(settings.freeze), settings.dtype)


@cache
def _training(
    config: ModelConfig,
    lora: tuple[int, tuple[str, ...]] | None,
    freeze: tuple[str, ...],
    dtype: Literal["bfloat16", "float32"],
) -> Training:
    from micota_fast.train.lora import adapted_modules, flops_per_token
    from micota_fast.train.trainable import trainable_decoder

    adapters = None if lora is None else LoraConfig(rank=lora[0], targets=list(lora[1]))
    decoder, _ = trainable_decoder(TrainSettings(lora=adapters, freeze=list(freeze), dtype=dtype), config)
    constant = flops_per_token(decoder, 0)
    return Training(
        trained=sum(p.numel() for p in decoder.parameters() if p.requires_grad),
        adapters=sum(module.adapter_parameters for module in adapted_modules(decoder).values()),
        frozen_head=not decoder.lm_head_weight.requires_grad,
        constant=constant,
        each=flops_per_token(decoder, 1) - constant,
    )


def recomputed_flops(config: ModelConfig, tokens: float, context: float, how: str, adapters: int = 0) -> float:
    """Return the FLOPs that activation checkpointing adds to `train_flops`: what is computed a second time.

    full: the forward pass of all blocks; selective: one of the matrix products, the gate's. Either repeats LoRA's
    products, which multiply `adapters` parameters.
    """
    if how == "none":
        return 0.0
    thin = 2.0 * tokens * adapters
    if how == "full":
        head = 2 * config.vocab_size * config.hidden_size
        return train_flops(config, tokens, context) / 3 - tokens * head + thin
    gates = config.num_hidden_layers * config.hidden_size * config.intermediate_size
    return 2.0 * tokens * gates + thin
