"""Gives torch's CPU build a CUDA device in name: `install` before anything asks for one, in a process of its own.

Tensors on that device are torch's fake tensors, which have shape, type, strides and device and no memory (`watch.py`
makes them). So all that Python decides on the way to a GPU is executed as it is: which operations, in which order, on
which shapes, which copies. What is not: any kernel's arithmetic, time, the order between streams, NCCL, and whatever a
CUDA build's own C++ does between an operation and its kernel.
"""

import contextlib
import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fake_cuda.library import library

# An H100 SXM with 80 GB, by NVIDIA's data sheet and `cudaGetDeviceProperties`.
NAME, CAPABILITY, TOTAL_MEMORY = "NVIDIA H100 80GB HBM3", (9, 0), 85_017_493_504
PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=TOTAL_MEMORY,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    is_integrated=False,
    gcnArchName="",
)
N_DEVICES = 8  # as in guard.cpp

_WAITED = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_kept: list[Any] = []  # what C++ points to must not be collected


class _Runtime:
    """The few functions of CUDA's runtime that Python calls by name; all succeed."""

    def __init__(self, compiled: ctypes.CDLL, on_wait: Callable[[str], None]) -> None:
        self._compiled, self._on_wait = compiled, on_wait

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        self._on_wait("cudaHostRegister")  # page-locking waits for the device, by CUDA's guide on implicit waits
        self._compiled.fake_cuda_pin(ctypes.c_void_p(start), ctypes.c_size_t(size))
        return 0

    def cudaHostUnregister(self, start: int) -> int:
        self._on_wait("cudaHostUnregister")
        known: bool = self._compiled.fake_cuda_unpin(ctypes.c_void_p(start))
        return 0 if known else 713  # cudaErrorHostMemoryNotRegistered


def install(on_wait: Callable[[str], None], memory: Callable[[], tuple[int, int]]) -> None:
    """Put the fake device into this process, which must not have imported torch yet.

    Args:
        on_wait: called with the name of each call that makes the host wait for streams, events or the device.
        memory: returns the bytes on the device, now and at most.
    """
    compiled = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
    compiled.fake_cuda_unpin.restype = ctypes.c_bool
    import torch

    callback = _WAITED(lambda what: on_wait(what.decode()))
    _kept.append(callback)
    compiled.fake_cuda_install(callback)
    for name, function in _bindings().items():
        setattr(torch._C, name, function)
    for name, value in _face(_Runtime(compiled, on_wait), on_wait, memory).items():
        setattr(torch.cuda, name, value)
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False: self.to(  # type: ignore[method-assign]
        "cuda" if device is None else device, non_blocking=non_blocking
    )


def _bindings() -> dict[str, Callable[..., Any]]:
    """What torch's Python calls in a CUDA build's C++."""
    import torch

    def exchange(index: int) -> int:
        before: int = torch._C._accelerator_getDeviceIndex()
        if index >= 0:
            torch._C._accelerator_setDeviceIndex(index)
        return before

    return {
        "_cuda_getDevice": lambda: torch._C._accelerator_getDeviceIndex(),
        "_cuda_setDevice": lambda index: torch._C._accelerator_setDeviceIndex(index),
        "_cuda_exchangeDevice": exchange,
        "_cuda_maybeExchangeDevice": exchange,
        "_cuda_getCurrentRawStream": lambda index: 0,
        "_cuda_isCurrentStreamCapturing": lambda: False,
    }


def _face(runtime: _Runtime, on_wait: Callable[[str], None], memory: Callable[[], tuple[int, int]]) -> dict[str, Any]:
    """What replaces names of `torch.cuda`."""
    import torch

    class Stream(torch.Stream):
        """torch's generic stream, made as torch.cuda's is; FSDP asks for some with a priority."""

        def __new__(cls, device: Any = None, priority: int = 0, **fields: Any) -> "Stream":
            made: Stream = (
                super().__new__(cls, **fields)
                if fields
                else super().__new__(cls, device=where(device), priority=priority)
            )
            return made

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

    class Event(torch.Event):
        """torch's generic event, made as torch.cuda's is: `synchronize` of it and of streams arrives in guard.cpp."""

        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> "Event":
            made: Event = super().__new__(cls, device="cuda", enable_timing=enable_timing, blocking=blocking)
            return made

        def elapsed_time(self, other: torch.Event) -> float:
            return 1.0  # milliseconds; torch's own takes no subclass

    def where(device: Any) -> torch.device:
        index = device if isinstance(device, int) else None if device is None else torch.device(device).index
        return torch.device("cuda", torch.accelerator.current_device_index() if index is None else index)

    def current_stream(device: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(where(device))

    class StreamContext(contextlib.AbstractContextManager[None]):
        """The current stream for a stretch; None: the one that is current already."""

        def __init__(self, chosen: torch.Stream | None) -> None:
            self._chosen = chosen

        def __enter__(self) -> None:
            self._before = current_stream()
            torch.accelerator.set_stream(self._chosen or self._before)

        def __exit__(self, *_: object) -> None:
            torch.accelerator.set_stream(self._before)

    class device(contextlib.AbstractContextManager[None]):
        """The current device for a stretch; None or a negative index: the one that is current already."""

        def __init__(self, chosen: Any) -> None:
            self._index = -1 if chosen is None else chosen if isinstance(chosen, int) else where(chosen).index

        def __enter__(self) -> None:
            self._before = torch.accelerator.current_device_index()
            if self._index >= 0:
                torch.accelerator.set_device_index(self._index)

        def __exit__(self, *_: object) -> None:
            torch.accelerator.set_device_index(self._before)

    class device_of(device):
        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__(tensor.device.index if tensor.is_cuda else -1)

    return {
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "_is_compiled": lambda: True,
        "device_count": lambda: N_DEVICES,
        "current_device": lambda: torch.accelerator.current_device_index(),
        "set_device": lambda chosen: torch.accelerator.set_device_index(where(chosen).index),
        "device": device,
        "device_of": device_of,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_properties": lambda device=None: PROPERTIES,
        "is_bf16_supported": lambda *_, **__: True,
        "Stream": Stream,
        "Event": Event,
        "current_stream": current_stream,
        "default_stream": lambda device=None: torch.Stream(
            stream_id=0, device_index=where(device).index, device_type=1
        ),
        "set_stream": torch.accelerator.set_stream,
        "stream": StreamContext,
        "StreamContext": StreamContext,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: on_wait("cuda.synchronize"),
        "empty_cache": lambda: on_wait("cuda.empty_cache"),  # cudaFree waits for the device
        "cudart": lambda: runtime,
        "check_error": lambda status: None if status == 0 else _fail(status),
        "memory_allocated": lambda device=None: memory()[0],
        "max_memory_allocated": lambda device=None: memory()[1],
        "memory_reserved": lambda device=None: memory()[0],
        "reset_peak_memory_stats": lambda device=None: None,
        # The generator's state has no bits here: runs that draw on the device are not compared.
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }


def _fail(status: int) -> None:
    raise RuntimeError(f"CUDA error {status}")
