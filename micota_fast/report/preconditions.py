"""Whether a run has what the method presupposes, each condition with its figure and its threshold.

MiCoTA (arXiv 2507.01887) is about a student for whom short answers are too terse to be right and long ones too long to
learn. Where that is not so, its arms say little about the method. The conditions are measured on the teacher, the
assistant, the merged assistant and the untrained student, and on no trained one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from micota_fast.config.report import TrainingAnswersConfig
from micota_fast.report.inputs import Inputs
from micota_fast.report.summary import Summary, percent, points
from micota_fast.report.tables import ABSENT, Cell, Table
from micota_fast.sources.completions import iter_completions
from micota_fast.sources.problems import iter_problems

# Fixed before any arm was trained, for a small world in which the method can show itself; ours: the paper has none.
TEACHER_AHEAD = 0.15
"""P1: how much more accurate the long answers are, on the harder half of the problems."""
LONG_TO_SHORT = 4.0
"""P2: the least ratio of the lengths of long and short answers."""
MID_WITHIN = 0.30
"""P2: how far the length of mid answers may be from the geometric mean of long and short ones, as a share of it."""
STUDENT_AVERAGE = (0.20, 0.60)
"""P3: the untrained student's average accuracy."""
CEILING = 0.95
"""P3: an accuracy from which a benchmark has no room left."""
MERGED_RIGHT = 0.90
"""P4: share of the merged assistant's answers that are right."""


@dataclass(frozen=True)
class Answers:
    """One model's answers to the training problems: right or not and tokens of each, by the problems' ids.

    An answer is right if the filter compared it with the gold answer and found it so: what it rejected for another
    reason, such as being cut off, counts as not right.
    """

    model: str
    right: dict[str, list[bool]]
    tokens: dict[str, list[int]]
    graded: bool

    def accuracy(self, problems: Iterable[str]) -> float:
        """Return the share of right answers, each problem counting alike."""
        shares = [sum(self.right[problem]) / len(self.right[problem]) for problem in problems]
        return math.fsum(shares) / len(shares)

    @property
    def mean_tokens(self) -> float:
        """The mean over all answers."""
        every = [count for counts in self.tokens.values() for count in counts]
        return sum(every) / len(every)


@dataclass(frozen=True)
class Condition:
    """A row of the table: what is asked, what was measured, and whether it is enough; `held` None: not judged.

    `details` qualify the figure. If nothing could be measured, `figure` is empty and `note` the reason.
    """

    name: str
    figure: str
    threshold: str
    held: bool | None
    details: tuple[str, str] = ("", "")
    note: str = ""


def measure(config: TrainingAnswersConfig | None, inputs: Inputs, summary: Summary) -> list[Condition]:
    """Judge the conditions P1 to P5.

    Raises:
        InputError: a file of answers or problems is missing or malformed.
    """
    answers = {part: _read(Path(path)) for part, path in config.answers.items()} if config is not None else {}
    return [
        _teacher_ahead(answers, _levels(config)),
        *_lengths(answers),
        *_student(answers, summary),
        _merged_right(answers),
        *_first_choices(inputs),
    ]


def _read(accepted: Path) -> Answers:
    """Read a filter's output and, next to it, what it rejected."""
    model, graded = "", True
    right: dict[str, list[bool]] = {}
    tokens: dict[str, list[int]] = {}
    for path in (accepted, accepted.with_name(f"{accepted.name}.rejects.jsonl")):
        for row in iter_completions(path):
            model = row.model or model
            graded = graded and not (path == accepted and row.correct is None)
            right.setdefault(row.id, []).append(row.correct is True)
            tokens.setdefault(row.id, []).append(row.completion_tokens)
    return Answers(model, right, tokens, graded)


def _levels(config: TrainingAnswersConfig | None) -> dict[str, int]:
    """Problem id -> level, of the problems that have one."""
    if config is None or config.problems is None:
        return {}
    problems = (problem for _, problem in iter_problems(config.problems, None, config.columns, need_answers=False))
    return {problem.id: problem.level for problem in problems if problem.level is not None}


def _why_not(answers: Mapping[str, Answers], parts: Sequence[str], graded: bool = False) -> str:
    """Say why answers cannot be used; empty: they can."""
    absent = [part for part in parts if part not in answers]
    if absent:
        return f"the run has no {' and no '.join(absent)} answers to the training problems"
    ungraded = [part for part in parts if graded and not answers[part].graded]
    return f"the {' and '.join(ungraded)} answers were not graded" if ungraded else ""


def _teacher_ahead(answers: Mapping[str, Answers], levels: Mapping[str, int]) -> Condition:
    name, threshold = "P1 Long more accurate than short, harder half", f"at least {points(TEACHER_AHEAD)} points"
    why = _why_not(answers, ("long", "short", "student"), graded=True)
    if not why:
        common = set.intersection(*(set(answers[part].right) for part in ("long", "short", "student")))
        why = "" if len(common) >= 2 else "they answer fewer than two problems in common"
    if why:
        return Condition(name, "", threshold, None, note=why)
    harder = _harder_half(common, answers["long"], levels)
    long, short, student = (answers[part].accuracy(harder) for part in ("long", "short", "student"))
    ahead = long - max(short, student)
    details = f"long {percent(long)}, short {percent(short)}", f"student {percent(student)} of {len(harder)} problems"
    return Condition(name, f"{points(ahead)} points", threshold, ahead >= TEACHER_AHEAD, details)


