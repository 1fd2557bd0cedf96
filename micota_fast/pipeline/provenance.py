"""What the report's "How it was made" says of a run: its models, its training options, and the code and machine."""

from micota_fast.config.corpus import FilterSettings
from micota_fast.config.recipe import ModelSpec, OnPolicyCorpus, Recipe
from micota_fast.pipeline.versions import commit, versions


def provenance(recipe: Recipe) -> dict[str, str]:
    """Return the lines in their order, from the recipe and this installation alone: equal runs give equal lines."""
    train = recipe.train
    lines = {f"model {name}": _origin(model) for name, model in recipe.models.items()}
    lines["student"] = recipe.student
    lines["training"] = (
        f"learning rate {train.lr:g}, "
        + (
            f"{train.epochs:g} epoch{'s' * (train.epochs != 1)}"
            if train.max_steps is None
            else f"{train.max_steps} steps"
        )
        + f", {train.packs_per_step} × {train.pack_tokens:,} tokens per step, "
        + f"seed{'s' * (len(recipe.seeds) > 1)} {', '.join(map(str, recipe.seeds))}"
    )
    lines |= {
        f"arm {name}": f"trained on {arm.corpus}{_changed(arm.overrides)}"
        for name, arm in recipe.students.items()
        if arm.overrides
    }
    for name, corpus in recipe.corpora.items():
        if (own := corpus.on_policy) is not None:
            lines[f"corpus {name}"] = (
                f"{own.rounds} rounds: {recipe.student} answers {own.problems_per_round} problems, {own.by} scores "
                f"{_kept(own, recipe.filter)} ({own.top} tokens), it is trained"
            )
    made_with = commit()
    return lines | ({"commit": made_with} if made_with else {}) | versions()


def _kept(own: OnPolicyCorpus, rules: FilterSettings) -> str:
    """Describe which of the student's answers are scored."""
    if own.keep == "right":
        return "those of its answers that the filter accepts"
    left_out = [f"of {rules.max_tokens:,} tokens or more"]
    if rules.max_foreign is not None:
        left_out.append(f"with a share above {rules.max_foreign:g} in foreign scripts")
    if rules.max_repeated is not None:
        left_out.append(f"with a share above {rules.max_repeated:g} repeated")
    return f"its answers, right or wrong, except those cut off, {' or '.join(left_out)}"


def _origin(model: ModelSpec) -> str:
    if model.train is not None:
        return f"{model.train.base} trained on {model.train.corpus}{_changed(model.train.overrides)}"
    if model.merge is not None:
        return _merged(model.merge.mergekit) + (
            f"; weight chosen for a median of {model.merge.median_tokens:,} tokens"
            if model.merge.median_tokens is not None
            else ""
        )
    return model.checkpoint or f"{model.served}, served by an API"


def _changed(overrides: dict[str, object]) -> str:
    return "".join(f", {key} {value}" for key, value in overrides.items())


def _merged(settings: dict[str, object]) -> str:
    """Describe a mergekit configuration in one line, as far as it has a list of models."""
    text = f"{settings.get('merge_method', 'merged')}"
    base, models = settings.get("base_model"), settings.get("models")
    parts = []
    for part in models if isinstance(models, list) else []:
        parameters = part.get("parameters", {}) if isinstance(part, dict) else {}
        told = ", ".join(f"{key} {value}" for key, value in parameters.items())
        parts.append(f"{part['model'] if isinstance(part, dict) else part}{f' ({told})' if told else ''}")
    return text + (f" of {', '.join(parts)}" if parts else "") + (f" on {base}" if base else "")
