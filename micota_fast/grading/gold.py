"""Problems whose gold answer no answer can equal: counted and named before anything is spent on them."""

import sys
from collections.abc import Callable, Iterable

from micota_fast.errors import InputError
from micota_fast.grading.answers import why_unreadable

NAMED = 3

WhyUnreadable = Callable[[str], str | None]  # the end of a sentence about a gold answer; None: it can be read


class GoldCheck:
    """Counts the problems whose gold answer cannot be read.

    Args:
        where: the file, for the message.
        why: says why a gold answer cannot be read by the rule in use.
        rule: that rule, for the message, where a file is read by several.
    """

    def __init__(self, where: object, why: WhyUnreadable = why_unreadable, rule: str | None = None) -> None:
        self._where, self._why, self._rule = where, why, rule
        self._problems = self._unreadable = 0
        self._named: list[str] = []
        self._last: str | None = None

    def take(self, problem_id: str, gold: str) -> None:
        """Look at one gold answer. The rows of one problem follow one another, and it counts once."""
        if problem_id == self._last:
            return
        self._last = problem_id
        self._problems += 1
        reason = self._why(gold)
        if reason is not None:
            self._unreadable += 1
            if len(self._named) < NAMED:
                self._named.append(f"that of {problem_id!r} ({gold!r:.60}) {reason}")

    def finish(self, required: bool = True) -> None:
        """Warn on stderr of gold answers that cannot be read.

        Args:
            required: nothing is worth doing if no gold answer can be read.

        Raises:
            InputError: `required`, and none can be read.
        """
        if not self._unreadable:
            return
        every = self._unreadable == self._problems
        more = "; ..." if self._unreadable > len(self._named) else ""
        message = (
            f"{self._where}: {self._unreadable} of {self._problems} gold answers cannot be read"
            f"{f' by the {self._rule} rule' if self._rule else ''}, so every answer to these problems would be wrong: "
            f"{'; '.join(self._named)}{more}. Correct key 'answer' in the file, or remove these problems"
        )
        if every and required:
            raise InputError(message)
        print(f"warning: {message}", file=sys.stderr, flush=True)


def check_golds(
    golds: Iterable[tuple[str, str]],
    where: object,
    why: WhyUnreadable = why_unreadable,
    rule: str | None = None,
    required: bool = True,
) -> None:
    """Warn of (problem id, gold answer) pairs that cannot be read; see `GoldCheck`."""
    check = GoldCheck(where, why, rule)
    for problem_id, gold in golds:
        check.take(problem_id, gold)
    check.finish(required)
