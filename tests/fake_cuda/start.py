"""Runs a scene in a process of its own, as a fake device cannot be taken out of one again."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fake_cuda.library import REQUIRED, compiler

needs_compiler = pytest.mark.skipif(
    compiler() is None and os.environ.get(REQUIRED) != "1", reason="needs a C++ compiler (g++, or $CXX)"
)


def run_scene(scene: str, **arguments: Any) -> Any:
    """Return what the scene of `scenes.py` returned; its output is shown if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONWARNINGS"] = "ignore"
    command = [sys.executable, "-m", "fake_cuda.scenes", scene, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(done.stdout.splitlines()[-1])
