"""How each method merges one tensor, in passes over it that any number of threads share.

Sources: task arithmetic: Ilharco et al. 2023 (arXiv 2212.04089); TIES: Yadav et al. 2023 (arXiv 2306.01708); DARE:
Yu et al. 2024 (arXiv 2311.03099); slerp: Shoemake 1985. Where implementations differ, the order of operations is
mergekit 0.1.5's: sparsify -> rescale -> weight -> sign consensus -> sum -> normalize -> lambda -> add to the base.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.merge import kernels
from micota_fast.merge.inputs import Source
from micota_fast.merge.kernels import COARSE_BITS, CODES, FINE_BITS, Drops, Tensors
from micota_fast.merge.mergekit import Method, Scalars
from micota_fast.merge.output import BYTES, overflow

CHUNK = 1 << 20  # elements that a thread takes at a time
Write = Callable[[int, memoryview], None]
"""(byte offset in the result, bytes)"""
Pass = tuple[int, Callable[[int, int], Any]]
"""A number of elements, and what to do with a chunk of them, from `start` to `stop`."""

_L1_FLOOR = 1e-7  # mergekit leaves a task vector alone whose sum of magnitudes is below this, before or after masking
_NORM_FLOOR = 1e-8  # and does not normalize a tensor of a lesser norm
_WEIGHT_FLOOR = 1e-8  # nor by weights of a lesser sum
_COLLINEAR = 0.9995  # cosine beyond which slerp is linear
_HOW = {
    "linear": kernels.WEIGHTED_SUM,
    "slerp": kernels.WEIGHTED_SUM,
    "ties": kernels.AGREEING,
    "dare_ties": kernels.AGREEING,
}


class _Within(NamedTuple):
    """What a chunk has of each task vector's bin, as a histogram, and sums of magnitudes: all, and in higher bins."""

    start: int
    counts: NDArray[np.uint32]  # [task vectors, 2^FINE_BITS]
    sums: NDArray[np.float64]


