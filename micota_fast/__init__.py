"""MiCoTA: distil long chains of thought into small models through a merged, mid-sized teacher assistant."""

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"


def _map_kernels_of_a_bare_checkout() -> None:
    """Make `micota_fast.kernels` importable where the package runs from the repository's root without being installed.

    An installation maps the folder by `package-dir` (pyproject.toml). The module is loaded lazily, so importing the
    package stays free of torch.
    """
    name = f"{__name__}.kernels"
    folder = Path(__file__).parent.parent / "kernels"
    if importlib.util.find_spec(name) is not None or not (folder / "__init__.py").is_file():
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        return
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_map_kernels_of_a_bare_checkout()
