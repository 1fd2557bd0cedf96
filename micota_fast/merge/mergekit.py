"""mergekit's YAML (https://github.com/arcee-ai/mergekit): what it may say here, and what it means.

Defaults, precedence and the order of operations are mergekit 0.1.5's. A method, key or form of value that is not known
here, or that would change nothing, is an error that names it; nothing is ignored.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from micota_fast.config.loader import build, load, option
from micota_fast.errors import InputError
from micota_fast.merge.settings import Case, Scalar, Setting, plain, read_setting, value_at

Method = Literal["linear", "task_arithmetic", "slerp", "ties", "dare_linear", "dare_ties"]
Dtype = Literal["float32", "float16", "bfloat16"]
Rescale = Literal["l1", "density", "none"]

_TASK_VECTORS = ("normalize", "lambda", "int8_mask")
# method -> (what each model may set, what only the whole file sets)
_PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("weight",), ("normalize",)),
    "slerp": ((), ("t",)),
    "task_arithmetic": (("weight",), _TASK_VECTORS),
    "ties": (("weight", "density"), (*_TASK_VECTORS, "rescale")),
    "dare_linear": (("weight", "density"), (*_TASK_VECTORS, "rescale")),
    "dare_ties": (("weight", "density"), (*_TASK_VECTORS, "rescale")),
}
_NORMALIZE = ("linear", "ties")  # by default
_RESCALE = ("dare_linear", "dare_ties")


@dataclass(kw_only=True)
class MergekitModel:
    """An entry under `models`."""

    model: str = option(doc="checkpoint (folder or hub name)")
    parameters: dict[str, Any] = option({}, doc="weight; density: share of the task vector's entries that is kept")


@dataclass(kw_only=True)
class MergekitTokenizer:
    """The `tokenizer` key."""

    source: Literal["base"] = option("base", doc="the base model's, which all models then have to share")


@dataclass(kw_only=True)
class MergekitFile:
    """The whole file."""

    merge_method: Method = option(doc="how the tensors are combined")
    base_model: str | None = option(None, doc="where task vectors start, and whose tokenizer and config are kept")
    models: list[MergekitModel] = option(doc="what is merged")
    parameters: dict[str, Any] = option(
        {},
        doc="normalize, lambda, rescale, int8_mask, t; weight and density here hold where a model has none of its own",
    )
    dtype: Dtype | None = option(None, doc="type of the result where out_dtype is absent; arithmetic is float32 always")
    out_dtype: Dtype | None = option(None, doc="type of the result; absent everywhere: that of the inputs")
    tokenizer_source: Literal["base"] | None = option(
        None, doc="the base model's, which all models then have to share; nothing is re-ordered"
    )
    tokenizer: MergekitTokenizer | None = option(None, doc="the same in another form")

    def __post_init__(self) -> None:
        own, shared = _PARAMETERS[self.merge_method]
        _check_keys("parameters", self.parameters, (*own, *shared), self.merge_method)
        if not self.models:
            raise InputError("`models` lists nothing to merge")
        names = [entry.model for entry in self.models]
        for i, entry in enumerate(self.models):
            if names.count(entry.model) > 1:
                raise InputError(f"`models` lists {entry.model!r} twice; add up its weights in one entry")
            where = f"models.{i}.parameters"
            if entry.parameters and entry.model == self.base_model and self.merge_method != "linear":
                raise InputError(f"`{where}`: {self.merge_method} takes no parameters for the base model")
            _check_keys(where, entry.parameters, own, self.merge_method)
        if self.merge_method == "linear":
            return
        if self.base_model is None:
            raise InputError(f"`base_model` is required by merge_method {self.merge_method}")
        others = sum(name != self.base_model for name in names)
        if others == 0:
            raise InputError("`models` lists only the base model: there is nothing to merge into it")
        if self.merge_method == "slerp" and others != 1:
            raise InputError(f"slerp goes from the base to one model, but `models` lists {others} others")


@dataclass(frozen=True)
class MergeInput:
    """A model to merge, with what it sets. For slerp the weight is `t`."""

    model: str
    weight: Setting
    density: Setting = (Case(None, (1.0,)),)


@dataclass(frozen=True)
class Scalars:
    """The parameters of one tensor; weights and densities in the order of the inputs."""

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    normalize: bool
    rescale: Rescale
    lambda_: float


@dataclass(frozen=True)
class MergePlan:
    """A merge with every default filled in.

    `base` gives config and tokenizer, and the start of the task vectors (or of the arc) where the method has them;
    linear has none. `inputs` is in the file's order and, but for linear, without the base. `rescale` is what makes up
    for the entries that a sparsifying method drops: "l1" keeps the task vector's sum of magnitudes (mergekit),
    "density" divides by the density (Yu et al. 2024, DARE, arXiv 2311.03099), "none" does nothing.
    """

    method: Method
    base: str
    inputs: tuple[MergeInput, ...]
    normalize: Setting
    rescale: Setting
    lambda_: Setting
    dtype: Dtype | None
    one_tokenizer: bool  # a file that names a tokenizer counts on a vocabulary that all share

    def at(self, tensor: str, depth: float) -> Scalars:
        """What holds for a tensor at a depth (see `settings.value_at`).

        Raises:
            InputError: naming model and tensor, where no weight holds, or where linear's weights sum to 0 and are to be
                normalized.
        """
        weights, densities = [], []
        for entry in self.inputs:
            weight = value_at(entry.weight, tensor, depth)
            if weight is None:
                raise InputError(f"{entry.model}: no `weight` holds for tensor {tensor}; add a case without a filter")
            weights.append(float(weight))
            densities.append(float(value_at(entry.density, tensor, depth) or 0.0))
        normalize = bool(value_at(self.normalize, tensor, depth))
        if self.method == "linear" and normalize and abs(sum(weights)) < 1e-8:
            raise InputError(
                f"the weights of tensor {tensor} sum to 0, so `normalize: true` cannot divide by their sum"
            )
        rescale = cast(Rescale, value_at(self.rescale, tensor, depth))
        lambda_ = float(value_at(self.lambda_, tensor, depth) or 0.0)
        return Scalars(tuple(weights), tuple(densities), normalize, rescale, lambda_)

    def filters(self) -> list[str]:
        """The parts of names by which parameters hold for some tensors only."""
        of_inputs = (setting for entry in self.inputs for setting in (entry.weight, entry.density))
        settings = (*of_inputs, self.normalize, self.rescale, self.lambda_)
        return sorted({case.filter for setting in settings for case in setting if case.filter is not None})

    def with_weight(self, weight: float) -> "MergePlan":
        """The plan with another weight (slerp: `t`) of its one model.

        Raises:
            InputError: the plan merges several models, or by linear, whose weights are shares of the models.
        """
        if self.method == "linear" or len(self.inputs) != 1:
            raise InputError(
                "a sweep over weights needs one model that is merged into a base by a method other than linear, not "
                f"{len(self.inputs)} by {self.method}"
            )
        setting = read_setting("weight", weight, partial(_scalar, "weight"))
        return replace(self, inputs=(replace(self.inputs[0], weight=setting),))

    def describe(self, base: str, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The plan as a file would say it; `base` and `inputs` say more about the models and replace their places."""
        return {
            "method": self.method,
            "base": base,
            "inputs": [
                about | {"weight": plain(entry.weight), "density": plain(entry.density)}
                for about, entry in zip(inputs, self.inputs, strict=True)
            ],
            "normalize": plain(self.normalize),
            "rescale": plain(self.rescale),
            "lambda": plain(self.lambda_),
            "dtype": self.dtype,
        }


