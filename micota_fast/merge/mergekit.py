"""mergekit's YAML (https://github.com/arcee-ai/mergekit): what it may say here, and what it means.

Defaults and the order of operations are mergekit 0.1.5's. A method, key or form of value that is not known here is an
error that names it; nothing is ignored.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from micota_fast.config import load, option
from micota_fast.errors import InputError

Method = Literal["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
Dtype = Literal["float32", "float16", "bfloat16"]
Rescale = Literal["l1", "density"] | None

# method -> its defaults of (normalize, rescale)
_DEFAULTS: dict[str, tuple[bool, Rescale]] = {
    "linear": (True, None),
    "task_arithmetic": (False, None),
    "ties": (True, None),
    "dare_linear": (False, "l1"),
    "dare_ties": (False, "l1"),
}
_TENSOR_KEYS = ("weight", "density")
_GLOBAL_KEYS = ("weight", "density", "normalize", "lambda", "rescale", "int8_mask")


@dataclass(kw_only=True)
class MergekitModel:
    """An entry under `models`."""

    model: str = option(doc="checkpoint (folder or hub name)")
    parameters: dict[str, Any] = option({}, doc="weight; density: share of the task vector's entries that is kept")

    def __post_init__(self) -> None:
        _check_parameters(self.parameters, _TENSOR_KEYS)


@dataclass(kw_only=True)
class MergekitFile:
    """The whole file."""

    merge_method: Method = option(doc="how the tensors are combined")
    base_model: str | None = option(None, doc="where task vectors start, and whose tokenizer and config are kept")
    models: list[MergekitModel] = option(doc="what is merged")
    parameters: dict[str, Any] = option(
        {}, doc="normalize, lambda, rescale, int8_mask; weight and density here hold where a model has none of its own"
    )
    dtype: Dtype | None = option(None, doc="type of the result where out_dtype is absent; arithmetic is float32 always")
    out_dtype: Dtype | None = option(None, doc="type of the result; absent everywhere: the base's, tensor by tensor")
    tokenizer_source: Literal["base"] | None = option(None, doc="only the base model's tokenizer is supported")

    def __post_init__(self) -> None:
        _check_parameters(self.parameters, _GLOBAL_KEYS)
        if not self.models:
            raise InputError("`models` lists nothing to merge")
        names = [entry.model for entry in self.models]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"`models` lists {name!r} twice; add up its weights in one entry")
        if self.base_model is None and self.merge_method != "linear":
            raise InputError(f"`base_model` is required by merge_method {self.merge_method}")
        if self.merge_method == "linear":
            for key in ("rescale", "lambda", "density"):
                if any(key in p for p in (self.parameters, *(entry.parameters for entry in self.models))):
                    raise InputError(f"`{key}` has no meaning for merge_method linear")
        elif all(name == self.base_model for name in names):
            raise InputError("`models` lists only the base model: there is nothing to merge into it")


@dataclass(frozen=True)
class MergeInput:
    """A model to merge, with its scalars."""

    model: str
    weight: float
    density: float = 1.0


@dataclass(frozen=True)
class MergePlan:
    """A merge with every default filled in.

    `base` gives config and tokenizer, and the start of the task vectors where the method has them (linear has none).
    `inputs` is in the file's order and, but for linear, without the base. `rescale` is what makes up for the entries
    that a sparsifying method drops: "l1" keeps the task vector's sum of magnitudes (mergekit), "density" divides by the
    density (Yu et al. 2024, DARE, arXiv 2311.03099), None does nothing.
    """

    method: Method
    base: str
    inputs: tuple[MergeInput, ...]
    normalize: bool
    rescale: Rescale
    lambda_: float
    dtype: Dtype | None


def read_mergekit(path: Path | str) -> MergePlan:
    """Read a mergekit file.

    `rescale` may also be "l1" or "density" by name; `true` is "l1", as mergekit does it. `int8_mask` is accepted and
    changes nothing, since masks are booleans here.

    Raises:
        InputError: naming file, line and key of what is unknown, missing or out of range. Gradients over layers and
            filters by tensor name (lists and mappings as values) are not supported yet.
    """
    file = load(MergekitFile, path)
    entries = list(file.models)
    if file.merge_method == "linear":
        if file.base_model is not None and all(entry.model != file.base_model for entry in entries):
            entries.insert(0, MergekitModel(model=file.base_model))  # mergekit counts it as an input
    else:
        entries = [entry for entry in entries if entry.model != file.base_model]
    inputs = []
    for entry in entries:
        own = file.parameters | entry.parameters
        if "weight" not in own:
            raise InputError(f"{path}: `models`: {entry.model} has no `weight`, which {file.merge_method} needs")
        inputs.append(MergeInput(_located(entry.model, path), float(own["weight"]), float(own.get("density", 1.0))))
    normalize, rescale = _DEFAULTS[file.merge_method]
    asked = file.parameters.get("rescale")
    if asked is not None:
        rescale = "l1" if asked is True else (asked or None)
    plan = MergePlan(
        method=file.merge_method,
        base=_located(file.base_model or entries[0].model, path),
        inputs=tuple(inputs),
        normalize=bool(file.parameters.get("normalize", normalize)),
        rescale=rescale,
        lambda_=float(file.parameters.get("lambda", 1.0)),
        dtype=file.out_dtype or file.dtype,
    )
    if plan.method == "linear" and plan.normalize and abs(sum(i.weight for i in plan.inputs)) < 1e-8:
        raise InputError(f"{path}: the weights sum to 0, so `normalize: true` cannot divide by their sum")
    return plan


def _located(model: str, path: Path | str) -> str:
    """A folder relative to the file, where there is one; else the name as it stands."""
    beside = Path(path).parent / model
    return str(beside) if beside.is_dir() else model


def _check_parameters(parameters: dict[str, Any], known: tuple[str, ...]) -> None:
    for key, value in parameters.items():
        if key not in known:
            raise InputError(f"`parameters.{key}`: unknown key; known here: {', '.join(known)}")
        if isinstance(value, list | dict):
            raise InputError(f"`parameters.{key}`: gradients and filters are not supported yet; give one value")
        if key in ("normalize", "int8_mask"):
            if not isinstance(value, bool):
                raise InputError(f"`parameters.{key}` must be true or false, not {value!r}")
        elif key == "rescale":
            if not isinstance(value, bool) and value not in ("l1", "density"):
                raise InputError(f"`parameters.rescale` must be true, false, l1 or density, not {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"`parameters.{key}` must be a number, not {value!r}")
        elif key == "density" and not 0 <= value <= 1:
            raise InputError(f"`parameters.density` must lie between 0 and 1, not {value}")
        elif abs(value) > 1e6 or value != value:
            raise InputError(f"`parameters.{key}` is out of range: {value}")
