"""What a thread does at a time, compiled: a pass over the elements [start, stop) of one tensor in all models.

Each function goes row by row: the row of every model is widened to float32 in the innermost cache and used there, so
memory is read once a pass and nothing of the chunk's size is made. Tensors are given by address, since they come in any
number and type. All return -1, or the number of the model whose elements are not all finite; `digests` [models] has the
models' elements mixed in, unless it is empty.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from micota_fast.compiled import compiled
from micota_fast.merge import kernels as row
from micota_fast.merge.kernels import ROW, Doubles, Floats

CODES = {"F32": 0, "F16": 1, "BF16": 2}
KEEP_ALL, AT_RANDOM, SMALLEST = 0, 1, 2
WEIGHTED_SUM, TASK_VECTORS, AGREEING = 0, 1, 2
OVERFLOW = -2
_MIX = np.uint64(0x9E3779B97F4A7C15)
Ints = NDArray[np.int64]
Digests = NDArray[np.uint64]


class Tensors(NamedTuple):
    """One tensor of every model: where its first element lies, and its type, [models]."""

    addresses: Ints
    codes: Ints  # of CODES


class Drops(NamedTuple):
    """Which elements of each task vector go, [models but the base].

    AT_RANDOM: those whose random word (of the stream `keys`) is not below `limits`. SMALLEST: those whose magnitude's
    bits are not above `limits`; of those that equal it the first stay, all before the chunk that starts at element
    `borders`, and `spares` in it. What stays is multiplied by `scales`.
    """

    kinds: Ints
    keys: NDArray[np.uint32]  # [models but the base, 2]
    limits: NDArray[np.uint32]
    borders: Ints
    spares: Ints
    scales: Floats


def _pointer(typing_context: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


_as_pointer: Any = intrinsic(_pointer)


@compiled
def _load(tensors: Tensors, start: int, rows: Floats, n: int, differences: bool, digests: Digests) -> int:
    """A row of n elements of every model into `rows` [models, ROW]; with `differences`, the first taken from others."""
    for k in range(tensors.codes.size):
        out, code, address = rows[k, :n], tensors.codes[k], tensors.addresses[k]
        if code == 0:
            fine = row.widen_float32(carray(_as_pointer(address + 4 * start), (n,), np.float32), out)
        elif code == 1:
            fine = row.widen_float16(carray(_as_pointer(address + 2 * start), (n,), np.uint16), out)
        else:
            fine = row.widen_bfloat16(carray(_as_pointer(address + 2 * start), (n,), np.uint16), out)
        if not fine:
            return k
        if digests.size > 0:
            digests[k] = digests[k] * _MIX + row.digest(out)
        if differences and k > 0:
            row.subtract(out, rows[0, :n])
    return -1


@compiled
def products(tensors: Tensors, start: int, stop: int, sums: Doubles, digests: Digests) -> int:
    """Of two tensors: a·a, b·b and a·b, into `sums` [3]."""
    rows, places = np.empty((2, ROW), np.float32), np.zeros((3, ROW))
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n, False, digests)
        if bad >= 0:
            return bad
        row.add_products(rows[0, :n], rows[1, :n], places[0], places[1], places[2])
    for i in range(3):
        sums[i] = places[i].sum()
    return -1


@compiled
def magnitudes_at_random(tensors: Tensors, start: int, stop: int, drops: Drops, sums: Doubles, digests: Digests) -> int:
    """Of each task vector the sum of magnitudes, and of those that stay, into `sums` [task vectors, 2]."""
    count = tensors.codes.size - 1
    rows, places, words = np.empty((count + 1, ROW), np.float32), np.zeros((count, 2, ROW)), np.empty(ROW, np.uint32)
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n, True, digests)
        if bad >= 0:
            return bad
        for k in range(count):
            if drops.kinds[k] == 1:
                row.random_words(drops.keys[k], low, words)
                row.add_magnitudes_at_random(rows[k + 1, :n], words, drops.limits[k], places[k, 0], places[k, 1])
    for k in range(count):
        for i in range(2):
            sums[k, i] = places[k, i].sum()
    return -1


@compiled
def count_magnitudes(tensors: Tensors, start: int, stop: int, counts: NDArray[np.uint32], digests: Digests) -> int:
    """Histograms of the task vectors, added to `counts` [task vectors, 2^COARSE_BITS]."""
    count = tensors.codes.size - 1
    rows = np.empty((count + 1, ROW), np.float32)
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n, True, digests)
        if bad >= 0:
            return bad
        for k in range(count):
            row.histogram(rows[k + 1, :n], counts[k])
    return -1


@compiled
def find_members(
    tensors: Tensors,
    start: int,
    stop: int,
    bins: Ints,
    found: NDArray[np.uint16],
    counts: Ints,
    sums: Doubles,
    digests: Digests,
) -> int:
    """The members of a bin of each task vector's histogram (see `kernels.members`).

    Into `found` [task vectors, chunk] and `counts` [task vectors]; and into `sums` [task vectors, 2], if it has room,
    the sum of magnitudes and that of the magnitudes in higher bins.
    """
    count = tensors.codes.size - 1
    rows, places = np.empty((count + 1, ROW), np.float32), np.zeros((count, 2, ROW))
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n, True, digests)
        if bad >= 0:
            return bad
        for k in range(count):
            counts[k] = row.members(rows[k + 1, :n], bins[k], found[k], counts[k])
            if sums.size > 0:
                row.add_magnitudes_above(rows[k + 1, :n], bins[k], places[k, 0], places[k, 1])
    for k in range(sums.shape[0]):
        for i in range(2):
            sums[k, i] = places[k, i].sum()
    return -1


@compiled
def merge(
    tensors: Tensors,
    start: int,
    stop: int,
    how: int,
    drops: Drops,
    weights_VK: Floats,
    divisors_V: Floats,
    normalize_V: NDArray[np.bool_],
    lambdas_V: Floats,
    code: int,
    out_VB: NDArray[np.uint8],
    digests: Digests,
) -> int:
    """The results of V lists of weights, by one of WEIGHTED_SUM, TASK_VECTORS, AGREEING, as bytes of type `code`.

    Returns OVERFLOW where a result is not finite in that type.
    """
    models = tensors.codes.size
    rows, words = np.empty((models, ROW), np.float32), np.empty(ROW, np.uint32)
    result, total, kept = np.empty(ROW, np.float32), np.empty(ROW, np.float32), np.empty(ROW, np.float32)
    spares = drops.spares.copy()
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n, how != 0, digests)
        if bad >= 0:
            return bad
        for k in range(drops.kinds.size):
            delta, limit = rows[k + 1, :n], drops.limits[k]
            if drops.kinds[k] == 1:
                row.random_words(drops.keys[k], low, words)
                row.drop_at_random(delta, words, limit, drops.scales[k])
            elif drops.kinds[k] == 2:
                if start == drops.borders[k]:
                    spares[k] = row.drop_smallest(delta, limit, spares[k], drops.scales[k])
                else:
                    # Before the border all that equal the limit stay; only zeros equal a limit of 0.
                    if start < drops.borders[k] and limit > 0:
                        limit = np.uint32(limit - np.uint32(1))
                    row.drop_smallest(delta, limit, 0, drops.scales[k])
        for v in range(weights_VK.shape[0]):
            out = result[:n]
            if how == 0:
                row.weighted_sum(rows, weights_VK[v], divisors_V[v], out)
            elif how == 1:
                row.add_task_vectors(rows[0], rows[1:], weights_VK[v], divisors_V[v], lambdas_V[v], out)
            else:
                row.add_agreeing_task_vectors(
                    rows[0], rows[1:], weights_VK[v], normalize_V[v], lambdas_V[v], total, kept, out
                )
            if not _store(out, code, out_VB[v], low - start):
                return -2
    return -1


@compiled
def copy(tensors: Tensors, start: int, stop: int, code: int, out: NDArray[np.uint8], digests: Digests) -> int:
    """The elements of one tensor, as bytes of type `code`. Returns OVERFLOW where one is not finite in it."""
    rows = np.empty((1, ROW), np.float32)
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n, False, digests)
        if bad >= 0:
            return bad
        if not _store(rows[0, :n], code, out, low - start):
            return -2
    return -1


@compiled
def _store(values: Floats, code: int, out: NDArray[np.uint8], place: int) -> bool:
    if code == 0:
        return row.narrow_float32(values, out.view(np.float32)[place : place + values.size])
    halves = out.view(np.uint16)[place : place + values.size]
    if code == 1:
        return row.narrow_float16(values, halves)
    return row.narrow_bfloat16(values, halves)
