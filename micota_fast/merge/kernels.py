"""The arithmetic of merging, compiled: first on rows of elements, then passes over a chunk, row by row.

The functions on rows take flat float32 arrays that fit the innermost cache. The passes are what a thread does at a
time: the elements [start, stop) of one tensor in all models. They widen a row of every model to float32 and use it
there, so memory is read once a pass and nothing of the chunk's size is made. Tensors are given by address, since they
come in any number and type. Passes return DONE, or the number of the model whose elements are not all finite. The one
that writes the result mixes the models' elements into `digests` [models].

Sums are kept in float64, one for each place of a row and those added up in order, so they depend on no CPU's vectors.

All of it is one file because numba's cache looks at a function's own file alone: a change to a function in another
would leave the machine code of its callers as it was.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import carray, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from micota_fast.common.numba_cache import compiled

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Words = NDArray[np.uint32]
Ints = NDArray[np.int64]
Places = NDArray[np.int32]
Digests = NDArray[np.uint64]

ROW = 1024  # elements; a multiple of 4, as `random_words` makes them
COARSE_BITS, FINE_BITS = 16, 15  # the 31 bits of a magnitude, as `histogram` and `histogram_within` take them
F32, F16, BF16 = 0, 1, 2
KINDS = {"F32": F32, "F16": F16, "BF16": BF16}
KEEP_ALL, AT_RANDOM, SMALLEST, OUTSIDE, CHOSEN = 0, 1, 2, 3, 4
WEIGHTED_SUM, TASK_VECTORS, AGREEING = 0, 1, 2
DONE, OVERFLOW = -1, -2
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT = np.uint32(0x7F800000)


class Tensors(NamedTuple):
    """One tensor of every model: where its first element lies, and its type, [models]."""

    addresses: Ints
    codes: Ints  # of KINDS


class Drops(NamedTuple):
    """Which elements of each task vector are dropped from a chunk, [task vectors]; made by `keep_all`, then filled in.

    AT_RANDOM: those whose random word (of the stream `keys`) is not below `limits`. SMALLEST: those whose magnitude's
    bits are not above `limits`, except the first `spares` of the chunk that equal it. OUTSIDE: those whose magnitude's
    bits are below `limits`, the first `skips` that equal it, and those not below `uppers`, except `spares` that equal
    it. CHOSEN: those that `stays` does not mark. What stays is multiplied by `scales`.
    """

    kinds: Ints
    keys: NDArray[np.uint32]  # [task vectors, 2]
    limits: NDArray[np.uint32]
    uppers: NDArray[np.uint32]
    skips: Ints
    spares: Ints
    scales: Floats
    stays: NDArray[np.uint8]  # [task vectors, elements of the chunk]


def keep_all(count: int) -> Drops:
    """Return the `Drops` of `count` task vectors that drop nothing."""
    return Drops(
        np.full(count, KEEP_ALL),
        np.zeros((count, 2), np.uint32),
        np.zeros(count, np.uint32),
        np.zeros(count, np.uint32),
        np.zeros(count, np.int64),
        np.zeros(count, np.int64),
        np.ones(count, np.float32),
        np.empty((count, 0), np.uint8),
    )


@compiled
def widen_bfloat16(source: NDArray[np.uint16], out: Floats) -> bool:
    """Convert bfloat16 bits to float32; False if one is NaN or infinite."""
    bits = out.view(np.uint32)
    bad = np.uint32(0)
    for i in range(source.size):
        word = np.uint32(source[i]) << np.uint32(16)
        bits[i] = word
        bad |= np.uint32((word & _EXPONENT) == _EXPONENT)
    return bad == 0


@compiled
def widen_float16(source: NDArray[np.uint16], out: Floats) -> bool:
    """Convert IEEE half bits to float32; False if one is NaN or infinite."""
    bits = out.view(np.uint32)
    bad = np.uint32(0)
    # A subnormal number is an integer times 2^-24; a normal one's exponent is re-biased by 127 - 15.
    for i in range(source.size):
        out[i] = np.float32(np.int32(source[i] & np.uint16(0x7FFF))) * np.float32(2.0**-24)
    for i in range(source.size):
        half = np.uint32(source[i])
        magnitude = half & np.uint32(0x7FFF)
        normal = np.uint32((magnitude << np.uint32(13)) + np.uint32(112 << 23))
        word = normal if magnitude >= np.uint32(0x400) else bits[i]
        bits[i] = word | ((half & np.uint32(0x8000)) << np.uint32(16))
        bad |= np.uint32(magnitude >= np.uint32(0x7C00))
    return bad == 0


@compiled
def copy_float32(source: Floats, out: Floats) -> bool:
    """Copy; False if an element is NaN or infinite."""
    bits = out.view(np.uint32)
    bad = np.uint32(0)
    for i in range(source.size):
        out[i] = source[i]
        bad |= np.uint32((bits[i] & _EXPONENT) == _EXPONENT)
    return bad == 0


@compiled
def narrow_bfloat16(source: Floats, out: NDArray[np.uint16]) -> bool:
    """Round float32 to bfloat16 bits, to nearest, ties to even; False if a result is NaN or infinite."""
    bits = source.view(np.uint32)
    bad = np.uint32(0)
    for i in range(source.size):
        word = bits[i]
        half = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        out[i] = np.uint16(half)
        bad |= np.uint32((half & np.uint32(0x7F80)) == np.uint32(0x7F80))
    return bad == 0


@compiled
def narrow_float16(source: Floats, out: NDArray[np.uint16]) -> bool:
    """Round float32 to IEEE half bits, to nearest, ties to even; False if a result is NaN or infinite."""
    bits = source.view(np.uint32)
    bad = np.uint32(0)
    for i in range(source.size):
        magnitude = bits[i] & _MAGNITUDE
        normal = (
            magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))
        ) >> (np.uint32(13))
        # Below 2^-14 the units are 2^-24, those of float32 between 1/2 and 1: adding 1/2 rounds to them.
        subnormal = np.uint32(np.int32((abs(source[i]) + np.float32(0.5)) * np.float32(2.0**24)) - np.int32(1 << 23))
        half = normal if magnitude >= np.uint32(113 << 23) else subnormal
        bad |= np.uint32(half >= np.uint32(0x7C00))
        out[i] = np.uint16(half | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000)))
    return bad == 0


@compiled
def digest(row: Floats) -> np.uint64:
    """Hash a row to 64 bits, no defence against forgery: the NH hash (Black et al. 1999, UMAC) with a
    Weyl sequence for a key."""
    bits = row.view(np.uint32)
    half = (bits.size + 1) // 2
    first, second = bits[:half], bits[half:]
    total = np.uint64(0)
    for i in range(second.size):
        key = np.uint32(i + 1) * np.uint32(0x9E3779B1)
        left = np.uint32(first[i] + key)
        right = np.uint32(second[i] + (key ^ np.uint32(0x85EBCA77)))
        total += np.uint64(left) * np.uint64(right)
    return total + np.uint64(bits[half - 1])


@compiled
def subtract(tensor: Floats, base: Floats) -> None:
    """Compute tensor -= base: the task vector."""
    for i in range(base.size):
        tensor[i] -= base[i]


@compiled
def random_words(key: tuple[int, int], start: int, out: Words) -> None:
    """Draw elements start, start + 1, ... of a stream of uniform 32-bit words: Philox 4x32-10 (Salmon et al. 2011).

    Element i is word i mod 4 of the output for the counter i div 4. `start` and the size of `out` are multiples of 4.
    """
    low, high = np.uint32(key[0]), np.uint32(key[1])
    shift = np.uint64(32)
    for block in range(out.size // 4):
        counter = np.uint64(start // 4 + block)
        a, b = np.uint32(counter), np.uint32(counter >> shift)
        c, d = np.uint32(0), np.uint32(0)
        k, m = low, high
        for _ in range(10):
            one = np.uint64(a) * np.uint64(0xD2511F53)
            two = np.uint64(c) * np.uint64(0xCD9E8D57)
            a, b = np.uint32(np.uint32(two >> shift) ^ b ^ k), np.uint32(two)
            c, d = np.uint32(np.uint32(one >> shift) ^ d ^ m), np.uint32(one)
            k, m = np.uint32(k + np.uint32(0x9E3779B9)), np.uint32(m + np.uint32(0xBB67AE85))
        out[4 * block] = a
        out[4 * block + 1] = b
        out[4 * block + 2] = c
        out[4 * block + 3] = d


@compiled
def drop_at_random(delta: Floats, words: Words, limit: np.uint32, scale: np.float32) -> None:
    """Zero the elements whose word is not below `limit`, and scale the others."""
    for i in range(delta.size):
        delta[i] = (delta[i] if words[i] < limit else np.float32(0)) * scale


@compiled
def add_magnitudes(row: Floats, sums: Doubles) -> None:
    """Add the magnitudes of the elements, each to its place."""
    for i in range(row.size):
        sums[i] += np.float64(abs(row[i]))


@compiled
def histogram(delta: Floats, counts: Words) -> None:
    """Add to `counts` [2^COARSE_BITS] how many magnitudes begin with each pattern of COARSE_BITS bits."""
    bits = delta.view(np.uint32)
    for i in range(bits.size):
        counts[(bits[i] & _MAGNITUDE) >> np.uint32(FINE_BITS)] += np.uint32(1)


@compiled
def histogram_within(delta: Floats, bin_: int, counts: Words) -> None:
    """Add to `counts` [2^FINE_BITS] how many magnitudes of a bin of `histogram` end with each pattern; zeros do not
    count."""
    bits = delta.view(np.uint32)
    for i in range(bits.size):
        word = bits[i] & _MAGNITUDE
        if word >> np.uint32(FINE_BITS) == np.uint32(bin_) and word != 0:
            counts[word & np.uint32((1 << FINE_BITS) - 1)] += np.uint32(1)


@compiled
def add_magnitudes_above(delta: Floats, bin_: int, every: Doubles, above: Doubles) -> None:
    """Add to `every` the magnitudes of all elements, and to `above` those of a histogram's higher bins."""
    bits = delta.view(np.uint32)
    for i in range(delta.size):
        magnitude = np.float64(abs(delta[i]))
        every[i] += magnitude
        above[i] += magnitude if (bits[i] & _MAGNITUDE) >> np.uint32(FINE_BITS) > np.uint32(bin_) else 0.0


