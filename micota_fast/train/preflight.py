"""What a training would fail of later: found at once, before torch is imported, which can take many seconds."""

import os
from importlib.util import find_spec

from micota_fast.config.train import TrainConfig
from micota_fast.errors import InputError
from micota_fast.model.folder import require_checkpoint
from micota_fast.model.hub_upload import require_upload
from micota_fast.sources.rows import require_readable


def check(config: TrainConfig) -> None:
    """Check that the model, the rows and the packages that a training needs are there.

    Raises:
        InputError: one is not.
    """
    require_trackers(config)
    require_torchao(config)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the one that uploads, which alone needs a token
        require_upload(config.push_to_hub)
    require_checkpoint(config.model)
    for source in filter(None, (config.data, config.validation_data)):
        require_readable(source)


def require_trackers(config: TrainConfig) -> None:
    """Raise InputError if TensorBoard or wandb is requested and not installed."""
    for wanted, package in ((config.tensorboard, "tensorboard"), (config.wandb is not None, "wandb")):
        if wanted and not is_installed(package):
            raise InputError(f"`{package}` needs a package that is not installed: pip install 'micota-fast[{package}]'")


def require_torchao(config: TrainConfig) -> None:
    """Raise InputError if moments of few bits are requested and torchao is not installed."""
    if config.optimizer_states != "float32" and not is_installed("torchao"):
        raise InputError(
            f"`optimizer_states: {config.optimizer_states}` needs torchao, which is not installed: "
            "pip install 'micota-fast[lowbit]'"
        )


def is_installed(package: str) -> bool:
    """Return whether a package can be imported. A mere folder of its name, as wandb leaves one, is not a package."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
