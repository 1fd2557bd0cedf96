"""MiCoTA: distil long chains of thought into small models through a merged, mid-sized teacher assistant.

What the command line does, as functions; docs/python.md has an example of each:

    train(config)               fine-tune a checkpoint on rows (config.train.TrainConfig)
    generate(config)            sample a model's answers (config.generation.GenerateConfig)
    merge(config)               merge checkpoints (config.merge.MergeConfig)
    evaluate(config)            answer and grade benchmarks (config.evaluation.EvaluateConfig)
    grade(pairs)                judge pairs of a completion and the gold answer
    pack(lengths, capacity)     distribute documents over packs, none split
    linear_cross_entropy(hidden, weight, targets)
                                compute the loss of a linear head without holding all logits

Each is imported when it is first used, so importing this package imports neither torch nor numpy.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micota_fast.common.importing import imported

if TYPE_CHECKING:
    from micota_fast.data.packing import pack
    from micota_fast.evaluation.evaluate import run as evaluate
    from micota_fast.generation.generate import run as generate
    from micota_fast.grading.grader import grade
    from micota_fast.kernels import linear_cross_entropy
    from micota_fast.merge.merge import merge
    from micota_fast.train.loop import train

__all__ = ["evaluate", "generate", "grade", "linear_cross_entropy", "merge", "pack", "train"]
__version__ = "0.1.0"

_PLACES = {
    "evaluate": "micota_fast.evaluation.evaluate:run",
    "generate": "micota_fast.generation.generate:run",
    "grade": "micota_fast.grading.grader:grade",
    "linear_cross_entropy": "micota_fast.kernels:linear_cross_entropy",
    "merge": "micota_fast.merge",  # these two are packages that can be called, as importing a module of them
    "pack": "micota_fast.data.packing:pack",
    "train": "micota_fast.train",  # would put the package in the place of a function
}


def __getattr__(name: str) -> Any:
    """Import one of `__all__` when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return imported(_PLACES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _KernelsOfABareCheckout(MetaPathFinder):
    """Finds `micota_fast.kernels` where the package runs from the repository's root without being installed.

    An installation maps the folder by `package-dir` (pyproject.toml). Nothing is loaded before it is imported, so
    importing the package stays free of torch. (A lazy module in its place would be loaded in the middle of the import
    of a module inside it, which then runs twice.)
    """

    folder = Path(__file__).parent.parent / "kernels"

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """Return the spec of this one package."""
        if fullname != f"{__name__}.kernels" or not (self.folder / "__init__.py").is_file():
            return None
        return spec_from_file_location(
            fullname, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)]
        )


sys.meta_path.append(_KernelsOfABareCheckout())  # after those of an installation
