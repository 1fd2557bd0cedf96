"""Losses with their gradients, and comparisons of lists of tensors."""

from typing import Any

import torch
from torch import Tensor


def with_gradients(function: Any, hidden: Tensor, weight: Tensor, targets: Any, **options: Any) -> list[Tensor]:
    """Loss, d hidden, d weight; each row of "none" is given a weight of its own."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, targets, **options)
    factors = torch.linspace(-1, 2, len(hidden), device=loss.device).to(loss.dtype) if loss.ndim else None
    loss.backward(factors)
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


def assert_same(got: list[Tensor], expected: list[Tensor], **tolerances: Any) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerances)


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