@compiled
def drop_smallest(delta: Floats, threshold: np.uint32, spare: int, scale: np.float32) -> int:
    """Scale magnitudes whose bits are above `threshold` and the first `spare` that equal it; zero the others.

    Returns what is left of `spare`.
    """
    bits = delta.view(np.uint32)
    if spare > 0:
        for i in range(delta.size):
            word = bits[i] & _MAGNITUDE
            if word == threshold and spare > 0:
                spare -= 1
                delta[i] *= scale
            else:
                delta[i] = (delta[i] if word > threshold else np.float32(0)) * scale
    else:
        for i in range(delta.size):
            delta[i] = (delta[i] if (bits[i] & _MAGNITUDE) > threshold else np.float32(0)) * scale
    return spare


@compiled
def drop_outside(delta: Floats, low: np.uint32, high: np.uint32, skips: Ints, spares: Ints, scale: np.float32) -> None:
    """Scale magnitudes whose bits are from `low` to below `high`; zero the others.

    Of those that equal `low` the first `skips[0]` are zeroed, too; of those that equal `high` the first `spares[0]`
    are scaled. Both are counted down.
    """
    bits = delta.view(np.uint32)
    if skips[0] == 0 and spares[0] == 0:
        for i in range(delta.size):
            word = bits[i] & _MAGNITUDE
            delta[i] = (delta[i] if (word >= low) & (word < high) else np.float32(0)) * scale
        return
    for i in range(delta.size):
        word = bits[i] & _MAGNITUDE
        stays = low <= word < high
        if word == low and skips[0] > 0:
            skips[0] -= 1
            stays = False
        elif word == high and spares[0] > 0:
            spares[0] -= 1
            stays = True
        delta[i] = (delta[i] if stays else np.float32(0)) * scale


