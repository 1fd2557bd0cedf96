"""LoRA adapters in peft's layout: written, read strictly, and added to the weights that they were trained beside.

    adapter_config.json           rank, alpha, the modules that have an adapter
    adapter_model.safetensors     base_model.model.MODULE.lora_A.weight [r, in] and .lora_B.weight [out, r]

The layout is that of https://github.com/huggingface/peft (0.21).
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from micota_fast.common.files import temporary_folder, whole_folder
from micota_fast.common.json_io import read_json, write_json
from micota_fast.common.safetensors_file import SafetensorsFile, read_header
from micota_fast.config.train import LoraConfig
from micota_fast.errors import InputError
from micota_fast.model.checks import checked_config
from micota_fast.model.config import ModelConfig
from micota_fast.model.decoder import parameter_shapes
from micota_fast.model.folder import ADAPTER, resolve_model, stored_tensors
from micota_fast.model.safetensors_io import code_of, memory_of, read_tensor, save_checkpoint

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
# Keys of adapter_config.json that make an adapter more than a product added to a weight, with the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "alpha_pattern": (None, {}),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "init_lora_weights": (None, True, False, "gaussian"),  # others take a part of the base into the adapter
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "use_bdlora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
}


def save_adapter(
    tensors: Mapping[str, Tensor], config: LoraConfig, base: str, out_dir: Path, files: Mapping[str, str]
) -> None:
    """Write an adapter's folder, which appears whole (`files.whole_folder`); equal inputs give equal bytes.

    Args:
        tensors: float32 on the CPU by name in the model, such as model.layers.0.mlp.up_proj.lora_A.weight.
        config: of the adapters.
        base: the checkpoint that they belong to, as peft is to find it.
        out_dir: must not exist.
        files: name and text of what else the folder is to hold.
    """
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    about = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": config.targets,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    layout = {_PREFIX + name: (tuple(tensors[name].shape), code_of(tensors[name].dtype)) for name in sorted(tensors)}
    with whole_folder(out_dir) as aside:
        with closing(SafetensorsFile(aside / WEIGHTS, layout)) as file:
            for name, tensor in tensors.items():
                file.write(_PREFIX + name, 0, memory_of(tensor))
        write_json(aside / ADAPTER, about, 2)
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")


class Adapter:
    """An adapter's folder, read.

    Args:
        folder: with the two files.
        shapes: of the tensors of the model that it belongs to, by name.

    Raises:
        InputError: naming the file and the key or tensor: it is damaged, does not fit the model, or changes more of it
            than by a product added to a weight.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, torch.Size]) -> None:
        config = _plain_config(folder / ADAPTER)
        self._scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        if self._scale > torch.finfo(torch.float32).max:
            raise InputError(f"{folder / ADAPTER}: `lora_alpha` and `r` scale by {self._scale}, beyond float32")
        path = folder / WEIGHTS
        headers = read_header(path)
        self._tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        for name, tensor in self._tensors.items():
            if (code := headers[name].code) not in _FLOATS:
                raise InputError(f"{path}: tensor {name} is {code}, and an adapter's are {', '.join(_FLOATS)}")
            if not tensor.isfinite().all():
                raise InputError(f"{path}: tensor {name} holds NaN or infinity; this adapter is damaged")
        self.adapted: list[str] = []
        """Names of the weights that it changes."""
        halves = {name.removeprefix(_PREFIX).removesuffix(f".lora_{half}.weight") for name in headers for half in "AB"}
        for module in sorted(half for half in halves if f"{_PREFIX}{half}.lora_A.weight" in headers):
            weight = f"{module}.weight"
            if weight not in shapes:
                raise InputError(f"{path}: {module} has an adapter, but the model has no tensor {weight}")
            if len(shapes[weight]) != 2:
                raise InputError(f"{path}: {module} has an adapter, but {weight} is not a matrix")
            rows, columns = shapes[weight]
            wanted = {f"{_PREFIX}{module}.lora_A.weight": (config["r"], columns)}
            wanted[f"{_PREFIX}{module}.lora_B.weight"] = (rows, config["r"])
            for name, shape in wanted.items():
                if name not in headers:
                    raise InputError(f"{path}: tensor {name} is missing, though the other half of the adapter is there")
                if headers[name].shape != shape:
                    raise InputError(
                        f"{path}: tensor {name} has shape {list(headers[name].shape)}, not {list(shape)} (`r` and the "
                        f"dimensions of {weight})"
                    )
            self.adapted.append(weight)
        known = {
            f"{_PREFIX}{name.removesuffix('.weight')}.lora_{half}.weight" for name in self.adapted for half in "AB"
        }
        for name in sorted(headers.keys() - known):
            raise InputError(f"{path}: tensor {name} is not half of a LoRA adapter of a linear module")
        if not self.adapted:
            raise InputError(f"{path} holds no adapter")

    def added_to(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight of this name with the adapter's product added, in float32; as it is if it has none."""
        if name not in self.adapted:
            return weight
        module = _PREFIX + name.removesuffix(".weight")
        A, B = self._tensors[f"{module}.lora_A.weight"], self._tensors[f"{module}.lora_B.weight"]
        return torch.addmm(weight.float(), B, A, alpha=self._scale)


def _plain_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: `peft_type` is {config.get('peft_type')!r}; only LORA adapters are read")
    for key, values in _PLAIN.items():
        if config.get(key) not in values:
            raise InputError(
                f"{path}: `{key}: {config[key]!r}` is not supported; merge the adapter with peft: "
                "`PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload().save_pretrained(OUT)`"
            )
    for key, kind in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(config.get(key), kind) or isinstance(config[key], bool) or config[key] <= 0:
            raise InputError(f"{path}: `{key}` must be a number above 0, not {config.get(key)!r}")
    return config


def save_merged(
    base: Path,
    adapter: Path,
    out_dir: Path,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write the checkpoint `base` with an adapter added to its weights, tensor by tensor: see `save_checkpoint`.

    Sums are float32 and rounded once, to the type that is stored. What has no adapter stays as it is.

    Raises:
        InputError: the adapter does not fit, a checkpoint is damaged, or `out_dir` cannot be written.
    """
    config = checked_config(base)
    weights = _Merged(base, config, adapter)
    save_checkpoint(weights, config, base, out_dir, dtype, max_shard_bytes, files)


@contextmanager
def temporarily_merged(name: str) -> Iterator[Path]:
    """Yield a folder with what BASE+ADAPTER (`folder.names_adapter`) names, merged; it goes with the block.

    The temporary folder is made where TMPDIR says and takes the room of the whole model. What a process that was killed
    has left there goes when the next one comes to this place.

    Raises:
        InputError: there is no such checkpoint or adapter, they do not fit each other, or the folder cannot be made.
    """
    base, adapter = resolve_model(name)
    assert adapter is not None
    with temporary_folder(Path(tempfile.gettempdir()) / "micota-merged") as folder:
        save_merged(base, adapter, folder / "model")
        yield folder / "model"


class _Merged(Mapping[str, Tensor]):
    """Reads each tensor when it is asked for."""

    def __init__(self, base: Path, config: ModelConfig, adapter: Path) -> None:
        shapes = parameter_shapes(config)
        self._adapter = Adapter(adapter, shapes)
        self._stored = stored_tensors(base)
        self._names = list(shapes)
        for name in self._names:
            if name not in self._stored:
                raise InputError(f"{base}: tensor {name} is missing; {base / 'config.json'} calls for it")

    def __getitem__(self, name: str) -> Tensor:
        return self._adapter.added_to(name, read_tensor(self._stored[name][0], name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
