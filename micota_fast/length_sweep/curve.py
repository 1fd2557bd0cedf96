"""Median length over merge weight: what is measured at a weight, where the curve bends, which weight gives a length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from micota_fast.common.records import Completion
from micota_fast.errors import InputError
from micota_fast.length_sweep.results import AnswerTokens, Measurement
from micota_fast.statistics.intervals import median95, wilson95
from micota_fast.statistics.quantiles import quantiles

QUANTILES = (10, 25, 50, 75, 90)


def measure(weight: float, problems: int, rows: Sequence[Completion], correct: int) -> Measurement:
    """Describe the answers to `problems` problems at a weight, of which `correct` are correct.

    Raises:
        InputError: every answer was aborted.
    """
    n = len(rows)
    share = {reason: sum(row.finish_reason == reason for row in rows) / n for reason in ("stop", "length", "abort")}
    lengths = np.array([row.completion_tokens for row in rows if row.finish_reason != "abort"])
    if not lengths.size:
        raise InputError(f"weight {weight:g}: the server aborted every answer")
    accuracy = correct / n
    return Measurement(
        weight=weight,
        problems=problems,
        answers=n,
        finished=share["stop"],
        truncated=share["length"],
        aborted=share["abort"],
        tokens=AnswerTokens(mean=float(lengths.mean()), **quantiles(lengths, QUANTILES)),
        median95=median95(lengths.tolist(), problems),
        median_is_cut=2 * share["length"] * n >= lengths.size,
        correct=correct,
        accuracy=accuracy,
        wilson95=wilson95(accuracy, problems),
    )


@dataclass(frozen=True)
class Point:
    """A point of the curve, lengths in tokens: `interval` and `cut` are `Measurement.median95` and `.median_is_cut`."""

    weight: float
    median: float
    interval: tuple[float, float] | None
    cut: bool


def points_of(measurements: Sequence[Measurement]) -> list[Point]:
    """Return the curve through what was measured."""
    return [Point(m.weight, m.tokens.p50, m.median95, m.median_is_cut) for m in measurements]


def bend(points: Sequence[Point], side: Literal["knee", "elbow"]) -> Point | None:
    """Find the point farthest above ("knee") or below ("elbow") the chord from the first point to the last.

    At the knee the length has risen early and more weight adds little; from the elbow on it rises steeply. An S-shaped
    curve has both. This is Kneedle (Satopaa et al. 2011, "Finding a 'Kneedle' in a Haystack", section III) for a
    concave and a convex curve, without its smoothing: the largest distance to the chord after both axes are scaled to
    [0, 1]. The interval replaces its sensitivity: a point counts only if the chord passes outside.

    Args:
        points: in the order of their weights.

    Returns:
        None if no point counts, or if the curve does not rise from the first point to the last.
    """
    first, last = points[0], points[-1]
    rise = last.median - first.median
    if rise <= 0:
        return None
    sign = 1 if side == "knee" else -1
    best, farthest = None, 0.0
    for point in points[1:-1]:
        chord = first.median + rise * (point.weight - first.weight) / (last.weight - first.weight)
        distance = sign * (point.median - chord) / rise
        apart = point.interval is not None and not point.interval[0] <= chord <= point.interval[1]
        if apart and distance > farthest:
            best, farthest = point, distance
    return best


def weight_of(median: float, points: Sequence[Point]) -> float:
    """Find the weight at which the median length is `median` tokens, rounded to 4 decimals.

    Between the measured weights the length is taken to be linear, after medians that fall are made equal to their
    neighbours by isotonic regression (pool adjacent violators: Barlow et al. 1972). If several weights give this
    length, the smallest is returned.

    Args:
        points: in the order of their weights.

    Raises:
        InputError: the points do not reach `median`, or only at a weight whose own median is not known.
    """
    levels = isotonic([point.median for point in points])
    if not levels[0] <= median <= levels[-1]:
        raise InputError(
            f"no weight from {points[0].weight:g} to {points[-1].weight:g} gives a median of {median:g} tokens: they "
            f"reach from {levels[0]:g} to {levels[-1]:g}; choose a length in between, or other weights"
        )
    after = next(i for i, level in enumerate(levels) if level >= median)
    if points[after].cut:
        raise InputError(
            f"a median of {median:g} tokens lies beyond weight {points[max(after - 1, 0)].weight:g}, but half of the "
            f"answers at {points[after].weight:g} were cut off; raise generate.max_new_tokens"
        )
    if after == 0:
        return round(points[0].weight, 4)
    before = after - 1
    share = (median - levels[before]) / (levels[after] - levels[before])
    return round(points[before].weight + share * (points[after].weight - points[before].weight), 4)


def isotonic(values: Sequence[float]) -> list[float]:
    """Compute the non-decreasing sequence nearest to `values` (least squares)."""
    blocks: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        mean, size = value, 1
        while blocks and blocks[-1][0] >= mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    return [mean for mean, size in blocks for _ in range(size)]
