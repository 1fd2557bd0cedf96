"""TensorBoard and Weights & Biases, on request: one curve per figure over the whole training, however often it resumes.

Tags have the form that the ecosystem's dashboards group by: `train/loss`, `eval/loss`.
"""

import json
import uuid
from pathlib import Path
from typing import Any

from micota_fast.common.files import write_atomic
from micota_fast.config import loader
from micota_fast.config.train import TrainConfig
from micota_fast.errors import InputError

EVAL = {"validation_loss": "eval/loss"}
NESTED = ("phase_s", "memory_gb")
WANDB_ID = "wandb-id"
"""File in the folder of checkpoints: it lasts as long as the training is unfinished."""


def tagged(row: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a step by their tags, without its number and without those that are unknown."""
    flat = {key: value for key, value in row.items() if key not in ("step", *NESTED) and value is not None}
    tags = {EVAL.get(key, f"train/{key}"): value for key, value in flat.items()}
    return tags | {f"train/{part}/{key}": value for part in NESTED for key, value in row.get(part, {}).items()}


def hparams(config: TrainConfig) -> dict[str, bool | str | float | int]:
    """Return the options as TensorBoard takes them: nested ones dotted, lists and null as JSON."""

    def flat(value: Any, key: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {
                k: v for inner, of in value.items() for k, v in flat(of, f"{key}.{inner}" if key else inner).items()
            }
        return {key: value if isinstance(value, bool | str | float | int) else json.dumps(value)}

    return flat(loader.plain(config), "")


class Trackers:
    """What a training reports to besides its own files, if the options ask for it.

    Args:
        config: `tensorboard`, `wandb`, and all options, which both record.
        out: the run's folder.
        start: steps done by the checkpoint that the run resumes from; later ones are reported again.

    Raises:
        InputError: wandb does not begin a run.
    """

    def __init__(self, config: TrainConfig, out: Path, start: int) -> None:
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._hparams = hparams(config)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        if config.wandb is not None:
            self._wandb = _begin_wandb(config, config.wandb, out)
            # Steps that are done again after a kill have smaller numbers than what wandb has seen, which it would drop.
            self._wandb.define_metric("*", step_metric="step")

    def report(self, row: dict[str, Any]) -> None:
        """Report a row of metrics.jsonl with its timing."""
        tags = tagged(row)
        if self._tensorboard is not None:
            for tag, value in tags.items():
                self._tensorboard.add_scalar(tag, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(tags | {"step": row["step"]})

    def close(self, last: dict[str, Any]) -> None:
        """End the reports; `last` is the last row, whose losses TensorBoard shows next to the options."""
        if self._tensorboard is not None:
            losses = {tag: value for tag, value in tagged(last).items() if tag in ("train/loss", "eval/loss")}
            self._tensorboard.add_hparams(
                self._hparams, {f"final/{tag}": value for tag, value in losses.items()}, run_name="."
            )
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _begin_wandb(config: TrainConfig, project: str, out: Path) -> Any:
    import wandb

    try:
        return wandb.init(
            project=project,
            dir=str(out),
            config=loader.plain(config),
            id=_wandb_id(out),
            resume="allow",
            allow_val_change=True,  # a training that resumes may have other operational options
        )
    except Exception as error:  # of its own kinds: not logged in, no network
        raise InputError(
            f"`wandb`: no run could be started: {error}; `wandb login`, or set WANDB_MODE=offline or `wandb: null`"
        ) from error


def _wandb_id(out: Path) -> str:
    """The id of the training's wandb run: the one it began with, or a new one."""
    path = out / "checkpoints" / WANDB_ID
    if path.exists() and (found := path.read_text(encoding="utf-8").strip()):
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    made = uuid.uuid4().hex[:16]
    write_atomic(path, [made.encode()])
    return made
