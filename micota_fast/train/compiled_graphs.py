"""Counts what torch.compile has made: graphs of the blocks and, apart from them, of the optimizer's step."""

from collections.abc import Iterator
from contextlib import contextmanager

# torch._dynamo takes a second to import, and has been imported where something is compiled.


@contextmanager
def counted_as_the_optimizers() -> Iterator[None]:
    """Count the graphs that torch makes inside as the optimizer's.

    The number is kept with torch's own counters of this process, so that whoever clears these clears it, too.
    """
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    try:
        yield
    finally:
        counters["micota_fast"]["optimizer_graphs"] += counters["stats"]["unique_graphs"] - before


def compiled_graphs() -> str:
    """Report what torch.compile has made so far: one graph of the blocks without a break is as it should be."""
    from torch._dynamo.utils import counters

    made, breaks = counters["stats"]["unique_graphs"], counters["graph_break"]
    steps = counters["micota_fast"]["optimizer_graphs"]  # one for each size of shard
    text = f"torch.compile: graphs {made - steps}, breaks {sum(breaks.values())}"
    if steps:
        text += f"; graphs of the optimizer's step {steps}"
    return text + "".join(f"\nWARNING: graph break: {reason.splitlines()[0]}" for reason in breaks)
