"""mergekit's YAML (https://github.com/arcee-ai/mergekit): what it may say here, and what it means.

Defaults, precedence and the order of operations are mergekit 0.1.5's. A method, key or form of value that is not known
here, or that would change nothing, is an error that names it; nothing is ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from micota_fast.config.loader import build, load, option
from micota_fast.config.suggestions import did_you_mean
from micota_fast.errors import InputError
from micota_fast.merge.methods import METHODS, PARAMETERS, MethodSpec, Rescale, Scalars
from micota_fast.merge.settings import Case, Scalar, Setting, plain, read_setting, value_at

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(METHODS)]
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(kw_only=True)
class MergekitModel:
    """An entry under `models`."""

    model: str = option(doc="checkpoint (folder or hub name), or MODEL+ADAPTER with a LoRA adapter in peft's layout")
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
        spec = METHODS[self.merge_method]
        _check_keys("parameters", self.parameters, (*spec.of_models, *spec.of_file), self.merge_method)
        if not self.models:
            raise InputError("`models` lists nothing to merge")
        names = [entry.model for entry in self.models]
        for i, entry in enumerate(self.models):
            if names.count(entry.model) > 1:
                raise InputError(f"`models` lists {entry.model!r} twice; add up its weights in one entry")
            where = f"models.{i}.parameters"
            if entry.parameters and entry.model == self.base_model and spec.starts_at_base:
                raise InputError(f"`{where}`: {self.merge_method} takes no parameters for the base model")
            _check_keys(where, entry.parameters, spec.of_models, self.merge_method)
        if not spec.starts_at_base:
            return
        if self.base_model is None:
            raise InputError(f"`base_model` is required by merge_method {self.merge_method}")
        others = sum(name != self.base_model for name in names)
        if others == 0:
            raise InputError("`models` lists only the base model: there is nothing to merge into it")
        if spec.one_model and others != 1:
            raise InputError(f"{self.merge_method} goes from the base to one model, but `models` lists {others} others")


@dataclass(frozen=True)
class MergeInput:
    """A model to merge, with what it sets by parameter: always "weight" (slerp's `t`) and "density"."""

    model: str
    settings: Mapping[str, Setting]


@dataclass(frozen=True)
class MergePlan:
    """A merge with every default filled in.

    `base` gives config and tokenizer, and is where the task vectors (or slerp's arc) start; linear has no such start.
    `inputs` is in the file's order and contains the base only for linear. `rescale` is what makes up for the entries
    that a sparsifying method drops: "l1" keeps the task vector's sum of magnitudes (mergekit), "density" divides by the
    density (Yu et al. 2024, DARE, arXiv 2311.03099), "none" does nothing.
    """

    method: str
    base: str
    inputs: tuple[MergeInput, ...]
    normalize: Setting
    rescale: Setting
    lambda_: Setting
    dtype: Dtype | None
    one_tokenizer: bool  # a file that names a tokenizer counts on a vocabulary that all share

    @property
    def spec(self) -> MethodSpec:
        return METHODS[self.method]

    def at(self, tensor: str, depth: float) -> Scalars:
        """Return what holds for a tensor at a depth (see `settings.value_at`).

        Raises:
            InputError: naming tensor and model: no value holds, or those that do make no merge.
        """
        of_models = {}
        for name in self.inputs[0].settings:
            values = [value_at(entry.settings[name], tensor, depth) for entry in self.inputs]
            if None in values:
                model = self.inputs[values.index(None)].model
                raise InputError(f"{model}: no `{name}` applies to tensor {tensor}; add a case without a filter")
            of_models[name] = tuple(float(value) for value in values if value is not None)
        normalize = bool(value_at(self.normalize, tensor, depth))
        rescale = cast(Rescale, value_at(self.rescale, tensor, depth))
        lambda_ = float(value_at(self.lambda_, tensor, depth) or 0.0)
        scalars = Scalars(of_models, normalize, rescale, lambda_)
        if self.spec.mistake is not None and (mistake := self.spec.mistake(scalars)) is not None:
            raise InputError(f"tensor {tensor}: {mistake}")
        return scalars

    def filters(self) -> list[str]:
        """Return the parts of names by which parameters hold for some tensors only."""
        of_inputs = (setting for entry in self.inputs for setting in entry.settings.values())
        settings = (*of_inputs, self.normalize, self.rescale, self.lambda_)
        return sorted({case.filter for setting in settings for case in setting if case.filter is not None})

    def with_weight(self, weight: float) -> "MergePlan":
        """Return the plan with another weight (slerp: `t`) of its one model.

        Raises:
            InputError: the plan merges several models, or by linear, whose weights are shares of the models.
        """
        if not self.spec.starts_at_base or len(self.inputs) != 1:
            raise InputError(
                "a sweep over weights needs one model that is merged into a base by a method other than linear, not "
                f"{len(self.inputs)} by {self.method}"
            )
        setting = read_setting("weight", weight, PARAMETERS["weight"].read)
        (entry,) = self.inputs
        return replace(self, inputs=(replace(entry, settings={**entry.settings, "weight": setting}),))

    def describe(self, base: str, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Describe the plan as a file would; `base` and `inputs` say more about the models and replace their places."""
        return {
            "method": self.method,
            "base": base,
            "inputs": [
                about | {name: plain(setting) for name, setting in entry.settings.items()}
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
        """Return a folder relative to the file if there is one, else the name as it stands; of MODEL+ADAPTER, both."""
        if "+" in model and not (folder / model).is_dir():
            return "+".join(located(part) for part in model.rsplit("+", 1))
        return str(folder / model) if (folder / model).is_dir() else model

    return _plan(load(MergekitFile, path), str(path), located)


def parse_mergekit(content: dict[str, Any], source: str) -> MergePlan:
    """Read the content of such a file that stands elsewhere. Model names stay as they are.

    Args:
        source: named in errors.
    """
    return _plan(build(MergekitFile, content, source), source, lambda model: model)


def _plan(file: MergekitFile, source: str, located: Callable[[str], str]) -> MergePlan:
    method, spec = file.merge_method, METHODS[file.merge_method]

    def setting(name: str, default: Scalar | None, own: dict[str, Any] | None = None, where: str = "") -> Setting:
        cases: Setting = ()
        if own is not None and name in own:
            cases += read_setting(f"{where}.{name}", own[name], PARAMETERS[name].read)
        if name in file.parameters:
            cases += read_setting(f"parameters.{name}", file.parameters[name], PARAMETERS[name].read)
        return _trimmed(cases if default is None else (*cases, Case(None, (default,))))

    entries = list(file.models)
    if spec.starts_at_base:
        entries = [entry for entry in entries if entry.model != file.base_model]
    elif file.base_model is not None and all(entry.model != file.base_model for entry in entries):
        entries.append(MergekitModel(model=file.base_model))  # mergekit counts it as an input
    inputs = []
    try:
        for i, entry in enumerate(entries):
            where = f"models.{i}.parameters"
            weight = setting(spec.weight, None, entry.parameters, where)
            if not weight:
                raise InputError(f"`models`: {entry.model} has no `{spec.weight}`, which {method} needs")
            others = dict.fromkeys(("density", *spec.of_models))
            others.pop("weight", None)
            settings = {name: setting(name, PARAMETERS[name].default, entry.parameters, where) for name in others}
            inputs.append(MergeInput(located(entry.model), {"weight": weight, **settings}))
        setting("int8_mask", None)
        return MergePlan(
            method=method,
            base=located(file.base_model or entries[0].model),
            inputs=tuple(inputs),
            normalize=setting("normalize", spec.normalize),
            rescale=setting("rescale", spec.rescale),
            lambda_=setting("lambda", PARAMETERS["lambda"].default),
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
    for key in parameters:
        if key not in known:
            what = f"has no meaning here for merge_method {method}" if key in PARAMETERS else "unknown key"
            asked = did_you_mean(key, known, f"known here: {', '.join(known) or 'none'}")
            raise InputError(f"`{where}.{key}`: {what}; {asked}")
