"""Where the labels of a plot's points go: next to their points, clear of each other and of what is drawn."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

GAPS = (2.0, 8.0, 16.0, 26.0, 38.0)
"""Distances of a label from its point's marker that are tried, in points; from the second on a line leads there."""
MARKER = 5.0
"""Half the side of the square that a point's marker takes up, in points."""
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""Where a label stands from its point, the best first."""
ROUNDS = 8
TEXTS = 10.0
"""How much worse it is that two labels overlap than that one covers a line."""


class Box(NamedTuple):
    """A rectangle, in points from the lower left corner of the drawing."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """Return the area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        """Its area, in square points."""
        return (self.right - self.left) * (self.top - self.bottom)


@dataclass(frozen=True)
class Placed:
    """A label's box, and where the line from its point ends; None: it stands next to its point."""

    box: Box
    leader: tuple[float, float] | None


def place_labels(
    points: Mapping[str, tuple[float, float]],
    sizes: Mapping[str, tuple[float, float]],
    taken: Sequence[Box],
    frame: Box,
) -> dict[str, Placed]:
    """Find a place for each label: the nearest of a fixed set that costs least, moved in turns until none
    improves; of several orders of these turns the cheapest end.

    Overlap of labels, their lines, markers and the outside counts first, then distance. The same input gives the same
    places.

    Args:
        points: name -> centre of its marker.
        sizes: name -> width and height of its label.
        taken: what else is drawn, such as intervals.
        frame: labels stay within it.
    """
    markers = _markers(points.values())
    candidates = {name: list(_candidates(points[name], sizes[name])) for name in points}
    names = list(points)
    found: list[tuple[float, dict[str, Placed]]] = []
    for start in range(len(names)):  # turns that begin with another label end in another arrangement
        placed = {name: places[0] for name, places in candidates.items()}
        total = 0.0
        for _ in range(ROUNDS):
            before, total = dict(placed), 0.0
            for name in (*names[start:], *names[:start]):
                others = [other.box for key, other in placed.items() if key != name]
                leaders = [box for key, other in placed.items() if key != name for box in _leader(points[key], other)]
                costs = [
                    _cost(place.box, [*markers, *taken, *leaders], frame)
                    + TEXTS * sum(map(place.box.overlap, others))
                    + sum(box.overlap(other) for box in _leader(points[name], place) for other in others)
                    + 0.01 * i
                    for i, place in enumerate(candidates[name])
                ]
                placed[name] = candidates[name][costs.index(min(costs))]
                total += min(costs)
            if placed == before:
                break
        found.append((total, placed))
    return min(found, key=lambda of: of[0])[1] if found else {}


def place_on_line(
    height: float, size: tuple[float, float], points: Iterable[tuple[float, float]], taken: Sequence[Box], frame: Box
) -> Box:
    """Find a place for the label of a horizontal line: on it or under it, as near to its right end as there is room.

    Args:
        height: of the line, in points.
        size: width and height of the label.
        points: centres of markers.
        taken: what else is drawn; the line itself may be among it.
        frame: the label stays within it.
    """
    width, depth = size
    lefts = [frame.right - width - share * (frame.right - frame.left - width) for share in (0, 1, 0.25, 0.5, 0.75)]
    boxes = [
        Box(left, bottom, left + width, bottom + depth) for left in lefts for bottom in (height + 2, height - 2 - depth)
    ]
    drawn = [*_markers(points), *taken]
    return min(boxes, key=lambda box: _cost(box, drawn, frame))


def _markers(points: Iterable[tuple[float, float]]) -> list[Box]:
    return [Box(x - MARKER, y - MARKER, x + MARKER, y + MARKER) for x, y in points]


def _candidates(point: tuple[float, float], size: tuple[float, float]) -> Iterable[Placed]:
    """The places round a point, the best first: at each of SIDES, and the same further out."""
    x, y = point
    width, height = size
    for gap, (dx, dy) in itertools.product(GAPS, SIDES):
        reach = MARKER + gap
        anchor = x + dx * reach, y + dy * reach
        left = anchor[0] - width * (1 - dx) / 2
        bottom = anchor[1] - height * (1 - dy) / 2
        yield Placed(Box(left, bottom, left + width, bottom + height), anchor if gap > GAPS[0] else None)


def _leader(point: tuple[float, float], place: Placed) -> list[Box]:
    """The line to a label as a row of small boxes."""
    if place.leader is None:
        return []
    (x0, y0), (x1, y1) = point, place.leader
    steps = [(x0 + (x1 - x0) * i / 8, y0 + (y1 - y0) * i / 8) for i in range(9)]
    return [Box(x - 2, y - 2, x + 2, y + 2) for x, y in steps]


def _cost(box: Box, taken: Iterable[Box], frame: Box) -> float:
    return 3 * (box.area - box.overlap(frame)) + sum(map(box.overlap, taken))
