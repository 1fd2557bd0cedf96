"""The report's tables: captions, cells and notes, whatever they are written as (see `formats`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from micota_fast.config.report import ClaimsConfig
from micota_fast.corpus.results import BenchmarkOverlap
from micota_fast.report.comparison import LEVEL, Comparison
from micota_fast.report.corpora import Corpus
from micota_fast.report.inputs import EvaluatedModel, Inputs
from micota_fast.report.summary import BASE, Arm, Sampled, Summary, p_value, percent, points
from micota_fast.statistics.intervals import Estimate
from micota_fast.statistics.paired import RESAMPLES

MARK = "†"
MARK_MEANING = f"{MARK} The 95% interval of Δ spans zero: not distinguishable from the untouched student."
CORRECTED_MARK = "‡"
CORRECTED_MEANING = (
    f"{CORRECTED_MARK} The 95% interval of Δ is clear of zero, but corrected for the number of comparisons its p-value "
    f"is above {LEVEL:g}: not distinguishable from the untouched student."
)
ABSENT = "–"
PROTOCOLS = {
    "strict": "strict: math-verify on the answer's box, mathematically equal answers count",
    "paper": "paper: the string rules of the authors' evaluation",
    "judge": "judge: as paper, and a model is asked about what those reject",
}


@dataclass(frozen=True)
class Cell:
    """A number and, smaller, what qualifies it, first and second. `strong` and `muted` are how it is set."""

    text: str
    qualifier: str = ""
    second: str = ""
    strong: bool = False
    muted: bool = False


@dataclass(frozen=True)
class Table:
    """`columns` are the headings; the first cell of each row names the row; `notes` stand below the table."""

    caption: str
    columns: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


def accuracy_table(summary: Summary, claims: ClaimsConfig | None) -> Table:
    """Tabulate arms by their average, its Δ to the base, what is claimed of that, and the benchmarks.

    An arm is in bold only if it is distinguishable from all others.
    """
    columns = (
        Cell("Arm"),
        Cell("Average", "95% interval"),
        Cell("Δ vs base", "95% interval"),
        *(Cell(name, f"n = {n}") for name, n in summary.problems.items()),
    )
    claimed = claims.deltas if claims is not None else {}
    rows = tuple(_accuracy_row(arm, arm is summary.winner, claimed.get(arm.name)) for arm in summary.arms)
    deltas = [arm.delta for arm in summary.trained if arm.delta]
    notes = [
        "In % of problems: mean ± standard deviation over seeds, and of the average or a single run the 95% interval.",
        *_chance(summary),
        *_mark_meanings(deltas),
    ]
    if summary.trained:
        unpaired = _unpaired(summary)
        except_for = f", except for {', '.join(unpaired)}" if unpaired else ""
        paired = "not paired" if len(unpaired) == len(summary.trained) else f"paired on the problems{except_for}"
        notes.append(f"Δ is {paired}: see the table of differences.")
        notes.append(
            "Bold: the highest average, where it is distinguishable from every other arm's: the interval of each "
            "difference is clear of zero, and its corrected p-value, where there is one, at most 0.05."
            if summary.winner
            else "No average is in bold: none is distinguishable from every other."
        )
    if claims is not None:
        notes.append(f"Published: the difference of the average in points according to {claims.source}.")
    return Table("Accuracy of the student, by training corpus", columns, rows, tuple(notes))


def _accuracy_row(arm: Arm, strong: bool, claimed: float | None) -> tuple[Cell, ...]:
    average = arm.average
    runs = len(average.seeds)
    delta = Cell(ABSENT, muted=True)
    if arm.delta is not None:
        delta = _delta(arm.delta, strong)
        if claimed is not None:
            delta = replace(delta, second=f"published: {claimed:+g}".replace("-", "−"))
    return (
        Cell(arm.name, "untouched" if arm.name == BASE else f"{runs} seed{'s' if runs > 1 else ''}", strong=strong),
        replace(
            _accuracy(average), second="" if average.sd is None else _bounds(average.low, average.high), strong=strong
        ),
        delta,
        *(_accuracy(estimate) for estimate in arm.benchmarks.values()),
    )


def _chance(summary: Summary) -> list[str]:
    """What a guess scores, where it is known."""
    if not summary.chance:
        return []
    average = summary.average_chance
    if average is not None and len(set(summary.chance.values())) == 1:
        return [f"Chance: {percent(average)} on each benchmark, and so on average."]
    known = ", ".join(f"{percent(of)} on {name}" for name, of in summary.chance.items())
    return [f"Chance: {known}" + ("; not known elsewhere." if average is None else f", {percent(average)} on average.")]


def _delta(delta: Comparison, strong: bool = False, tested: bool = False) -> Cell:
    mark = f" {MARK}" if delta.spans_zero else "" if delta.clear else f" {CORRECTED_MARK}"
    bounds = f"[{points(delta.low)}, {points(delta.high)}]"
    test = ("unpaired" if delta.p_holm is None else p_value(delta.p_holm)) if tested else ""
    return Cell(points(delta.value) + mark, bounds, test, strong, muted=not delta.clear)


def _mark_meanings(deltas: Sequence[Comparison]) -> list[str]:
    spans = [MARK_MEANING] if any(delta.spans_zero for delta in deltas) else []
    corrected = any(not delta.clear and not delta.spans_zero for delta in deltas)
    return [*spans, *([CORRECTED_MEANING] if corrected else [])]


def _unpaired(summary: Summary) -> list[str]:
    return [arm.name for arm in summary.trained if arm.delta and not arm.delta.paired]


def deltas_table(summary: Summary) -> Table:
    """Tabulate every trained arm's difference to the base, by benchmark and on average, with interval and p-value."""
    benchmarks = list(summary.problems) if len(summary.problems) > 1 else []
    rows, every = [], []
    for arm in summary.trained:
        assert arm.delta is not None  # a trained arm always has one
        deltas = [*(arm.deltas[name] for name in benchmarks), arm.delta]
        every += deltas
        rows.append((Cell(arm.name), *(_delta(delta, tested=True) for delta in deltas)))
    tests = sum(delta.p_holm is not None for delta in every)
    notes = _mark_meanings(every)
    if any(delta.paired for delta in every):
        notes += [
            f"In points. [ ]: 95% interval of the paired difference: percentiles of {RESAMPLES:,} bootstrap resamples "
            "of the problems within each benchmark, two pseudo-problems added to each (after Bonett & Price 2012), "
            "answers averaged over samples and seeds; Student's t over seeds added. Not corrected for the number of "
            "comparisons.",
            "p: two-sided, from the same pairs. On a benchmark where all differences are −1, 0 or 1 (one answer each), "
            f"McNemar's exact test; otherwise, and for the average, {RESAMPLES:,} random flips of the signs of the "
            f"problems' differences, which cannot show a p below {tests / (RESAMPLES + 1):.4f} after Holm's correction "
            f"over the {tests} tests of this table (a p shown at that value is at most that). The p is about "
            "the models that were trained: what another training seed would change is in the interval only.",
        ]
    if unpaired := _unpaired(summary):
        notes.append(
            f"Unpaired ({', '.join(unpaired)}): the graded rows of the arm or of the untouched student are not next to "
            "its results.json. The interval treats the two as if they had answered different problems, which makes it "
            "wide; nothing is tested."
        )
    columns = (Cell("Arm"), *(Cell(name, f"n = {summary.problems[name]}") for name in benchmarks), Cell("Average"))
    return Table("Difference to the untouched student", columns, tuple(rows), tuple(notes))


