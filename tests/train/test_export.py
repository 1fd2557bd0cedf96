"""The exported model: gathered a parameter at a time, equal to what is trained, and opened by transformers."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers.ranks import run_ranks
from helpers.training_runs import metrics, train_config
from micota_fast.errors import InputError
from micota_fast.model import safetensors_io
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder
from micota_fast.model.safetensors_io import load_model, save_checkpoint
from micota_fast.train import export as export_module
from micota_fast.train.export import export, license_of, model_card
from micota_fast.train.loop import train
from micota_fast.train.world import World


def sharded(source: Path, world: World) -> Decoder:
    decoder = load_model(source, torch.float32)
    mesh = init_device_mesh("cpu", (world.size,))
    for module in (*decoder.model.layers, decoder):
        fully_shard(module, mesh=mesh)
    return decoder


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "narrowed": {"dtype": "bfloat16", "max_shard_bytes": 50_000},
    "in shards": {"max_shard_bytes": 100_000},
}


def _export(world: World, source: Path, tmp: Path) -> None:
    for name, options in OPTIONS.items():
        export(sharded(source, world), source, tmp / name, world, {"README.md": "card\n"}, **options)


@pytest.mark.parametrize("family", ["qwen2", "llama"])  # tied embeddings, and not
def test_streamed_from_three_ranks_equals_the_whole(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(f"{family}_checkpoint")
    decoder = load_model(source, torch.float32)
    (tmp_path / "as it is").mkdir()
    (tmp_path / "as it is" / "stale").touch()
    run_ranks(3, _export, tmp_path / "log", source, tmp_path)
    for name, options in OPTIONS.items():
        save_checkpoint(decoder.state_dict(), decoder.config, source, tmp_path / "whole" / name, **options)
        streamed = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert streamed.pop("README.md") == b"card\n"
        assert streamed == {path.name: path.read_bytes() for path in (tmp_path / "whole" / name).iterdir()}
    from transformers import AutoModelForCausalLM

    assert len(list((tmp_path / "in shards").glob("model-*.safetensors"))) > 2
    ids = torch.arange(3, 40)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, tmp_path / "in shards")
    )
    assert torch.equal(before, after)


def _measure(world: World, source: Path, out: Path) -> None:
    decoder = sharded(source, world)
    card = {"README.md": "card\n"}
    export(decoder, source, out / "first", world, card, max_shard_bytes=8_000_000)  # what is only made once is made
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = _status("VmRSS")
    export(decoder, source, out / "second", world, card, max_shard_bytes=8_000_000)
    (out / f"peak-{world.rank}").write_text(str(_status("VmHWM") - before))


def _status(key: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is reset and read in /proc")
def test_no_rank_holds_the_whole_model(tmp_path: Path) -> None:
    from helpers.checkpoints import make_checkpoint  # here, as the ranks need not import transformers

    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    source = make_checkpoint(tmp_path / "source", "llama", **shape)
    size = (source / "model.safetensors").stat().st_size
    assert size > 120_000_000
    run_ranks(2, _measure, tmp_path / "log", source, tmp_path)
    # One file's tensors, their bytes as the writer hands them over, one parameter whole, and slack.
    for rank, limit in ((0, 40_000_000), (1, 24_000_000)):
        assert int((tmp_path / f"peak-{rank}").read_text()) < limit


def _fail(world: World, source: Path, out: Path) -> None:
    with pytest.raises(InputError, match=r"model \(.*bytes.*\) could not be written: .*checkpoints are kept"):
        export(sharded(source, world), source, out / "file" / "model", world, {"README.md": "card\n"})


def test_an_error_of_rank_0_is_an_error_on_all(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    run_ranks(2, _fail, tmp_path / "log", qwen2_checkpoint, tmp_path)


def test_the_trained_model_opens_in_transformers_and_says_how_it_was_made(
    qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cards = []
    for name in ("one", "two"):
        config = train_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / name), max_steps=3)
        assert train(config)
        cards.append((tmp_path / name / "model" / "README.md").read_text())
    assert cards[0] == cards[1], "equal runs give equal cards"
    uploaded: list[tuple[Path, str]] = []

    def upload(folder: Path, name: str) -> None:
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C would not end the upload"
        uploaded.append((folder, name))

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("micota_fast.train.loop.upload", upload)
    assert train(dataclasses.replace(config, push_to_hub="org/name")), "the finished run is uploaded, not made again"
    assert uploaded == [(tmp_path / "two" / "model", "org/name")]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "one" / "model")("1 + 1 =", return_tensors="pt")
    assert model(**tokens).logits.isfinite().all()
    stored = load_file(tmp_path / "one" / "model" / "model.safetensors")
    assert torch.equal(model.state_dict()["model.norm.weight"], stored["model.norm.weight"])
    _, front, text = cards[0].split("---\n", 2)
    facts = yaml.safe_load(front)
    assert "base_model" not in facts, "the hub would take a folder's name for one of its models"
    assert "license" not in facts
    assert "datasets" not in facts
    assert facts["library_name"] == "transformers"
    assert str(tmp_path) not in text
    assert f"| loss | {metrics(config)[-1]['loss']} |" in text
    assert "after the last step, 3" in text
    assert f"torch {torch.__version__}" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["lr"] == config.lr


def test_a_model_of_the_hub_is_named_in_full() -> None:
    counts = {"documents": 1, "rows": 1, "tokens": 1, "supervised": 1}
    facts = {"parameters": 1, "processes": 1, "versions": {"torch": "2"}, "data": counts}
    identity = {"model": "0", "documents": "1", "options": {}}
    card = model_card("Qwen/Qwen2.5-3B-Instruct", "data.jsonl", identity, facts, {}, "Step 1.")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "Qwen/Qwen2.5-3B-Instruct"
    assert front.keys().isdisjoint({"license", "datasets"}), "a file's name is no data set of the hub"
    card = model_card("a/b", "hf://datasets/org/name@main/part:train", identity, facts, {}, "Step 1.", "mit")
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["datasets"], front["license"]) == (["org/name"], "mit")


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", "apache-2.0"),
        ("---\ntags: [a]\n---\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: [\n---\n", None),
        ("# Model\n---\nlicense: mit\n---\n", None),
        (None, None),
    ],
)
def test_the_license_is_what_the_card_of_the_checkpoint_states(
    card: str | None, license_: str | None, tmp_path: Path
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) == license_


def test_a_run_whose_model_could_not_be_saved_is_finished_in_another_dtype(
    qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / "whole"), save_dtype="bfloat16", max_steps=3)
    train(whole)
    failed = dataclasses.replace(whole, out=str(tmp_path / "out"), save_dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "require_room", no_room)
        with pytest.raises(InputError, match="no room"):
            train(failed)
    narrowed = dataclasses.replace(failed, save_dtype="bfloat16")
    train(narrowed)
    assert metrics(narrowed) == metrics(whole), "no step is done again"
    saved = (Path(narrowed.out) / "model" / "model.safetensors").read_bytes()
    assert saved == (Path(whole.out) / "model" / "model.safetensors").read_bytes()
    with pytest.raises(
        InputError, match=r"result of another run \(options\.save_dtype: 'bfloat16' there, 'float32' here\)"
    ):
        train(failed)


def no_room(folder: Path, needed: int) -> None:
    raise InputError(f"no room for {needed} bytes in {folder}")


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_a_dtype_of_auto_in_config_json_is_saved_as_the_tensors_were(
    stored: str, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    decoder = load_model(qwen2_checkpoint, torch.float32)
    save_checkpoint(decoder.state_dict(), decoder.config, qwen2_checkpoint, source, stored)
    config_json = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config_json | {"dtype": "auto", "torch_dtype": "auto"}))
    config = train_config(source, tmp_path, max_steps=1)
    train(config)
    saved = load_file(Path(config.out) / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, stored)}
    written = json.loads((Path(config.out) / "model" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == stored


def test_what_cannot_be_saved_is_not_trained(
    qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(config: ModelConfig, source: Path, dtype: str | None) -> None:
        raise InputError(f"{source} cannot be written again as {dtype}")

    monkeypatch.setattr(safetensors_io, "check_savable", refuse)
    config = train_config(qwen2_checkpoint, tmp_path, save_dtype="bfloat16")
    with pytest.raises(InputError, match="cannot be written again as bfloat16"):
        train(config)
    assert not list(Path(config.out).rglob("*.safetensors"))
    assert not metrics(config)
