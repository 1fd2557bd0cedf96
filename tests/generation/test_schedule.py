"""Which answers are asked for: all that are wanted, once each, hard problems first, no more than it takes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.waiting import soon
from micota_fast.generation.schedule import Schedule, Wanted


def schedule(
    number: int, samples: int, enough: int | None, there: dict[tuple[int, int], bool] | None = None
) -> Schedule:
    there = there or {}
    problem, sample = (np.array([key[i] for key in there], np.int64) for i in range(2))
    return Schedule(
        np.full(number, -1, np.int8),
        np.zeros(number, np.uint32),
        samples,
        enough,
        problem,
        sample,
        np.array(list(there.values()), bool),
    )


def test_hard_problems_come_first_and_samples_of_one_together() -> None:
    none = np.empty(0, np.int64)
    levels, sizes = np.array([-1, 3, 5, 5], np.int8), np.array([900, 10, 20, 30], np.uint32)
    plan = Schedule(levels, sizes, 2, None, none, none, none.astype(bool))
    order = [plan.next() for _ in range(8)]
    assert order == [Wanted(p, s) for p in (3, 2, 1, 0) for s in (0, 1)]
    assert plan.next() is None
    assert not plan.finished
    for wanted in order:
        assert wanted is not None
        plan.done(wanted, True)
    assert plan.finished


def test_it_is_finished_with_the_last_answer_though_nobody_asks_for_a_further_one() -> None:
    """A client whose servers have all gone by then must not wait for them."""
    plan = schedule(1, 3, 2)
    two = [plan.next(), plan.next()]
    assert not plan.finished
    plan.done(Wanted(0, 0), True)
    assert two == [Wanted(0, 0), Wanted(0, 1)]
    plan.done(Wanted(0, 1), False)
    assert not plan.finished  # one accepted answer is lacking
    assert plan.next() == Wanted(0, 2)
    plan.done(Wanted(0, 2), False)
    assert plan.finished


def run(plan: Schedule, right: np.ndarray, random: np.random.Generator, most: int = 7) -> list[Wanted]:
    """Let answers come back in random order; what was asked for, in order."""
    asked: list[Wanted] = []
    flying: list[Wanted] = []
    while True:
        while len(flying) < most and (wanted := plan.next()) is not None:
            asked.append(wanted)
            flying.append(wanted)
        if plan.finished:
            return asked
        assert flying, "nothing flies, nothing is wanted, and it is not finished"
        done = flying.pop(random.integers(len(flying)))
        plan.done(done, bool(right[done.problem, done.sample]))


def needed(right: np.ndarray, enough: int | None) -> set[Wanted]:
    """By the definition: the shortest run of samples that holds `enough` right ones."""
    found = set()
    for p, row in enumerate(right):
        for s in range(len(row)):
            if enough is not None and row[:s].sum() >= enough:
                break
            found.add(Wanted(p, s))
    return found


cases = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(0, 6), st.integers(0, 10**6))


@given(cases)
@settings(max_examples=200, deadline=None)
def test_what_is_asked_does_not_depend_on_the_order_of_arrival(case: tuple[int, int, int, int]) -> None:
    number, samples, enough_, seed = case
    enough = min(enough_, samples) or None
    random = np.random.default_rng(seed)
    right = random.random((number, samples)) < random.random()
    asked = run(schedule(number, samples, enough), right, random, int(random.integers(1, 20)))
    assert len(asked) == len(set(asked))
    assert set(asked) == needed(right, enough)


@given(cases)
@settings(max_examples=200, deadline=None)
def test_a_run_that_was_killed_goes_on_to_the_same_end(case: tuple[int, int, int, int]) -> None:
    number, samples, enough_, seed = case
    enough = min(enough_, samples) or None
    random = np.random.default_rng(seed)
    right = random.random((number, samples)) < random.random()
    first = schedule(number, samples, enough)
    there: dict[tuple[int, int], bool] = {}
    flying: list[Wanted] = []
    for _ in range(int(random.integers(0, number * samples + 1))):
        if (wanted := first.next()) is not None:
            flying.append(wanted)
        if flying and random.random() < 0.7:
            done = flying.pop(random.integers(len(flying)))
            there[done.problem, done.sample] = bool(right[done.problem, done.sample])
            first.done(done, there[done.problem, done.sample])
    before = {Wanted(*key) for key in there}
    asked = run(schedule(number, samples, enough, there), right, random)
    assert len(asked) == len(set(asked))
    assert not before & set(asked)
    assert before | set(asked) == needed(right, enough)


def test_a_million_problems_take_little_memory_and_time() -> None:

    number = 1_000_000
    done = np.arange(number // 2, dtype=np.uint32)
    with soon():
        plan = Schedule(
            np.full(number, -1, np.int8),
            np.zeros(number, np.uint32),
            1,
            None,
            done,
            np.zeros(len(done), np.uint16),
            np.ones(len(done), bool),
        )
        for _ in range(1000):
            assert plan.next() is not None
    arrays = [value for value in vars(plan).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 18 * number
