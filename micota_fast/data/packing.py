"""Best-fit decreasing: documents into packs of a fixed number of tokens, none split, little space left over.

Johnson, "Near-optimal bin packing algorithms" (1973): longest document first, each into the fullest pack that still
takes it; at most 11/9 of the fewest packs possible plus a constant, and far closer where short documents abound.
Lengths are small integers, so documents are sorted by counting, packs are kept in one list for each number of free
tokens, and a two-level bitmap finds the next list that is not empty in a few word operations.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from micota_fast.errors import InputError


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile, keeping the machine code on disk where some cache folder can be written."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # numba: "no locator available": neither the source's folder nor the user's takes a file
        return numba.njit(function)


def _count_trailing_zeros(typing_context: Any, word: Any) -> tuple[Any, Callable[..., Any]]:
    """Number of zero bits below the lowest set bit of a uint64, which must not be 0."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), code


_lowest_bit: Any = intrinsic(_count_trailing_zeros)


def _best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    n = lengths.size
    one = np.uint64(1)

    # Counting sort, longest first, equal lengths in the order given.
    count = np.zeros(capacity + 1, np.int64)
    for d in range(n):
        count[lengths[d]] += 1
    start = np.zeros(capacity + 1, np.int64)
    for length in range(capacity - 1, 0, -1):
        start[length] = start[length + 1] + count[length + 1]
    by_length = np.empty(n, np.int32)
    for d in range(n):
        by_length[start[lengths[d]]] = d
        start[lengths[d]] += 1

    # top[f]: the pack with f free tokens that came last; below[p]: the one before it. A bit of `words` says that a list
    # is not empty, a bit of `summary` that a word is not zero.
    top = np.full(capacity + 1, -1, np.int32)
    below = np.empty(n, np.int32)
    words = np.zeros(capacity // 64 + 1, np.uint64)
    summary = np.zeros(words.size // 64 + 1, np.uint64)
    pack_of = np.empty(n, np.int32)  # by place in by_length
    n_packs = 0
    place = 0
    for length in range(capacity, 0, -1):
        for _ in range(count[length]):
            # The list with the fewest free tokens that are enough: in this word, or in the next that is not zero.
            free = -1
            word = length >> 6
            bits = words[word] >> np.uint64(length & 63)
            if bits != 0:
                free = length + _lowest_bit(bits)
            else:
                word += 1
                group = word >> 6
                if group < summary.size:
                    bits = (summary[group] >> np.uint64(word & 63)) << np.uint64(word & 63)
                    while bits == 0 and group + 1 < summary.size:
                        group += 1
                        bits = summary[group]
                    if bits != 0:
                        word = (group << 6) + _lowest_bit(bits)
                        free = (word << 6) + _lowest_bit(words[word])
            if free < 0:
                pack = n_packs
                n_packs += 1
                free = capacity
            else:
                pack = int(top[free])
                top[free] = below[pack]
                if top[free] < 0:
                    word = free >> 6
                    words[word] &= ~(one << np.uint64(free & 63))
                    if words[word] == 0:
                        summary[word >> 6] &= ~(one << np.uint64(word & 63))
            pack_of[place] = pack
            place += 1
            free -= length
            if free > 0:
                if top[free] < 0:
                    word = free >> 6
                    words[word] |= one << np.uint64(free & 63)
                    summary[word >> 6] |= one << np.uint64(word & 63)
                below[pack] = top[free]
                top[free] = pack

    # Documents grouped by pack, in order of descending length inside each.
    pack_offsets = np.zeros(n_packs + 1, np.int64)
    for place in range(n):
        pack_offsets[pack_of[place] + 1] += 1
    for pack in range(n_packs):
        pack_offsets[pack + 1] += pack_offsets[pack]
    order = np.empty(n, np.int64)
    filled = pack_offsets[:-1].copy()
    for place in range(n):
        pack = pack_of[place]
        order[filled[pack]] = by_length[place]
        filled[pack] += 1
    return order, pack_offsets


_best_fit_decreasing_jit = _jit(_best_fit_decreasing)


def pack(lengths: NDArray[Any], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack D documents by best-fit decreasing, in O(D + capacity) for any realistic capacity.

    The lengths alone decide the number of packs and which lengths lie together; of documents of equal length the one
    that comes first is placed first.

    Args:
        lengths: tokens of each document, integers [D], 1 to `capacity`.
        capacity: tokens a pack holds.

    Returns:
        order [D] and pack_offsets [P+1]: pack p holds documents `order[pack_offsets[p]:pack_offsets[p + 1]]`, longest
        first. D = 0 gives P = 0.

    Raises:
        InputError: a document is longer than a pack or has no token; names its index.
    """
    if capacity < 1:
        raise InputError(f"packs of {capacity} tokens hold no document: pack_tokens must be at least 1")
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    bad = (lengths > capacity) | (lengths < 1)
    if bad.any():
        index = int(bad.argmax())
        raise InputError(
            f"document {index} has {lengths[index]} tokens, a pack holds 1 to {capacity}: raise pack_tokens, or lower "
            f"max_doc_tokens to drop or truncate such documents"
        )
    return _best_fit_decreasing_jit(lengths, capacity)


def efficiency(lengths: NDArray[Any], n_packs: int, capacity: int) -> float:
    """Share of the packs' tokens that documents fill, 0 to 1."""
    return float(np.sum(lengths, dtype=np.int64)) / (n_packs * capacity)
