"""Quantiles under the names that results give them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


def quantiles(values: NDArray[Any], percents: Iterable[int]) -> dict[str, float]:
    """Compute {"p50": the median, ...}, interpolated linearly between the values next to it."""
    return {f"p{percent}": float(np.quantile(values, percent / 100)) for percent in percents}
