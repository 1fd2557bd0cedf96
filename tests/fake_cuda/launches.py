"""Compiles each Triton launch for GPUs that are not here, from the real call's types, strides and alignment.

Nothing is launched, so a kernel's result, its speed and a launch that the driver would refuse remain unproved; that
its registers do not spill and its grid is one that CUDA takes is seen.
"""

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA C++ programming guide, compute capabilities


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel for one chip."""

    name: str
    chip: int  # compute capability, 90 for 9.0
    kernel: Any  # Triton's, with its cubin


class _Described:
    """A tensor as Triton's specialisation reads it: no memory, and an address as aligned as the allocator makes it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.shape, self._tensor = tensor.dtype, tuple(tensor.shape), tensor

    def data_ptr(self) -> int:
        return self._tensor.storage_offset() * self._tensor.element_size()  # storages begin at multiples of 512

    def stride(self, dim: int | None = None) -> Any:
        return self._tensor.stride() if dim is None else self._tensor.stride(dim)

    @staticmethod
    def ptr_range() -> int:
        return 0


class Launches:
    """Takes the place of Triton's launches from here on.

    Args:
        chips: compute capabilities to compile for.

    Attributes:
        counts: how often each kernel was launched, by name.
        compiled: each variant, by hash.
    """

    def __init__(self, chips: tuple[int, ...]) -> None:
        assert "TRITON_INTERPRET" not in os.environ, "the interpreter would run the kernels and compile none"
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        self.counts: Counter[str] = Counter()
        self.compiled: dict[str, Compiled] = {}
        self._chip = chips[0]
        launches = self

        class Driver:
            """All that compilation asks of a GPU."""

            def get_current_device(self) -> int:
                return launches._chip  # Triton keeps what it has compiled by device

            def get_current_stream(self, device: int) -> int:
                return 0

            def get_active_torch_device(self) -> torch.device:
                return torch.device("cuda", torch.accelerator.current_device_index())

            def get_current_target(self) -> GPUTarget:
                return GPUTarget("cuda", launches._chip, 32)

        triton.runtime.driver.set_active(Driver())
        run = JITFunction.run

        def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            assert not warmup
            given = [_described(x) for x in args]
            named = {name: _described(x) for name, x in options.items()}
            for self._chip in chips:
                made = run(kernel, *given, grid=grid, warmup=True, **named)
                self.compiled.setdefault(made.hash, Compiled(kernel.__name__, self._chip, made))
            self.counts[kernel.__name__] += 1
            shape = grid(dict(zip(kernel.arg_names, args, strict=False)) | options) if callable(grid) else grid
            for size, limit in zip(shape, GRID_LIMITS, strict=False):
                assert 0 <= size <= limit, f"{kernel.__name__} has a grid of {shape}"

        JITFunction.run = compile_only


def _described(argument: Any) -> Any:
    return _Described(argument) if isinstance(argument, torch.Tensor) else argument
