"""Where in a document, and in how many tokens, it differs from the student: statistics of the tokens' likelihoods."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.alignment.results import STEPS, Markers, OwnOverlap, Step

PARTS = 10  # of a document, by position
PROBABILITIES = (0.5, 0.1, 0.01, 0.001)
RUN = 4  # words
# Words with which a writer reconsiders what it wrote; ours, from the chains of thought of reasoning models.
MARKERS = re.compile(
    r"\b(wait|hmm+|alternatively|actually|hold on|on second thought|let me (?:re-?)?(?:check|verify|think|consider|"
    r"examine|compute|calculate|read)\w*(?: again)?|double[- ]check\w*|let'?s (?:re-?)?(?:check|verify)\w*)\b",
    re.IGNORECASE,
)


class Profile(NamedTuple):
    """The keys of these names in `Alignment`."""

    by_position: tuple[float | None, ...]
    by_step: tuple[Step, ...]
    unlikely: dict[str, float]


def profile(nll_N: NDArray[np.float32], counts_D: NDArray[np.int64], ends_step_N: NDArray[np.bool_]) -> Profile:
    """Compute statistics of the N supervised tokens of D documents, one after the other.

    Args:
        nll_N: negative log-likelihood of each, nats.
        counts_D: tokens of each document; documents may have none.
        ends_step_N: whether a token ends a line, and with it a step of the solution.
    """
    document_N = np.repeat(np.arange(len(counts_D)), counts_D)
    starts_D = np.cumsum(counts_D) - counts_D
    rank_N = np.arange(len(nll_N)) - starts_D[document_N]
    part_N = rank_N * PARTS // counts_D[document_N]
    # A line break belongs to the line it ends, and empty lines are not steps.
    begins_N = np.zeros(len(nll_N), np.int64)
    begins_N[1:] = ends_step_N[:-1] & ~ends_step_N[1:] & (rank_N[1:] > 0)
    begun_N = np.cumsum(begins_N)
    step_N = np.minimum(begun_N - begun_N[starts_D[document_N]], STEPS - 1)
    return Profile(
        by_position=tuple(_means(nll_N, part_N, PARTS)[0]),
        by_step=tuple(
            Step(nll=mean, tokens=tokens)
            for mean, tokens in zip(*_means(nll_N, step_N, STEPS), strict=True)
            if mean is not None
        ),
        unlikely={str(p): float((nll_N > -np.log(p)).mean()) for p in PROBABILITIES},
    )


def _means(
    values: NDArray[np.float32], groups: NDArray[np.integer], number: int
) -> tuple[list[float | None], list[int]]:
    tokens = np.bincount(groups, minlength=number)
    sums = np.bincount(groups, weights=values, minlength=number)
    return [float(s / n) if n else None for s, n in zip(sums, tokens, strict=True)], tokens.tolist()


def reflection_markers(texts: Iterable[str], tokens: int) -> Markers:
    """Count the phrases of MARKERS per 1,000 tokens, all together and the ten most frequent by name."""
    number: dict[str, int] = defaultdict(int)
    for text in texts:
        for match in MARKERS.finditer(text):
            number[match.group(1).lower()] += 1
    per_1k = {
        name: 1000 * count / tokens for name, count in sorted(number.items(), key=lambda item: (-item[1], item[0]))
    }
    return Markers(total=sum(per_1k.values()), by_phrase=dict(list(per_1k.items())[:10]))


def overlap(texts: Mapping[str, Sequence[str]], own: Mapping[str, Sequence[str]]) -> OwnOverlap | None:
    """Measure how much of a corpus the student says by itself, problem by problem.

    For each answer this is the share of its distinct runs of RUN words that occur in the student's own answers to the
    same problem. Returns the mean over answers; None if no problem is in both.

    Args:
        texts: problem id -> its answers in the corpus.
        own: problem id -> the student's own answers.
    """
    shares = []
    for problem_id, answers in texts.items():
        if problem_id not in own:
            continue
        known = set().union(*(_runs(answer) for answer in own[problem_id]))
        shares += [len(runs & known) / len(runs) for runs in map(_runs, answers) if runs]
    if not shares:
        return None
    return OwnOverlap(mean=float(np.mean(shares)), answers=len(shares))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}
