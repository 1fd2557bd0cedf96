"""What is set up before a process joins the others."""

import os

import pytest
import torch

from micota_fast.train.world import join_world

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class InitialisedError(Exception):
    """CUDA would be by now."""


@pytest.mark.parametrize("own", [None, *NAMES])
def test_cuda_memory_may_grow_in_place_unless_the_user_has_set_it_up(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:512")
    seen = {}

    def initialise(device: torch.device) -> None:
        seen.update({name: os.environ[name] for name in NAMES if name in os.environ})
        raise InitialisedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", initialise)
    before = dict(os.environ)
    try:
        with pytest.raises(InitialisedError), join_world("cuda"):
            pass
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert seen == ({own: "max_split_size_mb:512"} if own else {NAMES[0]: "expandable_segments:True"})
