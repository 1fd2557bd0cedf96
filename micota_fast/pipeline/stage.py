"""A stage of a run: one verb on its settings, what it reads and what it leaves."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Artefact:
    """A file or folder that stages read: made by `stage`; or, with None, there from the beginning or a hub name."""

    location: str
    stage: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether it is a hub name, or a file that is missing."""
        return self.stage is None and not Path(self.location).exists()


@dataclass(frozen=True)
class Lasting:
    """Files that a stage makes and that stay valid when options change on which their contents do not depend.

    Attributes:
        names: of the files and folders, in the stage's folder. The stage checks by itself what it finds there.
        ignored: the options that they do not depend on (a.b: `b` of `a`, or of each of its items).
        item: (option, name): of the items of this option, a list, they depend on the one of this name alone.
    """

    names: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    item: tuple[str, str] | None = None


@dataclass(frozen=True)
class Stage:
    """One process: `verb` run on `settings`, in a folder of its own."""

    name: str
    verb: str
    settings: Any  # the options of its verb (`stages.Verb.options`)
    inputs: tuple[Artefact, ...]
    outputs: tuple[str, ...]  # relative to the stage's folder; it is done when all are there
    files: dict[str, str] = field(default_factory=dict)  # YAML, written into its folder before it starts
    lasting: tuple[Lasting, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the stages that make its inputs."""
        return tuple(dict.fromkeys(artefact.stage for artefact in self.inputs if artefact.stage is not None))
