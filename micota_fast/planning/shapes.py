"""The shapes of a checkpoint that need not be here: of its folder, of the hub's cache, known by name, or of the hub."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

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
    """Of a Qwen2.5 or an R1-Distill-Qwen model of the hub; None for others.

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


@cache
def shapes_of(location: str) -> ModelConfig:
    """Of a checkpoint's folder, or of a name on the hub; never takes longer than `HUB_TIMEOUT_S`.

    Raises:
        InputError: the folder or its config.json is missing or bad; or the hub did not give a model's config.json.
    """
    if Path(location).is_dir():
        return ModelConfig.from_checkpoint(location)
    if location.count("/") != 1 or location.startswith(("/", ".")):
        raise InputError(f"{location}: no such folder, so the shapes of the model are not known")
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
            f"folder that holds it, or run this where there is a network"
        ) from None
    return ModelConfig.from_checkpoint(file.parent)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cached_on_disk(name: str, file: str = "config.json") -> Path | None:
    """A file of a hub model in the local cache; None: it is not there."""
    import huggingface_hub

    found: Any = huggingface_hub.try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def weights_cached(name: str) -> bool:
    """Whether the local cache holds all of a hub model's weights, and not its config.json alone."""
    if cached_on_disk(name, "model.safetensors") is not None:
        return True
    index = cached_on_disk(name, "model.safetensors.index.json")
    if index is None:
        return False
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged: it must be fetched again
        return False
    return all(cached_on_disk(name, shard) is not None for shard in shards)
