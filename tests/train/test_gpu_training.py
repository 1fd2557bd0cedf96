"""The training path on one NVIDIA GPU: varlen attention, Triton loss, compile, bfloat16, resume, and all of micro."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.micro_runs import SMALL
from helpers.training_runs import finish, kill, metrics, start_training, train_config, wait_until
from micota_fast.cli import main
from micota_fast.config.train import TrainConfig
from micota_fast.model.folder import resolve_checkpoint
from micota_fast.train import prepare
from micota_fast.train.loop import train
from micota_fast.train.optim import clip_gradients, make_optimizer, step_if_finite
from micota_fast.train.packed_loss import on_device
from micota_fast.train.parallel import parallelize
from micota_fast.train.world import World, join_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

WAYS = [
    pytest.param({}, id="eager"),
    pytest.param({"compile": True}, id="compiled"),
    pytest.param({"activation_checkpointing": "selective"}, id="selective"),
    pytest.param({"compile": True, "activation_checkpointing": "selective"}, id="compiled, selective"),
    pytest.param({"activation_checkpointing": "full"}, id="full"),
]


@pytest.fixture(scope="module")
def exact(qwen2_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The run in float32 on the CPU."""
    config = train_config(qwen2_checkpoint, tmp_path_factory.mktemp("exact"))
    train(config)
    return config


@pytest.mark.parametrize("options", WAYS)
def test_bfloat16_on_the_gpu_is_near_float32_on_the_cpu(
    options: dict[str, object], exact: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(exact, out=str(tmp_path / "out"), device="cuda", dtype="bfloat16", **options)
    train(config)
    said = capsys.readouterr().out
    assert "attention: varlen" in said or "attention: flash" in said
    assert "memory: " in said
    for low, high in zip(metrics(config), metrics(exact), strict=True):
        assert low["loss"] == pytest.approx(high["loss"], rel=0.02)
        assert low["grad_norm"] == pytest.approx(high["grad_norm"], rel=0.05)
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    assert summary["attention"] in ("varlen", "flash")


def test_float32_on_the_gpu_equals_the_cpu(exact: TrainConfig, tmp_path: Path) -> None:
    config = replace(exact, out=str(tmp_path / "out"), device="cuda")
    train(config)
    for ours, theirs in zip(metrics(config), metrics(exact), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-4)


def test_a_killed_run_goes_on(exact: TrainConfig, tmp_path: Path) -> None:
    whole = replace(exact, out=str(tmp_path / "whole"), device="cuda", dtype="bfloat16", epochs=20)
    finish(start_training(whole), whole)
    config = replace(whole, out=str(tmp_path / "out"), checkpoint_every=5)
    processes = start_training(config)
    wait_until(lambda: len(metrics(config)) >= 12, processes)
    kill(processes)
    finish(start_training(config), config)
    assert "resuming after step" in Path(f"{config.out}.log").read_text()
    for ours, theirs in zip(metrics(config), metrics(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)  # attention's backward pass adds in any order
    expected = load_file(Path(whole.out) / "model" / "model.safetensors")
    for name, tensor in load_file(Path(config.out) / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("options", WAYS)
def test_a_step_never_waits_for_the_device(options: dict[str, object], exact: TrainConfig, tmp_path: Path) -> None:
    config = replace(exact, out=str(tmp_path / "out"), device="cuda", dtype="bfloat16", **options)
    with join_world("cuda") as world:
        source = resolve_checkpoint(config.model)
        documents, _ = prepare.load_documents(config, source, tmp_path, World(0, 1, torch.device("cpu")))
        model = prepare.build_model(config, source, world)
        steps = prepare.plan_steps(config, documents, model, world)
        parallelize(model, config, world)
        prepare.load_initial_weights(model, config, source, world)
        optimizer = make_optimizer(model, config)

        def step(number: int) -> None:
            batches, normalizer, _, _ = steps.step(number)
            loss = torch.zeros((), device=world.device)
            for batch in batches:
                batch_loss = model(**on_device(batch, world), normalizer=normalizer)
                batch_loss.backward()
                loss += batch_loss.detach()
            step_if_finite(optimizer, loss, clip_gradients(model, config.max_grad_norm))
            optimizer.zero_grad()

        for number in range(2):  # compiles, and makes what is made once
            step(number)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(2, 5):
                step(number)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_memory_grows_in_place() -> None:
    program = (
        "import torch\nfrom micota_fast.train.world import join_world\nwith join_world('cuda') as world:\n"
        "    torch.zeros(1, device=world.device)\n"
        "    print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_all_of_micro(tmp_path: Path) -> None:
    on_gpu = ["train.device=cuda", "train.dtype=bfloat16", "train.compile=true", "alignment.device=cuda"]
    on_gpu += ["train.activation_checkpointing=selective", "alignment.dtype=bfloat16"]
    options = [word for option in SMALL + on_gpu for word in ("--set", option)]
    assert main(["run", "micro", "--out", str(tmp_path / "run"), *options]) == 0
    assert "long" in (tmp_path / "run" / "report" / "table.md").read_text()
