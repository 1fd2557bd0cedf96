"""Counts the bytes of tensors on the fake device, as the caching allocator would hand them out.

Each storage counts from the operation that made it until the last tensor that shares it is gone, rounded up to the 512
bytes that CUDA's allocator rounds to. FSDP frees gathered parameters by resizing their storage to nothing, which is
followed. Not counted: what an operation allocates and frees inside its kernel (cuBLAS's workspaces, temporaries of a
sort or a scan), the allocator's gaps, NCCL's buffers and the CUDA context.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

ROUNDING = 512  # of c10/cuda/CUDACachingAllocator.h: kMinBlockSize


class Ledger:
    """The bytes on the device, `now` and `peak`; `at_peak` is what `note` returned when the peak was reached."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.note: Callable[[], str] = lambda: ""
        self.at_peak = ""
        self._sizes: dict[int, int] = {}  # by address of the storage
        self._follow_resizing()

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor on the fake device, if it is new or has another size than before."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._sizes:
            self._sizes[address] = 0
            weakref.finalize(storage, self._freed, address).atexit = False
        self._resized(address, storage.nbytes())

    def restart(self) -> None:
        """Forget the peak until now."""
        self.peak, self.at_peak = self.now, ""

    def _resized(self, address: int, size: int) -> None:
        size = -(-size // ROUNDING) * ROUNDING
        self.now += size - self._sizes[address]
        self._sizes[address] = size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, self.note()

    def _freed(self, address: int) -> None:
        self.now -= self._sizes.pop(address)

    def _follow_resizing(self) -> None:
        resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, size: int) -> object:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._resized(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = followed  # type: ignore[method-assign, assignment]
