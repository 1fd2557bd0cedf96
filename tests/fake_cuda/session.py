"""A process with the fake device in it, in which the real `train()` runs. To be imported before torch."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from fake_cuda import device

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as Triton 3.6 to 3.9 do; later ones ask to be told


class Session:
    """The fake device, this process as rank 0 of a world, and all that is recorded of what it does.

    Args:
        world: number of processes that it pretends to be one of.
        chips: compute capabilities for which Triton's launches are compiled.
        attention: one of `flash.VERSIONS`, to make that package importable; None: none is.

    Attributes:
        world: as given.
        waits, ledger, launches: see their modules.
        cuda: the mode, of which `copies` counts those between host and device.
    """

    def __init__(self, world: int, chips: tuple[int, ...] = (90,), attention: str | None = None) -> None:
        device.install(lambda what: self.waits.record(what), lambda: (self.ledger.now, self.ledger.peak))
        import torch

        from fake_cuda import flash
        from fake_cuda.launches import Launches
        from fake_cuda.ledger import Ledger
        from fake_cuda.waits import Waits
        from fake_cuda.watch import FakeCuda
        from fake_cuda.world import pretend

        torch.set_num_threads(1)
        self.world = world
        self.waits, self.ledger, self.launches = Waits(), Ledger(), Launches(chips)
        pretend(world, self.waits.record)
        if attention is not None:
            flash.install(attention)
        self.cuda = FakeCuda(self.waits, self.ledger, _bodies())
        _adapt(self)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run what follows on the fake device, with the account of waits empty at the start."""
        self.waits.found.clear()
        self.waits.phase = "start"
        with self.cuda:
            yield

    def train(self, config: Any) -> bool:
        """Run `micota_fast.train.loop.train`."""
        from micota_fast.train.loop import train

        with self.running():
            return train(config)

    def require_empty(self) -> None:
        """Check that nothing of a run that is over is left on the device: the next one is counted from nothing."""
        assert self.ledger.now < 1 << 20, f"{self.ledger.now:,} bytes are left on the device"

    def seen(self) -> list[list[Any]]:
        """Return the waits as JSON values: phase, what, where, how often."""
        return [[*wait_, count] for wait_, count in self.waits.found.items()]


def compile_nothing() -> None:
    """Let torch.compile return functions as they are: torch compiles nothing under a dispatch mode of others."""
    import torch

    torch.compile = lambda function, **_: function


def _bodies() -> dict[str, Any]:
    """Our operators whose insides are run: the loss, whose chunks and launches count, and FlashAttention 4."""
    import sys

    from micota_fast.kernels import linear_cross_entropy  # noqa: F401 (loads the module)
    from micota_fast.model import flash_attention_4 as version_4

    loss = sys.modules["micota_fast.kernels.linear_cross_entropy"]
    operators = (loss._by_chunks, version_4.flash_attention_4, version_4.flash_attention_4_backward)
    return {operator._qualname: operator._init_fn for operator in operators}


def _adapt(session: Session) -> None:
    """Change what the real code does where a fake tensor cannot take a real one's place, and follow its phases."""
    from micota_fast.train import checkpoint, prepare
    from micota_fast.train.stopwatch import Stopwatch

    # FSDP moves buffers by `tensor.data = tensor.to(device)`, which no real tensor of the host can do: they go first.
    build_model = prepare.build_model

    def on_device(*args: Any) -> Any:
        model = build_model(*args)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to("cuda")
        return model

    prepare.build_model = on_device

    # A fake mode belongs to one thread at a time: the caller waits for the writer, whose thread is real all the same.
    class AtOnce(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:  # type: ignore[override]
            future = super().submit(*args, **kwargs)
            wait([future])
            return future

    checkpoint.ThreadPoolExecutor = AtOnce  # type: ignore[misc]

    lap = Stopwatch.lap

    def noted(watch: Stopwatch, phase: str) -> None:
        session.waits.phase = phase
        lap(watch, phase)

    Stopwatch.lap = noted  # type: ignore[method-assign]
