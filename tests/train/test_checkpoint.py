"""Resume checkpoints, by themselves: real gloo ranks, real files, real kills and a disk that is really full."""

import json
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers.ranks import run_ranks, start_ranks
from helpers.training_runs import flip
from micota_fast.errors import InputError
from micota_fast.train.checkpoint import Checkpoints
from micota_fast.train.packed_loss import PackedLoss
from micota_fast.train.world import World, join_world

IDENTITY = {"model": "m", "options": {"lr": 0.1}}


class Weights(nn.Module):
    """Shapes that four ranks cannot share evenly: three rows, and one."""

    def __init__(self, columns: int = 5) -> None:
        super().__init__()
        for name, shape in {"a": (3, columns), "b": (1,), "c": (8, 2)}.items():
            values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32) / 7
            self.register_parameter(name, nn.Parameter(values.reshape(shape)))


def trained(world: World, steps: int, mesh: tuple[int, ...] | None = None, columns: int = 5) -> Any:
    """Model and optimizer after so many steps: the same values up to rounding, however they are sharded."""
    model = PackedLoss(Weights(columns), "sdpa")  # type: ignore[arg-type]
    if world.size > 1:
        names = ("replicate", "shard")[-len(mesh) :] if mesh else ("shard",)
        fully_shard(model, mesh=init_device_mesh("cpu", mesh or (world.size,), mesh_dim_names=names))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: PackedLoss, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5 - 1
        optimizer.step()