def samples_table(summary: Summary) -> Table | None:
    """Tabulate avg@k, maj@k and pass@k of the benchmarks with several answers per problem; None if there are none."""
    names = [name for name in summary.problems if any(name in arm.sampled for arm in summary.arms)]
    if not names:
        return None
    rows = tuple((Cell(arm.name), *(_sampled(arm.sampled.get(name)) for name in names)) for arm in summary.arms)
    notes = (
        "avg@k: the mean over k answers to each problem (and over seeds), in %. SE: its standard error, the answers to "
        "a problem taken as one cluster (Miller 2024, arXiv 2411.00640); it covers the sample of problems, not "
        "training. maj@k: the share of problems whose most frequent answer is right (of equally frequent ones the "
        "first). pass@k: the unbiased estimate (Chen et al. 2021, arXiv 2107.03374), mean over problems and seeds. "
        "[ ]: 95% interval, as of the accuracies: Wilson's over the problems and Student's t over seeds.",
    )
    columns = (Cell("Arm"), *(Cell(name, f"n = {summary.problems[name]}") for name in names))
    return Table("Several answers to a problem", columns, rows, notes)


def _sampled(one: Sampled | None) -> Cell:
    if one is None:
        return Cell(ABSENT, muted=True)
    error = "" if one.standard_error is None else f", SE {percent(one.standard_error)}"
    k = one.samples
    shares = [f"pass@{k} {percent(one.pass_at[k])} {_bounds(*one.pass95)}"]
    if one.majority is not None and one.majority95 is not None:
        shares.insert(0, f"maj@{k} {percent(one.majority)} {_bounds(*one.majority95)}")
    return Cell(percent(one.accuracy), f"avg@{k}{error}", ", ".join(shares))


