"""Runs operations on CUDA tensors without memory, sees which of them make the host wait, and counts their bytes.

Only what touches the device is fake: tensors on the CPU are real and keep their values, so batches, corpora, lengths,
plans and files are what they are in a real run. What comes back from the device is zeros.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fake_cuda.ledger import Ledger
from fake_cuda.waits import Waits

# The host asks how many elements they return or, of `multinomial`, whether its input is allowed.
ASKS_FOR_VALUES = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::bincount",
    "aten::multinomial",
}
YES_OR_NO = {"aten::equal", "aten::allclose", "aten::is_nonzero"}
INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
SCALARS = {True: True, False: 1}  # what `item()` gives instead of a value, by whether the type is bool


class FakeCuda(TorchDispatchMode):
    """A dispatch mode under which CUDA tensors are torch's fake tensors.

    Args:
        waits: told of each operation that makes the host wait for the device.
        ledger: told of each tensor on it.
        bodies: by name of an operator, the function to run in place of its kernel, for operators whose insides matter.

    Attributes:
        copies: how often memory was copied, by direction ("to device", "to host") and whether the host waited.
    """

    def __init__(self, waits: Waits, ledger: Ledger, bodies: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.copies: Counter[tuple[str, bool]] = Counter()
        self._waits, self._ledger, self._bodies = waits, ledger, bodies or {}

    def __enter__(self) -> "FakeCuda":
        # torch.tensor(..., device="cuda") then makes its tensor on the CPU and copies it where we see it.
        self._lifted_before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted_before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        torch._C._set_only_lift_cpu_tensors(True)  # also in the threads of autograd, each of which has its own
        if any(not issubclass(FakeTensor, kind) for kind in types):
            return NotImplemented  # a DTensor: it comes back with the tensors that it is made of
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if fake is not None and fake is not self.fake:
            return func(*args, **kwargs)  # DTensor asks for a shape, with fake tensors of its own
        leaves = tree_leaves((args, kwargs))
        on_device = [x for x in leaves if isinstance(x, FakeTensor)]
        device = kwargs.get("device")
        if not on_device and (device is None or torch.device(device).type != "cuda"):
            return func(*args, **kwargs)
        name = func._schema.name
        if name in self._bodies:
            with self:
                return self._bodies[name](*args, **kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            copied = self._copy(func, args, kwargs)
            if copied is not None:
                return copied
        elif name == "aten::_local_scalar_dense":
            self._waits.record("item")
            return SCALARS[args[0].dtype == torch.bool]
        elif name in YES_OR_NO:
            self._waits.record(name.removeprefix("aten::"))
            return True
        elif what := _asks(func, args, kwargs):
            self._waits.record(what)
        with self.fake:
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.is_cuda:
                self._ledger.see(tensor)
        return out

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Note a copy between host and device; make one to the host. None: the copy is still to be made."""
        source: Tensor
        if func._schema.name == "aten::copy_":
            target, source, *rest = args
            to, non_blocking = target.device, bool(rest and rest[0]) or kwargs.get("non_blocking", False)
        else:
            (target, source), non_blocking = (None, args[0]), kwargs.get("non_blocking", False)
            to = torch.device(kwargs.get("device") or source.device)
        if source.device.type == to.type or "meta" in (source.device.type, to.type):
            return None
        host = source if to.type == "cuda" else target
        # To pageable memory, or from it, CUDA goes through a buffer of its own and waits. What `.to("cpu",
        # non_blocking=True)` makes is pinned (`pin_out` in ATen/native/TensorConversions.cpp).
        waits = not (non_blocking and (host is None or host.is_pinned()))
        way = "to device" if to.type == "cuda" else "to host"
        self.copies[way, waits] += 1
        if waits:
            self._waits.record(f"copy {way}")
        if to.type == "cuda" and target is None:  # made here, as torch would take constants to be copied for real
            with self.fake:
                out = torch.empty_strided(
                    source.shape, source.stride(), dtype=kwargs.get("dtype") or source.dtype, device=to
                )
            self._ledger.see(out)
            return out
        if to.type == "cuda":
            return target
        if target is None:
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype, pin_memory=not waits)
        return target.zero_()


def _asks(func: Any, args: Any, kwargs: Any) -> str | None:
    """Name what makes the host wait in an operation on CUDA tensors; None if nothing does."""
    name = func._schema.name.removeprefix("aten::")
    if func._schema.name in ASKS_FOR_VALUES:
        return str(name)
    if func._schema.name in INDEXES:
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                return f"{name} by a mask"
            if isinstance(index, Tensor) and index.device.type == "cpu":
                return f"{name} by a tensor on the host"
    if func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "repeat_interleave of unknown size"
    return None


def provoke(operation: Callable[[], Any]) -> None:
    """Run an operation for the waits that it makes; that its result has no shape without values is no error here."""
    with contextlib.suppress(DynamicOutputShapeException):
        operation()
