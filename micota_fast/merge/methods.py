"""How each method merges one tensor, in passes over it that any number of threads share.

Sources: task arithmetic: Ilharco et al. 2023 (arXiv 2212.04089); TIES: Yadav et al. 2023 (arXiv 2306.01708); DARE:
Yu et al. 2024 (arXiv 2311.03099); slerp: Shoemake 1985. Where implementations differ, the order of operations is
mergekit 0.1.5's: sparsify -> rescale -> weight -> sign consensus -> sum -> normalize -> lambda -> add to the base.
"""

import hashlib
import math
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.merge import kernels
from micota_fast.merge.inputs import NUMPY, Source
from micota_fast.merge.kernels import BLOCK, COARSE_BITS, FINE_BITS
from micota_fast.merge.mergekit import Method, Scalars
from micota_fast.merge.output import BYTES, NARROW, overflow

Write = Callable[[int, memoryview], None]
"""(byte offset in the result, bytes)"""
Pass = tuple[int, Callable[[int, int], Any]]
"""A number of elements, and what to do with the elements [start, stop) of them; start is a multiple of BLOCK."""

_L1_FLOOR = 1e-7  # mergekit leaves a task vector alone whose sum of magnitudes is below this, before or after masking
_NORM_FLOOR = 1e-8  # and does not normalize a tensor of a lesser norm
_WEIGHT_FLOOR = 1e-8  # nor by weights of a lesser sum
_COLLINEAR = 0.9995  # cosine beyond which slerp is linear


class _Random(NamedTuple):
    """DARE's dropping: an element stays where its random word is below `limit`."""

    key: tuple[int, int]
    limit: int
    scale: float = 1.0


class _Smallest(NamedTuple):
    """TIES' dropping: elements stay whose magnitude's bits are above `threshold`, and some that equal it.

    `spares`: of how many equals the first stay, by the block's first element.
    """

    threshold: int
    spares: dict[int, int]
    scale: float = 1.0


