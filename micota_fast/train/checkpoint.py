"""Resume checkpoints: a run killed at any moment goes on from the newest whole one, bit for bit.

    OUT/checkpoints/run.json              what the run is: its identity and number of processes
    OUT/checkpoints/step-00000040/        after 40 steps
        rank-00000.safetensors            that rank's shards of weights and optimizer
        rank-00000.json                   size and SHA-256 of the file beside it

A folder is filled under a temporary name and renamed once every rank has synced its part, so all ranks must see one
and the same OUT: several nodes need a shared filesystem. The order of the documents follows from the step number and
nothing in training draws random numbers, so these are the whole state.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from micota_fast.errors import InputError
from micota_fast.model.safetensors_io import sync
from micota_fast.train.parallel import PackedLoss, World, local_part

KEPT = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Checkpoints:
    """The resume checkpoints of one run in one output folder.

    Args:
        out: the run's folder.
        identity: all that the result depends on (plain JSON values); a run goes on only with an equal one.
        world: the processes; a run goes on only with as many.

    Raises:
        InputError: the folder holds an unfinished run of another identity or number of processes.
    """

    def __init__(self, out: Path, identity: dict[str, Any], world: World) -> None:
        self._dir, self._world = out / "checkpoints", world
        if world.is_main:
            self._claim(out, identity)
        world.barrier()

    def _claim(self, out: Path, identity: dict[str, Any]) -> None:
        path = self._dir / "run.json"
        wanted = {"identity": identity, "processes": self._world.size}
        if path.is_file():
            differences = describe_differences(json.loads(path.read_text(encoding="utf-8")), wanted)
            if differences:
                raise InputError(
                    f"{out} holds an unfinished run of other making ({differences}). Start as that one was started to "
                    f"finish it, choose another `out`, or delete {out} to start over"
                )
            return
        if (out / "model").exists():
            raise InputError(f"{out / 'model'} is there and no run of this folder made it; choose another `out`")
        self._dir.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)

    def restore(self, model: PackedLoss, optimizer: torch.optim.AdamW) -> int:
        """Load the newest whole checkpoint into model and optimizer; returns its step, 0 where there is none.

        Rank 0 says which folders there are: a rank that looked itself might see another list (a network filesystem's
        cache), and the ranks would wait for each other in different collectives.
        """
        names = [sorted((path.name for path in self._dir.glob("step-*")), reverse=True)]
        dist.broadcast_object_list(names)
        for folder in (self._dir / name for name in names[0]):
            tensors, fault = self._read(folder)
            faults = torch.tensor(int(fault is not None), device=self._world.device)
            dist.all_reduce(faults)
            if tensors is not None and not int(faults):
                step = int(folder.name.removeprefix("step-"))
                _load(tensors, model, optimizer, step)
                self._world.say(f"going on after step {step}, from {folder}")
                return step
            if fault is not None:
                print(f"WARNING: {fault}; trying the checkpoint before it", flush=True)
        return 0

    def _read(self, folder: Path) -> tuple[dict[str, Tensor] | None, str | None]:
        path = folder / f"rank-{self._world.rank:05d}.safetensors"
        try:
            recorded = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            if path.stat().st_size != recorded["bytes"] or sha256(path) != recorded["sha256"]:
                return None, f"{path} is not what was written"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"{path} cannot be read ({type(error).__name__}: {error})"
        return load_file(path), None

    def save(self, step: int, model: PackedLoss, optimizer: torch.optim.AdamW) -> Path:
        """Write the state after `step` steps, then drop all but the newest checkpoints."""
        folder = self._dir / f"step-{step:08d}"
        aside = self._dir / f".{folder.name}.part"
        if self._world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        self._world.barrier()
        path = aside / f"rank-{self._world.rank:05d}.safetensors"
        save_file(_state(model, optimizer), path)
        sync(path)
        write_json(path.with_suffix(".json"), {"bytes": path.stat().st_size, "sha256": sha256(path)})
        self._world.barrier()
        if self._world.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one that `restore` passed over
            sync(aside)
            aside.rename(folder)
            sync(self._dir)
            for old in sorted(self._dir.glob("step-*"))[:-KEPT]:
                shutil.rmtree(old)
        return folder

    def discard(self) -> None:
        """Remove them all: the run is finished."""
        if self._world.is_main:
            shutil.rmtree(self._dir)


def _state(model: PackedLoss, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in model.decoder.named_parameters():
        tensors[f"weight.{name}"] = parameter
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return {name: local_part(tensor.detach()).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _load(tensors: dict[str, Tensor], model: PackedLoss, optimizer: torch.optim.AdamW, step: int) -> None:
    for name, parameter in model.decoder.named_parameters():
        state = {"step": torch.tensor(float(step), device=parameter.device)}
        state |= {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
        for target, stored in ((parameter, "weight"), *((state[moment], moment) for moment in _MOMENTS)):
            local_part(target).copy_(tensors[f"{stored}.{name}"])
        optimizer.state[parameter] = state


def describe_differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What differs between two identities, as "key: theirs there, ours here; ..."; empty where they are equal."""
    a, b = dict(_flat(theirs)), dict(_flat(ours))
    keys = [key for key in (b | a) if a.get(key) != b.get(key)]
    return "; ".join(f"{key}: {a.get(key)!r} there, {b.get(key)!r} here" for key in keys)


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, item in value.items():
        name = re.sub(r"^identity\.", "", f"{prefix}{key}")
        pairs += _flat(item, f"{name}.") if isinstance(item, dict) else [(name, item)]
    return pairs


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all, also after a power failure."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)
