"""Hugging Face checkpoint folders: read strictly, written whole or not at all. safetensors only."""

import math
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from micota_fast.common.dtypes import CODES, FLOATS
from micota_fast.common.files import whole_folder
from micota_fast.common.json_io import encode_json, write_json
from micota_fast.common.safetensors_file import read_header
from micota_fast.errors import InputError
from micota_fast.model.checks import HEAD, check_tied, checked_config
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import Decoder, parameter_shapes
from micota_fast.model.folder import COPIED_FILES, stored_tensors
from micota_fast.model.safetensors_writer import ShardWriter

_DTYPES = {name: getattr(torch, name) for name in FLOATS}


def load_model(
    directory: Path | str, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> Decoder:
    """Read a checkpoint into a decoder with weights of `dtype` (None or "auto": as config.json says) on `device`.

    Raises InputError, naming file and tensor, for anything missing, unexpected, of a wrong shape or damaged.
    """
    config = checked_config(directory)
    model = shapes_only(config, _as_dtype(dtype, config)).to_empty(device=device)
    read_weights(model, directory)
    return model


def shapes_only(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    """Build a decoder on torch's meta device: no memory yet, and no initial weights that would be overwritten.

    To be sharded, or not, then given memory (`Module.to_empty`), then weights (`read_weights`, `draw_weights`).
    """
    with torch.device("meta"):
        model = Decoder(config)
    return model.to(dtype)


def read_weights(model: Decoder, directory: Path | str) -> None:
    """Set all weights of `model`, or the shards of them that this rank holds, to a checkpoint's.

    Files are mapped, so of a tensor sharded by rows only those of this rank are read.

    Raises InputError, naming file and tensor, for anything missing, unexpected, of a wrong shape or damaged.
    """
    config, shapes = model.config, parameter_shapes(model.config)
    stored = stored_tensors(directory)
    files = {name: path for name, (path, _) in stored.items() if name != HEAD or not config.tie_word_embeddings}
    where = Path(directory) / "config.json"
    if missing := shapes.keys() - files.keys():
        raise InputError(f"{directory}: tensor {min(missing)} is missing; {where} calls for it")
    if unexpected := files.keys() - shapes.keys():
        name = min(unexpected)
        raise InputError(f"{files[name]}: unexpected tensor {name}; {where} describes no such parameter")
    check_tied(config, stored, Path(directory))
    parameters = dict(model.named_parameters())
    for path in sorted(set(files.values())):
        with _open(path) as shard:
            for name in (name for name, file in files.items() if file == path):
                found = tuple(shard.get_slice(name).get_shape())
                if found != tuple(shapes[name]):
                    raise InputError(
                        f"{path}: tensor {name} has shape {list(found)}; {where} calls for {list(shapes[name])}"
                    )
                set_parameter(parameters[name], _plain_float(shard, path, name), f"{path}: tensor {name}")


@torch.no_grad()
def set_parameter(parameter: Tensor, value: Tensor, where: str | None = None) -> None:
    """Copy `value`, whole and on the CPU, to the parameter or, of its rows, to this rank's shard of it.

    Args:
        where: the file and tensor that it comes from, so that what this rank takes of it is checked to be finite.

    Raises:
        InputError: it contains NaN or infinity.
    """
    if isinstance(parameter, DTensor):
        for mesh_dim, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                shards = value.chunk(parameter.device_mesh.size(mesh_dim), placement.dim)
                rank = parameter.device_mesh.get_local_rank(mesh_dim)
                value = shards[rank] if rank < len(shards) else value.narrow(placement.dim, 0, 0)
    if where is not None:
        _check_finite(value, where)
    (parameter.to_local() if isinstance(parameter, DTensor) else parameter).copy_(value)


def _check_finite(value: Tensor, where: str) -> None:
    """Look at the least and the greatest element: one pass at 7 GB/s per core, no slower than the copy that follows."""
    if value.numel() and not all(math.isfinite(float(end)) for end in value.aminmax()):
        kind = "NaN" if value.isnan().any() else "infinity"
        raise InputError(f"{where} holds {kind}; this checkpoint is damaged")


def init_random(
    config: ModelConfig, seed: int, dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """Build a decoder with fresh weights: see `draw_weights`."""
    model = shapes_only(config, _as_dtype(dtype, config)).to_empty(device=device)
    draw_weights(model, seed)
    return model


def draw_weights(model: Decoder, seed: int) -> None:
    """Draw fresh weights as transformers does: normal(0, initializer_range), biases 0, norms 1; fixed by `seed`.

    Every dtype, device and way of sharding gets the same ones.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(model.config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            value = torch.ones(shapes[name])
        elif name.endswith(".bias"):
            value = torch.zeros(shapes[name])
        else:
            value = torch.empty(shapes[name]).normal_(0.0, model.config.initializer_range, generator=generator)
        set_parameter(parameter, value)


def check_savable(config: ModelConfig, source_dir: Path | str, dtype: torch.dtype | str | None = None) -> None:
    """Check all that `save_checkpoint` needs besides the weights and room on the disk, so before there are weights.

    Args:
        config, source_dir, dtype: as for `save_checkpoint`.

    Raises:
        InputError: naming the dtype or file at fault.
    """
    try:
        encode_json(config.to_dict(_dtype_name(_as_dtype(dtype, config))))
    except InputError as error:
        raise InputError(f"{Path(source_dir) / 'config.json'}: {error}") from None
    for path in (Path(source_dir) / file for file in COPIED_FILES):
        try:
            if path.is_file():
                path.open("rb").close()
        except OSError as error:
            raise InputError(f"{path}: cannot be read, but is to be copied: {error.strerror}") from None


def save_checkpoint(
    state_dict: Mapping[str, Tensor],
    config: ModelConfig,
    source_dir: Path | str,
    out_dir: Path | str,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint that transformers opens unchanged; equal inputs give equal bytes.

    The folder appears whole (`files.whole_folder`).

    Args:
        state_dict: a tensor for each parameter, on any device, of any float dtype. Each is taken once, in the model's
            order, when it is written, so a lazy mapping keeps one tensor in memory at a time.
        config: of the model; its config.json is written with the dtype of the saved tensors.
        source_dir: the checkpoint it was made from; tokenizer, chat template and generation_config are copied from it.
        out_dir: must not exist, or be empty.
        dtype: to store; None or "auto": the one `config` states, else fp32.
        max_shard_bytes: largest size of a file, unless one tensor alone is larger; beyond it, shards with an index.
        extra_files: name and text of what else the folder is to hold, such as README.md.

    Raises:
        InputError: `out_dir` holds something or cannot be written, or the tensors are not those `config` describes.
    """
    out_dir, resolved = Path(out_dir), _as_dtype(dtype, config)
    shapes = parameter_shapes(config)
    given = set(state_dict) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if given != shapes.keys():
        name = min(given ^ shapes.keys())
        raise InputError(f"{out_dir}: tensor {name} is {'unexpected' if name in given else 'missing'}; nothing saved")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir}: already exists; remove it or choose another place for the checkpoint")
    with whole_folder(out_dir) as aside:
        _write_weights(state_dict, shapes, resolved, aside, max_shard_bytes)
        write_json(aside / "config.json", config.to_dict(_dtype_name(resolved)), 2)
        for file in COPIED_FILES:
            if (Path(source_dir) / file).is_file():
                shutil.copyfile(Path(source_dir) / file, aside / file)
        for file, text in (extra_files or {}).items():
            (aside / file).write_text(text, encoding="utf-8")


def _write_weights(
    state_dict: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    directory: Path,
    max_shard_bytes: int,
) -> None:
    code = code_of(dtype)
    layout = {name: (tuple(shape), code) for name, shape in shapes.items()}
    with closing(ShardWriter(directory, layout, max_shard_bytes)) as writer:
        for name, shape in shapes.items():
            tensor = state_dict[name].detach()
            if tensor.shape != shape:
                raise InputError(f"{name}: shape {list(tensor.shape)} to be saved, {list(shape)} in config.json")
            writer.write(name, 0, memory_of(tensor.to("cpu", dtype)))


def memory_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, without a copy if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_tensor(path: Path, name: str) -> Tensor:
    """Return one tensor of a safetensors file, mapped.

    Raises:
        InputError: the file is damaged, or the tensor is no plain float.
    """
    with _open(path) as file:
        return _plain_float(file, path, name)


def _plain_float(file: safe_open, path: Path, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if tensor.dtype not in _DTYPES.values():
        raise InputError(f"{path}: tensor {name} is stored as {tensor.dtype}, not as a plain float")
    return tensor


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        read_header(path)  # says more, where it sees what is wrong
        raise InputError(f"{path}: damaged or not a safetensors file: {error}") from None


def _as_dtype(dtype: torch.dtype | str | None, config: ModelConfig) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype if dtype not in (None, "auto") else config.dtype_name or "float32"
    if name not in _DTYPES:
        raise InputError(f"dtype {name!r} is not supported; choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def code_of(dtype: torch.dtype) -> str:
    """Return safetensors' code of a type."""
    return CODES[_dtype_name(dtype)]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