class Scratch(threading.local):
    """A thread's own memory, of block size."""

    def __init__(self, n_sources: int) -> None:
        self.rows = np.empty((n_sources, BLOCK), np.float32)
        self.out = np.empty(BLOCK, np.float32)
        self.words = np.empty(BLOCK, np.uint32)
        self.found = np.empty(BLOCK, np.uint16)
        self.narrow = np.empty(BLOCK, np.float32)  # or as many halves


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
        scratch: shared by all tensors of a merge.
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
        scratch: Scratch,
    ) -> None:
        self.name, self.method, self.scalars, self.seed = name, method, scalars, seed
        self.sources, self.donor, self.code, self.write = sources, sources[donor], code, write
        self.size = min(source.elements.size for source in sources)
        self._scratch = scratch
        self._drops: list[_Random | _Smallest | None] = [None] * (len(sources) - 1)
        self._coefficients = [np.array(each.weights, np.float32) for each in scalars]
        self._digests: dict[int, list[int]] = {}

    def passes(self) -> Generator[Pass, list[Any], None]:
        """The passes to make, each over all its elements in pieces; send back the pieces' results, in order."""
        shared = self.scalars[0]
        if self.method == "slerp":
            self._place_on_arc((yield self.size, self._products))
        elif self.method == "ties" and min(shared.densities) < 1:
            counts = np.zeros((len(self.sources) - 1, 1 << COARSE_BITS), np.int64)
            for piece in (yield self.size, self._count):
                counts += piece
            bins = [self._bin(counts[i], density) for i, density in enumerate(shared.densities)]
            self._trim((yield self.size, lambda start, stop: self._find(start, stop, bins)), bins)
        elif self.method in ("dare_linear", "dare_ties"):
            self._draw()
            if shared.rescale == "l1" and min(shared.densities) < 1:
                self._match_l1((yield self.size, self._sums))
        yield self.donor.elements.size, self._merge

    def fingerprints(self) -> list[bytes]:
        """Of each source, what of it was read. To be called after the first pass."""
        marks = [self._digests[start] for start in sorted(self._digests)]
        return [np.array([each[i] for each in marks], "<u8").tobytes() for i in range(len(self.sources))]

    # -- blocks

    def _read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Block [start, stop) of all sources in float32, [sources, BLOCK], in the thread's memory."""
        rows = self._scratch.rows
        for row, source in zip(rows, self.sources, strict=True):
            source.read(start, stop, row[: stop - start])
        if start not in self._digests:
            self._digests[start] = [int(kernels.digest(row[: stop - start])) for row in rows]
        return rows

    def _task_vectors(self, start: int, stop: int) -> NDArray[np.float32]:
        """As `_read`, with the base taken from the other models."""
        rows = self._read(start, stop)
        for row in rows[1:]:
            kernels.subtract(row, rows[0, : stop - start])
        return rows

    def _words(self, key: tuple[int, int], start: int, stop: int) -> NDArray[np.uint32]:
        words = self._scratch.words[: -(-(stop - start) // 4) * 4]
        kernels.random_words(key, start, words)
        return words

    # -- passes that measure

    def _products(self, start: int, stop: int) -> list[tuple[float, float, float]]:
        parts = []
        for low, high in _blocks(start, stop):
            base, other = self._read(low, high)
            parts.append(kernels.products(base[: high - low], other[: high - low]))
        return parts

    def _place_on_arc(self, pieces: list[list[tuple[float, float, float]]]) -> None:
        aa, bb, ab = (math.fsum(part[i] for parts in pieces for part in parts) for i in range(3))
        norms = [norm if norm > _NORM_FLOOR else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
        cosine = min(1.0, max(-1.0, ab / norms[0] / norms[1]))
        self._coefficients = []
        for each in self.scalars:
            (t,) = each.weights
            pair = (1 - t, t)
            if abs(cosine) <= _COLLINEAR:
                angle = math.acos(cosine)
                pair = (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle))
            self._coefficients.append(np.array(pair, np.float32))

    def _draw(self) -> None:
        for i, density in enumerate(self.scalars[0].densities):
            if density < 1:
                scale = 1 / density if self.scalars[0].rescale == "density" and density > 0 else 1.0
                self._drops[i] = _Random(mask_key(self.seed, self.name, i), keep_limit(density), scale)

    def _sums(self, start: int, stop: int) -> list[list[tuple[float, float]]]:
        parts = []
        for low, high in _blocks(start, stop):
            rows = self._task_vectors(low, high)[1:, : high - low]
            part = []
            for row, drop in zip(rows, self._drops, strict=True):
                sums = (0.0, 0.0)
                if isinstance(drop, _Random):
                    sums = kernels.sums_at_random(row, self._words(drop.key, low, high), np.uint32(drop.limit))
                part.append(sums)
            parts.append(part)
        return parts

    def _match_l1(self, pieces: list[list[list[tuple[float, float]]]]) -> None:
        for i, drop in enumerate(self._drops):
            if isinstance(drop, _Random):
                before, after = (math.fsum(part[i][j] for parts in pieces for part in parts) for j in range(2))
                self._drops[i] = drop._replace(scale=_l1_scale(before, after))

    def _count(self, start: int, stop: int) -> NDArray[np.uint32]:
        counts = np.zeros((len(self.sources) - 1, 1 << COARSE_BITS), np.uint32)
        for low, high in _blocks(start, stop):
            for row, count in zip(self._task_vectors(low, high)[1:, : high - low], counts, strict=True):
                kernels.histogram(row, count)
        return counts

    def _bin(self, counts: NDArray[np.int64], density: float) -> tuple[int, int]:
        """The bin in which the smallest magnitude that stays lies, and how many of the bin stay."""
        keep = max(1, int(density * self.size)) if density > 0 else 0
        at_least = counts[::-1].cumsum()[::-1]  # how many lie in a bin or above it
        bin_ = int(np.flatnonzero(at_least >= keep)[-1])
        return bin_, keep - int(at_least[bin_] - counts[bin_])

    def _find(self, start: int, stop: int, bins: list[tuple[int, int]]) -> list[list[tuple[Any, float, float]]]:
        parts = []
        for low, high in _blocks(start, stop):
            part = []
            for row, (bin_, _) in zip(self._task_vectors(low, high)[1:, : high - low], bins, strict=True):
                count, every, above = kernels.members(row, bin_, self._scratch.found)
                part.append((self._scratch.found[:count].copy(), every, above))
            parts.append(part)
        return parts

    def _trim(self, pieces: list[list[list[tuple[Any, float, float]]]], bins: list[tuple[int, int]]) -> None:
        parts = [part for piece in pieces for part in piece]
        for i, (density, (bin_, keep)) in enumerate(zip(self.scalars[0].densities, bins, strict=True)):
            if density >= 1:
                continue
            found = [part[i][0] for part in parts]
            counts = np.bincount(np.concatenate(found), minlength=1 << FINE_BITS)
            at_least = counts[::-1].cumsum()[::-1]
            enough = np.flatnonzero(at_least >= keep)
            last = int(enough[-1]) if enough.size else 0  # else zeros stay, too, and none of them matters
            stay = counts[last:].copy()
            stay[0] = spare = min(int(counts[last]), keep - int(at_least[last] - counts[last]))
            threshold = (bin_ << FINE_BITS) + last
            spares = {}
            if spare == counts[last]:
                threshold = max(threshold - 1, 0)  # all that equal it stay
            else:
                for block, members in enumerate(found):
                    spares[block * BLOCK] = here = min(spare, int((members == last).sum()))
                    spare -= here
            scale = 1.0
            if self.scalars[0].rescale == "density" and density > 0:
                scale = 1 / density
            elif self.scalars[0].rescale == "l1":
                bits = np.arange(last, 1 << FINE_BITS, dtype=np.uint32) + np.uint32(bin_ << FINE_BITS)
                with_threshold = (bits.view(np.float32).astype(np.float64) * stay)[stay > 0]
                above = math.fsum(part[i][2] for part in parts) + math.fsum(with_threshold)
                scale = _l1_scale(math.fsum(part[i][1] for part in parts), above)
            self._drops[i] = _Smallest(threshold, spares, scale)

    # -- the pass that writes

    def _merge(self, start: int, stop: int) -> None:
        for low, high in _blocks(start, stop):
            if low < self.size:
                self._merge_block(low, min(high, self.size))
            if high > self.size:  # rows that not all sources have
                tail = max(low, self.size)
                out = self._scratch.out[: high - tail]
                self.donor.read(tail, high, out)
                for write in self.write:
                    self._emit(write, tail, out)

    def _merge_block(self, start: int, stop: int) -> None:
        linear = self.method in ("linear", "slerp")
        rows = self._read(start, stop) if linear else self._task_vectors(start, stop)
        for row, drop in zip(rows[1:, : stop - start], self._drops, strict=True):
            if isinstance(drop, _Random):
                words = self._words(drop.key, start, stop)
                kernels.drop_at_random(row, words, np.uint32(drop.limit), np.float32(drop.scale))
            elif isinstance(drop, _Smallest):
                spare = drop.spares.get(start, 0)
                kernels.drop_smallest(row, np.uint32(drop.threshold), spare, np.float32(drop.scale))
        out = self._scratch.out[: stop - start]
        for each, weights, write in zip(self.scalars, self._coefficients, self.write, strict=True):
            divisor, lambda_ = np.float32(1), np.float32(each.lambda_)
            if each.normalize and abs(total := weights.sum(dtype=np.float32)) >= _WEIGHT_FLOOR:
                divisor = total
            if linear:
                kernels.weighted_sum(rows, weights, divisor, out)
            elif self.method in ("ties", "dare_ties"):
                kernels.add_agreeing_task_vectors(rows[0], rows[1:], weights, each.normalize, lambda_, out)
            else:
                kernels.add_task_vectors(rows[0], rows[1:], weights, divisor, lambda_, out)
            self._emit(write, start, out)

    def _emit(self, write: Write, start: int, values: NDArray[np.float32]) -> None:
        narrowed = self._scratch.narrow.view(NUMPY[self.code])[: values.size]
        if not NARROW[self.code](values, narrowed):
            raise overflow(self.donor.where, self.code)
        write(start * BYTES[self.code], narrowed.data.cast("B"))


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


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for low in range(start, stop, BLOCK):
        yield low, min(low + BLOCK, stop)
