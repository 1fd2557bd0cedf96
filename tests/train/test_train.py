"""The trainer in one process, against a plain loop and against itself packed, split and accumulated otherwise."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from helpers.training_runs import clipped_step, metrics, train_config, weights_of
from micota_fast.chat.encoding import Chat
from micota_fast.config.loader import dump
from micota_fast.config.train import TrainConfig
from micota_fast.data.batches import PackedSteps, packed_batch
from micota_fast.data.tokenise import Documents, load_documents
from micota_fast.errors import InputError
from micota_fast.model.safetensors_io import load_model
from micota_fast.train.loop import train
from micota_fast.train.meters import duration
from micota_fast.train.packed_loss import PackedLoss
from micota_fast.train.parallel import parallelize
from micota_fast.train.world import World

CPU = World(0, 1, torch.device("cpu"))


def load_corpus(config: TrainConfig) -> Documents:
    chat = Chat.from_checkpoint(config.model, config.chat)
    return load_documents(config.data, chat, config.pack_tokens)


@pytest.fixture(scope="module")
def trained(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = train_config(qwen2_checkpoint, tmp_path_factory.mktemp("trained"), weight_decay=0.1)
    assert train(config)
    return config


def test_equals_a_plain_loop(trained: TrainConfig) -> None:
    """transformers' model, one document at a time, torch's loss and optimizer, schedule and clipping written out."""
    documents = load_corpus(trained)
    steps = PackedSteps(documents, trained.pack_tokens, trained.packs_per_step, seed=trained.seed)
    total = 2 * steps.steps_per_epoch
    assert steps.n_packs % trained.packs_per_step == 1, "the last step of an epoch should be a partial one"
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32)
    decayed = [p for n, p in model.named_parameters() if "norm" not in n and not n.endswith("bias")]
    others = [p for n, p in model.named_parameters() if "norm" in n or n.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)

    rows = metrics(trained)
    assert [row["step"] for row in rows] == list(range(1, total + 1))
    for step, row in enumerate(rows):
        ids = [d for batch in steps.step(step)[0] for d in batch.doc_ids]
        nll, count = torch.zeros(()), 0
        for d in ids:
            span = slice(documents.offsets[d], documents.offsets[d + 1])
            tokens = torch.from_numpy(documents.input_ids[span]).long()
            supervised = torch.from_numpy(documents.supervised[span])[1:]
            logits = model(tokens[None, :-1]).logits[0]
            nll = nll + F.cross_entropy(logits[supervised], tokens[1:][supervised], reduction="sum")
            count += int(supervised.sum())
        loss = nll / count
        loss.backward()
        norm = clipped_step(model, optimizer, trained.max_grad_norm, row["lr"])
        assert row["supervised"] == count
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"]
    for name, ours in weights_of(trained).items():
        torch.testing.assert_close(ours, model.state_dict()[name], rtol=0, atol=2e-5)


def gradients(checkpoint: Path, config: TrainConfig, batches: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of documents laid out as `batches`, one backward pass each."""
    documents = load_corpus(config)
    total = int(documents.n_targets[[d for ids in batches for d in ids]].sum())
    model = PackedLoss(load_model(checkpoint, torch.float64), "sdpa")
    loss = 0.0
    for ids in batches:
        b = packed_batch(documents, torch.tensor(ids).numpy())
        part = model(b.input_ids, b.position_ids, b.targets, None, b.cu_seqlens, b.lengths, b.n_supervised, total)
        part.backward()
        loss += part.item()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("batches", [[[0], [1], [2], [3], [4]], [[3, 1], [0, 4, 2]], [[4, 3, 2, 1, 0]]])
def test_packing_and_accumulation_change_nothing(
    batches: list[list[int]], qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    config = train_config(qwen2_checkpoint, tmp_path)
    loss, expected = gradients(qwen2_checkpoint, config, [[0, 1, 2, 3, 4]])
    got_loss, got = gradients(qwen2_checkpoint, config, batches)
    assert got_loss == pytest.approx(loss, rel=1e-12)
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12)


