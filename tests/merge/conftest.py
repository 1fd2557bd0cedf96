"""Fixtures that several tests of merging share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.mergekit_parity import make_models
from micota_fast.merge import tensor_merge


@pytest.fixture(scope="module")
def small_chunks() -> Iterator[None]:
    """So that a few hundred elements are several chunks, whose borders lie within rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_merge, "CHUNK", 64)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))
