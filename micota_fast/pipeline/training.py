"""The stage that trains a model, in a recipe's graph."""

import dataclasses
from typing import Any

from micota_fast.config.train import SoftConfig, TrainConfig, TrainSettings
from micota_fast.errors import InputError
from micota_fast.pipeline.builder import Builder
from micota_fast.pipeline.stage import Artefact, Stage


def train_stage(
    builder: Builder,
    stage: str,
    model: Artefact,
    data: Artefact,
    columns: dict[str, str],
    scores: Artefact | None,
    overrides: dict[str, Any],
    where: str,
) -> Artefact:
    """Enter a stage that trains; return its model.

    Args:
        builder: of the graph.
        stage: its name.
        model: that it starts from.
        data: the corpus.
        columns: of the corpus.
        scores: of the corpus's rows, to be learned; None: the texts are.
        overrides: of the recipe's `train`.
        where: the recipe's part that has them.

    Raises:
        InputError: an option is bad, or the stage would leave no whole model.
    """
    defaults = dataclasses.replace(
        builder.recipe.train, soft=None if scores is None else builder.recipe.train.soft or SoftConfig()
    )
    soft = builder.settings(TrainSettings, defaults, overrides, where).soft
    if soft is None and scores is not None:
        raise InputError(
            f"{builder.path}, `{where}.soft: null`: this corpus has distributions to learn; leave `soft` out, or name "
            f"a corpus without `score` and `on_policy` to train on texts"
        )
    if soft is not None and scores is None:
        raise InputError(
            f"{builder.path}, `{where}.soft`: this corpus has texts alone; leave `soft` out, or name a corpus with "
            f"`score` or `on_policy`"
        )
    settings = builder.settings(
        TrainConfig,
        defaults,
        overrides,
        where,
        model=model.location,
        data=data.location,
        columns=columns,
        top_logprobs=None if scores is None else scores.location,
        out=str(builder.run_dir / stage),
    )
    if settings.lora is not None and not settings.lora.merged:
        raise InputError(
            f"{builder.path}, `{where}`: `lora` needs `merged: true`: the stages that follow serve whole models"
        )
    inputs = [model, data, *([] if scores is None else [scores])]
    if settings.validation_data is not None:
        inputs.append(builder.file(settings.validation_data, f"{where}.validation_data"))
        settings.validation_data = inputs[-1].location
    settings.chat, template = builder.template(settings.chat, where)
    builder.add(Stage(stage, "train", settings, (*inputs, *template), ("model", "metrics.jsonl", "summary.json")))
    return builder.artefact(stage, "model")