def whole_state(model: PackedLoss, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {}
    for name, parameter in model.decoder.named_parameters():
        for key, value in {"weight": parameter.detach(), **optimizer.state[parameter]}.items():
            state[f"{name}.{key}"] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    return state


def _save(world: World, out: Path, mesh: tuple[int, ...] | None = None) -> None:
    with Checkpoints(out, IDENTITY, world) as checkpoints:
        model, optimizer = trained(world, 3, mesh)
        torch.manual_seed(100 + world.rank)
        checkpoints.save({"step": 3, "patience": [1, 0.5]}, model, optimizer)
        saved = whole_state(model, optimizer)
        drawn = torch.rand(4)
        train(model, optimizer, 2)  # while the write goes on
        checkpoints.wait()
    save_file(saved, out / f"saved-{world.rank}.safetensors")
    save_file({"drawn": drawn, **whole_state(model, optimizer)}, out / f"later-{world.rank}.safetensors")


def _restore(world: World, out: Path, wrote: int) -> None:
    with Checkpoints(out, IDENTITY, world) as checkpoints:
        model, optimizer = trained(world, 1)
        torch.manual_seed(0)
        fresh = torch.get_rng_state()
        assert checkpoints.restore(model, optimizer) == {"step": 3, "patience": [1, 0.5]}
        saved, later = (
            load_file(out / f"{name}-{min(world.rank, wrote - 1)}.safetensors") for name in ("saved", "later")
        )
        restored = whole_state(model, optimizer)
        assert restored.keys() == saved.keys()
        assert all(torch.equal(restored[name], tensor) for name, tensor in saved.items())
        drawn = later.pop("drawn")
        if world.size == wrote:
            assert torch.equal(torch.rand(4), drawn)
        else:
            assert torch.equal(torch.get_rng_state(), fresh)
        train(model, optimizer, 2)
        tolerance = 0 if world.size == wrote else 1e-5  # the optimizer's vector code rounds otherwise on other lengths
        for name, tensor in whole_state(model, optimizer).items():
            torch.testing.assert_close(tensor, later[name], rtol=tolerance, atol=0)


@pytest.mark.parametrize(("wrote", "readers"), [(1, (1, 2)), (2, (1, 2)), (4, (4,))])
def test_state_goes_on_with_any_number_of_ranks(wrote: int, readers: tuple[int, ...], tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run_ranks(wrote, _save, log, out)
    for reads in readers:
        run_ranks(reads, _restore, log, out, wrote)
        changed = f"resuming with {reads} processes, but {wrote} processes wrote"
        assert (changed in log.read_text()) == (wrote != reads)


@pytest.mark.slow
def test_replicas_are_written_once(tmp_path: Path) -> None:
    for name, mesh in (("flat", (4,)), ("hybrid", (2, 2))):
        run_ranks(4, _save, tmp_path / "log", tmp_path / name, mesh)
    sizes = {}
    for name in ("flat", "hybrid"):
        files = (tmp_path / name / "checkpoints" / "step-00000003").glob("rank-*")
        sizes[name] = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert sizes["hybrid"] == sizes["flat"]
    run_ranks(1, _restore, tmp_path / "log", tmp_path / "hybrid", 4)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flip rank-00000.safetensors": lambda folder: flip(folder / "rank-00000.safetensors"),
    "flip rank-00001.safetensors": lambda folder: flip(folder / "rank-00001.safetensors"),
    "flip manifest.json": lambda folder: flip(folder / "manifest.json"),
    "flip manifest.sha256": lambda folder: flip(folder / "manifest.sha256"),
    "cut rank-00001.safetensors": lambda folder: os.truncate(folder / "rank-00001.safetensors", 300),
    "cut manifest.json": lambda folder: os.truncate(folder / "manifest.json", 40),
    "remove rank-00001.safetensors": lambda folder: (folder / "rank-00001.safetensors").unlink(),
    "remove manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "remove manifest.sha256": lambda folder: (folder / "manifest.sha256").unlink(),
    "empty step-00000002": lambda folder: [file.unlink() for file in folder.iterdir()],
    "add rank-00002.safetensors": lambda folder: shutil.copy(
        folder / "rank-00000.safetensors", folder / "rank-00002.safetensors"
    ),
}


def _survive_damages(world: World, tmp: Path) -> None:
    model, optimizer = trained(world, 0)
    with Checkpoints(tmp / "out", IDENTITY, world) as checkpoints:
        for step in (1, 2):
            train(model, optimizer, 1)
            checkpoints.save({"step": step}, model, optimizer)
        checkpoints.wait()
    for number, (name, damage) in enumerate(DAMAGES.items()):
        out = tmp / str(number)
        if world.is_main:
            shutil.copytree(tmp / "out", out)
            damage(out / "checkpoints" / "step-00000002")
        dist.barrier()
        world.say(f"case: {name}")
        with Checkpoints(out, IDENTITY, world) as checkpoints:
            assert checkpoints.restore(model, optimizer) == {"step": 1}, name
            expected = whole_state(*trained(world, 1))
            state = whole_state(model, optimizer)
            assert all(torch.equal(state[key], value) for key, value in expected.items()), name
            # The damaged one does not count among those to keep.
            checkpoints.save({"step": 2}, model, optimizer)
            checkpoints.wait()
        assert sorted(p.name for p in (out / "checkpoints").glob("*step*")) == [
            "damaged-step-00000002",
            "step-00000001",
            "step-00000002",
        ]


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_ranks(2, _survive_damages, log, tmp_path)
    cases = log.read_text().split("case: ")[1:]
    assert len(cases) == len(DAMAGES)
    for text in cases:
        kind, file = text.splitlines()[0].split()
        assert re.search(rf"WARNING: .*step-00000002.*({re.escape(file)}|torn)", text), (kind, text)
        assert "trying the checkpoint before it" in text


def test_without_a_whole_checkpoint_a_run_starts_over_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with join_world("cpu") as world, Checkpoints(tmp_path / "out", IDENTITY, world) as checkpoints:
        model, optimizer = trained(world, 1)
        assert checkpoints.restore(model, optimizer) is None
        assert "WARNING" not in capsys.readouterr().out
        for steps in ((1, 2), (3,)):
            for step in steps:
                folder = checkpoints.save({"step": step}, model, optimizer)
                checkpoints.wait()
                flip(folder / "rank-00000.safetensors")
            assert checkpoints.restore(model, optimizer) is None
            assert "WARNING: no whole checkpoint is left; starting over" in capsys.readouterr().out
            names = sorted(path.name for path in folder.parent.glob("*step*"))
            assert names == [f"damaged-step-{step:08d}" for step in steps], "those of an earlier start are gone"


COLUMNS = 2_000_000  # of three rows and with two moments: 72 MB, which take a while to write


def test_what_is_written_is_the_state_at_the_call(tmp_path: Path) -> None:
    with join_world("cpu") as world, Checkpoints(tmp_path / "out", IDENTITY, world) as checkpoints:
        model, optimizer = trained(world, 1, columns=COLUMNS)
        expected = whole_state(model, optimizer)
        folder = checkpoints.save({"step": 1}, model, optimizer)
        assert not folder.exists(), "the call waited for the write"
        train(model, optimizer, 1)
        checkpoints.wait()
        assert folder.exists()
        checkpoints.restore(model, optimizer)
        assert all(torch.equal(value, expected[key]) for key, value in whole_state(model, optimizer).items())


def _save_twice(world: World, out: Path) -> None:
    with Checkpoints(out, IDENTITY, world) as checkpoints:
        for step in (1, 2):
            model, optimizer = trained(world, step, columns=COLUMNS)
            checkpoints.save({"step": step}, model, optimizer)


def _restore_large(world: World, out: Path, step: int) -> None:
    with Checkpoints(out, IDENTITY, world) as checkpoints:
        assert not list((out / "checkpoints").glob(".*"))
        model, optimizer = trained(world, 0, columns=COLUMNS)
        assert checkpoints.restore(model, optimizer) == {"step": step}
        expected = whole_state(*trained(world, step, columns=COLUMNS))
        assert all(torch.equal(value, expected[key]) for key, value in whole_state(model, optimizer).items())


def test_killed_in_the_middle_of_a_write(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    processes = start_ranks(2, _save_twice, log, out)
    torn = ".step-00000002.*.partial/rank-00001.safetensors"
    while not any(path.stat().st_size > 1_000_000 for path in (out / "checkpoints").glob(torn)):
        assert all(p.is_alive() for p in processes), log.read_text()
        time.sleep(0.001)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert list((out / "checkpoints").glob(torn)), "killed too late to prove anything"
    run_ranks(2, _restore_large, log, out, 1)


def _fill_while_writing(world: World, disk: Path) -> None:
    with Checkpoints(disk / "out", IDENTITY, world) as checkpoints:
        model, optimizer = trained(world, 1, columns=50_000)
        checkpoints.save({"step": 1}, model, optimizer)
        checkpoints.wait()
        dist.barrier()
        if world.rank == 1:  # its file alone may not grow: an error of one rank in the middle of its write
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        folder = checkpoints.save({"step": 2}, model, optimizer)
        with pytest.raises(InputError, match=rf"{folder} could not be saved: .*rank-00001.safetensors: File too large"):
            checkpoints.wait()
        dist.barrier()
        assert sorted(p.name for p in (disk / "out" / "checkpoints").iterdir()) == ["run.json", "step-00000001"]
        assert checkpoints.restore(model, optimizer) == {"step": 1}


def test_a_write_that_fails_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    run_ranks(2, _fill_while_writing, tmp_path / "log", tmp_path)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    def kept() -> list[int]:
        return [int(path.name[-8:]) for path in sorted((tmp_path / "out" / "checkpoints").glob("step-*"))]

    with join_world("cpu") as world, Checkpoints(tmp_path / "out", IDENTITY, world, keep=2) as checkpoints:
        model, optimizer = trained(world, 1)
        assert checkpoints.load_best(model) is None
        for step, score in enumerate((3.0, 1.0, None, 2.0, float("nan")), start=1):
            checkpoints.save({"step": step}, model, optimizer, score)
        checkpoints.wait()
        assert kept() == [2, 4, 5]
        train(model, optimizer, 1)
        state = optimizer.state[model.decoder.get_parameter("a")]["exp_avg"].clone()
        assert checkpoints.load_best(model) == (2, 1.0)  # the weights alone
        assert torch.equal(model.decoder.get_parameter("a"), trained(world, 1)[0].decoder.get_parameter("a"))
        assert torch.equal(optimizer.state[model.decoder.get_parameter("a")]["exp_avg"], state)
        checkpoints.save({"step": 6}, model, optimizer, 0.5)
        assert checkpoints.load_best(model) == (6, 0.5)
        assert kept() == [5, 6]
        checkpoints.discard()
        assert not (tmp_path / "out" / "checkpoints").exists()


def test_another_version_of_torch_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with join_world("cpu") as world, Checkpoints(tmp_path / "out", IDENTITY, world) as checkpoints:
        model, optimizer = trained(world, 1)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "__version__", "2.0.1")
            checkpoints.save({"step": 1}, model, optimizer)
        checkpoints.wait()
        assert checkpoints.restore(model, optimizer) == {"step": 1}
        now = f"resuming with 1 processes of torch {torch.__version__}, but 1 processes of torch 2.0.1 wrote"
        assert now in capsys.readouterr().out


def test_before_the_first_step_of_the_optimizer(tmp_path: Path) -> None:
    with join_world("cpu") as world, Checkpoints(tmp_path / "out", IDENTITY, world) as checkpoints:
        model, optimizer = trained(world, 0)
        checkpoints.save({"step": 1}, model, optimizer)
        checkpoints.wait()
        train(model, optimizer, 2)
        assert checkpoints.restore(model, optimizer) == {"step": 1}
        assert not optimizer.state


def test_another_run_is_refused_by_name(tmp_path: Path) -> None:
    other = {"model": "m", "options": {"lr": 0.2}}
    with join_world("cpu") as world:
        Checkpoints(tmp_path / "out", IDENTITY, world)
        difference = r"\(options\.lr: 0\.1 there, 0\.2 here\)"
        with pytest.raises(
            InputError, match=rf"unfinished run with different settings, according to .*/run\.json {difference}"
        ):
            Checkpoints(tmp_path / "out", other, world)
        # A checkpoint says itself whose it is, so one that was copied here is known.
        model, optimizer = trained(world, 1)
        for name, identity in (("out", IDENTITY), ("other", other)):
            with Checkpoints(tmp_path / name, identity, world) as checkpoints:
                folder = checkpoints.save({"step": len(name)}, model, optimizer)
        shutil.copytree(folder, tmp_path / "out" / "checkpoints" / folder.name)
        with pytest.raises(InputError, match=rf"different settings, .*/{folder.name}/manifest\.json \(.*0\.2 there"):
            Checkpoints(tmp_path / "out", IDENTITY, world)


@pytest.mark.parametrize("text", [None, "", '{"identity": {"model": "m", "options": {"lr": 0.7}}}', "[1]"])
def test_the_checkpoints_do_without_run_json(text: str | None, tmp_path: Path) -> None:
    with join_world("cpu") as world:
        model, optimizer = trained(world, 1)
        with Checkpoints(tmp_path, IDENTITY, world) as checkpoints:
            checkpoints.save({"step": 1}, model, optimizer)
        path = tmp_path / "checkpoints" / "run.json"
        path.unlink()
        if text is not None:
            path.write_text(text)
        (tmp_path / "model").mkdir()  # what a kill between the export and the summary leaves
        with Checkpoints(tmp_path, IDENTITY, world) as checkpoints:
            assert checkpoints.restore(model, optimizer) == {"step": 1}
        assert json.loads(path.read_text()) == {"identity": IDENTITY}


def test_files_are_plain(tmp_path: Path) -> None:
    with join_world("cpu") as world, Checkpoints(tmp_path / "out", IDENTITY, world) as checkpoints:
        model, optimizer = trained(world, 2)
        folder = checkpoints.save({"step": 2}, model, optimizer)
        checkpoints.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "manifest.sha256", "rank-00000.safetensors"]
    tensors = load_file(folder / "rank-00000.safetensors")
    assert torch.equal(tensors["model.a"], model.decoder.get_parameter("a"))
    assert tensors["optimizer.step.a"] == 2
    manifest = json.loads((folder / "manifest.json").read_text())
    size = (folder / "rank-00000.safetensors").stat().st_size
    assert manifest["files"]["rank-00000.safetensors"]["bytes"] == size
    assert manifest["processes"] == 1
    assert manifest["torch"] == torch.__version__
    subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
