"""The report's numbers as CSV, unrounded: fractions where the tables show percent, empty where there is none."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

from micota_fast.report.corpora import Corpus
from micota_fast.report.inputs import Overlap
from micota_fast.report.learnability import PARTS_BELOW
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


def corpora_csv(corpora: Mapping[str, Corpus], arms: Mapping[str, Arm]) -> str:
    """One row a corpus. Tokens are the student's where `student_tokens`, else the writer's; NLL in nats a token; shares
    and accuracy are fractions. `arms`: corpus -> the arm that was trained on it."""
    rows = []
    for name, corpus in corpora.items():
        row: list[Any] = [name, corpus.total, corpus.accepted, corpus.median_tokens, corpus.mean_tokens]
        row += [corpus.student_tokens, corpus.perplexity, *(corpus.document_nll or [None] * 3), corpus.dropped]
        for spread in (corpus.nats_per_answer, corpus.departures_per_answer):
            row += astuple(spread) if spread else [None] * 5
        row += [corpus.rank_surprisal_ratio, *(corpus.unlikely.get(p) for p in PARTS_BELOW)]
        row += [corpus.markers_per_1k, corpus.own_overlap, arms[name].average.mean if name in arms else None]
        rows.append(row)
    heads = ["corpus", "completions", "accepted", "median_tokens", "mean_tokens", "student_tokens", "perplexity"]
    heads += ["document_nll_p10", "document_nll_p50", "document_nll_p90", "documents_too_long_to_measure"]
    for what in ("nats", "departures"):
        heads += [f"{what}_per_answer_{key}" for key in ("mean", "sd", "p10", "p50", "p90")]
    heads += ["rank_surprisal_ratio", *(f"tokens_below_p_{p}" for p in PARTS_BELOW)]
    return _csv([*heads, "reflection_markers_per_1k", "own_overlap", "arm_accuracy"], rows)


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
