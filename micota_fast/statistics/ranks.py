"""Whether two measures put the same things in the same order."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Compute the rank correlation; equal values get their mean rank. None if one side's values are all equal.

    Spearman, "The proof and measurement of association between two things", American Journal of Psychology 15 (1904).

    Raises:
        ValueError: a value is not finite.
    """
    if not np.isfinite([*x, *y]).all():
        raise ValueError("values that are not finite have no rank")
    ranks = np.stack([_average_ranks(np.asarray(side, dtype=float)) for side in (x, y)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    squares = (centred**2).sum(axis=1)
    return float(centred[0] @ centred[1] / math.sqrt(squares.prod())) if squares.all() else None


def _average_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank the values, 1 for the smallest; equal ones share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks
