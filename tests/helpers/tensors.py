"""Comparisons of lists of tensors."""

from typing import Any

import torch
from torch import Tensor


def assert_same(got: list[Tensor], expected: list[Tensor], **tolerances: Any) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances)


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
