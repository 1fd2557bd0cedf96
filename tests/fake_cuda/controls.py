"""What makes a host wait for the device, and what does not: the watch must see the one and pass over the other.

One is known to be missed: printing a tensor, as torch prints a fake one without values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operations = dict[str, Callable[[], Any]]


def matrix() -> Tensor:
    return torch.ones(4, 4, device="cuda")


def mask() -> Tensor:
    return matrix() > 0


def pinned() -> Tensor:
    return torch.ones(4).pin_memory()


def recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


WAITS: Operations = {
    "item": lambda: matrix().sum().item(),
    "float": lambda: float(matrix().sum()),
    "int": lambda: int(matrix().sum()),
    "if": lambda: bool(matrix().sum() > 0),
    "range": lambda: range(matrix().sum().long()),  # type: ignore[call-overload]
    "tolist": lambda: matrix().tolist(),
    "cpu": lambda: matrix().cpu(),
    "numpy": lambda: matrix().cpu().numpy(),
    "to host, pageable": lambda: torch.empty(4, 4).copy_(matrix(), non_blocking=True),
    "to host, blocking": lambda: torch.empty(4, 4).pin_memory().copy_(matrix()),
    "to device, pageable": lambda: torch.ones(4).to("cuda", non_blocking=True),
    "to device, blocking": lambda: pinned().to("cuda"),
    "copy_ to device, pageable": lambda: matrix()[0].copy_(torch.ones(4), non_blocking=True),
    "a slice of pageable memory": lambda: torch.ones(8)[4:].to("cuda", non_blocking=True),
    "torch.tensor of a list": lambda: torch.tensor([1.0, 2.0], device="cuda"),
    "torch.tensor of a number": lambda: torch.tensor(5.0, device="cuda"),
    "nonzero": lambda: matrix().nonzero(),
    "argwhere": lambda: torch.argwhere(matrix()),
    "where of a condition": lambda: torch.where(mask()),
    "masked_select": lambda: matrix().masked_select(mask()),
    "index by a mask": lambda: matrix()[mask()],
    "assignment by a mask": lambda: matrix().__setitem__(mask(), torch.zeros(3, device="cuda")),
    "index by a list": lambda: matrix()[[0, 1]],
    "index by a tensor on the host": lambda: matrix()[torch.tensor([0, 1])],
    "index by a number on the device": lambda: range(4)[matrix().argmax()],  # type: ignore[call-overload]
    "unique": lambda: matrix().unique(),
    "unique_consecutive": lambda: matrix().unique_consecutive(),
    "bincount": lambda: matrix()[0].long().bincount(),
    "repeat_interleave": lambda: torch.repeat_interleave(torch.ones(3, dtype=torch.int64, device="cuda")),
    "repeat_interleave of rows": lambda: matrix().repeat_interleave(matrix()[0].long(), dim=0),
    "equal": lambda: torch.equal(matrix(), matrix()),
    "allclose": lambda: torch.allclose(matrix(), matrix()),
    "multinomial": lambda: torch.multinomial(matrix(), 1),
    "synchronize": lambda: torch.cuda.synchronize(),
    "stream synchronize": lambda: torch.cuda.current_stream().synchronize(),
    "event synchronize": lambda: recorded().synchronize(),
    "event of a stream": lambda: torch.cuda.current_stream().record_event().synchronize(),
    "item in a backward pass": lambda: _AsksInBackward.apply(matrix().requires_grad_()).sum().backward(),
    "torch.tensor in a backward pass": lambda: _MakesInBackward.apply(matrix().requires_grad_()).sum().backward(),
    "empty_cache": lambda: torch.cuda.empty_cache(),
}

NO_WAIT: Operations = {
    "to device, pinned": lambda: pinned().to("cuda", non_blocking=True),
    "a slice of pinned memory": lambda: torch.ones(8).pin_memory()[4:].to("cuda", non_blocking=True),
    "to host, made there": lambda: matrix().to("cpu", non_blocking=True),
    "to host, pinned": lambda: torch.empty(4, 4).pin_memory().copy_(matrix(), non_blocking=True),
    "a scalar of the host": lambda: matrix() * 2.0,
    "a 0-d tensor of the host": lambda: matrix() + torch.tensor(2.0),
    "masked_fill": lambda: matrix().masked_fill_(mask(), 0.0),
    "where": lambda: matrix().where(mask(), 0.0),
    "index by a tensor on the device": lambda: matrix()[torch.arange(2, device="cuda")],
    "repeat_interleave of known size": lambda: torch.repeat_interleave(
        torch.ones(3, dtype=torch.int64, device="cuda"), output_size=3
    ),
    "product": lambda: matrix() @ matrix(),
    "event record": recorded,
    "event that was not recorded": lambda: torch.cuda.Event().synchronize(),
    "wait_event": lambda: torch.cuda.current_stream().wait_event(recorded()),
    "work on the host": lambda: torch.ones(4).nonzero().tolist(),
    "clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(_with_gradient(), 1.0),
}


class _AsksInBackward(torch.autograd.Function):
    """Waits in the thread of autograd that belongs to the device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * grad.sum().item()


class _MakesInBackward(_AsksInBackward):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.tensor(2.0, device=grad.device)


def _with_gradient() -> list[torch.nn.Parameter]:
    parameter = torch.nn.Parameter(matrix())
    parameter.grad = matrix()
    return [parameter]
