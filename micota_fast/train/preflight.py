"""What a training would fail of later: found at once, before torch is imported, which can take many seconds."""

import os
from importlib.util import find_spec
from pathlib import Path

from micota_fast.chat.encoding import Chat
from micota_fast.common.files import require_folder
from micota_fast.config.train import TrainConfig
from micota_fast.data.tokenise import check_first_row
from micota_fast.errors import InputError
from micota_fast.model.checks import checked_config
from micota_fast.model.config import ModelConfig
from micota_fast.model.folder import require_checkpoint
from micota_fast.model.hub_upload import require_upload
from micota_fast.sources import hub
from micota_fast.sources.rows import require_readable


def check(config: TrainConfig) -> None:
    """Check that the model, the rows and the packages that a training needs are there; of what is here also its form.

    Raises:
        InputError: one is not; or a checkpoint's folder, the chat template, or the first row of a file is refused.
    """
    require_trackers(config)
    require_torchao(config)
    main = os.environ.get("RANK", "0") == "0"  # one of torchrun's processes is enough, and only this one needs a token
    if main:
        require_upload(config.push_to_hub)
    require_folder(config.out)
    require_checkpoint(config.model)
    for source in filter(None, (config.data, config.validation_data)):
        require_readable(source)
    if main:
        _check_form(config)


def _check_form(config: TrainConfig) -> None:
    """Check a checkpoint and rows that are files here as far as that takes no torch."""
    folder = Path(config.model)
    if not folder.is_dir():  # it is on the hub
        return
    (ModelConfig.from_checkpoint if config.init == "random" else checked_config)(folder)
    chat = Chat.from_checkpoint(folder, config.chat)
    for source in filter(None, (config.data, config.validation_data)):
        if not config.skip_bad_rows and not hub.is_hub(source):
            check_first_row(source, chat, config.columns)


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