@compiled
def drop_unmarked(delta: Floats, stays: NDArray[np.uint8], scale: np.float32) -> None:
    """Zero the elements that are not marked, and scale the others."""
    for i in range(delta.size):
        delta[i] = (delta[i] if stays[i] != 0 else np.float32(0)) * scale


@compiled
def sort_by_magnitude(delta: Floats, order: Places, room: Places) -> None:
    """Write the places of the elements into `order`, the smallest magnitude first, and of equals the first first.

    A radix sort by digits of 11 bits; `room` is of the size of `order`.
    """
    bits = delta.view(np.uint32)
    starts = np.empty(1 << 11, np.int64)
    for i in range(delta.size):
        room[i] = i
    source, target = room, order
    for digit in range(3):
        shift = np.uint32(11 * digit)
        starts[:] = 0
        for i in range(delta.size):
            starts[((bits[i] & _MAGNITUDE) >> shift) & np.uint32(2047)] += 1
        total = 0
        for value in range(starts.size):
            here = starts[value]
            starts[value] = total
            total += here
        for i in range(delta.size):
            value = ((bits[source[i]] & _MAGNITUDE) >> shift) & np.uint32(2047)
            target[starts[value]] = source[i]
            starts[value] += 1
        source, target = target, source


@compiled
def add_products(a: Floats, b: Floats, aa: Doubles, bb: Doubles, ab: Doubles) -> None:
    """Add the products of the elements."""
    for i in range(a.size):
        p, q = np.float64(a[i]), np.float64(b[i])
        aa[i] += p * p
        bb[i] += q * q
        ab[i] += p * q


