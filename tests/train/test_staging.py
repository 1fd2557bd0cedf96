"""Host memory of checkpoints: one piece, page-locked as it is, and the writer's thread on its rank's device."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from micota_fast.train.checkpoint import Checkpoints
from micota_fast.train.packed_loss import PackedLoss
from micota_fast.train.staging import Staging
from micota_fast.train.world import join_world

LIKE = {
    "matrix": torch.empty(3, 5),
    "count": torch.empty(()),
    "narrow": torch.empty(7, dtype=torch.bfloat16),
    "no rows": torch.empty(0, 4),
    "state": torch.empty(5056, dtype=torch.uint8),
}


def test_tensors_of_all_types_share_one_allocation_and_no_byte() -> None:
    staged = Staging(LIKE, pinned=False).tensors
    for number, (name, tensor) in enumerate(LIKE.items()):
        assert (staged[name].shape, staged[name].dtype) == (tensor.shape, tensor.dtype)
        assert staged[name].is_contiguous()
        staged[name].fill_(number)
    assert [set(tensor.flatten().tolist()) for tensor in staged.values()] == [{0}, {1}, {2}, set(), {4}]
    (storage,) = {tensor.untyped_storage().data_ptr() for tensor in staged.values()}
    size = next(iter(staged.values())).untyped_storage().nbytes()
    assert size <= sum(tensor.nbytes for tensor in LIKE.values()) + 64 * len(LIKE)
    assert storage


class Runtime:
    """Stands in for CUDA's, and notes what is page-locked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.locked: dict[int, int] = {}
        self.sizes: list[int] = []
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 0
        self.locked[address] = size
        self.sizes.append(size)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_the_memory_is_locked_as_large_as_it_is_and_unlocked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(monkeypatch)
    staging = Staging(LIKE, pinned=True)
    storage = staging.tensors["matrix"].untyped_storage()
    assert runtime.locked == {storage.data_ptr(): storage.nbytes()}
    staging.close()
    staging.close()
    assert runtime.locked == {}


def test_a_writer_works_on_the_device_of_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that is taken for the second GPU of its machine."""
    runtime = Runtime(monkeypatch)
    devices: dict[str, torch.device] = {}
    copied = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: devices.update({threading.current_thread().name: device})
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=lambda: copied))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    model = PackedLoss(nn.ParameterDict({"a": torch.ones(3, 5)}), "sdpa")  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with join_world("cpu") as world:
        second = replace(world, device=torch.device("cuda", 1))
        with Checkpoints(tmp_path, {"model": "m"}, second) as checkpoints:
            checkpoints.save({"step": 1}, model, optimizer)
            optimizer_state(model, optimizer)
            checkpoints.save({"step": 2}, model, optimizer)
            checkpoints.save({"step": 3}, model, optimizer)
    assert list(devices.values()) == [torch.device("cuda", 1)]
    assert next(iter(devices)).startswith("checkpoint")
    assert len(runtime.sizes) == 2, "once for the weights, and once when the optimizer had its moments as well"
    assert runtime.locked == {}
    assert {path.name for path in (tmp_path / "checkpoints").glob("step-*")} == {"step-00000002", "step-00000003"}


def optimizer_state(model: PackedLoss, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_the_memory_is_made_anew_only_for_other_tensors() -> None:
    staging = Staging(LIKE, pinned=False)
    assert staging.fits(LIKE)
    others: list[dict[str, Tensor]] = [
        LIKE | {"more": torch.empty(1)},
        LIKE | {"count": torch.empty(1)},
        LIKE | {"count": torch.empty((), dtype=torch.float64)},
    ]
    assert not any(staging.fits(other) for other in others)
