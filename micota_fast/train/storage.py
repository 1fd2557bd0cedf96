"""The files of a resume checkpoint: a safetensors file from each rank, and a manifest.

`torch.distributed.checkpoint` decides which rank writes what; torch's own storage would write and read pickles. Besides
each tensor's shape, the header of a file has its offsets in the whole tensor, under the key where torch's
`HuggingFaceStorageReader` looks for them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from micota_fast.common.files import remove_whole, whole_folder, write_atomic, writing
from micota_fast.common.fingerprint import of_file
from micota_fast.common.json_io import parse_json, write_json
from micota_fast.common.safetensors_file import SafetensorsFile
from micota_fast.errors import InputError
from micota_fast.model.safetensors_io import code_of, memory_of

_MEND = "fix this and run the same command to resume from the last checkpoint"
_SLACK = 1 << 20  # bytes besides the tensors: headers and manifest


class CheckpointWriter(StorageWriter):
    """Writes each rank's part of a checkpoint into one safetensors file, and then the manifest, from rank 0.

    A file is hashed while it is written, so nothing is held twice. `dcp.save` raises an error of any rank on all. Use
    it in a `with` statement, at whose end nothing is left of a checkpoint that failed.

    Args:
        folder: appears once everything is in it and synced, in place of what was there.
        rank: of this process.
        manifest: JSON values; the files' sizes and digests are added to it.
        published: called on rank 0 once `folder` is there.
    """

    def __init__(self, folder: Path, rank: int, manifest: dict[str, Any], published: Callable[[], None]) -> None:
        self._folder, self._rank, self._manifest, self._published = folder, rank, manifest, published
        self._aside = folder  # until rank 0 has made another
        self._open = ExitStack()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: no state is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder to fill, on rank 0; the others learn its name from the plan."""
        if is_coordinator:
            self._aside = self._open.enter_context(whole_folder(self._folder))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Check, on rank 0, that there is room for what all ranks will write."""
        pieces = [item.tensor_data for plan in plans for item in plan.items if item.tensor_data is not None]
        sizes = (piece.chunk.sizes.numel() * piece.properties.dtype.itemsize for piece in pieces)
        require_room(self._aside.parent, _SLACK + sum(sizes))
        return [replace(plan, storage_data=self._aside) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        path = plan.storage_data / f"rank-{self._rank:05d}.safetensors"
        offsets = {item.index.fqn: list(item.index.offset or ()) for item in plan.items}
        tensors = {item.index.fqn: cast(Tensor, planner.resolve_data(item)) for item in plan.items}
        with writing(path, sum(tensor.nbytes for tensor in tensors.values())):
            size, digest = _write_safetensors(path, tensors, offsets)
        result: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        result.set_result([WriteResult(MetadataIndex(path.name), size, digest)])
        return result

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and publish the folder: called on rank 0 when all ranks have written."""
        files = {r.index.fqn: {"bytes": r.size_in_bytes, "sha256": r.storage_data} for rank in results for r in rank}
        path = self._aside / "manifest.json"
        write_json(path, self._manifest | {"files": files}, 2, finite=False)
        write_atomic(path.with_suffix(".sha256"), [f"{of_file(path)}  {path.name}\n".encode()])
        remove_whole(self._folder)
        self._open.close()
        self._published()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _write_safetensors(path: Path, tensors: dict[str, Tensor], offsets: dict[str, list[int]]) -> tuple[int, str]:
    """Write and sync; return size in bytes and SHA-256. `offsets`: where each tensor begins in the whole one."""
    # The format wants every tensor aligned to its own type, so wide types go first.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    sharding = {name: {"saved_offsets": offsets[name]} for name in ordered}
    layout = {name: (tuple(tensors[name].shape), code_of(tensors[name].dtype)) for name in ordered}
    digest = hashlib.sha256()
    with closing(SafetensorsFile(path, layout, {"DCP_SHARDING_INFO": json.dumps(sharding)})) as file:
        digest.update(file.header)
        for name in ordered:
            piece = memory_of(tensors[name])
            digest.update(piece)
            file.write(name, 0, piece)
    return file.size, digest.hexdigest()


def read_manifest(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Return the manifest and None; or None and what is wrong with it or with the list of files."""
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
        expected = path.with_suffix(".sha256").read_bytes()
    except OSError as error:
        return None, f"{folder} is torn: {error}"
    if expected != f"{hashlib.sha256(text).hexdigest()}  {path.name}\n".encode():
        return None, f"{path} is not what was written, according to manifest.sha256"
    try:
        manifest = parse_json(text, str(path), finite=False)
    except InputError as error:
        return None, str(error)
    if not all(isinstance(manifest.get(key), dict) for key in ("files", "progress", "identity")):
        return None, f"{path} is not a checkpoint's manifest"
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in manifest["files"]:  # torch's reader takes whatever lies there
            return None, f"{file} is none of the files that {path.name} lists"
    return manifest, None


def first_fault(folder: Path, files: list[tuple[str, dict[str, Any]]]) -> str | None:
    """Say what is wrong with the first of `files` that differs from the manifest; None if none does."""
    for name, recorded in files:
        path = folder / name
        try:
            if path.stat().st_size != recorded["bytes"] or of_file(path) != recorded["sha256"]:
                return f"{path} is not what was written"
        except OSError as error:
            return f"{path} cannot be read ({error})"
    return None


def require_room(folder: Path, needed: int) -> None:
    """Raise InputError if the disk of `folder` has no room for `needed` more bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"it needs {needed:,} bytes and {free:,} are free on the disk of {folder}; {_MEND}")