@compiled
def _add(tensor: Floats, weight: np.float32, total: Floats) -> None:
    for i in range(tensor.size):
        total[i] += tensor[i] * weight


@compiled
def _add_fused(tensor: Floats, weight: np.float32, total: Floats) -> None:
    for i in range(tensor.size):
        # The product of two float32 numbers is exact in float64, so the sum alone is rounded.
        total[i] = np.float32(np.float64(total[i]) + np.float64(tensor[i]) * np.float64(weight))


@compiled
def _add_agreeing(delta: Floats, weight: np.float32, total: Floats, mixed: Floats, kept: Floats) -> None:
    for i in range(delta.size):
        weighted = delta[i] * weight
        # A dropped element has no sign and never counts; the sign of a sum of 0 is +.
        agrees = weighted > 0 if total[i] >= 0 else weighted < 0
        mixed[i] += weighted if agrees else np.float32(0)
        kept[i] += weight if agrees else np.float32(0)


@compiled
def weighted_sum(tensors_KR: Floats, weights_K: Floats, divisor: np.float32, out: Floats) -> None:
    """Compute sum_k weights[k] tensors[k] / divisor, by fused multiply-adds in order (mergekit's, if the CPU can)."""
    out[:] = 0
    for k in range(weights_K.size):
        _add_fused(tensors_KR[k, : out.size], weights_K[k], out)
    for i in range(out.size):
        out[i] /= divisor


@compiled
def add_task_vectors(
    base: Floats, deltas_KR: Floats, weights_K: Floats, divisor: np.float32, lambda_: np.float32, out: Floats
) -> None:
    """Compute base + lambda sum_k weights[k] deltas[k] / divisor."""
    out[:] = 0
    for k in range(weights_K.size):
        _add(deltas_KR[k, : out.size], weights_K[k], out)
    for i in range(out.size):
        out[i] = base[i] + out[i] / divisor * lambda_


@compiled
def add_agreeing_task_vectors(
    base: Floats,
    deltas_KR: Floats,
    weights_K: Floats,
    normalize: bool,
    lambda_: np.float32,
    total: Floats,
    kept: Floats,
    out: Floats,
) -> None:
    """Add as `add_task_vectors`, but of each element only those weighted deltas with the sign of their sum (TIES).

    Args:
        normalize: divide by the sum of the weights that took part, if it is not 0.
        total, kept: room for a row each.
    """
    total[:] = 0
    kept[:] = 0
    out[:] = 0
    for k in range(weights_K.size):
        _add(deltas_KR[k, : out.size], weights_K[k], total)
    for k in range(weights_K.size):
        _add_agreeing(deltas_KR[k, : out.size], weights_K[k], total, out, kept)
    if normalize:
        for i in range(out.size):
            out[i] /= kept[i] if kept[i] != 0 else np.float32(1)
    for i in range(out.size):
        out[i] = base[i] + out[i] * lambda_


def _pointer(typing_context: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


_as_pointer: Any = intrinsic(_pointer)


@compiled
def _load(tensors: Tensors, start: int, rows: Floats, n: int) -> int:
    """A row of n elements of every model into `rows` [models, at least n]."""
    for k in range(tensors.codes.size):
        out, code, address = rows[k, :n], tensors.codes[k], tensors.addresses[k]
        if code == F32:
            fine = copy_float32(carray(_as_pointer(address + 4 * start), (n,), np.float32), out)
        elif code == F16:
            fine = widen_float16(carray(_as_pointer(address + 2 * start), (n,), np.uint16), out)
        else:
            fine = widen_bfloat16(carray(_as_pointer(address + 2 * start), (n,), np.uint16), out)
        if not fine:
            return k
    return DONE


@compiled
def _subtract_base(rows: Floats, n: int) -> None:
    """Make task vectors of all rows but the first, which is the base's."""
    for k in range(1, rows.shape[0]):
        subtract(rows[k, :n], rows[0, :n])


@compiled
def _mix_in(rows: Floats, n: int, digests: Digests) -> None:
    for k in range(digests.size):
        digests[k] = digests[k] * _MIX + digest(rows[k, :n])


@compiled
def products(tensors: Tensors, start: int, stop: int, sums: Doubles) -> int:
    """Compute of two tensors a·a, b·b and a·b, into `sums` [3]."""
    rows, places = np.empty((2, ROW), np.float32), np.zeros((3, ROW))
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n)
        if bad >= 0:
            return bad
        add_products(rows[0, :n], rows[1, :n], places[0], places[1], places[2])
    for i in range(3):
        sums[i] = places[i].sum()
    return DONE


