"""The loss on held-out rows: what it is, that measuring it changes nothing, and that training stops by it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

from helpers.training_runs import (
    checkpoint_steps,
    finish,
    kill,
    metrics,
    start_training,
    train_config,
    wait_until,
    weights_of,
    write_corpus,
)
from micota_fast.chat.encoding import Chat
from micota_fast.config.train import TrainConfig
from micota_fast.data.tokenise import load_documents
from micota_fast.errors import InputError
from micota_fast.train import loop, prepare
from micota_fast.train.checkpoint import Checkpoints
from micota_fast.train.loop import train
from micota_fast.train.packed_loss import PackedLoss


def held_out(folder: Path, rows: int, seed: int = 1) -> str:
    """Rows like those of the corpus, with weights, which are for training alone."""
    path = write_corpus(folder / f"held-out-{rows}-{seed}.jsonl", rows, seed)
    lines = [json.loads(line) | {"weight": 1.0 + n} for n, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def plain_loss(config: TrainConfig) -> float:
    """Of the exported model: one document at a time, by transformers."""
    assert config.validation_data is not None
    chat = Chat.from_checkpoint(config.model, config.chat)
    documents = load_documents(config.validation_data, chat, config.pack_tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(Path(config.out) / "model", dtype=torch.float32)
    nll, count = 0.0, 0
    for d in range(len(documents)):
        span = slice(documents.offsets[d], documents.offsets[d + 1])
        tokens = torch.from_numpy(documents.input_ids[span]).long()
        supervised = torch.from_numpy(documents.supervised[span])[1:]
        with torch.no_grad():
            logits = model(tokens[None, :-1]).logits[0]
        nll += F.cross_entropy(logits[supervised], tokens[1:][supervised], reduction="sum").item()
        count += int(supervised.sum())
    return nll / count


def losses_of(config: TrainConfig) -> dict[int, float]:
    """By step."""
    return {row["step"]: row["validation_loss"] for row in metrics(config) if "validation_loss" in row}


def summary_of(config: TrainConfig) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((Path(config.out) / "summary.json").read_text())
    return summary


@pytest.mark.parametrize(("family", "rows", "world"), [("qwen2", 9, 1), ("llama", 9, 2), ("qwen2", 2, 2)])
def test_it_equals_a_plain_computation(
    family: str, rows: int, world: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Three packs; or one for two ranks."""
    checkpoint = request.getfixturevalue(f"{family}_checkpoint")
    config = train_config(checkpoint, tmp_path, validation_data=held_out(tmp_path, rows), validate_every=3)
    finish(start_training(config, world), config)
    losses = losses_of(config)
    assert list(losses) == [3, 6, 8]
    assert losses[8] == pytest.approx(plain_loss(config), abs=1e-5)
    assert losses[8] != pytest.approx(losses[6], abs=1e-3)
    assert f"validation {losses[6]:.4f}" in Path(f"{config.out}.log").read_text()
    lowest = min(losses, key=losses.__getitem__)
    assert summary_of(config)["validation"] == {
        "lowest": losses[lowest],
        "step": lowest,
        "since": sum(step > lowest for step in losses),
    }


@pytest.mark.parametrize("world", [1, 2])
def test_measuring_changes_nothing(world: int, qwen2_checkpoint: Path, tmp_path: Path) -> None:
    without = train_config(qwen2_checkpoint, tmp_path, activation_checkpointing="selective")
    measured = replace(without, out=str(tmp_path / "measured"), validation_data=held_out(tmp_path, 5))
    for config in (without, measured):
        finish(start_training(config, world), config)
    assert list(losses_of(measured)) == list(range(1, 9)), "ten a run where it has so many steps"
    rows = [{key: value for key, value in row.items() if key != "validation_loss"} for row in metrics(measured)]
    assert rows == metrics(without)
    assert all(torch.equal(tensor, weights_of(without)[name]) for name, tensor in weights_of(measured).items())


def overfitting(checkpoint: Path, folder: Path, **options: Any) -> TrainConfig:
    """The fewer the rows and the higher the learning rate, the sooner the loss on others rises."""
    write_corpus(folder / "corpus.jsonl", rows=6)
    settings = {"lr": 5e-3, "epochs": 40, "packs_per_step": 1, "early_stop": 3, "validate_every": 2} | options
    return train_config(checkpoint, folder, validation_data=held_out(folder, 4), **settings)