def read_mergekit(path: Path | str) -> MergePlan:
    """Read a mergekit file.

    Any parameter may be one value, a gradient over the layers, or either by tensor name (see `settings`). A model's own
    cases go before those of the whole file. `rescale` may also be "l1" or "density" by name; `true` is "l1", as
    mergekit does it. `int8_mask` is accepted and changes nothing, since no masks are stored.

    Raises:
        InputError: naming file, line and key of what is unknown, missing or out of range.
    """
    folder = Path(path).parent

    def located(model: str) -> str:
        """A folder relative to the file, where there is one; else the name as it stands."""
        return str(folder / model) if (folder / model).is_dir() else model

    return _plan(load(MergekitFile, path), str(path), located)


def parse_mergekit(content: dict[str, Any], source: str) -> MergePlan:
    """The same of a file's content that stands elsewhere. Model names stay as they are.

    Args:
        source: named in errors.
    """
    return _plan(build(MergekitFile, content, source), source, lambda model: model)


def _plan(file: MergekitFile, source: str, located: Callable[[str], str]) -> MergePlan:
    method = file.merge_method

    def setting(name: str, default: Scalar | None, own: dict[str, Any] | None = None, where: str = "") -> Setting:
        cases: Setting = ()
        if own is not None and name in own:
            cases += read_setting(f"{where}.{name}", own[name], partial(_scalar, name))
        if name in file.parameters:
            cases += read_setting(f"parameters.{name}", file.parameters[name], partial(_scalar, name))
        return cases if default is None else (*cases, Case(None, (default,)))

    entries = list(file.models)
    if method == "linear" and file.base_model is not None:
        if all(entry.model != file.base_model for entry in entries):
            entries.append(MergekitModel(model=file.base_model))  # mergekit counts it as an input
    elif method != "linear":
        entries = [entry for entry in entries if entry.model != file.base_model]
    key = "t" if method == "slerp" else "weight"
    inputs = []
    try:
        for i, entry in enumerate(entries):
            where = f"models.{i}.parameters"
            weight = setting(key, None, entry.parameters, where)
            if not weight:
                raise InputError(f"`models`: {entry.model} has no `{key}`, which {method} needs")
            density = setting("density", 1.0, entry.parameters, where)
            inputs.append(MergeInput(located(entry.model), _trimmed(weight), _trimmed(density)))
        setting("int8_mask", None)
        return MergePlan(
            method=method,
            base=located(file.base_model or entries[0].model),
            inputs=tuple(inputs),
            normalize=_trimmed(setting("normalize", method in _NORMALIZE)),
            rescale=_trimmed(setting("rescale", "l1" if method in _RESCALE else "none")),
            lambda_=_trimmed(setting("lambda", 1.0)),
            dtype=file.out_dtype or file.dtype,
            one_tokenizer=file.tokenizer_source is not None or file.tokenizer is not None,
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _trimmed(setting: Setting) -> Setting:
    """Without the cases that stand behind one for all tensors and so never hold."""
    for i, case in enumerate(setting):
        if case.filter is None:
            return setting[: i + 1]
    return setting


def _check_keys(where: str, parameters: dict[str, Any], known: tuple[str, ...], method: str) -> None:
    everything = {key for own, shared in _PARAMETERS.values() for key in (*own, *shared)}
    for key in parameters:
        if key not in known:
            what = f"has no meaning here for merge_method {method}" if key in everything else "unknown key"
            raise InputError(f"`{where}.{key}`: {what}; known here: {', '.join(known) or 'none'}")


def _scalar(name: str, key: str, value: Any) -> Scalar:
    """One value of the parameter `name`, checked; `key` is where it stands."""
    if name in ("normalize", "int8_mask"):
        if value not in (True, False):  # 1 and 0 too: mergekit writes its own files so
            raise InputError(f"`{key}` must be true or false, not {value!r}")
        return bool(value)
    if name == "rescale":
        if value in (True, False):
            return "l1" if value else "none"
        if value not in ("l1", "density"):
            raise InputError(f"`{key}` must be true, false, l1 or density, not {value!r}")
        return str(value)
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML reads 1e-5 as a string
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise InputError(f"`{key}` must be a number, not {value!r}")
    if name == "density" and not 0 <= number <= 1:
        raise InputError(f"`{key}` must lie between 0 and 1, not {value}")
    if abs(number) > 1e6:
        raise InputError(f"`{key}` is out of range: {value}")
    return number
