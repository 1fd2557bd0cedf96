"""The report's numbers as CSV, unrounded: fractions where the tables show percent, empty where there is none."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from micota_fast.report.inputs import Corpus, Overlap
from micota_fast.report.summary import Arm, Summary

AVERAGE = "Average"


def accuracy_csv(summary: Summary, claims: Mapping[str, float]) -> str:
    """One row an arm and benchmark, and one an arm for the average. `claims`: arm -> claimed Δ of it, in points."""
    rows: list[list[Any]] = []
    for arm in summary.arms:
        every = [*arm.benchmarks.items(), (AVERAGE, arm.average)]
        for name, estimate in every:
            average = name is AVERAGE
            delta = arm.delta if average else arm.deltas.get(name)
            row: list[Any] = [arm.name, name, None if average else summary.problems[name], len(estimate.seeds)]
            row += [estimate.mean, estimate.sd, estimate.low, estimate.high]
            if delta is None:
                row += [None] * 6
            else:
                row += [delta.value, delta.low, delta.high, delta.paired, delta.p, delta.p_holm]
            claim = claims.get(arm.name) if average else None
            rows.append([*row, None if claim is None else claim / 100])
    heads = ["arm", "benchmark", "problems", "seeds", "accuracy", "sd_over_seeds", "low95", "high95", "delta"]
    return _csv([*heads, "delta_low95", "delta_high95", "paired", "p", "p_holm", "delta_claimed"], rows)


def corpora_csv(corpora: Mapping[str, Corpus]) -> str:
    """One row a corpus. Tokens are the student's where `student_tokens`, else the writer's; NLL in nats a token."""
    rows = []
    for name, corpus in corpora.items():
        counts = [corpus.total, corpus.accepted, corpus.median_tokens, corpus.mean_tokens, corpus.student_tokens]
        rows.append([name, *counts, corpus.perplexity, *(corpus.document_nll or [None] * 3)])
    heads = ["corpus", "completions", "accepted", "median_tokens", "mean_tokens", "student_tokens", "perplexity"]
    return _csv([*heads, "document_nll_p10", "document_nll_p50", "document_nll_p90"], rows)


def contamination_csv(overlaps: Mapping[str, Mapping[str, Overlap]]) -> str:
    """One row a corpus and benchmark."""
    rows = [
        [corpus, name, overlap.problems, overlap.exact, overlap.shared, overlap.rows]
        for corpus, of_corpus in overlaps.items()
        for name, overlap in of_corpus.items()
    ]
    return _csv(["corpus", "benchmark", "problems", "word_for_word", "sharing_13_words", "corpus_rows"], rows)


def answers_csv(arms: Sequence[Arm]) -> str:
    """One row an arm: how its answers look."""
    heads = ["arm", "mean_tokens", "mean_tokens_sd_over_seeds", "truncated", "no_answer", "timeout"]
    answers = [(arm.name, arm.answers) for arm in arms]
    rows = [[name, of.mean_tokens, of.mean_tokens_sd, of.truncated, of.no_answer, of.timeout] for name, of in answers]
    return _csv(heads, rows)


def _csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return text.getvalue()
