"""Moments of 8 and 4 bits: against torchao's own optimizer, killed and resumed in shards, and what is refused."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers import moments
from helpers.training_runs import finish, kill, metrics, result, start_training, train_config
from micota_fast.config.loader import build, identity
from micota_fast.config.train import LoraConfig, TrainConfig, TrainSettings
from micota_fast.errors import InputError
from micota_fast.train import loop, preflight
from micota_fast.train.loop import train
from micota_fast.train.low_bit_adamw import LowBitAdamW
from micota_fast.train.optim import step_if_finite

torchao_optim = pytest.importorskip("torchao.optim")

STEP = "micota_fast.train.loop:clip_gradients"  # once in each
NAN = float("nan")


def settings(bits: Any) -> TrainSettings:
    return TrainSettings(optimizer_states=bits, lr=0.01)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_steps_are_those_of_torchao_and_one_that_is_not_finite_changes_nothing(bits: Any) -> None:
    shapes = [(80, 64), (100, 50), (64,)]  # quantised; not of whole blocks; too small
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizer = LowBitAdamW([{"params": ours, "weight_decay": 0.1}], settings(bits), compiled=False)
    kind = {"8bit": torchao_optim.AdamW8bit, "4bit": torchao_optim.AdamW4bit}[bits]
    reference = kind(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for rate in (0.01, 0.02, 0.005):
        optimizer.param_groups[0]["lr"] = rate
        reference.param_groups[0]["lr"].fill_(rate)
        for p in ours:
            p.grad = torch.full_like(p, NAN)
        step_if_finite(optimizer, torch.tensor(NAN), torch.tensor(1.0))
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        step_if_finite(optimizer, torch.tensor(1.0), torch.tensor(1.0))
        with torch.compiler.set_stance("force_eager"):
            reference.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    kept = {name: value.dtype for p in ours for name, value in optimizer.states(p)}
    assert kept["exp_avg-codes-0of1"] == torch.uint8
    assert kept["exp_avg_sq-0of1"] == torch.float32
    assert [len(dict(optimizer.states(p))) for p in ours] == [7, 3, 3]


def test_a_state_can_be_made_without_a_change_of_weights() -> None:
    parameter = nn.Parameter(torch.randn(80, 64))
    before = parameter.detach().clone()
    optimizer = LowBitAdamW([{"params": [parameter], "weight_decay": 0.1}], settings("8bit"), compiled=False)
    optimizer.make_states()
    assert torch.equal(parameter, before)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert not dict(optimizer.states(parameter))["exp_avg-codes-0of1"].view(-1).float().std()


def run_config(checkpoint: Path, folder: Path, name: str, **options: Any) -> TrainConfig:
    (folder / name).mkdir()
    fixed = {"max_steps": 8, "epochs": 10, "checkpoint_every": 2, "weight_decay": 0.1, "lr": 0.01}
    return train_config(checkpoint, folder, out=str(folder / name / "out"), **{**fixed, **options})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "further"),
    [
        ("8bit", {"activation_checkpointing": "selective"}),
        ("4bit", {"keep_checkpoints": 1, "dtype": "bfloat16"}),
    ],
    ids=["8bit", "4bit"],
)
def test_two_ranks_that_are_killed_resume_bit_for_bit(
    bits: str, further: dict[str, Any], qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    whole, killed = (
        run_config(qwen2_checkpoint, tmp_path, name, optimizer_states=bits, **further) for name in ("whole", "killed")
    )
    finish(start_training(whole, world=2), whole)
    processes = start_training(killed, world=2, before=partial(moments.at_call, 1, STEP, moments.die, nth=6))
    processes[1].join(240)
    kill(processes)
    newest = max((Path(killed.out) / "checkpoints").glob("step-*"))
    assert any("exp_avg_sq-codes-1of2" in name for name in load_file(newest / "rank-00001.safetensors"))
    finish(start_training(killed, world=2), killed)
    log = Path(f"{killed.out}.log").read_text()
    assert "resuming after step" in log
    assert "bit for bit" not in log
    assert result(killed) == result(whole)
    assert metrics(whole)[-1]["loss"] < metrics(whole)[0]["loss"]


def test_adapters_with_moments_of_8_bits_resume_bit_for_bit(
    qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LoraConfig(rank=64, targets=["q_proj", "down_proj"], merged=True)  # thinner ones are not quantised here
    whole, stopped = (
        run_config(qwen2_checkpoint, tmp_path, name, optimizer_states="8bit", lora=lora, max_steps=2)
        for name in ("whole", "stopped")
    )
    assert train(whole)
    monkeypatch.setattr(loop, "clip_gradients", loop.clip_gradients)  # to be as it was after the test
    moments.at_call(0, STEP, moments.terminate, my_rank=0)
    assert not train(stopped)
    saved = load_file(next((Path(stopped.out) / "checkpoints" / "step-00000001").glob("rank-*.safetensors")))
    quantised = [name for name in saved if name.startswith("optimizer.exp_avg-codes-")]
    assert len(quantised) == 2 * 2 * 2, "both halves of two adapters in each of two layers"
    assert train(stopped)
    assert result(stopped) == result(whole)
    assert metrics(whole)[1]["loss"] != metrics(whole)[0]["loss"]


def test_another_number_of_shards_is_refused_by_name(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    config = run_config(qwen2_checkpoint, tmp_path, "run", optimizer_states="8bit")
    processes = start_training(config, world=2, before=partial(moments.at_call, 1, STEP, moments.die, nth=6))
    processes[1].join(240)
    kill(processes)
    with pytest.raises(InputError, match=r"step-0000000\d has moments of few bits .* shards of 2 processes; now 1"):
        train(config)


def test_what_does_not_go_together_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"model": "m", "data": "d", "out": str(tmp_path), "optimizer_states": "8bit"}
    with pytest.raises(InputError, match="`optimizer_states: 8bit` with `offload`: "):
        build(TrainConfig, given | {"offload": True}, "test")
    with pytest.raises(InputError, match="optimizer_states"):
        build(TrainConfig, given | {"optimizer_states": "2bit"}, "test")
    monkeypatch.setattr(preflight, "is_installed", lambda package: package != "torchao")
    for start in (preflight.check, train):
        with pytest.raises(InputError, match=r"needs torchao, .*: pip install 'micota-fast\[lowbit\]'"):
            start(TrainConfig(**given))


def test_identities_of_runs_from_before_the_option_stay() -> None:
    plain = TrainConfig(model="m", data="d", out="o")
    assert "optimizer_states" not in identity(plain)
    assert identity(replace(plain, optimizer_states="8bit"))["optimizer_states"] == "8bit"
