"""The stage that trains a model, in a recipe's graph."""

import dataclasses
from typing import Any

from micota_fast.config.train import SoftConfig, TrainConfig
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
    soft = None if scores is None else builder.recipe.train.soft or SoftConfig()
    settings = builder.settings(
        TrainConfig,
        dataclasses.replace(builder.recipe.train, soft=soft),
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
