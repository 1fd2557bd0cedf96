"""config.json of a checkpoint: what the decoder needs, checked; what it cannot honour, refused. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from micota_fast.common.dtypes import FLOATS
from micota_fast.common.json_io import read_json_if_there
from micota_fast.errors import InputError
from micota_fast.model.folder import what_else
from micota_fast.model.json_keys import Keys
from micota_fast.model.rope_config import RopeConfig, read_rope, written_rope

_MOST_PARAMETERS = 10**14


@dataclass(frozen=True)
class Family:
    """In what a family of decoders differs from Llama's shape. Another one is an entry of `FAMILIES` and a parity test.

    Args:
        max_position_embeddings: default, as of the family's configuration class in transformers.
        attention_bias: which projections of the attention have a bias: q, k and v; or none; or as the key
            `attention_bias` says, then also the output's.
        kv_heads_stated: config.json has to state `num_key_value_heads`; otherwise there are as many as query heads.
        head_dim: default; None: hidden_size / num_attention_heads.
        mlp_bias: the key `mlp_bias` is known.
        qk_norm: heads of queries and keys are normalised.
        windowed: `sliding_window`, unless null, holds in all layers; otherwise only with `use_sliding_window`.
    """

    max_position_embeddings: int
    attention_bias: Literal["qkv", "none", "as stated"] = "as stated"
    kv_heads_stated: bool = True
    head_dim: int | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    windowed: bool = False


FAMILIES = {
    "Qwen2ForCausalLM": Family(max_position_embeddings=32768, attention_bias="qkv"),
    "Qwen3ForCausalLM": Family(max_position_embeddings=32768, head_dim=128, qk_norm=True),
    "LlamaForCausalLM": Family(max_position_embeddings=2048, kv_heads_stated=False, mlp_bias=True),
    "MistralForCausalLM": Family(max_position_embeddings=131072, attention_bias="none", windowed=True),
}
"""The families that the decoder computes, by their name under `architectures` in config.json."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a decoder. Field names are those of config.json; `raw` is that file as it was read, for saving."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_checkpoint(cls, directory: Path | str) -> "ModelConfig":
        """Read `directory`/config.json. Raises InputError, naming the file and key, for what cannot be honoured."""
        path = Path(directory) / "config.json"
        raw = read_json_if_there(path)
        if raw is None:
            why = what_else(path.parent) or "; a checkpoint folder holds config.json and *.safetensors"
            raise InputError(f"{path}: no such file{why}")
        return cls.from_dict(raw, str(path))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], where: str = "config") -> "ModelConfig":
        """Build from the content of a config.json; `where` names it in errors."""
        if not isinstance(d, Mapping):
            raise InputError(f"{where}: expected a JSON object, found {type(d).__name__}")
        keys = Keys(d, where)
        architecture = _architecture(keys)
        family = FAMILIES[architecture]
        _refuse_unsupported(keys, family)
        hidden_size, heads = keys.positive_int("hidden_size"), keys.positive_int("num_attention_heads")
        if d.get("num_key_value_heads") is None and family.kv_heads_stated:
            raise InputError(
                f"{where}: num_key_value_heads is missing; state it ({heads} for plain multi-head attention)"
            )
        kv_heads = keys.positive_int("num_key_value_heads", heads)
        if heads % kv_heads:
            raise InputError(
                f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            )
        if d.get("head_dim") is None and family.head_dim is None and hidden_size % heads:
            raise InputError(f"{where}: hidden_size={hidden_size} is not a multiple of num_attention_heads={heads}")
        head_dim = keys.positive_int("head_dim", family.head_dim or hidden_size // heads)
        if head_dim % 2:
            raise InputError(f"{where}: head_dim={head_dim} is odd; rotary position embedding needs pairs")
        layers, intermediate_size = (
            keys.positive_int("num_hidden_layers", most=10_000),
            keys.positive_int("intermediate_size"),
        )
        vocab_size = keys.positive_int("vocab_size")
        parameters = hidden_size * (
            2 * vocab_size + layers * ((heads + kv_heads) * 2 * head_dim + 3 * intermediate_size)
        )
        if parameters > _MOST_PARAMETERS:
            raise InputError(
                f"{where}: vocab_size, hidden_size, num_hidden_layers, num_attention_heads, head_dim and "
                f"intermediate_size make {parameters:.2g} parameters; one of them is wrong"
            )
        max_positions = keys.positive_int("max_position_embeddings", family.max_position_embeddings)
        stated_bias = family.attention_bias == "as stated" and keys.boolean("attention_bias", False)
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
            initializer_range=keys.number("initializer_range", 0.02),
            qkv_bias=stated_bias or family.attention_bias == "qkv",
            o_bias=stated_bias,
            mlp_bias=family.mlp_bias and keys.boolean("mlp_bias", False),
            qk_norm=family.qk_norm,
            rope=read_rope(keys, max_positions),
            raw=dict(d),
        )

    @property
    def dtype_name(self) -> str | None:
        """The dtype in which the checkpoint says it is stored, one of `FLOATS`; None if it does not say, or "auto"."""
        return _dtype_name(self.raw.get("dtype")) or _dtype_name(self.raw.get("torch_dtype"))

    def to_dict(self, dtype_name: str) -> dict[str, Any]:
        """Return the config.json to save: the one that was read, with the dtype of the saved tensors.

        transformers 5 keeps the dtype in `dtype` and RoPE in `rope_parameters`; transformers 4 and the tools built on
        it read `torch_dtype`, `rope_theta` and `rope_scaling`. Both are written.
        """
        return {**self.raw, "dtype": dtype_name, "torch_dtype": dtype_name, **written_rope(self.rope, self.raw)}


