"""The arithmetic of merging on one row of elements, compiled: flat float32 arrays that fit the innermost cache.

Sums are kept in float64, one for each place of a row and those added up in order by the caller, so they depend on no
CPU's vectors.
"""

import numpy as np
from numpy.typing import NDArray

from micota_fast.compiled import compiled

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Words = NDArray[np.uint32]

ROW = 1024  # elements; a multiple of 4, as `random_words` makes them
COARSE_BITS, FINE_BITS = 16, 15  # the 31 bits of a magnitude, as `histogram` and `members` take them
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT = np.uint32(0x7F800000)


@compiled
def widen_bfloat16(source: NDArray[np.uint16], out: Floats) -> bool:
    """bfloat16 bits to float32; False where one is NaN or infinite."""
    bits = out.view(np.uint32)
    bad = np.uint32(0)
    for i in range(source.size):
        word = np.uint32(source[i]) << np.uint32(16)
        bits[i] = word
        bad |= np.uint32((word & _EXPONENT) == _EXPONENT)
    return bad == 0


@compiled
def widen_float16(source: NDArray[np.uint16], out: Floats) -> bool:
    """IEEE half bits to float32; False where one is NaN or infinite."""
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
def widen_float32(source: Floats, out: Floats) -> bool:
    """A copy; False where an element is NaN or infinite."""
    bits = out.view(np.uint32)
    bad = np.uint32(0)
    for i in range(source.size):
        out[i] = source[i]
        bad |= np.uint32((bits[i] & _EXPONENT) == _EXPONENT)
    return bad == 0


@compiled
def narrow_bfloat16(source: Floats, out: NDArray[np.uint16]) -> bool:
    """float32 to bfloat16 bits, to nearest, ties to even; False where a result is NaN or infinite."""
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
    """float32 to IEEE half bits, to nearest, ties to even; False where a result is NaN or infinite."""
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
def narrow_float32(source: Floats, out: Floats) -> bool:
    """A copy; False where an element is NaN or infinite."""
    return widen_float32(source, out)


@compiled
def digest(row: Floats) -> np.uint64:
    """A 64-bit number that tells rows apart, no defence against forgery: the NH hash (Black et al. 1999, UMAC) with a
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
    """tensor -= base: the task vector."""
    for i in range(base.size):
        tensor[i] -= base[i]


@compiled
def random_words(key: tuple[int, int], start: int, out: Words) -> None:
    """Elements start, start + 1, ... of a stream of uniform 32-bit words: Philox 4x32-10 (Salmon et al. 2011).

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
def add_magnitudes_at_random(delta: Floats, words: Words, limit: np.uint32, every: Doubles, kept: Doubles) -> None:
    """Add to `every` the magnitudes of all elements, and to `kept` those that `drop_at_random` keeps."""
    for i in range(delta.size):
        magnitude = np.float64(abs(delta[i]))
        every[i] += magnitude
        kept[i] += magnitude if words[i] < limit else 0.0


@compiled
def histogram(delta: Floats, counts: Words) -> None:
    """Add to `counts` [2^COARSE_BITS] how many magnitudes begin with each pattern of COARSE_BITS bits."""
    bits = delta.view(np.uint32)
    for i in range(bits.size):
        counts[(bits[i] & _MAGNITUDE) >> np.uint32(FINE_BITS)] += np.uint32(1)


@compiled
def members(delta: Floats, bin_: int, found: NDArray[np.uint16], count: int) -> int:
    """The magnitudes of a histogram's bin, but for zeros: their last bits go to `found` from place `count` on.

    Returns the place after the last.
    """
    bits = delta.view(np.uint32)
    for i in range(bits.size):
        word = bits[i] & _MAGNITUDE
        if word >> np.uint32(FINE_BITS) == np.uint32(bin_) and word != 0:
            found[count] = np.uint16(word & np.uint32((1 << FINE_BITS) - 1))
            count += 1
    return count


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
    """sum_k weights[k] tensors[k] / divisor, by fused multiply-adds in order (mergekit's, where the CPU has them)."""
    out[:] = 0
    for k in range(weights_K.size):
        _add_fused(tensors_KR[k, : out.size], weights_K[k], out)
    for i in range(out.size):
        out[i] /= divisor


@compiled
def add_task_vectors(
    base: Floats, deltas_KR: Floats, weights_K: Floats, divisor: np.float32, lambda_: np.float32, out: Floats
) -> None:
    """base + lambda sum_k weights[k] deltas[k] / divisor."""
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
    """As `add_task_vectors`, but of each element only those weighted deltas that have the sign of their sum (TIES).

    Args:
        normalize: divide by the sum of the weights that took part, where it is not 0.
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
