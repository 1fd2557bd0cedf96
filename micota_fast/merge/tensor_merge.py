"""One tensor of every model on its way through the passes of a method, which any number of threads share."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from micota_fast.common.dtypes import DTYPES
from micota_fast.merge import kernels
from micota_fast.merge.inputs import Source
from micota_fast.merge.kernels import KINDS, Tensors
from micota_fast.merge.methods import WEIGHT_FLOOR, DropsOf, MethodSpec, Pass, Scalars
from micota_fast.merge.output import overflow

CHUNK = 1 << 20  # elements that a thread takes at a time
Write = Callable[[int, memoryview], None]
"""(byte offset in the result, bytes)"""

_COMBINE = {
    "weighted sum": kernels.WEIGHTED_SUM,
    "task vectors": kernels.TASK_VECTORS,
    "agreeing task vectors": kernels.AGREEING,
}


class TensorMerge:
    """One tensor of every model, merged.

    Args:
        name: of the tensor.
        method: how it is merged.
        scalars: one for each result; they may differ in weights alone, so that results share reads and masks.
        sources: the tensor in each model: in the order of the weights, after the base if the merge starts there.
        donor: which source gives the result its shape, and the rows that not all sources have.
        code: type of the results, as safetensors names it.
        seed: of random masks.
        write: one for each result.
    """

    def __init__(
        self,
        name: str,
        method: MethodSpec,
        scalars: Sequence[Scalars],
        sources: Sequence[Source],
        donor: int,
        code: str,
        seed: int,
        write: Sequence[Write],
    ) -> None:
        self.name, self.method, self.scalars, self.seed = name, method, scalars, seed
        self.sources, self.donor, self.code, self.write = sources, sources[donor], code, write
        self._donor_index = donor
        self.size = min(source.elements.size for source in sources)
        self.row_length = self.donor.shape[-1] if self.donor.shape else 1
        self._tensors = _tensors(sources)
        nothing = kernels.keep_all(len(sources) - 1 if method.combine != "weighted sum" else 0)
        self._drops_of: DropsOf = lambda start, stop: nothing
        self._weights = np.array([each.weights for each in scalars], np.float32)
        self._digests: dict[int, NDArray[np.uint64]] = {}
        self._digests_beyond: dict[int, NDArray[np.uint64]] = {}  # of the rows that the donor alone gives

    def passes(self) -> Generator[Pass, list[Any], None]:
        """Yield the passes to make, each over all its elements chunk by chunk.

        The results of the chunks are to be sent back, in order.
        """
        if self.method.weigh is not None:
            self._weights = yield from self.method.weigh(self)
        if self.method.sparsify is not None and min(self.scalars[0].densities) < 1:
            self._drops_of = yield from self.method.sparsify(self)
        yield self.donor.elements.size, self._merge

    def fingerprints(self) -> list[bytes]:
        """Return for each source a mark of what was read of it. To be called after the last pass."""
        marks = np.array([self._digests[start] for start in sorted(self._digests)], "<u8")
        found = [marks[:, i].tobytes() for i in range(len(self.sources))]
        beyond = [self._digests_beyond[start] for start in sorted(self._digests_beyond)]
        found[self._donor_index] += np.array(beyond, "<u8").tobytes()
        return found

    def run(self, start: int, stop: int, kernel: Callable[..., int], *arguments: Any) -> None:
        """Run a pass of `kernels` over a chunk of the sources.

        Raises:
            InputError: naming the source that is not finite.
        """
        status = kernel(self._tensors, start, stop, *arguments)
        if status >= 0:
            raise self.sources[status].not_finite(start, stop)
        if status == kernels.OVERFLOW:
            raise overflow(self.donor.where, self.code)

    def _merge(self, start: int, stop: int) -> None:
        size = DTYPES[self.code].bytes
        pieces_VB = np.empty((len(self.write), (stop - start) * size), np.uint8)
        common = min(stop, self.size)
        if start < common:
            digests = self._digests[start] = np.zeros(len(self.sources), np.uint64)
            totals = self._weights.sum(axis=1, dtype=np.float32)
            normalize = np.array([each.normalize for each in self.scalars])
            self.run(
                start,
                common,
                kernels.merge,
                _COMBINE[self.method.combine],
                self._drops_of(start, common),
                self._weights,
                np.where(normalize & (abs(totals) >= WEIGHT_FLOOR), totals, np.float32(1)),
                normalize,
                np.array([each.lambda_ for each in self.scalars], np.float32),
                KINDS[self.code],
                pieces_VB,
                digests,
            )
        if common < stop:  # rows that not all sources have
            low = max(start, common)
            tail = np.empty((stop - low) * size, np.uint8)
            digest = self._digests_beyond[low] = np.zeros(1, np.uint64)
            status = kernels.copy(_tensors([self.donor]), low, stop, KINDS[self.code], tail, digest)
            if status >= 0:
                raise self.donor.not_finite(low, stop)
            if status == kernels.OVERFLOW:
                raise overflow(self.donor.where, self.code)
            pieces_VB[:, (low - start) * size :] = tail
        for piece, write in zip(pieces_VB, self.write, strict=True):
            write(start * size, piece.data)


def _tensors(sources: Sequence[Source]) -> Tensors:
    addresses = [source.elements.ctypes.data for source in sources]
    return Tensors(np.array(addresses, np.int64), np.array([KINDS[source.code] for source in sources]))
