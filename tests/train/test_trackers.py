"""TensorBoard and wandb, by stand-ins of both: tags, hparams, and one wandb run for one training."""

import shutil
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest

from micota_fast.config.train import TrainConfig
from micota_fast.errors import InputError
from micota_fast.train.preflight import is_installed
from micota_fast.train.trackers import WANDB_ID, Trackers, hparams, tagged

ROW: dict[str, Any] = {
    "step": 3,
    "loss": 0.5,
    "lr": 1e-3,
    "validation_loss": 0.75,
    "tokens_per_s": 10.0,
    "phase_s": {"data": 0.1},
    "memory_gb": {"peak": 1.5},
}
TAGS = {
    "train/loss": 0.5,
    "train/lr": 1e-3,
    "eval/loss": 0.75,
    "train/tokens_per_s": 10.0,
    "train/phase_s/data": 0.1,
    "train/memory_gb/peak": 1.5,
}


class Writer:
    """What `SummaryWriter` is asked to write."""

    made: ClassVar["list[Writer]"] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        self.hparams: list[tuple[dict[str, Any], dict[str, Any], str]] = []
        Writer.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def add_hparams(self, options: dict[str, Any], metrics: dict[str, Any], run_name: str) -> None:
        self.hparams.append((options, metrics, run_name))

    def close(self) -> None:
        self.closed = True


class Wandb(types.ModuleType):
    """What `wandb` is asked for."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starts: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.step_metrics: dict[str, str] = {}
        self.finished = 0

    def init(self, **given: Any) -> "Wandb":
        self.starts.append(given)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.step_metrics[name] = step_metric

    def log(self, figures: dict[str, Any]) -> None:
        self.logged.append(figures)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def config(out: Path, **options: Any) -> TrainConfig:
    return TrainConfig(model="a/b", data="rows.jsonl", out=str(out), **options)


def test_tags_have_the_form_of_the_ecosystem_and_unknown_figures_none() -> None:
    assert tagged(ROW) == TAGS
    assert tagged({"step": 1, "loss": None, "lr": 0.1}) == {"train/lr": 0.1}


def test_hparams_are_flat_and_of_the_types_that_tensorboard_takes(tmp_path: Path) -> None:
    options = hparams(config(tmp_path))
    assert options["lr"] == TrainConfig(model="a/b", data="rows.jsonl", out="o").lr
    assert options["max_steps"] == "null"
    assert options["betas"] == "[0.9, 0.95]"
    assert "chat.system" in options
    assert {type(value) for value in options.values()} <= {bool, str, float, int}


def test_one_training_is_one_wandb_run_however_often_it_resumes(wandb: Wandb, tmp_path: Path) -> None:
    for start in (0, 2):
        trackers = Trackers(config(tmp_path, wandb="project"), tmp_path, start)
        trackers.report(ROW)
        trackers.close(ROW)
    first, second = wandb.starts
    assert first["id"] == second["id"]
    assert (first["project"], first["resume"], first["dir"]) == ("project", "allow", str(tmp_path))
    assert first["config"]["betas"] == [0.9, 0.95]
    assert wandb.logged == [TAGS | {"step": 3}] * 2
    assert wandb.step_metrics == {"*": "step"}, "steps done again are not dropped"
    assert wandb.finished == 2
    shutil.rmtree(tmp_path / "checkpoints")  # as at the end of a training
    Trackers(config(tmp_path, wandb="project"), tmp_path, 0)
    assert wandb.starts[-1]["id"] != first["id"]


def test_an_empty_id_is_none(wandb: Wandb, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / WANDB_ID).touch()
    Trackers(config(tmp_path, wandb="project"), tmp_path, 0)
    assert len(wandb.starts[0]["id"]) == 16


def test_a_run_that_wandb_does_not_begin_is_an_error_with_a_remedy(
    wandb: Wandb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def init(**given: Any) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(InputError, match=r"api_key not configured; `wandb login`, or set WANDB_MODE=offline"):
        Trackers(config(tmp_path, wandb="project"), tmp_path, 0)


def test_a_folder_of_its_name_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """wandb leaves a folder called wandb in the current folder."""
    (tmp_path / "not_wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_spec("not_wandb") is not None
    assert not is_installed("not_wandb")


def test_tensorboard_gets_the_figures_and_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [])
    trackers = Trackers(config(tmp_path, tensorboard=True), tmp_path, 2)
    trackers.report(ROW)
    trackers.close(ROW)
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path / "tensorboard"), 3, True)
    assert writer.scalars == [(tag, value, 3) for tag, value in TAGS.items()]
    ((options, metrics, name),) = writer.hparams
    assert options["data"] == "rows.jsonl"
    assert (metrics, name) == ({"final/train/loss": 0.5, "final/eval/loss": 0.75}, ".")
