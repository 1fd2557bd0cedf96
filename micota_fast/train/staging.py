"""Host memory for the copies that a checkpoint is written from: one piece for all tensors of a rank."""

from collections.abc import Mapping

import torch
from torch import Tensor

ALIGNED_BYTES = 64  # of a cache line; any type may start there


class Staging:
    """Uninitialised host tensors of given shapes and dtypes, in one allocation.

    For a GPU the memory is page-locked, as only then do copies not wait for the device. torch's own pinned memory
    (`pin_memory=True`) comes in powers of two for each tensor: 21.7 GB where a rank of Qwen2.5-7B on eight has 11.4.

    Args:
        like: by name, what is to be copied.
        pinned: whether to page-lock the memory; needs CUDA.

    Attributes:
        tensors: by name, contiguous.
    """

    def __init__(self, like: Mapping[str, Tensor], pinned: bool) -> None:
        starts, end = {}, 0
        for name, tensor in like.items():
            starts[name] = end
            end += -(-tensor.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
        buffer = torch.empty(end, dtype=torch.uint8)
        self.tensors = {
            name: buffer[starts[name] : starts[name] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for name, tensor in like.items()
        }
        self._pinned_at = buffer.data_ptr() if pinned and end else None
        if self._pinned_at is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._pinned_at, end, 0))

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether `tensors` have the names, shapes and dtypes that it was made for."""
        return {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
            name: (t.shape, t.dtype) for name, t in self.tensors.items()
        }

    def close(self) -> None:
        """Unlock the memory, before it can be freed; the tensors must not be copied to any more."""
        if self._pinned_at is not None:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._pinned_at))
            self._pinned_at = None
