"""Documents whose loss is NaN: their steps change nothing and are told, and too many in a row end the run, unharmed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from helpers.training_runs import (
    checkpoint_steps,
    finish,
    metrics,
    start_training,
    train_config,
    weights_of,
    write_corpus,
)
from micota_fast.chat.encoding import Chat
from micota_fast.config.loader import dump
from micota_fast.config.train import TrainConfig
from micota_fast.data.batches import PackedSteps
from micota_fast.data.tokenise import load_documents
from micota_fast.errors import InputError
from micota_fast.train import loop
from micota_fast.train.loop import train

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def checkpoint(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embedding of "~" is as large as a float32 can be: in a document of nothing else, gradients are NaN."""
    path = shutil.copytree(llama_checkpoint, tmp_path_factory.mktemp("infinite") / "model")
    weights = load_file(path / "model.safetensors")
    weights[EMBEDDING][tilde(path)] = torch.finfo(torch.float32).max
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def tilde(checkpoint: Path) -> int:
    (token,) = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode("~", add_special_tokens=False).ids
    return token


def config_with(checkpoint: Path, folder: Path, bad_steps: Iterable[int] = (), **options: object) -> TrainConfig:
    """In each of `bad_steps`, counted from 1 in the first epoch, a "~" stands in one document where others have "@"."""
    rows = [json.loads(line) for line in write_corpus(folder / "corpus.jsonl").read_text().splitlines()]
    config = train_config(checkpoint, folder, **{"out": str(folder / "out"), **options})

    def write(bad: set[int]) -> None:
        marked = (row | {"problem": "@~"[i in bad] + row["problem"]} for i, row in enumerate(rows))
        Path(config.data).write_text("".join(json.dumps(row) + "\n" for row in marked))

    write(set())
    write(
        {int(plan_steps(config).documents(step - 1)[0]) for step in bad_steps}
    )  # of the same lengths, so in that order
    return config


def plan_steps(config: TrainConfig) -> PackedSteps:
    documents = load_documents(config.data, Chat.from_checkpoint(config.model, config.chat), config.pack_tokens)
    return PackedSteps(documents, config.pack_tokens, config.packs_per_step, seed=config.seed)


def skipped(config: TrainConfig) -> list[int]:
    for row in metrics(config):
        if "skipped" in row:
            assert row["skipped"] is True
            assert row["loss"] is row["grad_norm"] is None
        else:
            assert row["loss"] > 0
    return [row["step"] for row in metrics(config) if "skipped" in row]


@pytest.fixture(scope="module")
def trained(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = config_with(checkpoint, tmp_path_factory.mktemp("trained"), [3], epochs=3, weight_decay=0.1)
    finish(start_training(config), config)
    return config


def test_a_bad_document_costs_its_step_in_each_epoch(trained: TrainConfig) -> None:
    steps = plan_steps(trained)
    (bad,) = [i for i, line in enumerate(Path(trained.data).read_text().splitlines()) if "~" in line]
    total = steps.total_steps(3)
    expected = [step + 1 for step in range(total) if bad in steps.documents(step)]
    assert len(expected) == 3
    assert expected[0] == 3
    assert skipped(trained) == expected
    assert len(metrics(trained)) == total
    log = Path(f"{trained.out}.log").read_text()
    for step in expected:
        listed = ", ".join(map(str, steps.documents(step - 1)))
        warning = f"WARNING: step {step} is skipped: its loss is "
        (line,) = [line for line in log.splitlines() if warning in line]
        assert " and the norm of its gradient nan" in line
        assert line.endswith(f"{trained.data} without the rows left out: {listed}")
    assert log.count("WARNING: step") == len(expected)
    assert "NaN" not in (Path(trained.out) / "metrics.jsonl").read_text()
    summary = json.loads((Path(trained.out) / "summary.json").read_text())
    assert summary["skipped_steps"] == 3
    assert summary["final"] == metrics(trained)[-1]


def test_it_equals_the_run_in_which_those_steps_do_nothing(
    trained: TrainConfig, llama_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint that is finite, with the optimizer left out of them."""
    done = 0

    def sound_steps_alone(optimizer: torch.optim.AdamW, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        nonlocal done
        done += 1
        if done not in skipped(trained):
            optimizer.step()

    monkeypatch.setattr(loop, "step_if_finite", sound_steps_alone)
    config = replace(trained, model=str(llama_checkpoint), out=f"{trained.out}-finite")
    train(config)
    assert not skipped(config)
    for ours, theirs in zip(metrics(trained), metrics(config), strict=True):
        assert ours == theirs or ours["step"] in skipped(trained)
    expected, found = weights_of(config), weights_of(trained)
    token = tilde(llama_checkpoint)
    assert (found[EMBEDDING][token] > 1e38).all()
    found[EMBEDDING][token] = expected[EMBEDDING][token]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_two_ranks_skip_alike(trained: TrainConfig) -> None:
    two = replace(trained, out=f"{trained.out}-two")
    finish(start_training(two, world=2), two)
    assert skipped(two) == skipped(trained)
    for a, b in zip(metrics(two), metrics(trained), strict=True):
        assert a["loss"] == (b["loss"] and pytest.approx(b["loss"], abs=1e-5))
    expected = weights_of(trained)
    for name, tensor in weights_of(two).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("reports", [{}, {"log_every": 5, "checkpoint_every": 9}], ids=str)
def test_too_many_in_a_row_end_the_run_and_it_can_go_on(
    reports: dict[str, int], checkpoint: Path, tmp_path: Path
) -> None:
    config = config_with(checkpoint, tmp_path, [3, 4, 5], max_skipped_steps=3, epochs=1.0, packs_per_step=1, **reports)
    with pytest.raises(InputError, match=r"^3 steps in a row, the last of them 5, .*step-00000005 contains the state"):
        train(config)
    assert checkpoint_steps(config)[-1] == 5
    assert not (Path(config.out) / "model").exists()
    assert skipped(config) == [3, 4, 5]

    patient = replace(config, max_skipped_steps=4)
    train(patient if reports else config)  # as it was, or with more patience
    assert skipped(config) == [3, 4, 5]
    assert len(metrics(config)) == plan_steps(config).steps_per_epoch > 6
    assert json.loads((Path(config.out) / "summary.json").read_text())["skipped_steps"] == 3
    whole = replace(patient, out=str(tmp_path / "whole"))
    train(whole)
    assert metrics(config) == metrics(whole)
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(config).items())


def test_a_sound_step_between_them_starts_the_count_again(checkpoint: Path, tmp_path: Path) -> None:
    config = config_with(checkpoint, tmp_path, [2, 3, 5, 6], max_skipped_steps=3, epochs=1.0, packs_per_step=1)
    train(config)
    assert skipped(config) == [2, 3, 5, 6]


def test_two_ranks_end_alike_with_exit_status_2(checkpoint: Path, tmp_path: Path) -> None:
    config = config_with(checkpoint, tmp_path, [1, 2], max_skipped_steps=2, checkpoint_every=9)
    processes = start_training(config, world=2)
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [2, 2]
    assert "2 steps in a row, the last of them 2," in Path(f"{config.out}.log").read_text()
    assert checkpoint_steps(config) == [2]


@pytest.mark.slow
def test_the_command_says_so(checkpoint: Path, tmp_path: Path) -> None:
    """A learning rate that no model survives: every step after the first is bad."""
    config = train_config(checkpoint, tmp_path, lr=1e30, max_skipped_steps=2)
    (tmp_path / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "micota_fast.train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("micota train: 2 steps in a row, the last of them ")
    assert "Traceback" not in done.stderr
