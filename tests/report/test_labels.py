"""Labels of points stand clear of each other, of the points and of what is drawn, wherever there is room."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from micota_fast.report.labels import MARKER, Box, place_labels, place_on_line

FRAME = Box(0, 0, 300, 200)
SIZE = (40.0, 12.0)


def around(x: float, y: float) -> Box:
    return Box(x - MARKER, y - MARKER, x + MARKER, y + MARKER)


@example([(153.0, 69.0), (195.0, 60.0), (198.0, 49.0), (198.0, 58.0), (195.0, 48.0)])
@example([(10.0, 147.0), (10.0, 171.0), (10.0, 182.0)])
@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(10, 290), st.floats(10, 190)), min_size=1, max_size=6))
def test_labels_overlap_neither_each_other_nor_a_point(points: list[tuple[float, float]]) -> None:
    named = {f"p{i}": point for i, point in enumerate(points)}
    placed = place_labels(named, dict.fromkeys(named, SIZE), [], FRAME)
    boxes = [place.box for place in placed.values()]
    assert all(box.overlap(FRAME) == pytest.approx(box.area) for box in boxes)
    assert sum(a.overlap(b) for a, b in itertools.combinations(boxes, 2)) < 1
    assert sum(box.overlap(around(*point)) for box in boxes for point in points) < 1
    assert placed == place_labels(named, dict.fromkeys(named, SIZE), [], FRAME)


def test_a_label_with_room_stands_right_of_its_point_without_a_line() -> None:
    placed = place_labels({"a": (100, 100)}, {"a": SIZE}, [], FRAME)["a"]
    assert placed.leader is None
    assert placed.box.left > 100 + MARKER
    assert (placed.box.bottom + placed.box.top) / 2 == 100


def test_points_on_one_spot_are_led_to_without_crossing_a_label() -> None:
    named = dict.fromkeys(("base", "short", "long", "mid"), (150.0, 190.0))
    placed = place_labels(named, dict.fromkeys(named, SIZE), [], FRAME)
    for name, place in placed.items():
        if place.leader is not None:
            steps = [
                (150 + (place.leader[0] - 150) * i / 50, 190 + (place.leader[1] - 190) * i / 50) for i in range(50)
            ]
            others = [other.box for key, other in placed.items() if key != name]
            assert not [
                box for box in others for x, y in steps if box.left < x < box.right and box.bottom < y < box.top
            ], (name, placed)


def test_a_label_keeps_clear_of_lines() -> None:
    interval, level = Box(99, 20, 101, 180), Box(0, 99, 300, 101)
    box = place_labels({"a": (100, 100)}, {"a": SIZE}, [interval, level], FRAME)["a"].box
    assert box.overlap(interval) == box.overlap(level) == 0


def test_the_label_of_a_line_moves_to_where_there_is_room() -> None:
    line = Box(0, 49, 300, 51)
    free = place_on_line(50, SIZE, [], [line], FRAME)
    assert (free.right, free.bottom) == (300, 52)
    moved = place_on_line(50, SIZE, [(280, 55)], [line, Box(270, 30, 272, 80)], FRAME)
    assert (moved.left, moved.bottom) == (0, 52)
