"""Checkpoints: what we save opens in transformers, and what is wrong with one is named."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.checkpoints import REMOVED, VOCAB_SIZE, edit_config, edit_tensors, make_checkpoint
from helpers.waiting import soon
from micota_fast.chat.encoding import Chat
from micota_fast.common.safetensors_file import read_header
from micota_fast.config.generation import ChatConfig
from micota_fast.errors import InputError
from micota_fast.model.attention import PackedAttention
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder, parameter_shapes
from micota_fast.model.folder import resolve_checkpoint, tensor_files
from micota_fast.model.safetensors_io import init_random, load_model, save_checkpoint

FAMILIES = ["qwen2", "qwen3", "llama"]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def logits(model: Decoder, ids: Tensor) -> Tensor:
    attend = PackedAttention(torch.tensor([0, len(ids)], dtype=torch.int32), [len(ids)])
    with torch.no_grad():
        return model(ids, torch.arange(len(ids)), attend) @ model.lm_head_weight.T


def hf_logits(directory: Path, ids: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids[None]).logits[0]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 100_000], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_opens_in_transformers(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, max_shard_bytes: int
) -> None:
    source = request.getfixturevalue(f"{family}_checkpoint")
    model = init_random(ModelConfig.from_checkpoint(source), seed=5)
    out = tmp_path / "out"
    save_checkpoint(model.state_dict(), model.config, source, out, max_shard_bytes=max_shard_bytes)
    ids = torch.arange(50) * 7 % VOCAB_SIZE
    torch.testing.assert_close(hf_logits(out, ids), logits(model, ids), atol=1e-4, rtol=0)
    assert torch.equal(logits(load_model(out), ids), logits(model, ids))
    theirs, ours = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "1 + 2 = ?"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [2, 0]
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert (out / "model.safetensors.index.json").exists() == (max_shard_bytes == 100_000)
    assert (shards == ["model.safetensors"]) == (max_shard_bytes != 100_000)
    if max_shard_bytes == 100_000:
        assert len(shards) > 3
        assert all((out / name).stat().st_size < 100_000 + 5_000 for name in shards)
        total = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        assert total == 4 * model.num_params()


def test_a_checkpoint_of_transformers_4_opens_in_both(tmp_path: Path) -> None:
    """RoPE and dtype under their old names: read alike by us and by transformers, and kept when saving."""
    new = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    new |= {"original_max_position_embeddings": 32, "rope_theta": 700.0}
    source = make_checkpoint(tmp_path / "new", "llama", rope_parameters=new)
    expected = ModelConfig.from_checkpoint(source)
    old = {key: value for key, value in new.items() if key != "rope_theta"}
    old["type"] = old.pop("rope_type")
    edit_config(source, rope_parameters=REMOVED, dtype=REMOVED)
    edit_config(source, rope_theta=700.0, rope_scaling=old, torch_dtype="float32")
    config = ModelConfig.from_checkpoint(source)
    assert config == expected
    assert config.dtype_name == "float32"
    model = load_model(source)
    save_checkpoint(model.state_dict(), config, source, tmp_path / "out")
    ids = torch.arange(100) % VOCAB_SIZE
    for directory in (source, tmp_path / "out"):
        torch.testing.assert_close(hf_logits(directory, ids), logits(model, ids), atol=1e-4, rtol=0)


def test_the_saved_config_speaks_to_transformers_4_and_5(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 700.0}
    source = make_checkpoint(tmp_path / "source", "qwen2", rope_parameters=rope)
    model = load_model(source)
    save_checkpoint(model.state_dict(), model.config, source, tmp_path / "out", torch.bfloat16)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: after[key] for key in before} == {**before, "dtype": "bfloat16"}
    assert (after["torch_dtype"], after["rope_theta"]) == ("bfloat16", 700.0)
    assert after["rope_scaling"] == rope
    assert ModelConfig.from_checkpoint(tmp_path / "out") == model.config
    ids = torch.arange(100) % VOCAB_SIZE
    torch.testing.assert_close(
        hf_logits(tmp_path / "out", ids), logits(load_model(tmp_path / "out", "float32"), ids), atol=1e-4, rtol=0
    )


def test_saving_is_deterministic_and_converts(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(qwen3_checkpoint)
    for name in ("a", "b"):
        save_checkpoint(model.state_dict(), model.config, qwen3_checkpoint, tmp_path / name, "bfloat16", 50_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    for name, tensor in (item for file in files for item in load_file(file).items()):
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())
    assert next(load_model(tmp_path / "a").parameters()).dtype == torch.bfloat16
    assert next(load_model(tmp_path / "a", "auto").parameters()).dtype == torch.bfloat16
    assert next(load_model(tmp_path / "a", torch.float64).parameters()).dtype == torch.float64


def test_tensors_are_taken_once_and_file_by_file(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(qwen2_checkpoint)
    taken: list[str] = []

    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            taken.append(name)
            return model.state_dict()[name]

        def __iter__(self) -> Iterator[str]:
            return iter(model.state_dict())

        def __len__(self) -> int:
            return len(model.state_dict())

    save_checkpoint(Lazy(), model.config, qwen2_checkpoint, tmp_path / "out", max_shard_bytes=100_000)
    assert taken == list(parameter_shapes(model.config))


def test_a_saved_chat_is_the_one_of_the_source(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    """Wherever a checkpoint keeps its chat template."""
    config_name, key = "tokenizer_config.json", "chat_template"
    plain = json.loads((qwen2_checkpoint / config_name).read_text())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    for place in (config_name, "named", "chat_template.jinja", "chat_template.json"):
        source = shutil.copytree(qwen2_checkpoint, tmp_path / place / "source")
        kept = {k: v for k, v in plain.items() if k != key}
        if place == config_name:
            kept[key] = template
        elif place == "named":
            kept[key] = [{"name": "default", "template": template}]
        elif place == "chat_template.jinja":
            (source / place).write_text(template)
        else:
            (source / place).write_text(json.dumps({key: template}))
        (source / config_name).write_text(json.dumps(kept))
        model, saved = load_model(source), tmp_path / place / "saved"
        save_checkpoint(model.state_dict(), model.config, source, saved)
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        texts = [Chat.from_checkpoint(path, ChatConfig()).render(messages, False) for path in (source, saved)]
        assert texts == ["user: Hi<|im_end|>assistant: Ho<|im_end|>"] * 2, place


def test_nothing_is_left_of_a_save_that_fails(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(qwen2_checkpoint)
    state = dict(model.state_dict())
    state[Q_PROJ] = state[Q_PROJ][:-1]
    with pytest.raises(InputError, match=rf"{Q_PROJ}.*\[63, 64\]"):
        save_checkpoint(state, model.config, qwen2_checkpoint, tmp_path / "out", max_shard_bytes=100_000)
    del state[Q_PROJ]
    with pytest.raises(InputError, match=f"tensor {Q_PROJ} is missing"):
        save_checkpoint(state, model.config, qwen2_checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_save_left_is_cleared(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.0123456789abcdef.partial"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    model = load_model(qwen2_checkpoint)
    save_checkpoint(model.state_dict(), model.config, qwen2_checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_an_existing_checkpoint_is_not_overwritten(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(qwen2_checkpoint)
    save_checkpoint(model.state_dict(), model.config, qwen2_checkpoint, tmp_path)  # an empty folder is fine
    before = contents(tmp_path)
    with pytest.raises(InputError, match="already exists"):
        save_checkpoint(model.state_dict(), model.config, qwen2_checkpoint, tmp_path)
    assert contents(tmp_path) == before


def test_permissions_follow_the_umask(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(qwen2_checkpoint)
    before = os.umask(0o022)
    try:
        save_checkpoint(model.state_dict(), model.config, qwen2_checkpoint, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


# --- loading ----------------------------------------------------------------------------------------------------------


def test_loading_leaves_the_files_alone(copy: Path) -> None:
    before = contents(copy)
    model = load_model(copy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    del model
    assert contents(copy) == before


def test_a_missing_tensor_is_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(InputError, match=rf"copy: tensor {Q_PROJ} is missing"):
        load_model(copy)


def test_an_unexpected_tensor_is_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({"model.layers.7.extra": torch.ones(2)}))
    with pytest.raises(InputError, match=r"model\.safetensors: unexpected tensor model\.layers\.7\.extra"):
        load_model(copy)


def test_rotary_buffers_of_old_checkpoints_are_ignored(copy: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.ones(8)}))
    load_model(copy)


def test_a_wrong_shape_is_named(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:32].clone()}))
    message = rf"model\.safetensors: tensor {Q_PROJ} has shape \[32, 64\]; .*config\.json calls for \[64, 64\]"
    with pytest.raises(InputError, match=message):
        load_model(copy)


def test_tensors_that_are_no_floats_are_refused(copy: Path) -> None:
    edit_tensors(copy, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.int8)}))
    with pytest.raises(InputError, match=f"tensor {Q_PROJ} is stored as torch.int8"):
        load_model(copy)


def test_a_head_beside_a_tied_embedding_must_equal_it(copy: Path) -> None:
    edit_tensors(copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(copy).num_params() == sum(shape.numel() for shape in parameter_shapes_of(copy).values())
    edit_tensors(copy, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(copy)


def parameter_shapes_of(directory: Path) -> dict[str, torch.Size]:
    return parameter_shapes(ModelConfig.from_checkpoint(directory))


def test_a_truncated_file_is_named_with_the_tensor_it_ends_in(copy: Path) -> None:
    path = copy / "model.safetensors"
    size = path.stat().st_size
    header_length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_length])
    ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
    last = max(ends, key=lambda name: ends[name])
    os.truncate(path, size - 1)
    with pytest.raises(InputError, match=rf"model\.safetensors: damaged.*within tensor {last}, and should have {size}"):
        load_model(copy)
    os.truncate(path, 100)
    with pytest.raises(InputError, match=r"ends within its header \(100 bytes\)"):
        load_model(copy)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.safetensors: damaged"):
        load_model(copy)


def test_a_damaged_header_is_named(copy: Path) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or not a safetensors file"):
        load_model(copy)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("a", "[" + ",".join(["9" * 290] * 60_000) + "]"), ("a", "[9223372036854775808]"), ("a" * 1001, "[]")],
)
def test_a_header_with_sizes_that_cannot_be_is_refused_at_once(tmp_path: Path, name: str, shape: str) -> None:
    """The product of the first one's would take hours."""
    header = f'{{"{name}": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 4]}}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with soon(), pytest.raises(InputError, match=r"^.{,300}damaged or not a safetensors file: .{,200}$"):
        read_header(tmp_path / "x.safetensors")