@pytest.fixture(scope="module")
def stopped(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = overfitting(qwen2_checkpoint, tmp_path_factory.mktemp("stopped"))
    finish(start_training(config, world=2), config)
    return config


def test_early_stop_keeps_the_best_weights(stopped: TrainConfig) -> None:
    losses = losses_of(stopped)
    best = min(losses, key=losses.__getitem__)
    assert best > 2
    assert list(losses) == list(range(2, best + 2 * 3 + 1, 2)), "three more without a lower one"
    summary = summary_of(stopped)
    assert summary["steps"] > summary["final"]["step"] == max(losses)
    assert summary["validation"] == {"lowest": losses[best], "step": best, "since": 3}
    assert plain_loss(stopped) == pytest.approx(losses[best], abs=1e-5)
    card = (Path(stopped.out) / "model" / "README.md").read_text()
    assert f"after step {best} of {max(losses)}, the best on held-out rows" in card
    assert f"| validation_loss | {losses[best]} |" in card


def test_the_exported_weights_are_those_of_the_checkpoint(
    qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "discard", lambda self: None)
    config = overfitting(qwen2_checkpoint, tmp_path, keep_checkpoints=1)
    train(config)
    losses = losses_of(config)
    best = min(losses, key=losses.__getitem__)
    assert checkpoint_steps(config) == [best, max(losses)]
    folders = [Path(config.out) / "checkpoints" / f"step-{step:08d}" for step in (best, max(losses))]
    stored, last = (load_file(folder / "rank-00000.safetensors") for folder in folders)
    for name, tensor in weights_of(config).items():
        assert torch.equal(tensor, stored[f"model.{name}"])
        assert not torch.equal(tensor, last[f"model.{name}"])


@pytest.mark.slow
def test_killed_and_resumed_it_stops_alike(stopped: TrainConfig, tmp_path: Path) -> None:
    config = replace(stopped, out=str(tmp_path / "out"))
    last = max(losses_of(stopped))
    for until in (3, last - 3):  # the second time between the best step and the last
        processes = start_training(config, world=2)
        wait_until(lambda until=until: max(checkpoint_steps(config), default=0) >= until, processes)  # type: ignore[misc]
        kill(processes)
    finish(start_training(config, world=2), config)
    assert Path(f"{config.out}.log").read_text().count("resuming after step") == 2
    assert metrics(config) == metrics(stopped)
    assert summary_of(config) | {"timing": None} == summary_of(stopped) | {"timing": None}
    assert all(torch.equal(tensor, weights_of(stopped)[name]) for name, tensor in weights_of(config).items())


def test_ended_in_the_export_it_is_not_trained_further(
    qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = overfitting(qwen2_checkpoint, tmp_path)
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)

    def full(*_: object) -> None:
        raise InputError("no space left")

    monkeypatch.setattr(loop, "export", full)
    with pytest.raises(InputError, match="no space left"):
        train(config)
    monkeypatch.undo()
    train(config)
    assert metrics(config) == metrics(whole)
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(config).items())


def test_a_loss_that_is_not_finite_is_never_the_best(
    llama_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that only the held-out row uses is infinite once the checkpoint, in which none may be, has been read."""
    (token,) = Tokenizer.from_file(str(llama_checkpoint / "tokenizer.json")).encode("~", add_special_tokens=False).ids
    load = prepare.load_initial_weights

    def load_and_break(model: PackedLoss, *args: Any) -> None:
        load(model, *args)
        with torch.no_grad():
            model.decoder.model.embed_tokens.weight[token] = math.inf

    monkeypatch.setattr(prepare, "load_initial_weights", load_and_break)
    (tmp_path / "held-out.jsonl").write_text('{"problem": "~", "completion": "1"}\n')
    config = train_config(llama_checkpoint, tmp_path, validation_data=str(tmp_path / "held-out.jsonl"), early_stop=3)
    train(config)
    assert losses_of(config) == {1: None, 2: None, 3: None}
    assert "NaN" not in (Path(config.out) / "metrics.jsonl").read_text()
    assert summary_of(config)["validation"] == {"lowest": None, "step": None, "since": 3}
    assert "those after the last step, 3." in (Path(config.out) / "model" / "README.md").read_text()


def test_early_stop_without_held_out_rows_is_refused() -> None:
    with pytest.raises(InputError, match="`early_stop` needs `validation_data`"):
        TrainConfig(model="", data="", out="", early_stop=2)
