"""Resume checkpoints: a run killed at any moment resumes from the newest whole one.

    OUT/checkpoints/run.json              what the run is: its identity
    OUT/checkpoints/step-00000040/        after 40 steps
        rank-00000.safetensors            what that rank wrote of weights, optimizer and random-number generators
        manifest.json                     progress and score; size and SHA-256 of every file
        manifest.sha256                   of the manifest, as `sha256sum -c` reads it
    OUT/checkpoints/damaged-step-*/       moved out of the way by the last start that found damage

`torch.distributed.checkpoint` plans who writes and who reads what, so a run may resume with another number of
processes, and replicas are written once. A folder is filled under a temporary name and renamed once every rank has
synced its part, so all ranks must see the same OUT: several nodes need a shared filesystem.

On the same number of processes a resumed run gives the same bits. The learning rate and the order of the documents
follow from the step, which the caller keeps in `progress`.
"""

import contextlib
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import MetadataIndex

from micota_fast.common.files import remove_whole, sync, writing
from micota_fast.common.fingerprint import differences
from micota_fast.common.json_io import as_read_back, read_json, write_json
from micota_fast.errors import InputError
from micota_fast.train.low_bit_adamw import LowBitAdamW
from micota_fast.train.packed_loss import PackedLoss
from micota_fast.train.parallel import local_part
from micota_fast.train.staging import Staging
from micota_fast.train.storage import CheckpointWriter, first_fault, read_manifest
from micota_fast.train.world import HOSTS_TIMEOUT, World


