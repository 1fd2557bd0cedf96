"""maj@k: whether the answer that most of a problem's k samples give is right.

Self-consistency (Wang et al., arXiv 2203.11171) with the classes of equal answers that the grading rule makes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from micota_fast.common.records import Completion
from micota_fast.evaluation.results import ABORTED
from micota_fast.grading.grader import Verdict

Grade = Callable[[Sequence[tuple[str, str]]], list[Verdict]]
"""Grades pairs of completion and gold answer."""


@dataclass
class _Answer:
    """A final answer as it is spelled: a text that has it, how often it was given, and whether it is right.

    What could not be compared with the gold answer, within the limits, is not compared with the others either.
    """

    text: str
    extracted: str
    votes: int
    correct: bool
    comparable: bool


class _Poll:
    """The votes of one problem. `waiting` are the answers of no class yet, in the order in which they were sampled."""

    def __init__(self, rows: Sequence[Completion], verdicts: Sequence[Verdict]) -> None:
        spelled: dict[str, _Answer] = {}
        for row, verdict in zip(rows, verdicts, strict=True):
            if verdict.status == "no_answer" or verdict.extracted is None or row.finish_reason in ABORTED:
                continue
            correct, comparable = verdict.status == "correct", verdict.status in ("correct", "wrong")
            answer = _Answer(row.completion, verdict.extracted, 0, correct, comparable)
            spelled.setdefault(verdict.extracted, answer).votes += 1
        self.waiting = list(spelled.values())
        self.most, self.correct = 0, False

    @property
    def is_open(self) -> bool:
        """Whether the answers that wait could outvote the class that leads."""
        return sum(answer.votes for answer in self.waiting) > self.most

    def pairs(self) -> list[tuple[str, str]]:
        """Return what is to be compared: each answer but the first, with the first as the gold answer."""
        first, *others = self.waiting
        return [(answer.text, first.extracted) for answer in others if first.comparable and answer.comparable]

    def count(self, verdicts: Iterator[Verdict]) -> None:
        """Make a class of the first answer and its equals, by the verdicts on `pairs`."""
        first, *others = self.waiting
        votes, self.waiting = first.votes, []
        for answer in others:
            if first.comparable and answer.comparable and next(verdicts).status == "correct":
                votes += answer.votes
            else:
                self.waiting.append(answer)
        if votes > self.most:
            self.most, self.correct = votes, first.correct


def majority_correct(rows: Sequence[Completion], verdicts: Sequence[Verdict], samples: int, grade: Grade) -> list[bool]:
    """Return of each problem whether the final answer that it is given most often is right.

    Two answers are equal if `grade` takes one for right where the other, of which it is a later sample, is the gold
    answer; a class of equals is right if its first is. Of classes of one size, the one sampled first wins, so that a
    problem counts as 0 or 1. An answer without a final answer, or that the server broke off, has no vote; a problem
    without a vote is wrong. One whose comparison with the gold answer came to no end is equal to its own spelling only.

    Args:
        rows: the answers, problem by problem, `samples` to each.
        verdicts: of the rows, by `grade`.
        samples: answers to each problem.
        grade: the rule.
    """
    starts = range(0, len(rows), samples)
    polls = [_Poll(rows[start : start + samples], verdicts[start : start + samples]) for start in starts]
    while open_ := [poll for poll in polls if poll.is_open]:  # all problems at once: the rule works in parallel
        found = iter(grade([pair for poll in open_ for pair in poll.pairs()]))
        for poll in open_:
            poll.count(found)
    return [poll.correct for poll in polls]
