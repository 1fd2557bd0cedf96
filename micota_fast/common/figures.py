"""Figures as text: two significant digits."""

import math


def two(value: float) -> str:
    """Return two significant digits, with commas."""
    if value <= 0 or not math.isfinite(value):
        return "0"
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def size(value: float, unit: str = "B") -> str:
    """Return two significant digits with a decimal prefix: 15 GB, 50M."""
    if value <= 0:
        return "–"
    power, prefix = next((p for p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= p[0]), (1.0, ""))
    return f"{two(value / power)}{' ' if unit else ''}{prefix}{unit}"
