"""What every part of a recipe's graph is built with: settings from the recipe, files, folders, and stages made once."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from micota_fast.chat.template import named_template
from micota_fast.config import loader
from micota_fast.config.generation import ChatConfig, ServeConfig
from micota_fast.config.recipe import Recipe
from micota_fast.errors import InputError
from micota_fast.pipeline.stage import Artefact, Stage
from micota_fast.sources.hub import is_hub

Config = TypeVar("Config")


class Builder:
    """A graph in the making.

    Args:
        recipe: loaded from `recipe_path`.
        recipe_path: of the recipe; relative checkpoints start from its folder.
        run_dir: folder of the run.
        absent: takes up what is missing; None: that is an error.

    Attributes:
        made: the stages so far, by name.
    """

    def __init__(self, recipe: Recipe, recipe_path: Path, run_dir: Path, absent: list[str] | None) -> None:
        self.recipe, self.path, self.run_dir, self.absent = recipe, recipe_path, run_dir, absent
        self.data_dir = Path(recipe.data_dir).resolve() if recipe.data_dir else recipe_path.parent
        self.made: dict[str, Stage] = {}
        self.open: list[str] = []  # names being made, to notice circles

    def miss(self, what: str) -> None:
        """Take note of something that is missing.

        Raises:
            InputError: that is an error.
        """
        if self.absent is None:
            raise InputError(what)
        if what not in self.absent:  # every evaluation names the same files
            self.absent.append(what)

    def add(self, stage: Stage) -> None:
        """Enter a stage that is made.

        Raises:
            InputError: there is one of its name, of another part of the recipe.
        """
        if stage.name in self.made:
            raise InputError(f"{self.path}: two parts of the recipe make the stage {stage.name}; rename one of them")
        self.made[stage.name] = stage

    def out(self, stage: str, name: str) -> str:
        """Return where a stage leaves its output of this name."""
        return str(self.run_dir / stage / name)

    def artefact(self, stage: str, name: str) -> Artefact:
        """Return a stage's output of this name."""
        return Artefact(self.out(stage, name), stage)

    def settings(
        self, cls: type[Config], defaults: Any, overrides: dict[str, Any], where: str, **values: Any
    ) -> Config:
        """Return the options of a verb: the recipe's defaults, then overrides of the part `where`, then `values`."""
        merged = loader.merged(cls, loader.plain(defaults), overrides)
        return loader.build(cls, merged | values, f"{self.path}, `{where}`")

    def file(self, name: str, where: str) -> Artefact:
        """Return a file of rows that the recipe names in its part `where`."""
        if is_hub(name):
            return Artefact(name)  # the stage that opens it says if it cannot be fetched
        path = self.data_dir / name  # an absolute name stays as it is
        if not path.is_file():
            hint = "" if self.recipe.data_dir else "; --set data_dir=FOLDER says where relative names start from"
            self.miss(f"{self.path}, `{where}`: no such file: {path}{hint}")
        return Artefact(str(path.resolve()))

    def once(self, stage: str, make: Callable[[], None]) -> None:
        """Have `make` enter a stage, unless it is there.

        Raises:
            InputError: it is being made, so it is made from itself.
        """
        if stage in self.made:
            return
        if stage in self.open:
            circle = " -> ".join([*self.open[self.open.index(stage) :], stage])
            raise InputError(f"{self.path}: these are made from each other: {circle}")
        self.open.append(stage)
        make()
        self.open.pop()

    def template(self, chat: ChatConfig, where: str) -> tuple[ChatConfig, list[Artefact]]:
        """Return the options with the file of the template that they name, and the file; none may be named."""
        if chat.template is None:
            return chat, []
        file = self.path.parent / chat.template
        try:
            file = named_template(str(file)).file
        except InputError as error:
            self.miss(f"{self.path}, `{where}`: {error}")
        found = Artefact(str(file.resolve()))
        return dataclasses.replace(chat, template=found.location), [found]

    def checkpoint(self, name: str, where: str) -> Artefact:
        """Return a checkpoint, a folder or hub name, that the recipe names in its part `where`.

        Raises:
            InputError: it is no such folder, or MODEL+ADAPTER, whose adapter would be in no stage's fingerprint.
        """
        folder = self.path.parent / name
        if folder.is_dir():
            return Artefact(str(folder.resolve()))
        if "+" in name:  # in no name on the hub
            raise InputError(
                f"{self.path}, `{where}`: no such folder: {folder}. If {name} is MODEL+ADAPTER: a recipe takes whole "
                "models. Merge the two first (`micota merge` takes MODEL+ADAPTER), or train with `lora.merged: true`, "
                "and name the folder `model` that this makes"
            )
        if name.count("/") == 1 and not name.startswith((".", "/", "~")):
            return Artefact(name)  # a hub name; the stage that opens it says if it cannot be fetched
        self.miss(f"{self.path}, `{where}`: no such folder: {folder} (a hub name has the form organisation/model)")
        return Artefact(str(folder))

    def served(self, defaults: Any, model: str) -> Any:
        """Return settings with the server of this model in them; one that the run starts has SGLang's native API."""
        spec = self.recipe.models[model]
        serve = self.settings(ServeConfig, defaults.serve, spec.serve, f"models.{model}.serve")
        return dataclasses.replace(
            defaults, serve=serve, url=spec.url, api="sglang" if spec.url is None else defaults.api
        )
