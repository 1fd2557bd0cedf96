"""Whether the learnability score of a corpus predicted the accuracy of the arm that was trained on it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from micota_fast.report.corpora import Corpus
from micota_fast.report.summary import Arm, Summary, percent
from micota_fast.report.tables import ABSENT, Cell, Table, significant
from micota_fast.statistics.ranks import spearman

FEWEST = 3  # arms; the correlation of two is always 1 or -1
FEW = 10  # arms; with fewer the table warns
OTHERS: dict[str, Callable[[Corpus], float | None]] = {
    "perplexity": lambda corpus: corpus.perplexity,
    "length": lambda corpus: corpus.mean_tokens,
    "rank-surprisal ratio": lambda corpus: corpus.rank_surprisal_ratio,
}
PARTS_BELOW = ("0.1", "0.01")  # the probabilities of `Alignment.unlikely` that are shown


@dataclass(frozen=True)
class LearnabilityRanking:
    """The corpora that the student was aligned with, the easiest to learn first; those without a score last.

    `trained` has the arm that was trained on each corpus, if there is one. `rho` is Spearman's rank correlation of ease
    (the score, negated) and average accuracy over `compared`, the corpora that have both; None: they are too few, or
    all alike in one of them.
    """

    order: tuple[str, ...]
    trained: dict[str, Arm]
    compared: tuple[str, ...]
    rho: float | None
    others: dict[str, float | None]
    """The same correlation for other measures that are known before training; less is taken for easier."""


def rank_by_learnability(
    corpora: Mapping[str, Corpus], trained_on: Mapping[str, str], summary: Summary
) -> LearnabilityRanking | None:
    """Rank the corpora by their score and correlate it with the accuracy of their arms.

    Args:
        corpora: by name.
        trained_on: arm -> corpus, if it has another name than the arm.
        summary: of the arms.

    Returns:
        None if no alignment has more than perplexity and length, as those of earlier versions.
    """
    aligned = {name: corpus for name, corpus in corpora.items() if corpus.nats_per_answer or corpus.unlikely}
    if not aligned:
        return None
    scores = {name: corpus.nats_per_answer.mean for name, corpus in aligned.items() if corpus.nats_per_answer}
    order = tuple(sorted(aligned, key=lambda name: scores.get(name, math.inf)))
    arms = {trained_on.get(arm.name, arm.name): arm for arm in reversed(summary.trained)}  # the first counts
    trained = {name: arms[name] for name in order if name in arms}
    compared = tuple(name for name in trained if name in scores)
    accuracies = [trained[name].average.mean for name in compared]
    rho, others = None, {}
    if len(compared) >= FEWEST:
        rho = spearman([-scores[name] for name in compared], accuracies)
    if rho is not None:
        for measure, value in OTHERS.items():
            known = [-found for name in compared if (found := value(aligned[name])) is not None]
            if len(known) == len(compared):
                others[measure] = spearman(known, accuracies)
    return LearnabilityRanking(order, trained, compared, rho, others)


def learnability_table(ranking: LearnabilityRanking, corpora: Mapping[str, Corpus]) -> Table:
    """Tabulate how the untrained student finds each corpus, next to the accuracy of the arm trained on it."""
    measured = {name: corpora[name] for name in ranking.order}
    nats = [corpus.nats_per_answer for corpus in measured.values()]
    departures = [corpus.departures_per_answer for corpus in measured.values()]
    columns = [
        (Cell("Nats", "an answer"), [_figure(of.mean if of else None) for of in nats]),
        (Cell("Accuracy of its arm", "average, %"), [_accuracy(ranking.trained.get(name)) for name in ranking.order]),
        (
            Cell("Departures", "tokens an answer"),
            [_figure(of.mean if of else None) for of in departures],
        ),
        (Cell("Top-1", "% of tokens"), [_percent(c.top1) for c in measured.values()]),
        (Cell("Length", "tokens, mean"), [_figure(c.mean_tokens) for c in measured.values()]),
        (Cell("Perplexity"), [_figure(c.perplexity) for c in measured.values()]),
        (Cell("Rank-surprisal ratio"), [_figure(c.rank_surprisal_ratio) for c in measured.values()]),
        *(
            (Cell(f"p < {p}", "% of tokens"), [_share(c.unlikely.get(p)) for c in measured.values()])
            for p in PARTS_BELOW
        ),
        (Cell("Reflection markers", "per 1,000 tokens"), [_figure(c.markers_per_1k) for c in measured.values()]),
        (Cell("In own answers", "% of 4-word runs"), [_share(c.own_overlap) for c in measured.values()]),
    ]
    there = [(head, cells) for head, cells in columns if any(cell.text != ABSENT for cell in cells)]
    rows = zip(map(Cell, ranking.order), *(cells for _, cells in there), strict=True)
    notes = (
        "Under the student before training. Nats: negative log-likelihood of a whole answer, mean over answers, this "
        "project's learnability score: less is easier to learn, and the easiest stands first. Corpora may hold answers "
        "to different problems. Departures: tokens that were not the student's first choice. Top-1: share of the "
        "tokens that were. Rank-surprisal ratio: arXiv 2601.14249, less is better. p: what the student gave the token. "
        "Its arm: the one trained on it.",
        agreement(ranking),
    )
    heads = (Cell("Corpus"), *(head for head, _ in there))
    return Table("How easy the corpora are to learn, by the student's own likelihood", heads, tuple(rows), notes)


def agreement(ranking: LearnabilityRanking) -> str:
    """Say how well the score predicts accuracy, and how little so few arms prove."""
    arms = len(ranking.compared)
    what = "ease by the score with the accuracy of the arms"
    if arms < FEWEST:
        had = f"{arms} arm{' has' if arms == 1 else 's have'} both" if arms else "no arm has both"
        return f"No rank correlation of {what}: {had}, {FEWEST} are needed."
    if ranking.rho is None:
        return f"No rank correlation of {what}: over {arms} arms one of them is the same for all."
    told = (
        f"Spearman's rank correlation of {what}: {_signed(ranking.rho)} over {arms} arms "
        f"({', '.join(ranking.compared)}), where {_signed(1.0)} would mean that the easier a corpus is to learn, "
        "the more accurate is its arm."
    )
    same = [f"{measure} {_signed(rho)}" for measure, rho in ranking.others.items() if rho is not None]
    if same:
        told += f" The same by other measures, with less counted as easier: {', '.join(same)}."
    if arms < FEW:
        told += (
            f" So few arms say little: {arms} in an order by chance give {_signed(1.0)} once in "
            f"{math.factorial(arms):,} times, and accuracies that differ by noise are ranked like others."
        )
    return told


def _signed(rho: float) -> str:
    """Two decimals with a true minus sign."""
    return f"{rho:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _figure(value: float | None) -> Cell:
    return Cell(ABSENT, muted=True) if value is None else Cell(significant(value))


def _share(value: float | None) -> Cell:
    return Cell(ABSENT, muted=True) if value is None else Cell(significant(100 * value))


def _percent(value: float | None) -> Cell:
    """One decimal, as accuracies have: rates near 100% differ in it."""
    return Cell(ABSENT, muted=True) if value is None else Cell(percent(value))


def _accuracy(arm: Arm | None) -> Cell:
    if arm is None:
        return Cell(ABSENT, muted=True)
    return Cell(percent(arm.average.mean), "" if arm.average.sd is None else f"± {percent(arm.average.sd)}")