def _bounds(low: float, high: float) -> str:
    return f"[{percent(low)}, {percent(high)}]"


def _accuracy(estimate: Estimate) -> Cell:
    spread = _bounds(estimate.low, estimate.high) if estimate.sd is None else f"± {percent(estimate.sd)}"
    return Cell(percent(estimate.mean), spread)


def corpora_table(corpora: dict[str, Corpus]) -> Table:
    """Tabulate what filtering kept of each corpus, how long it is and how likely the untrained student finds it."""
    columns = (
        Cell("Corpus"),
        Cell("Completions"),
        Cell("Accepted"),
        Cell("Acceptance"),
        Cell("Median length", "tokens"),
        Cell("Mean length", "tokens"),
        Cell("Perplexity", "untrained student"),
    )
    rows = tuple(
        (
            Cell(name),
            _known(corpus.total, "{:,}"),
            _known(corpus.accepted, "{:,}"),
            _known(
                100 * corpus.accepted / corpus.total if corpus.accepted is not None and corpus.total else None,
                "{:.1f}%",
            ),
            Cell(_thousands(corpus.median_tokens)),
            Cell(_thousands(corpus.mean_tokens)),
            Cell(ABSENT, muted=True) if corpus.perplexity is None else Cell(significant(corpus.perplexity)),
        )
        for name, corpus in corpora.items()
    )
    others = [name for name, corpus in corpora.items() if not corpus.student_tokens]
    notes = [
        "Lengths in tokens of the model that wrote the corpus."
        if len(others) == len(corpora)
        else "Lengths in supervised tokens of the student"
        + (f", except {', '.join(others)}: of its writer." if others else ".")
    ]
    notes += [
        f"Left out of {name} where the student measures it, as too long: {corpus.dropped:,} "
        f"document{'s' if corpus.dropped > 1 else ''}."
        for name, corpus in corpora.items()
        if corpus.dropped
    ]
    notes += [
        f"Rejected from {name}: " + ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts) + "."
        for name, corpus in corpora.items()
        if (counts := [(reason, count) for reason, count in corpus.rejected.items() if count])
    ]
    return Table("Training corpora", columns, rows, tuple(notes))


