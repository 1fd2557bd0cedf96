"""Does this answer enter a corpus? The rules, applied as answers come or to a finished file.

The cheap ones are settled on the spot; whether the final answer is right may take sympy and is left to grading
processes, in the background.
"""

import asyncio
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from micota_fast.chat.thoughts import CLOSE, split_thought
from micota_fast.common.records import Completion
from micota_fast.config.corpus import FilterSettings
from micota_fast.errors import InputError
from micota_fast.grading.grader import Grader, Verdict, extract_boxed

# The first that holds is the reason an answer is rejected for.
REASONS = (
    "truncated",
    "aborted",
    "too_long",
    "no_answer",
    "foreign_script",
    "repetition",
    "wrong",
    "timeout",
    "crashed",
    "content_filter",  # new ones last, as journals keep the places of reasons
    "unclosed_thought",
    "malformed_thought",  # opened or closed twice, or not at the beginning
)
SELDOM = REASONS[-3:]  # of APIs or of reasoning models alone: counted only if there are any
RUN_WORDS = 16  # of `max_repeated`
GRADED_AT_ONCE = 256  # pairs; a batch ends with its slowest


def reject_at_once(row: Completion, rules: FilterSettings) -> str | None:
    """Return why an answer is rejected, by all rules but that it be correct; None: by none."""
    if row.finish_reason != "stop":
        return {"length": "truncated", "content_filter": "content_filter"}.get(row.finish_reason, "aborted")
    if row.completion_tokens >= rules.max_tokens:
        return "too_long"
    try:
        thought, answer = split_thought(row.completion, row.opened)
    except InputError:
        return "malformed_thought" if CLOSE in row.completion else "unclosed_thought"
    if thought is not None and not answer.strip():
        return "no_answer"
    if (rules.require_boxed or rules.require_correct) and not extract_boxed(answer):  # a box in a thought is no answer
        return "no_answer"
    if rules.max_foreign is not None and foreign_share(row.completion, row.problem) > rules.max_foreign:
        return "foreign_script"
    if rules.max_repeated is not None and repeated_share(row.completion) > rules.max_repeated:
        return "repetition"
    return None


def reject_graded(verdict: Verdict) -> str | None:
    """Return why an answer is rejected by its grade. A comparison that hit its limit is not called wrong."""
    return None if verdict.status == "correct" else verdict.status


def foreign_share(answer: str, problem: str) -> float:
    """Return the share of the answer's letters whose script its problem does not use; 0 if it has no letters.

    A script is the first word of a letter's Unicode name (LATIN, CJK, CYRILLIC...). Greek and mathematical letters
    belong to no language here.
    """
    scripts = _scripts(answer)
    letters = sum(scripts.values())
    known = _scripts(problem).keys() or {"LATIN"}
    return sum(number for script, number in scripts.items() if script not in known) / letters if letters else 0.0


def _scripts(text: str) -> Counter[str]:
    number: Counter[str] = Counter()
    for letter, times in Counter(text).items():
        if (script := _script(letter)) is not None:
            number[script] += times
    return number


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str | None:
    if not letter.isalpha():
        return None
    script = unicodedata.name(letter, "").partition(" ")[0]
    return None if script in ("GREEK", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "") else script


def repeated_share(answer: str) -> float:
    """Return the share of the answer's words in runs of RUN_WORDS words that occurred before, overlaps included."""
    words = answer.split()
    seen: set[int] = set()
    covered = last = 0
    for start in range(len(words) - RUN_WORDS + 1):
        run = hash(tuple(words[start : start + RUN_WORDS]))
        if run in seen:
            end = start + RUN_WORDS
            covered += end - max(start, last)
            last = end
        else:
            seen.add(run)
    return covered / len(words) if words else 0.0


@dataclass(frozen=True)
class Judgement:
    """The end of one answer: why it is rejected (None: it is accepted)."""

    reason: str | None

    @property
    def accepted(self) -> bool:
        return self.reason is None


class Judge:
    """Judges the answers of a running generation; the event loop never waits for a comparison. A context manager.

    Comparisons are made in batches by a `Grader` in one other thread; its processes start with the first pair that
    needs one.
    """

    def __init__(self, rules: FilterSettings) -> None:
        self._rules = rules
        self._grader = Grader(rules.workers, rules.timeout_s)
        self._waiting: list[tuple[Completion, asyncio.Future[Judgement]]] = []
        self._grading: asyncio.Task[None] | None = None

    def at_once(self, row: Completion) -> Judgement | None:
        """Return the judgement if it needs no comparison."""
        reason = reject_at_once(row, self._rules)
        return Judgement(reason) if reason is not None or not self._rules.require_correct else None

    async def compared(self, row: Completion) -> Judgement:
        """Return the judgement of an answer that `at_once` left open."""
        future: asyncio.Future[Judgement] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future))
        if self._grading is None or self._grading.done():
            self._grading = asyncio.create_task(self._grade())
        return await future

    async def _grade(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:GRADED_AT_ONCE], self._waiting[GRADED_AT_ONCE:]
            pairs = [(row.completion, row.answer) for row, _ in batch]
            try:
                verdicts = await asyncio.to_thread(self._grader.grade, pairs)
            except asyncio.CancelledError:
                self._grader.close()  # the run ends: the loop's end waits for its threads, and a batch may take minutes
                raise
            except Exception as error:  # a grader that cannot start: whoever waits must hear of it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), verdict in zip(batch, verdicts, strict=True):
                if not future.done():
                    future.set_result(Judgement(reject_graded(verdict)))

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self._grader.close()