class Checkpoints:
    """The resume checkpoints of one run in one output folder. Call every method on all ranks.

    Args:
        out: the run's folder.
        identity: all that the result depends on (plain JSON values); only a run with an equal one is resumed. The dtype
            of the saved model, on which no step depends, may change.
        world: the processes; a run may resume with another number of them.
        keep: how many of the newest to keep, besides the one with the lowest score.

    Raises:
        InputError: on all ranks: the folder contains an unfinished run of another identity, or cannot be written.
    """

    def __init__(self, out: Path, identity: dict[str, Any], world: World, keep: int = 2) -> None:
        self._dir, self._identity, self._world, self._keep = out / "checkpoints", identity, world, keep
        world.on_main(lambda: self._claim(out))
        # The writer's collectives must not mix with those of the training thread; gloo needs no device.
        self._group = dist.new_group(backend="gloo", timeout=HOSTS_TIMEOUT)
        self._on_cuda = world.device.type == "cuda"
        # A new thread starts on device 0, where an event or a collective of it would open a second CUDA context.
        on_device = (lambda: torch.cuda.set_device(world.device)) if self._on_cuda else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", on_device)
        self._pending: Future[None] | None = None
        self._staging = Staging({}, pinned=False)

    def _claim(self, out: Path) -> None:
        """Claim the folder, or check that it belongs to this run, and remove what a killed run left half done."""
        owners = self._owners()
        for file, identity in owners.items():
            if differing := describe_differences(_resumed_as(identity), _resumed_as(self._identity)):
                raise InputError(
                    f"{out} contains an unfinished run with different settings, according to {file} ({differing}). Use "
                    f"its settings to finish it, choose another `out`, or delete {out} to start over"
                )
        for result in (out / "model", out / "adapter") if not owners else ():
            if result.exists():
                raise InputError(f"{result} is there and no run of this folder made it; choose another `out`")
        for torn in self._dir.glob(".step-*"):
            shutil.rmtree(torn, ignore_errors=True)
        with writing(self._dir):
            self._dir.mkdir(parents=True, exist_ok=True)
            write_json(self._dir / "run.json", {"identity": self._identity}, 2)
            sync(out)

    def _owners(self) -> dict[Path, dict[str, Any]]:
        """Return the identities of the runs in the folder: from each whole checkpoint, or from run.json if none is."""
        manifests = {path: read_manifest(path)[0] for path in sorted(self._dir.glob("step-*"))}
        owners = {path / "manifest.json": m["identity"] for path, m in manifests.items() if m is not None}
        if not owners:
            path = self._dir / "run.json"
            with contextlib.suppress(InputError, FileNotFoundError):  # it is damaged, or there is none
                owners[path] = read_identity(path)
        return owners

    def save(
        self, progress: dict[str, Any], model: PackedLoss, optimizer: torch.optim.Optimizer, score: float | None = None
    ) -> Path:
        """Copy the state to the host and write it while training continues; waits for the save before this one.

        The copies are enqueued on the device's current stream into pinned memory, and the writer thread waits for them
        instead of the caller (unlike in torch's `async_save`); what is on the host already is copied at once. Needs
        host memory for the rank's share of weights and optimizer.

        Args:
            progress: plain JSON values including "step" (steps done); `restore` returns those of rank 0.
            model: the parameters of its decoder that are trained, plain or sharded.
            optimizer: of `model`; every tensor of its state.
            score: a validation loss; the checkpoint with the lowest one is kept.

        Returns:
            The folder that will contain it.

        Raises:
            InputError: on all ranks, if the save before this one failed.
        """
        self.wait()
        tensors = dict(_state(model, optimizer)) | _generators(self._world)
        local = {name: local_part(tensor) for name, tensor in tensors.items()}
        if not self._staging.fits(local):
            self._staging.close()
            self._staging = Staging(local, pinned=self._world.device.type == "cuda" and not self._world.offload)
        for name, tensor in local.items():
            self._staging.tensors[name].copy_(tensor, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if self._on_cuda else None
        manifest = {
            "progress": as_read_back(progress),  # as it is now: the caller keeps changing it
            "score": score if score is not None and math.isfinite(score) else None,
            "processes": self._world.size,
            "replicas": self._world.replicas,
            **({"offload": True} if self._world.offload else {}),
            "torch": torch.__version__,
            "identity": self._identity,
        }
        folder = self._dir / f"step-{progress['step']:08d}"
        self._pending = self._thread.submit(self._write, folder, tensors, manifest, copied)
        return folder

    def _write(
        self, folder: Path, tensors: dict[str, Tensor], manifest: dict[str, Any], copied: torch.cuda.Event | None
    ) -> None:
        """Do the background thread's part of `save`."""
        if copied is not None:
            copied.synchronize()
        planner = _StagedPlanner(self._staging.tensors)
        try:
            with CheckpointWriter(folder, self._world.rank, manifest, self._remove_old) as writer:
                dcp.save(tensors, storage_writer=writer, planner=planner, process_group=self._group)
        except dcp.CheckpointException as error:  # the same one on every rank, and all have stopped writing
            cause = next(iter(error.failures.values()))[0]
            if not isinstance(cause, InputError | OSError):
                raise RuntimeError(f"{folder} could not be written") from error
            raise InputError(
                f"{folder} could not be saved: {cause}. The checkpoints before it are untouched; a smaller "
                f"`keep_checkpoints` takes less room"
            ) from None

    def _remove_old(self) -> None:
        steps = sorted(self._dir.glob("step-*"))
        best = [name for _, name in self._by_score()[:1]]
        for old in steps[: -self._keep]:
            if old.name not in best:
                remove_whole(old)

    def wait(self) -> None:
        """Wait until nothing is being written. Raises InputError, on all ranks, if it could not be written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, model: PackedLoss, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into model and optimizer; return its progress, or None if there is none.

        Rank 0 lists the folders: another rank might see a different list (from a network filesystem's cache), and the
        ranks would then wait for each other in different collectives. A damaged checkpoint is skipped with a warning
        and moved aside, so that it does not count among those to keep.
        """
        names = self._world.on_main(lambda: sorted((path.name for path in self._dir.glob("step-*")), reverse=True))
        for number, name in enumerate(names):
            folder = self._dir / name
            progress = self.load(folder, model, optimizer)
            if progress is not None:
                self._world.say(f"resuming after step {progress['step']} from {folder}")
                return progress
            if self._world.is_main:
                for old in self._dir.glob("damaged-*") if number == 0 else ():  # of an earlier start: they are large
                    shutil.rmtree(old, ignore_errors=True)
                aside = folder.with_name(f"damaged-{name}")
                folder.rename(aside)
                print(f"WARNING: {folder} is moved to {aside.name}; trying the checkpoint before it", flush=True)
        if names:
            self._world.say("WARNING: no whole checkpoint is left; starting over")
        return None

    def load_best(self, model: PackedLoss) -> tuple[int, float] | None:
        """Load the weights of the whole checkpoint with the lowest score.

        Returns its step and score; None, with nothing changed, if no whole checkpoint has a score.
        """
        self.wait()
        for score, name in self._world.on_main(self._by_score):
            progress = self.load(self._dir / name, model)
            if progress is not None:
                return progress["step"], score
            self._world.say(f"WARNING: {self._dir / name} was the best; trying the best of the others")
        return None

    def load(
        self, folder: Path, model: PackedLoss, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Any] | None:
        """Check `folder` against its manifest and load it; without an optimizer, only the weights.

        Returns its progress; None, with a warning and nothing changed, if the checkpoint is damaged.
        """
        manifest, fault = self._world.on_main(lambda: read_manifest(folder))
        faults = [fault]
        if manifest is not None:  # every file is read by one rank
            mine = sorted(manifest["files"].items())[self._world.rank :: self._world.size]
            faults = [None] * self._world.size
            dist.all_gather_object(faults, first_fault(folder, mine), group=self._group)
        if manifest is None or any(faults):
            for text in filter(None, faults):
                self._world.say(f"WARNING: {text}")
            return None
        reader = dcp.HuggingFaceStorageReader(str(folder))
        stored = reader.read_metadata().state_dict_metadata
        if optimizer is None:
            targets = {f"model.{name}": p.detach() for name, p in _trained(model).items()}
        else:
            if isinstance(optimizer, LowBitAdamW):
                _require_same_shards(folder, manifest, self._world)
            _make_state(stored, model, optimizer)
            targets = dict(_state(model, optimizer))
            there = _layout(manifest["processes"], manifest["replicas"], manifest.get("offload", False))
            here = _layout(self._world.size, self._world.replicas, self._world.offload)
            if there == here:
                targets |= {name: state for name, state in _generators(self._world).items() if name in stored}
            if manifest["torch"] != torch.__version__:
                there, here = f"{there} of torch {manifest['torch']}", f"{here} of torch {torch.__version__}"
            if there != here:
                self._world.say(
                    f"resuming with {here}, but {there} wrote {folder}: the result is equal up to rounding, not bit "
                    "for bit"
                )
        dcp.load(targets, storage_reader=reader, planner=_load_planner(), process_group=self._group)
        _set_generators(targets, self._world)
        progress: dict[str, Any] = manifest["progress"]
        return progress

    def _by_score(self) -> list[tuple[float, str]]:
        """Return score and name of the checkpoints that have a score, the lowest first."""
        read = [(read_manifest(path)[0], path.name) for path in self._dir.glob("step-*")]
        return sorted((m["score"], name) for m, name in read if m is not None and m["score"] is not None)

    def discard(self) -> None:
        """Remove all checkpoints: the run is finished."""
        self.wait()
        if self._world.is_main:
            shutil.rmtree(self._dir, ignore_errors=True)  # the next start of the finished run does it otherwise

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Let a write in flight finish, whatever ends the run: it needs the process group, which is destroyed next."""
        self._thread.shutdown()
        self._staging.close()


def _trained(model: PackedLoss) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name; the others are what it starts from."""
    return {name: p for name, p in model.decoder.named_parameters() if p.requires_grad}


def _state(model: PackedLoss, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor, sharing memory, of everything that is restored by name and may be sharded."""
    for name, parameter in _trained(model).items():
        yield f"model.{name}", parameter.detach()
        if isinstance(optimizer, LowBitAdamW):
            states = optimizer.states(parameter)
        else:
            states = iter(optimizer.state.get(parameter, {}).items())
        for field, value in states:
            yield f"optimizer.{field}.{name}", value


def _make_state(stored: dict[str, Any], model: PackedLoss, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer a tensor for each stored one: it makes its own only in its first step."""
    if isinstance(optimizer, LowBitAdamW):
        if any(key.startswith("optimizer.") for key in stored):  # else no step was made
            optimizer.make_states()
        return
    names = dict(model.decoder.named_parameters())
    on_device = {
        id(p): bool(g.get("fused") or g.get("capturable")) for g in optimizer.param_groups for p in g["params"]
    }
    optimizer.state.clear()
    for key, metadata in stored.items():
        kind, _, rest = key.partition(".")
        if kind != "optimizer":
            continue
        field, _, name = rest.partition(".")
        parameter, dtype = names[name], metadata.properties.dtype
        if metadata.size == parameter.shape:
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:  # the step count; only a fused or capturable step wants it on the device
            device = parameter.device if on_device[id(parameter)] else torch.device("cpu")
            value = torch.zeros(metadata.size, dtype=dtype, device=device)
        optimizer.state[parameter][field] = value


def _require_same_shards(folder: Path, manifest: dict[str, Any], world: World) -> None:
    """Raise InputError, on all ranks, if a checkpoint's quantised moments are those of other shards."""
    there, here = manifest["processes"] // manifest["replicas"], world.size // world.replicas
    if there != here:
        raise InputError(
            f"{folder} has moments of few bits (`optimizer_states`), quantised in shards of {there} processes; now "
            f"{here} share the model. Resume with {there}, or choose another `out` to start over"
        )


def _generators(world: World) -> dict[str, Tensor]:
    """Return the state of this rank's random-number generators, uint8."""
    states = {f"rng.cpu.{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"rng.cuda.{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return states


def _set_generators(states: dict[str, Tensor], world: World) -> None:
    if (state := states.get(f"rng.cpu.{world.rank}")) is not None:
        torch.set_rng_state(state)
    if (state := states.get(f"rng.cuda.{world.rank}")) is not None:
        torch.cuda.set_rng_state(state, world.device)


class _StagedPlanner(dcp.DefaultSavePlanner):
    """Plans from the shapes and placements of the live tensors, and writes their copies."""

    def __init__(self, staged: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._staged = staged

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._staged[index.fqn]


def _layout(processes: int, replicas: int, offload: bool) -> str:
    copies = f" and {replicas} copies of the model" if replicas > 1 else ""
    return f"{processes} processes{copies}{' with offload' if offload else ''}"


def _load_planner() -> dcp.DefaultLoadPlanner:
    return dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def read_identity(path: Path) -> dict[str, Any]:
    """Read the identity of a run from the JSON file that holds it.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    identity = read_json(path, finite=False).get("identity")
    if not isinstance(identity, dict):
        raise InputError(f"{path}: key 'identity' must be an object")
    return identity


def _resumed_as(identity: dict[str, Any]) -> dict[str, Any]:
    """Leave out what only the export depends on."""
    options = {key: value for key, value in identity.get("options", {}).items() if key != "save_dtype"}
    return identity | {"options": options}


def describe_differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Describe how two identities differ, as "key: theirs there, ours here; ..."; empty if they are equal."""
    found = differences(theirs, ours)
    return "; ".join(f"{key}: {there!r} there, {here!r} here" for key, (there, here) in found.items())