@pytest.fixture
def sharded(qwen2_checkpoint: Path, tmp_path: Path) -> Path:
    model = load_model(qwen2_checkpoint)
    save_checkpoint(model.state_dict(), model.config, qwen2_checkpoint, tmp_path / "s", max_shard_bytes=100_000)
    return tmp_path / "s"


def test_an_index_that_names_a_missing_file(sharded: Path) -> None:
    gone = tensor_files(sharded)[Q_PROJ]
    gone.unlink()
    with pytest.raises(
        InputError, match=rf"index\.json: model\..* should be in {gone.name}, which is not in the folder"
    ):
        load_model(sharded)


def test_an_index_that_names_a_file_with_too_long_a_name(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"][Q_PROJ] = "a" * 300
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"index\.json: {Q_PROJ} should be in a*, which is not in the folder"):
        load_model(sharded)


def test_an_index_may_not_point_out_of_the_folder(sharded: Path, qwen2_checkpoint: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"][Q_PROJ] = os.path.relpath(qwen2_checkpoint / "model.safetensors", sharded)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"{Q_PROJ} should be in model.safetensors, which is not in the folder"):
        load_model(sharded)


def test_an_index_that_disagrees_with_its_files(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    right = index["weight_map"][Q_PROJ]
    index["weight_map"][Q_PROJ] = next(file for file in files if file > right)
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"{right}: tensor {Q_PROJ} is not listed in"):
        load_model(sharded)
    index["weight_map"][Q_PROJ] = right
    index["weight_map"]["model.layers.0.absent"] = right
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"{right}: tensor model\.layers\.0\.absent is missing"):
        load_model(sharded)
    path.write_text("{")
    with pytest.raises(InputError, match=r"index\.json:1: not JSON"):
        load_model(sharded)


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    path = tensor_files(sharded)[Q_PROJ]
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(InputError, match=rf"{path.name}: damaged.* within tensor "):
        load_model(sharded)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="pickled weights are not read"):
        load_model(copy)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"architectures: \['GPT2LMHeadModel'\] is not supported"),
        ({"architectures": REMOVED}, "architectures: None is not supported"),
        ({"hidden_size": REMOVED}, "hidden_size: missing"),
        ({"hidden_size": -4}, "hidden_size: expected a positive integer, found -4"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: expected a positive integer, found 2.5"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"num_key_value_heads": REMOVED}, "num_key_value_heads is missing"),
        ({"hidden_size": 66}, "hidden_size=66 is not a multiple of num_attention_heads=4"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, found 'yes'"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantised"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1 is not supported"),
        (
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8, "layer_types": REMOVED},
            "use_sliding_window: sliding-window attention is not supported",
        ),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types: 'sliding_attention' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters\.rope_type: 'longrope' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling\.rope_type: 'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor: missing"),
        ({"rope_parameters": [1]}, "rope_parameters: expected an object, found list"),
        ({"rope_theta": "x", "rope_parameters": REMOVED}, "rope_theta: expected a positive number, found 'x'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(copy: Path, change: dict[str, Any], message: str) -> None:
    edit_config(copy, **change)
    with pytest.raises(InputError, match=message) as raised:
        load_model(copy)
    assert str(raised.value).startswith(f"{copy / 'config.json'}: ")


def test_a_config_that_is_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json:1: not JSON"):
        load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_model(copy)


# --- names of the hub -------------------------------------------------------------------------------------------------


def test_a_folder_is_itself(qwen2_checkpoint: Path) -> None:
    assert resolve_checkpoint(str(qwen2_checkpoint)) == qwen2_checkpoint


@pytest.mark.parametrize("name", ["./nowhere/model", "/nowhere/model", "student"])
def test_a_missing_folder_is_not_sought_on_the_hub(name: str) -> None:
    with pytest.raises(InputError, match="no such folder; name a checkpoint's folder"):
        resolve_checkpoint(name)


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"hf download Qwen/Qwen2\.5-3B-Instruct --local-dir DIR"):
        resolve_checkpoint("Qwen/Qwen2.5-3B-Instruct")
