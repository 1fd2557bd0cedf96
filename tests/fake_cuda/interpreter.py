"""Python with a GPU, in name: `python -m fake_cuda.interpreter (-c CODE | -m MODULE | FILE | --version) [ARGUMENT...]`.

What it runs finds the fake device, and so do the processes that it starts by `sys.executable`, which is the executable
that FAKE_CUDA_PYTHON names. Figures are without meaning, so `bench/results/` is refused as a place for them.
"""

import os
import runpy
import sys
from pathlib import Path

from fake_cuda.session import Session

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def main(arguments: list[str]) -> None:
    """Run what the command line names."""
    for argument in arguments:
        if RESULTS in (ROOT / argument).resolve().parents:
            sys.exit(f"{argument}: figures of a device that is not there do not belong in {RESULTS}")
    what, *rest = arguments
    if what.startswith("-") and what not in ("-c", "-m"):
        os.execv(sys.executable, [sys.executable, *arguments])
    session = Session(world=1)
    import torch

    if wrapper := os.environ.get("FAKE_CUDA_PYTHON"):
        sys.executable = wrapper

    class OnHost(torch.Generator):
        def __new__(cls, device: object = "cpu") -> "OnHost":
            return super().__new__(cls)

    torch.Generator = OnHost  # type: ignore[misc]
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a fake tensor cannot be put into a real one
    with session.running():
        if what == "-c":
            exec(rest[0], {"__name__": "__main__"})
        elif what == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(what).resolve().parent))
            sys.argv = arguments
            runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as scenes.py does