def answers_table(arms: Sequence[Arm]) -> Table:
    """Tabulate how long each arm's answers are and how many have no final answer."""
    columns = (
        Cell("Arm"),
        Cell("Mean answer length", "tokens"),
        Cell("Truncated", "% of answers"),
        Cell("No final answer", "% of answers"),
        Cell("Grading timed out", "% of answers"),
    )
    rows = tuple(
        (
            Cell(arm.name),
            _tokens(arm.answers.mean_tokens, arm.answers.mean_tokens_sd),
            *(
                _known(None if share is None else 100 * share, "{:.1f}")
                for share in (arm.answers.truncated, arm.answers.no_answer, arm.answers.timeout)
            ),
        )
        for arm in arms
    )
    notes = ("Over all answers of all benchmarks and seeds; ± is the standard deviation over seeds.",)
    return Table("Length of the answers and how they end", columns, rows, notes)


def _tokens(mean: float | None, sd: float | None) -> Cell:
    if mean is None:
        return Cell(ABSENT, muted=True)
    return Cell(f"{mean:,.1f}", "" if sd is None else f"± {sd:,.1f}")


def _known(value: float | None, form: str) -> Cell:
    return Cell(ABSENT, muted=True) if value is None else Cell(form.format(value))


def _thousands(value: float) -> str:
    """Format whole numbers as they are and others to one decimal: 12,000 and 613.5."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def significant(value: float) -> str:
    """Format three significant digits in plain notation, and all digits before the point: 0.0123, 45.6, 1,235."""
    if value >= 100 or value <= 0:
        return f"{value:,.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}"


def contamination_table(overlaps: Mapping[str, Mapping[str, BenchmarkOverlap]]) -> Table:
    """Tabulate which benchmark problems the training corpora hold, corpora by benchmarks."""
    sizes = {name: overlap.problems for of_corpus in overlaps.values() for name, overlap in of_corpus.items()}
    columns = (Cell("Corpus"), *(Cell(name, f"n = {n}") for name, n in sizes.items()))
    rows = tuple(
        (Cell(corpus), *(_overlap(of_corpus[name]) for name in sizes)) for corpus, of_corpus in overlaps.items()
    )
    notes = (
        "Problems of the benchmark that some row of the corpus holds word for word / shares 13 words in a row with "
        "(letters, digits and the signs before numbers count, case and punctuation do not), and how many rows of the "
        "corpus do either.",
        "A hit is not proof, as problems share phrases; and without one, text may still be shared: a paraphrase shares "
        "no 13 words, and problems of fewer words are looked for whole only.",
    )
    return Table("Benchmark problems in the training corpora", columns, rows, notes)


def _overlap(overlap: BenchmarkOverlap) -> Cell:
    if not overlap.rows:
        return Cell("0 / 0", muted=True)
    found = f"{len(overlap.exact):,} / {len(overlap.gram13):,}"
    return Cell(found, f"{overlap.rows:,} row{'s' if overlap.rows > 1 else ''}")


def protocols_table(inputs: Inputs) -> Table | None:
    """Tabulate the average accuracy of each arm by every protocol; None if the results name no protocol."""
    protocol = inputs.base.protocol
    if protocol is None:
        return None
    arms = {BASE: [inputs.base], **inputs.arms}
    others = [name for name in PROTOCOLS if name != protocol]
    there = [
        protocol,
        *(name for name in others if any(_average(models, name) is not None for models in arms.values())),
    ]
    rows = tuple((Cell(arm), *(_share(_average(models, name)) for name in there)) for arm, models in arms.items())
    columns = (Cell("Arm"), *(Cell(name, "counts in all other tables" if name == protocol else "") for name in there))
    notes = (
        "Average accuracy (%), mean over seeds, of the same answers. "
        + "; ".join(PROTOCOLS[name] for name in there)
        + ".",
    )
    return Table("The answers by each protocol", columns, rows, notes)


def _average(models: Sequence[EvaluatedModel], protocol: str) -> float | None:
    scores = [result.protocols.get(protocol) for model in models for result in model.benchmarks.values()]
    known = [score.accuracy for score in scores if score is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None


def _share(accuracy: float | None) -> Cell:
    return Cell(ABSENT, muted=True) if accuracy is None else Cell(percent(accuracy))
