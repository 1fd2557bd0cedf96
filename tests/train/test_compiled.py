"""torch.compile: one graph serves all layers and every pack, alone and under FSDP, and nothing comes out otherwise.

torch's own counters count the graphs. It keeps what it has compiled, so these tests take a minute only once.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from helpers.ranks import run_ranks
from helpers.training_runs import metrics, train_config
from micota_fast.config.train import LoraConfig, TrainConfig
from micota_fast.model.safetensors_io import load_model
from micota_fast.train.loop import train
from micota_fast.train.lora import add_adapters, draw_adapters
from micota_fast.train.optim import clip_gradients, make_optimizer, step_if_finite
from micota_fast.train.packed_loss import DUMMY_BATCH, PackedLoss, on_device
from micota_fast.train.parallel import parallelize
from micota_fast.train.world import World, join_world

How = Literal["none", "selective", "full"]
# Packs of different lengths and numbers of documents, as documents' lengths; a document has two tokens at least.
PACKS = [[30, 2, 50, 19], [40, 40], [7, 9, 3, 3, 3], [64], [2], [100, 3], [5, 90, 8]]
CPU = World(0, 1, torch.device("cpu"))

pytestmark = pytest.mark.slow


# torch 2.13 does not quote the path of its own headers when it calls the compiler.
QUOTED = pytest.mark.skipif(" " in torch.__file__, reason="torch.compile does not work in a path with a space")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build_model(
    checkpoint: Path, world: World, how: How = "none", compiled: bool = True, lora: LoraConfig | None = None
) -> PackedLoss:
    decoder = load_model(checkpoint, torch.float32)
    if lora is not None:
        add_adapters(decoder, lora)
        draw_adapters(decoder, seed=0)
    model = PackedLoss(decoder, "sdpa")
    config = TrainConfig(
        model="", data="", out="", dtype="float32", compile=compiled, activation_checkpointing=how, lr=1e-3
    )
    parallelize(model, config, world)
    return model


def loss_of(model: PackedLoss, lengths: list[int]) -> Tensor:
    total = sum(lengths)
    ids_T = torch.randint(320, (total,), generator=torch.Generator().manual_seed(total))
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    loss: Tensor = model(ids_T, positions_T, ids_T.roll(-1), None, cu_seqlens, lengths, total, float(total))
    return loss


def products_of_backward(loss: Tensor) -> int:
    with torch.profiler.profile() as profile:
        loss.backward()
    runs = Counter(event.name for event in profile.events())
    return runs["aten::mm"] + runs["aten::addmm"]


@pytest.mark.slow
@QUOTED
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_one_graph_for_all_layers_and_packs(how: How, qwen2_checkpoint: Path) -> None:
    eager, model = (build_model(qwen2_checkpoint, CPU, how, compiled) for compiled in (False, True))
    layers = len(model.decoder.model.layers)
    for lengths in PACKS:
        expected, loss = loss_of(eager, lengths), loss_of(model, lengths)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        expected.backward()
        products = products_of_backward(loss)
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert layers > 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    again = {"none": 0, "selective": 1, "full": 6}[how]
    assert products == (2 * 7 + again) * layers


@QUOTED
def test_one_graph_for_all_layers_with_adapters(qwen2_checkpoint: Path) -> None:
    eager, model = (
        build_model(qwen2_checkpoint, CPU, "selective", compiled, LoraConfig(rank=4)) for compiled in (False, True)
    )
    for lengths in PACKS[:3]:
        expected, loss = loss_of(eager, lengths), loss_of(model, lengths)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        expected.backward()
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is not None) == ("lora_" in name)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert counters["stats"]["unique_graphs"] == 1, "though the first layer's input is an embedding that is frozen"
    assert not counters["graph_break"]


def test_one_graph_with_moments_of_8_bits_whose_own_graphs_are_counted_apart(
    qwen2_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch makes the graphs and runs them as they are: inductor would take ten times as long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled, plain = (
        train_config(
            qwen2_checkpoint,
            tmp_path,
            out=str(tmp_path / name),
            max_steps=3,
            log_every=2,
            weight_decay=0.1,
            optimizer_states="8bit",
            compile=name == "compiled",
        )
        for name in ("compiled", "plain")
    )
    train(compiled)
    sizes = {(p.numel(), p.ndim > 1) for p in load_model(qwen2_checkpoint, torch.float32).parameters()}
    assert len(sizes) > 1
    expected = f"torch.compile: graphs 1, breaks 0; graphs of the optimizer's step {len(sizes)}"
    assert [line for line in capsys.readouterr().out.splitlines() if "torch.compile" in line] == [expected]
    made = counters["stats"]["unique_graphs"]
    assert made == 1 + len(sizes)
    train(plain)
    assert counters["stats"]["unique_graphs"] == made, "without `compile` the step on a CPU is not compiled, either"
    assert metrics(compiled) == metrics(plain)


@pytest.mark.slow
@QUOTED
def test_two_ranks_with_fsdp(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    with join_world("cpu") as world:
        expected = train_steps(build_model(qwen2_checkpoint, world, compiled=False), world)
    torch.save(expected, tmp_path / "expected.pt")
    run_ranks(2, _compiled_rank, tmp_path / "log", qwen2_checkpoint, tmp_path / "expected.pt")


def _compiled_rank(world: World, checkpoint: Path, path: Path) -> None:
    expected_losses, expected = torch.load(path)
    losses, weights = train_steps(build_model(checkpoint, world, "selective"), world)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def train_steps(model: PackedLoss, world: World) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of steps of two packs; in the last step there is one, and rank 1 has none."""
    optimizer = make_optimizer(model, TrainConfig(model="", data="", out="", lr=1e-3))
    losses = []
    for first in range(0, len(PACKS), 2):
        mine = PACKS[first : first + 2][world.rank :: world.size]
        dummy = model(**on_device(DUMMY_BATCH, world), normalizer=1.0) if not mine else None
        parts = [dummy] if dummy is not None else [loss_of(model, lengths) for lengths in mine]
        loss = torch.stack(parts).sum()
        loss.backward()
        loss = loss.detach()
        dist.all_reduce(loss)
        step_if_finite(optimizer, loss, clip_gradients(model, 1.0))
        optimizer.zero_grad()
        losses.append(loss.item())
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return losses, {name: p.detach() for name, p in whole.items()}
