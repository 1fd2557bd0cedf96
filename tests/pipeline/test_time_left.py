"""The estimate of what is left of a run: from the plan's relative costs and the time that finished stages took."""

import re

import pytest

from micota_fast.pipeline.stage import Artefact, Stage
from micota_fast.pipeline.time_left import duration, seconds_left

CHAIN = {"answers": "generate", "corpus": "filter", "student": "train", "evaluate": "evaluate", "report": "report"}
COSTS = {"answers": 10.0, "corpus": 0.0, "student": 40.0, "evaluate": 5.0, "report": 0.0, "align": 4.0}


def stage(name: str, verb: str, *needs: str) -> Stage:
    return Stage(name, verb, None, tuple(Artefact(need, need) for need in needs), ())


def chain() -> list[Stage]:
    """Five stages, each of which needs the one before."""
    names = list(CHAIN)
    return [stage(name, CHAIN[name], *names[max(0, i - 1) : i]) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("took", "running", "expected"),
    [
        pytest.param({}, {}, None, id="nothing has finished"),
        pytest.param({"answers": 20.0, "corpus": 1.0}, {}, None, id="the speed of training is unknown"),
        # Evaluation answers at the speed of generation: 5 at 2 s each.
        pytest.param({"answers": 20.0, "corpus": 1.0, "student": 8.0}, {}, 10.0, id="another verb of its kind"),
        pytest.param({"answers": 20.0, "corpus": 1.0, "student": 8.0}, {"evaluate": 4.0}, 6.0, id="part of it is over"),
        pytest.param({"answers": 20.0, "corpus": 1.0, "student": 8.0}, {"evaluate": 99.0}, 0.0, id="never below zero"),
        pytest.param({"answers": 2.0, "corpus": 1.0, "student": 8.0, "evaluate": 9.0}, {}, 0.0, id="only the report"),
    ],
)
def test_what_is_left_of_a_chain(took: dict[str, float], running: dict[str, float], expected: float | None) -> None:
    assert seconds_left(chain(), 1, COSTS, took, running) == expected


def test_without_a_plan_nothing_is_said() -> None:
    took = dict.fromkeys(CHAIN, 5.0)
    assert seconds_left(chain(), 1, {}, took, {}) is None


@pytest.mark.parametrize(("jobs", "expected"), [(1, 60.0), (2, 30.0), (3, 20.0), (9, 20.0)])
def test_stages_that_run_at_once_share_the_time(jobs: int, expected: float) -> None:
    students = [stage(f"student/{seed}", "train") for seed in range(4)]
    costs = {one.name: 10.0 for one in students}
    assert seconds_left(students, jobs, costs, {"student/0": 20.0}, {}) == expected


def test_a_chain_takes_its_whole_length_whatever_runs_at_once() -> None:
    stages = [stage("first", "train"), stage("second", "train", "first"), stage("third", "train", "second")]
    assert seconds_left(stages, 8, dict.fromkeys(("first", "second", "third"), 1.0), {"first": 7.0}, {}) == 14.0


def test_a_stage_that_the_plan_does_not_count_takes_what_its_verb_took() -> None:
    stages = [stage(f"corpus/{name}", "filter") for name in "abc"]
    assert seconds_left(stages, 1, {"corpus/a": 0.0}, {"corpus/a": 2.0, "corpus/b": 4.0}, {}) == 3.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "10 s"), (44, "40 s"), (54.9, "50 s"), (56, "1 min"), (430, "7 min"), (5400, "1.5 h"), (2e5, "2.3 days")],
)
def test_durations_are_as_rough_as_the_estimate(seconds: float, text: str) -> None:
    assert duration(seconds) == text
    assert re.fullmatch(r"[\d.]+ (s|min|h|days)", text)
