"""Which answer is asked for next: hard problems first, no more answers to a problem than it takes."""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Wanted:
    """One answer: the problem's ordinal in its file, and which of its samples."""

    problem: int
    sample: int


class Sized(Protocol):
    """What is asked, as far as its order depends on it: a `ProblemFile`, or rows that are scored."""

    @property
    def levels(self) -> NDArray[np.int8]:
        """[asked], -1 where unknown."""

    @property
    def sizes(self) -> NDArray[np.uint32]:
        """[asked], how long each is."""


class Schedule:
    """Hands out the answers that are still wanted, and takes note of what became of them.

    Problems come in an order in which the longest answers are likely to begin early, so that the end of a run does not
    wait for a few: by falling `level` where the file gives one, then by falling length of their text.

    Without `enough` each problem gets all its samples. With it a problem never has more answers on the way than it
    still lacks accepted ones, so it ends with the shortest run of samples 0, 1, ... that holds `enough` accepted ones
    (or with all of them): which answers exist then depends on the answers alone, not on their order of arrival.

    About 18 bytes per problem.

    Args:
        levels: [problems] int8, -1 where unknown.
        sizes: [problems] uint32, length of a problem's text.
        samples: most answers to a problem.
        enough: accepted answers after which a problem is done; None: it always gets `samples`.
        problem: [answers] of each answer that is there already, its problem.
        sample: [answers] and its sample.
        accepted: [answers] and whether it is accepted.
    """

    def __init__(
        self,
        levels: NDArray[np.int8],
        sizes: NDArray[np.uint32],
        samples: int,
        enough: int | None,
        problem: NDArray[np.integer],
        sample: NDArray[np.integer],
        accepted: NDArray[np.bool_],
    ) -> None:
        number = len(levels)
        self._samples, self._enough = samples, enough
        self._order = np.lexsort((-sizes.astype(np.int64), -levels.astype(np.int16))).astype(np.uint32)
        self._cursor = 0
        self._accepted = np.bincount(problem[accepted], minlength=number).astype(np.uint16)
        self._next = np.zeros(number, np.uint16)  # the first sample that was never asked for
        np.maximum.at(self._next, problem, sample.astype(np.uint16) + np.uint16(1))
        self._under_way = np.zeros(number, np.uint16)
        self._in_flight = 0
        # A run that was killed leaves holes: samples below one that was answered sooner.
        self._first: deque[Wanted] = deque()
        torn = np.bincount(problem, minlength=number) < self._next
        of_torn = torn[problem]
        there = set(zip(problem[of_torn].tolist(), sample[of_torn].tolist(), strict=True))
        for hole in np.flatnonzero(torn).tolist():
            self._first += [Wanted(hole, s) for s in range(int(self._next[hole])) if (hole, s) not in there]
        self._reopened: deque[int] = deque()

    def next(self) -> Wanted | None:
        """Return the next answer to ask for; None if none is wanted before another one is `done`."""
        if self._first:
            wanted = self._first.popleft()
            return self._hand_out(wanted.problem, wanted.sample)
        if (problem := self._next_problem()) is None:
            return None
        sample = int(self._next[problem])
        self._next[problem] += 1
        return self._hand_out(problem, sample)

    def _next_problem(self) -> int | None:
        """The problem whose next sample comes next."""
        # Problems whose answers were rejected are hard ones: they continue before new ones begin.
        while self._reopened:
            if self._wants(self._reopened[0]):
                return self._reopened[0]
            self._reopened.popleft()
        while self._cursor < len(self._order):
            if self._wants(problem := int(self._order[self._cursor])):
                return problem
            self._cursor += 1
        return None

    def done(self, wanted: Wanted, accepted: bool) -> None:
        """Count an answer that has come and been judged; without rules every one is accepted."""
        self._in_flight -= 1
        self._under_way[wanted.problem] -= 1
        self._accepted[wanted.problem] += accepted
        if self._enough is not None and not accepted and self._wants(wanted.problem):
            self._reopened.append(wanted.problem)

    @property
    def finished(self) -> bool:
        """Nothing is on the way and nothing is wanted any more."""
        return self._in_flight == 0 and not self._first and self._next_problem() is None

    @property
    def expected(self) -> int:
        """Answers that there will be in the end, if no problem needs a further one: for the progress shown."""
        if self._enough is None:
            return len(self._order) * self._samples
        lacking = np.maximum(self._enough - self._accepted.astype(np.int64) - self._under_way, 0)
        return int((self._next + np.minimum(lacking, self._samples - self._next.astype(np.int64))).sum())

    def _wants(self, problem: int) -> bool:
        if self._next[problem] >= self._samples:
            return False
        return self._enough is None or int(self._accepted[problem]) + int(self._under_way[problem]) < self._enough

    def _hand_out(self, problem: int, sample: int) -> Wanted:
        self._in_flight += 1
        self._under_way[problem] += 1
        return Wanted(problem, sample)
