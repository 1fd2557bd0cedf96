"""Fixtures that many tests share: one tiny checkpoint per family, made once a session. Do not write to them."""

import os
import signal
from pathlib import Path

import pytest
import torch

from helpers.paths import HELPERS

# Processes that tests start find `helpers` and, where the package is not installed, the package.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HELPERS.parent), os.environ.get("PYTHONPATH", "")]))

# Where a shell started the tests in the background SIGINT is ignored, and what they start would ignore a Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: its kernels then run on CPU tensors


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their number: workers must collect the same names, and what is compressed holds the time."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def qwen2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(tmp_path_factory, "qwen2")


@pytest.fixture(scope="session")
def qwen3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(tmp_path_factory, "qwen3")


@pytest.fixture(scope="session")
def llama_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _made(tmp_path_factory, "llama")


def _made(tmp_path_factory: pytest.TempPathFactory, family: str) -> Path:
    from helpers.checkpoints import make_checkpoint  # imports transformers, which most tests never need

    return make_checkpoint(tmp_path_factory.mktemp(family), family)
