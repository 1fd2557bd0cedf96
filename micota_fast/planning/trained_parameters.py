"""What `lora` and `freeze` name in a recipe, checked before its first stage starts."""

from collections.abc import Sequence
from pathlib import Path

from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.pipeline.stage import Stage


def check_trained_parameters(stages: Sequence[Stage]) -> None:
    """Check what the trainings' `lora` and `freeze` name against the models that are here; the hub is not asked.

    A model that another stage makes has the shapes of the one that it is made of.

    Raises:
        InputError: naming the stage and the option that does not fit its model.
    """
    made = {stage.name: stage for stage in stages}
    for stage in stages:
        if stage.verb != "train" or (stage.settings.lora is None and not stage.settings.freeze):
            continue
        model = stage.inputs[0]
        while model.stage is not None:
            model = made[model.stage].inputs[0]
        if not (Path(model.location) / "config.json").is_file():
            continue
        from micota_fast.train.trainable import trainable_decoder  # torch, which no other recipe needs here

        try:
            trainable_decoder(stage.settings, ModelConfig.from_checkpoint(model.location))
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from None