def _dtype_name(value: Any) -> str | None:
    name = None if value is None else str(value).removeprefix("torch.")
    return None if name == "auto" else name


def _architecture(keys: Keys) -> str:
    named = keys.d.get("architectures")
    for architecture in FAMILIES:
        if named == [architecture]:
            return architecture
    raise keys.refuse("architectures", f"{named!r} is not supported; supported are {', '.join(FAMILIES)}")


def _refuse_unsupported(keys: Keys, family: Family) -> None:
    """Refuse what would change the result if it were ignored."""
    d = keys.d
    if d.get("hidden_act", "silu") != "silu":
        raise keys.refuse("hidden_act", f"{d['hidden_act']!r} is not supported, only 'silu'")
    if d.get("quantization_config"):
        raise keys.refuse("quantization_config", "quantised checkpoints are not supported; dequantise it first")
    if d.get("attention_dropout"):
        raise keys.refuse("attention_dropout", f"{d['attention_dropout']!r} is not supported, only 0.0")
    for key in ("dtype", "torch_dtype"):
        if (name := _dtype_name(d.get(key))) not in (None, *FLOATS):
            raise keys.refuse(key, f"{name!r} is not supported; supported are auto, {', '.join(FLOATS)}")
    kinds = d.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise keys.refuse("layer_types", f"expected a list, found {kinds!r}")
    for kind in kinds or []:
        if kind != "full_attention":
            raise keys.refuse("layer_types", f"{kind!r} is not supported, only 'full_attention'")
    # The window holds from layer `max_window_layers` on; many checkpoints state one that is never reached.
    first = d.get("max_window_layers", 28)
    if keys.boolean("use_sliding_window", False) and d.get("sliding_window", 4096) is not None:
        if isinstance(first, bool) or not isinstance(first, int):
            raise keys.refuse("max_window_layers", f"expected an integer, found {first!r}")
        if first < keys.positive_int("num_hidden_layers"):
            raise keys.refuse("use_sliding_window", "sliding-window attention is not supported; set it to false")
    if family.windowed and (window := d.get("sliding_window", 4096)) is not None:
        raise keys.refuse("sliding_window", f"sliding-window attention (here of {window} tokens) is not supported")
