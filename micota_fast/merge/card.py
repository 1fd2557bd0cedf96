"""What a merged checkpoint says of its making, as mergekit does: README.md and mergekit_config.yml.

Equal merges give equal text: it has no date, and of this machine's folders only as much of their names as tells them
apart.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from micota_fast.merge.mergekit import MergePlan
from micota_fast.merge.settings import Setting, plain

CARD, CONFIG = "README.md", "mergekit_config.yml"
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Return a name for each model of a merge: of a folder the last parts that tell it from the others; a hub name."""
    parts = {model: PurePath(model).parts if Path(model).is_dir() else (_without_paths(model),) for model in models}
    names = {}
    for model, own in parts.items():
        others = [other for name, other in parts.items() if name != model]
        count = next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
        names[model] = "/".join(own[-count:])
    return names


def _without_paths(model: str) -> str:
    """Return a hub name as it is; of MODEL+ADAPTER, folders by their last parts."""
    return "+".join(PurePath(part).name if Path(part).is_dir() else part for part in model.rsplit("+", 1))


def as_mergekit(plan: MergePlan, names: Mapping[str, str], out_dtype: str | None) -> str:
    """Return the mergekit file of a plan, with every default filled in, that gives the same merge.

    Args:
        names: of the models, by what the plan calls them.
        out_dtype: of the result; None: it has several.
    """
    spec = plan.spec
    models: list[dict[str, Any]] = []
    for entry in plan.inputs:
        own = {name: plain(entry.settings[name]) for name in spec.of_models}
        models.append({"model": names[entry.model], **({"parameters": own} if own else {})})
    shared: dict[str, Setting] = {"normalize": plan.normalize, "rescale": plan.rescale, "lambda": plan.lambda_}
    if spec.weight in spec.of_file:
        shared[spec.weight] = plan.inputs[0].settings["weight"]
    content: dict[str, Any] = {
        "merge_method": plan.method,
        "base_model": names[plan.base],
        "models": models,
        "parameters": {name: _for_mergekit(plain(shared[name])) for name in spec.of_file if name in shared},
        "dtype": "float32",  # of the arithmetic, here always
    }
    if out_dtype is not None:
        content["out_dtype"] = out_dtype
    if plan.one_tokenizer:
        content["tokenizer_source"] = "base"
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def _for_mergekit(value: Any) -> Any:
    """`rescale` in mergekit's words, if it has them."""
    if isinstance(value, list):
        return [_for_mergekit(item) for item in value]
    if isinstance(value, dict):
        return value | {"value": _for_mergekit(value["value"])}
    return {"l1": True, "none": False}.get(value, value) if isinstance(value, str) else value


def card(plan: MergePlan, names: Mapping[str, str], config: str) -> str:
    """Return the README.md of a merge.

    Args:
        names: of the models, by what the plan calls them.
        config: the text of its mergekit file.
    """
    merged = [plan.base, *(entry.model for entry in plan.inputs if entry.model != plan.base)]
    hub = [model for model in merged if _HUB.fullmatch(model) and not Path(model).is_dir()]
    front = {"base_model": hub, "library_name": "transformers", "tags": ["micota-fast", "mergekit", "merge"]}
    start = f", which starts at {_code(names[plan.base])}" if plan.spec.starts_at_base else ""
    listed = merged[1:] if plan.spec.starts_at_base else merged
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {" ".join(names[plan.base].split())}, merged

A merge of language models, made with micota-fast by [{plan.spec.title}]({plan.spec.url}){start}. Merged were:

{"".join(f"* {_code(names[model])}{chr(10)}" for model in listed)}
This file, which mergekit reads too, made it ({CONFIG}); the seed of random masks and fingerprints of the models are in
merge.json.

```yaml
{config}```
"""


def _code(name: str) -> str:
    return "`" + " ".join(name.replace("`", "'").split()) + "`"