def _harder_half(problems: Iterable[str], teacher: Answers, levels: Mapping[str, int]) -> list[str]:
    """Choose half of the problems: of the highest levels if all have one, then the longest for the teacher."""
    every = sorted(problems)
    levelled = all(problem in levels for problem in every)

    def hardness(problem: str) -> tuple[int, float]:
        tokens = teacher.tokens[problem]
        return levels[problem] if levelled else 0, sum(tokens) / len(tokens)

    return sorted(every, key=hardness)[-(len(every) // 2) :]


def _lengths(answers: Mapping[str, Answers]) -> list[Condition]:
    tokens = {part: of.mean_tokens for part, of in answers.items()}
    name, limit = "P2 Long to short, tokens", f"at least {LONG_TO_SHORT:g} ×"
    if why := _why_not(answers, ("long", "short")):
        found = [Condition(name, "", limit, None, note=why)]
    else:
        ratio = tokens["long"] / tokens["short"]
        told = f"{tokens['long']:,.0f} to {tokens['short']:,.0f}"
        found = [Condition(name, f"{ratio:.1f} ×", limit, ratio >= LONG_TO_SHORT, (told, ""))]
    name, limit = "P2 Mid to the geometric mean of long and short", f"within ±{100 * MID_WITHIN:g}%"
    if why := _why_not(answers, ("long", "mid", "short")):
        return [*found, Condition(name, "", limit, None, note=why)]
    middle = math.sqrt(tokens["long"] * tokens["short"])
    off = tokens["mid"] / middle - 1
    figure, told = f"{100 * off:+.0f}%".replace("-", "−"), f"{tokens['mid']:,.0f} to {middle:,.0f}"
    return [*found, Condition(name, figure, limit, abs(off) <= MID_WITHIN, (told, ""))]


def _student(answers: Mapping[str, Answers], summary: Summary) -> list[Condition]:
    name = "P3 Untrained student's answers nearer to short than to mid, tokens"
    if why := _why_not(answers, ("student", "mid", "short")):
        found = [Condition(name, "", "", None, note=why)]
    else:
        own = answers["student"].mean_tokens
        halfway = math.sqrt(answers["short"].mean_tokens * answers["mid"].mean_tokens)
        found = [Condition(name, f"{own:,.0f}", f"below {halfway:,.0f}", own < halfway)]
    base = summary.arms[0]
    average, (low, high) = base.average.mean, STUDENT_AVERAGE
    limit = f"{100 * low:g} to {100 * high:g}%"
    found.append(
        Condition("P3 Untrained student's average accuracy", f"{percent(average)}%", limit, low <= average <= high)
    )
    stuck = [
        f"{benchmark} {percent(of.mean)}%"
        for benchmark, of in base.benchmarks.items()
        if of.mean <= summary.chance.get(benchmark, 0.0) or of.mean >= CEILING
    ]
    figure, limit = f"{len(stuck)} of {len(summary.problems)}", f"none at chance or from {100 * CEILING:g}%"
    return [
        *found,
        Condition("P3 Benchmarks at their floor or ceiling for it", figure, limit, not stuck, note=", ".join(stuck)),
    ]


def _merged_right(answers: Mapping[str, Answers]) -> Condition:
    name, threshold = "P4 Merged assistant's answers right", f"at least {100 * MERGED_RIGHT:g}%"
    if why := _why_not(answers, ("mid",), graded=True):
        return Condition(name, "", threshold, None, note=why)
    right = answers["mid"].accuracy(answers["mid"].right)
    return Condition(name, f"{percent(right)}%", threshold, right >= MERGED_RIGHT)


def _first_choices(inputs: Inputs) -> list[Condition]:
    rates = {name: corpus.top1 for name, corpus in inputs.corpora.items() if corpus.top1 is not None}
    name = "P5 Right next token ranked first by the untrained student"
    if not rates:
        why = "no alignment of a corpus has the rate: `align` names none, or an earlier version measured it"
        return [Condition(name, "", "", None, note=why)]
    return [Condition(f"{name}, {corpus}", f"{percent(rate)}%", "", None) for corpus, rate in rates.items()]


def preconditions_table(conditions: Sequence[Condition]) -> Table:
    """Tabulate the conditions with their figures and thresholds."""
    verdicts = {True: Cell("yes"), False: Cell("no", strong=True), None: Cell(ABSENT, muted=True)}
    rows = tuple(
        (
            Cell(one.name),
            verdicts[one.held],
            Cell(one.figure, *one.details) if one.figure else Cell(ABSENT, muted=True),
            Cell(one.threshold or ABSENT, muted=not one.threshold),
        )
        for one in conditions
    )
    notes = [f"{one.name}: {'' if one.figure else 'not known, because '}{one.note}." for one in conditions if one.note]
    notes.append(
        "Measured on the teacher (long), the writer of the short answers, the merged assistant (mid) and the untrained "
        "student, before any arm is trained; P1, P2 and P4 on the training problems, in tokens of each writer. Harder: "
        "by the problems' levels, or else by the length of the long answers. Answers that were cut off or rejected by "
        "another rule than correctness count as not right. Floor: chance, where it is known, or else 0. P5, for the "
        "right text of each corpus, is shown without a verdict."
    )
    columns = (Cell("Precondition"), Cell("Held"), Cell("Measured"), Cell("Threshold"))
    return Table("What the method presupposes, and whether it held", columns, rows, tuple(notes))


def preconditions_json(conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """Return the conditions as plain values, for report.json."""
    return [vars(one) for one in conditions]
