"""MiCoTA: distil long chains of thought into small models through a merged, mid-sized teacher assistant."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

__version__ = "0.1.0"


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