@compiled
def _drop(
    delta: Floats,
    drops: Drops,
    k: int,
    start: int,
    low: int,
    skips: Ints,
    spares: Ints,
    words: Words,
    scale: np.float32,
) -> None:
    """Drop from a row of task vector k, and multiply what stays by `scale`.

    Args:
        start, low: first element in the tensor of the chunk and of the row.
        skips, spares: what is left of those of `drops` in the chunk.
        words: room for a row.
    """
    if drops.kinds[k] == AT_RANDOM:
        random_words(drops.keys[k], low, words)
        drop_at_random(delta, words, drops.limits[k], scale)
    elif drops.kinds[k] == SMALLEST:
        spares[k] = drop_smallest(delta, drops.limits[k], spares[k], scale)
    elif drops.kinds[k] == OUTSIDE:
        drop_outside(delta, drops.limits[k], drops.uppers[k], skips[k : k + 1], spares[k : k + 1], scale)
    elif drops.kinds[k] == CHOSEN:
        drop_unmarked(delta, drops.stays[k, low - start :], scale)


@compiled
def magnitudes(tensors: Tensors, start: int, stop: int, drops: Drops, sums: Doubles) -> int:
    """Write into `sums` [task vectors, 2] the sum of magnitudes of each task vector, and of what stays of it."""
    count = tensors.codes.size - 1
    rows, places, words = np.empty((count + 1, ROW), np.float32), np.zeros((count, 2, ROW)), np.empty(ROW, np.uint32)
    skips, spares = drops.skips.copy(), drops.spares.copy()
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n)
        if bad >= 0:
            return bad
        _subtract_base(rows, n)
        for k in range(count):
            delta = rows[k + 1, :n]
            add_magnitudes(delta, places[k, 0])
            _drop(delta, drops, k, start, low, skips, spares, words, np.float32(1))
            add_magnitudes(delta, places[k, 1])
    for k in range(count):
        for i in range(2):
            sums[k, i] = places[k, i].sum()
    return DONE


@compiled
def count_magnitudes(tensors: Tensors, start: int, stop: int, counts: NDArray[np.uint32]) -> int:
    """Add histograms of the task vectors to `counts` [task vectors, 2^COARSE_BITS]."""
    count = tensors.codes.size - 1
    rows = np.empty((count + 1, ROW), np.float32)
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n)
        if bad >= 0:
            return bad
        _subtract_base(rows, n)
        for k in range(count):
            histogram(rows[k + 1, :n], counts[k])
    return DONE


@compiled
def count_within(tensors: Tensors, start: int, stop: int, bins: Ints, counts: NDArray[np.uint32], sums: Doubles) -> int:
    """Add histograms of what lies in one bin of each task vector's to `counts` [task vectors, 2^FINE_BITS].

    Into `sums` [task vectors, 2], if it has room, the sum of magnitudes and that of the magnitudes in higher bins.
    """
    count = tensors.codes.size - 1
    rows, places = np.empty((count + 1, ROW), np.float32), np.zeros((count, 2, ROW))
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n)
        if bad >= 0:
            return bad
        _subtract_base(rows, n)
        for k in range(count):
            histogram_within(rows[k + 1, :n], bins[k], counts[k])
            if sums.size > 0:
                add_magnitudes_above(rows[k + 1, :n], bins[k], places[k, 0], places[k, 1])
    for k in range(sums.shape[0]):
        for i in range(2):
            sums[k, i] = places[k, i].sum()
    return DONE