def test_bfloat16_computes_near_float32_and_keeps_float32_weights(
    qwen2_checkpoint: Path, tmp_path: Path, trained: TrainConfig
) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, weight_decay=0.1, dtype="bfloat16")
    train(config)
    for low, exact in zip(metrics(config), metrics(trained), strict=True):
        assert low["loss"] == pytest.approx(exact["loss"], rel=0.01)
        assert low["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.03)
        assert low["loss"] != exact["loss"]
    weights = weights_of(config)
    assert {t.dtype for t in weights.values()} == {torch.float32}, "of the checkpoint it started from"
    assert any((t != t.bfloat16().float()).any() for t in weights.values()), "the weights were rounded on the way"


def test_documents_past_the_models_positions_are_told(
    qwen2_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = shutil.copytree(qwen2_checkpoint, tmp_path / "short")
    changed = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 60}
    (short / "config.json").write_text(json.dumps(changed))
    lengths = load_corpus(train_config(short, tmp_path)).lengths
    over = int((lengths > 60).sum())
    assert 0 < over < len(lengths)
    train(train_config(short, tmp_path, max_steps=1))
    assert f"WARNING: {over} documents (longest: {lengths.max()} tokens)" in capsys.readouterr().out
    train(train_config(qwen2_checkpoint, tmp_path, out=str(tmp_path / "other"), max_steps=1))
    assert "max_position_embeddings" not in capsys.readouterr().out


def test_outputs(trained: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(trained.out)
    assert {p.name for p in out.iterdir()} == {"model", "metrics.jsonl", "summary.json", ".lock"}
    summary = json.loads((out / "summary.json").read_text())
    documents = load_corpus(trained)
    assert summary["final"] == metrics(trained)[-1]
    assert summary["data"]["documents"] == len(documents) == 23
    assert summary["data"]["tokens"] == len(documents.input_ids)
    assert summary["timing"]["tokens_per_s"] > 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    ours = load_model(out / "model")
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in ours.named_parameters())

    # Other places and other reporting make the same result, byte for byte.
    again = dataclasses.replace(trained, out=str(tmp_path / "again"), log_every=7, checkpoint_every=4, save_dtype=None)
    train(again)
    printed = capsys.readouterr().out
    assert metrics(again) == metrics(trained)
    weights = out / "model" / "model.safetensors"
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == weights.read_bytes()
    for part in (
        "23 documents of 23 rows",
        "0 dropped",
        "attention: sdpa (",
        "supervised tok/s",
        "left 0:00",
        "float32",
    ):
        assert part in printed

    # Finished: said, and nothing written.
    written = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert train(trained)
    assert "already contains the finished result of this run" in capsys.readouterr().out
    assert written == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(InputError, match=r"holds the result of another run \(options\.epochs: 2\.0 there, 1\.0 here\)"):
        train(dataclasses.replace(trained, epochs=1.0))


def test_random_init_and_save_dtype(qwen2_checkpoint: Path, tmp_path: Path, trained: TrainConfig) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, init="random", seed=3, save_dtype="bfloat16", max_steps=1)
    train(config)
    first = metrics(config)[0]["loss"]
    assert first == pytest.approx(math.log(320), rel=0.02), "fresh weights predict nothing yet"
    assert {t.dtype for t in weights_of(config).values()} == {torch.bfloat16}
    other = dataclasses.replace(config, seed=4, out=str(tmp_path / "other"))
    train(other)
    assert metrics(other)[0]["loss"] != first


def test_dropped_and_bad_rows_are_counted(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path, max_doc_tokens=60, skip_bad_rows=True, max_steps=1)
    with Path(config.data).open("a", encoding="utf-8") as file:
        file.write('{"problem": "no answer"}\n')
    train(config)
    data = json.loads((Path(config.out) / "summary.json").read_text())["data"]
    assert data["rows"] == 24
    assert data["rejected"] == 1
    assert data["dropped"] > 0
    assert data["documents"] == 23 - data["dropped"]
    assert (Path(config.out) / "bad_rows.jsonl").is_file()


def test_a_foreign_model_folder_is_not_overwritten(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = train_config(qwen2_checkpoint, tmp_path)
    (Path(config.out) / "model").mkdir(parents=True)
    (Path(config.out) / "model" / "mine").touch()
    with pytest.raises(InputError, match="no run of this folder made it"):
        train(config)
    assert (Path(config.out) / "model" / "mine").exists()


@pytest.mark.parametrize(
    ("option", "package"), [({"wandb": "project"}, "wandb"), ({"tensorboard": True}, "tensorboard")]
)
def test_a_missing_tracker_is_named(
    option: dict[str, object], package: str, qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=rf"pip install 'micota-fast\[{package}\]'"):
        train(train_config(qwen2_checkpoint, tmp_path, **option))
    with pytest.raises(InputError, match=rf"pip install 'micota-fast\[{package}\]'"):  # said before anything is read
        train(train_config(tmp_path / "nowhere", tmp_path, **option))


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (math.nan, 0.9)},
        {"weight_decay": -0.1},
        {"max_grad_norm": math.nan},
        *({name: math.inf} for name in ("epochs", "lr", "eps", "weight_decay", "warmup_ratio", "min_lr_ratio")),
        *({name: math.nan} for name in ("epochs", "lr", "eps", "weight_decay", "warmup_ratio", "min_lr_ratio")),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"`{next(iter(wrong))}` must"):
        TrainConfig(model="", data="", out="", **wrong)


def test_the_default_does_not_wait_for_the_device_at_every_step() -> None:
    assert TrainConfig(model="", data="", out="").log_every == 10


def test_one_process_in_float32_is_left_unwrapped(qwen2_checkpoint: Path) -> None:
    model = PackedLoss(load_model(qwen2_checkpoint, torch.float32), "sdpa")
    parallelize(model, TrainConfig(model="", data="", out="", dtype="float32"), CPU)
    assert type(model) is PackedLoss


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 61, 3723, math.inf)] == ["0:00", "1:01", "1:02:03", "?"]


def test_command_line_errors(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: nowhere\ndata: none.jsonl\nout: out\nlearning_rate: 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "micota_fast.train", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"{path}, line 4" in done.stderr
    assert "learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_dump_of_a_config_is_a_config_file(trained: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(trained))
    command = [sys.executable, "-m", "micota_fast.train", str(tmp_path / "config.yaml"), "--set", "log_every=3"]
    command += ["--set", "checkpoint_every=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "already contains the finished result of this run" in done.stdout