class TensorMerge:
    """One tensor of every model, merged.

    Args:
        name: the tensor's.
        method: how.
        scalars: one for each result; they may differ in weights alone, so that results share reads and masks.
        sources: the tensor in each model: of `scalars[...].weights` for linear; else the base, then those.
        donor: which source gives the result its shape, and the rows that not all sources have.
        code: the results' type by safetensors' name.
        seed: of DARE's masks.
        write: one for each result.
    """

    def __init__(
        self,
        name: str,
        method: Method,
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
        self._tensors = _tensors(sources)
        count = len(sources) - 1 if method not in ("linear", "slerp") else 0
        self._drops = Drops(
            np.full(count, kernels.KEEP_ALL),
            np.zeros((count, 2), np.uint32),
            np.zeros(count, np.uint32),
            np.zeros(count, np.int64),
            np.zeros(count, np.int64),
            np.ones(count, np.float32),
        )
        self._weights = np.array([each.weights for each in scalars], np.float32)
        self._digests: dict[int, NDArray[np.uint64]] = {}
        self._digests_beyond: dict[int, NDArray[np.uint64]] = {}  # of the rows that the donor alone gives
        self._lock = threading.Lock()
        self._counts = np.zeros((count, 1), np.int64)  # of magnitudes, a histogram for each task vector

    def passes(self) -> Generator[Pass, list[Any], None]:
        """The passes to make, each over all its elements chunk by chunk; send back the chunks' results, in order."""
        shared = self.scalars[0]
        if self.method == "slerp":
            self._place_on_arc((yield self.size, self._products))
        elif self.method == "ties" and min(shared.densities) < 1:
            yield self.size, self._count
            bins = [self._bin(*each) for each in zip(self._counts, shared.densities, strict=True)]
            self._trim((yield self.size, lambda start, stop: self._count_within(start, stop, bins)), bins)
        elif self.method in ("dare_linear", "dare_ties"):
            self._draw()
            if shared.rescale == "l1" and min(shared.densities) < 1:
                self._match_l1((yield self.size, self._magnitudes))
        yield self.donor.elements.size, self._merge

    def fingerprints(self) -> list[bytes]:
        """Of each source, what of it was read. To be called after the last pass."""
        marks = np.array([self._digests[start] for start in sorted(self._digests)], "<u8")
        found = [marks[:, i].tobytes() for i in range(len(self.sources))]
        beyond = [self._digests_beyond[start] for start in sorted(self._digests_beyond)]
        found[self._donor_index] += np.array(beyond, "<u8").tobytes()
        return found

    def _run(self, start: int, stop: int, work: Callable[..., int], *arguments: Any) -> None:
        """A pass of `kernels` over the sources. Raises InputError naming the source that is not finite."""
        first = start not in self._digests
        digests = np.zeros(len(self.sources) if first else 0, np.uint64)
        status = work(self._tensors, start, stop, *arguments, digests)
        if status >= 0:
            raise self.sources[status].not_finite(start, stop)
        if status == kernels.OVERFLOW:
            raise overflow(self.donor.where, self.code)
        if first:
            self._digests[start] = digests

    # -- slerp

    def _products(self, start: int, stop: int) -> NDArray[np.float64]:
        sums = np.empty(3)
        self._run(start, stop, kernels.products, sums)
        return sums

    def _place_on_arc(self, parts: list[NDArray[np.float64]]) -> None:
        aa, bb, ab = (math.fsum(part[i] for part in parts) for i in range(3))
        norms = [norm if norm > _NORM_FLOOR else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
        cosine = min(1.0, max(-1.0, ab / norms[0] / norms[1]))
        pairs = []
        for each in self.scalars:
            (t,) = each.weights
            if abs(cosine) > _COLLINEAR:
                pairs.append((1 - t, t))
            else:
                angle = math.acos(cosine)
                pairs.append((math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)))
        self._weights = np.array(pairs, np.float32)

    # -- DARE

    def _draw(self) -> None:
        for k, density in enumerate(self.scalars[0].densities):
            if density < 1:
                self._drops.kinds[k] = kernels.AT_RANDOM
                self._drops.keys[k] = mask_key(self.seed, self.name, k)
                self._drops.limits[k] = keep_limit(density)
                self._drops.scales[k] = self._density_scale(density)

    def _magnitudes(self, start: int, stop: int) -> NDArray[np.float64]:
        sums = np.zeros((len(self._drops.kinds), 2))
        self._run(start, stop, kernels.magnitudes_at_random, self._drops, sums)
        return sums

    def _match_l1(self, parts: list[NDArray[np.float64]]) -> None:
        for k in np.flatnonzero(self._drops.kinds):
            self._drops.scales[k] = _l1_scale(*(math.fsum(part[k, i] for part in parts) for i in range(2)))

    def _density_scale(self, density: float) -> float:
        return 1 / density if self.scalars[0].rescale == "density" and density > 0 else 1.0

    # -- TIES

    def _count(self, start: int, stop: int) -> None:
        counts = np.zeros((len(self._drops.kinds), 1 << COARSE_BITS), np.uint32)
        self._run(start, stop, kernels.count_magnitudes, counts)
        with self._lock:
            self._counts = self._counts + counts

    def _bin(self, counts: NDArray[np.int64], density: float) -> tuple[int, int]:
        """The bin in which the smallest magnitude that stays lies, and how many of the bin stay."""
        keep = max(1, int(density * self.size)) if density > 0 else 0
        at_least = counts[::-1].cumsum()[::-1]  # how many lie in a bin or above it
        bin_ = int(np.flatnonzero(at_least >= keep)[-1])
        return bin_, keep - int(at_least[bin_] - counts[bin_])

    def _count_within(self, start: int, stop: int, bins: list[tuple[int, int]]) -> _Within:
        counts = np.zeros((len(bins), 1 << FINE_BITS), np.uint32)
        sums = np.zeros((len(bins) if self.scalars[0].rescale == "l1" else 0, 2))
        self._run(start, stop, kernels.count_within, np.array([bin_ for bin_, _ in bins]), counts, sums)
        return _Within(start, counts, sums)

    def _trim(self, parts: list[_Within], bins: list[tuple[int, int]]) -> None:
        drops = self._drops
        for k, (density, (bin_, keep)) in enumerate(zip(self.scalars[0].densities, bins, strict=True)):
            if density >= 1:
                continue
            counts = np.zeros(1 << FINE_BITS, np.int64)
            for part in parts:
                counts += part.counts[k]
            at_least = counts[::-1].cumsum()[::-1]
            enough = np.flatnonzero(at_least >= keep)
            last = int(enough[-1]) if enough.size else 0  # else zeros stay, too, and none of them matters
            stay = counts[last:].copy()
            stay[0] = spare = min(int(counts[last]), keep - int(at_least[last] - counts[last]))
            border = self.size
            for part in parts:
                here = int(part.counts[k, last])
                if spare < here:
                    border = part.start
                    break
                spare -= here
            drops.kinds[k] = kernels.SMALLEST
            drops.limits[k] = (bin_ << FINE_BITS) + last
            drops.borders[k], drops.spares[k] = border, spare
            drops.scales[k] = self._density_scale(density)
            if self.scalars[0].rescale == "l1":
                bits = np.arange(last, 1 << FINE_BITS, dtype=np.uint32) + np.uint32(bin_ << FINE_BITS)
                in_bin = (bits.view(np.float32).astype(np.float64) * stay)[stay > 0]
                kept = math.fsum(part.sums[k, 1] for part in parts) + math.fsum(in_bin)
                drops.scales[k] = _l1_scale(math.fsum(part.sums[k, 0] for part in parts), kept)

    # -- the pass that writes

    def _merge(self, start: int, stop: int) -> None:
        size = BYTES[self.code]
        pieces_VB = np.empty((len(self.write), (stop - start) * size), np.uint8)
        common = min(stop, self.size)
        if start < common:
            totals = self._weights.sum(axis=1, dtype=np.float32)
            normalize = np.array([each.normalize for each in self.scalars])
            self._run(
                start,
                common,
                kernels.merge,
                _HOW.get(self.method, kernels.TASK_VECTORS),
                self._drops,
                self._weights,
                np.where(normalize & (abs(totals) >= _WEIGHT_FLOOR), totals, np.float32(1)),
                normalize,
                np.array([each.lambda_ for each in self.scalars], np.float32),
                CODES[self.code],
                pieces_VB,
            )
        if common < stop:  # rows that not all sources have
            low = max(start, common)
            tail = np.empty((stop - low) * size, np.uint8)
            digest = self._digests_beyond[low] = np.zeros(1, np.uint64)
            status = kernels.copy(_tensors([self.donor]), low, stop, CODES[self.code], tail, digest)
            if status >= 0:
                raise self.donor.not_finite(low, stop)
            if status == kernels.OVERFLOW:
                raise overflow(self.donor.where, self.code)
            pieces_VB[:, (low - start) * size :] = tail
        for piece, write in zip(pieces_VB, self.write, strict=True):
            write(start * size, piece.data)


def _tensors(sources: Sequence[Source]) -> Tensors:
    addresses = [source.elements.ctypes.data for source in sources]
    return Tensors(np.array(addresses, np.int64), np.array([CODES[source.code] for source in sources]))


def mask_key(seed: int, tensor: str, index: int) -> tuple[int, int]:
    """The key of the random stream (`kernels.random_words`) that masks a tensor of a merge's input number `index`.

    A digest of these three alone: so the mask depends neither on the order of tensors, nor on threads, nor on how
    checkpoints are sharded, and two inputs of one merge have independent masks.
    """
    digest = hashlib.sha256(f"{seed}\0{tensor}\0{index}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def keep_limit(density: float) -> int:
    """The number below which a share `density` of all 32-bit words lies."""
    return min(round(density * 2**32), 2**32 - 1)


def _l1_scale(before: float, after: float) -> float:
    return before / after if before >= _L1_FLOOR and after >= _L1_FLOOR else 1.0