@compiled
def count_equal(tensors: Tensors, start: int, stop: int, magnitudes_KN: Words, counts_KN: Ints) -> int:
    """Count the elements of each task vector whose magnitude has these bits."""
    count = tensors.codes.size - 1
    rows = np.empty((count + 1, ROW), np.float32)
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n)
        if bad >= 0:
            return bad
        _subtract_base(rows, n)
        for k in range(count):
            bits = rows[k + 1, :n].view(np.uint32)
            for j in range(magnitudes_KN.shape[1]):
                for i in range(n):
                    counts_KN[k, j] += (bits[i] & _MAGNITUDE) == magnitudes_KN[k, j]
    return DONE


@compiled
def choose_by_rank(
    tensors: Tensors,
    start: int,
    stop: int,
    row: int,
    first: int,
    drops: Drops,
    densities_K: Doubles,
    epsilons_K: Doubles,
) -> int:
    """Mark in `drops.stays` what stays of the task vectors of kind CHOSEN, the larger in its tensor's row the likelier.

    The probability rises linearly with the rank of an element's magnitude in its row, from density - epsilon for the
    smallest to density + epsilon for the largest. Of equals the first counts as the smallest.

    Args:
        start, stop: whole rows of the tensor, of `row` elements each, that contain the chunk.
        first: of the chunk, which `drops.stays` covers.
    """
    count = tensors.codes.size - 1
    rows, words = np.empty((count + 1, row), np.float32), np.empty((row + 3) // 4 * 4 + 4, np.uint32)
    order, room = np.empty(row, np.int32), np.empty(row, np.int32)
    last = first + drops.stays.shape[1]
    for low in range(start, stop, row):
        bad = _load(tensors, low, rows, row)
        if bad >= 0:
            return bad
        _subtract_base(rows, row)
        for k in range(count):
            if drops.kinds[k] != CHOSEN:
                continue
            sort_by_magnitude(rows[k + 1], order, room)
            random_words(drops.keys[k], low - low % 4, words)
            for rank in range(row):
                i = low + order[rank]
                if first <= i < last:
                    share = densities_K[k] - epsilons_K[k] + 2 * epsilons_K[k] * rank / max(row - 1, 1)
                    drops.stays[k, i - first] = np.float64(words[i - low + low % 4]) < share * 2.0**32
    return DONE


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
    """Merge by V lists of weights, by one of WEIGHTED_SUM, TASK_VECTORS, AGREEING, into bytes of type `code`.

    Returns OVERFLOW if a result is not finite in that type.
    """
    models = tensors.codes.size
    rows, words = np.empty((models, ROW), np.float32), np.empty(ROW, np.uint32)
    result, total, kept = np.empty(ROW, np.float32), np.empty(ROW, np.float32), np.empty(ROW, np.float32)
    skips, spares = drops.skips.copy(), drops.spares.copy()
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n)
        if bad >= 0:
            return bad
        _mix_in(rows, n, digests)
        if how != WEIGHTED_SUM:
            _subtract_base(rows, n)
        for k in range(drops.kinds.size):
            _drop(rows[k + 1, :n], drops, k, start, low, skips, spares, words, drops.scales[k])
        for v in range(weights_VK.shape[0]):
            out = result[:n]
            if how == WEIGHTED_SUM:
                weighted_sum(rows, weights_VK[v], divisors_V[v], out)
            elif how == TASK_VECTORS:
                add_task_vectors(rows[0], rows[1:], weights_VK[v], divisors_V[v], lambdas_V[v], out)
            else:
                add_agreeing_task_vectors(
                    rows[0], rows[1:], weights_VK[v], normalize_V[v], lambdas_V[v], total, kept, out
                )
            if not _store(out, code, out_VB[v], low - start):
                return OVERFLOW
    return DONE


@compiled
def copy(tensors: Tensors, start: int, stop: int, code: int, out: NDArray[np.uint8], digests: Digests) -> int:
    """Write the elements of one tensor as bytes of type `code`. Returns OVERFLOW if one is not finite in it."""
    rows = np.empty((1, ROW), np.float32)
    for low in range(start, stop, ROW):
        n = min(ROW, stop - low)
        bad = _load(tensors, low, rows, n)
        if bad >= 0:
            return bad
        _mix_in(rows, n, digests)
        if not _store(rows[0, :n], code, out, low - start):
            return OVERFLOW
    return DONE


@compiled
def _store(values: Floats, code: int, out: NDArray[np.uint8], place: int) -> bool:
    if code == F32:
        return copy_float32(values, out.view(np.float32)[place : place + values.size])
    halves = out.view(np.uint16)[place : place + values.size]
    if code == F16:
        return narrow_float16(values, halves)
    return narrow_bfloat16(values, halves)
