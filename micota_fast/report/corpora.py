"""What the report knows of a training corpus: what filtering left of it, and how the untrained student finds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from micota_fast.errors import InputError
from micota_fast.report.node import Node, parse, read


@dataclass(frozen=True)
class Spread:
    """A distribution over the answers of a corpus: mean, standard deviation and the 10th, 50th and 90th percentile."""

    mean: float
    sd: float
    p10: float
    p50: float
    p90: float


@dataclass(frozen=True)
class Corpus:
    """One corpus as it was trained on.

    Lengths are in tokens; perplexity and NLL (nats per token) are the untrained student's. Counts of the filter are
    None for a corpus that was not generated and filtered; what an alignment would tell is None or empty without one, or
    where an earlier version made it.
    """

    total: int | None
    accepted: int | None
    rejected: dict[str, int]
    mean_tokens: float
    median_tokens: float
    lengths: tuple[int, ...]
    student_tokens: bool
    """Whether lengths are in the student's tokens (from its alignment) or in those of the model that wrote it."""
    perplexity: float | None
    document_nll: tuple[float, float, float] | None
    """p10, p50 and p90 over documents."""
    dropped: int | None
    """Documents that were too long for the alignment, which says nothing of them."""
    nats_per_answer: Spread | None
    """Negative log-likelihood of a whole answer, nats: the learnability score is its mean, less is easier to learn."""
    departures_per_answer: Spread | None
    """Tokens of an answer that are not the student's first choice."""
    rank_surprisal_ratio: float | None
    """Ranks over nats (arXiv 2601.14249)."""
    by_position: tuple[float | None, ...]
    """NLL of each tenth of the answers; None: no answer is long enough for it."""
    by_step: tuple[float, ...]
    """NLL of the answers' first, second... line; the STEPS-th, where there is one, is of all lines from there."""
    unlikely: dict[str, float]
    """Share of the tokens whose probability is below this one, by "0.1" and the like."""
    markers_per_1k: float | None
    """Phrases of reflection for each 1,000 tokens."""
    own_overlap: float | None
    """Share of runs of four words that the student's own answers to the same problem hold."""


def load_corpus(name: str, files: Mapping[str, str]) -> Corpus:
    """Read what the config names of a corpus: its `counts`, its `alignment` or both.

    Raises:
        InputError: neither is named, or a file is absent or malformed; names the file and the key.
    """
    unknown = sorted(set(files) - {"counts", "alignment"})
    if unknown or not files:
        named = f"unknown key '{unknown[0]}'" if unknown else "no file named"
        raise InputError(
            f"report config: corpora.{name}: {named}; give the path of its 'counts', its 'alignment' or both"
        )
    counts = parse(read(Path(files["counts"])), files["counts"]) if "counts" in files else None
    alignment = parse(read(Path(files["alignment"])), files["alignment"]) if "alignment" in files else None
    total = accepted = None
    rejected: dict[str, int] = {}
    if counts is not None:
        total, accepted = counts.count("total"), counts.count("accepted")
        if accepted > total:
            raise InputError(f"{counts.where}: key 'accepted' is {accepted}, more than 'total', {total}")
        reasons = counts.optional_child("rejected")
        rejected = {reason: reasons.count(reason) for reason in reasons.data} if reasons else {}
    # The student's tokens measure all corpora alike, whoever wrote them; an alignment without their distribution
    # (`tokens` a bare total) leaves those of the filter.
    of_student = alignment is not None and (counts is None or isinstance(alignment.data.get("tokens"), dict))
    measured = alignment if alignment is not None and of_student else counts
    assert measured is not None  # one of the two files is named
    tokens = measured.child("tokens")
    told = alignment or Node({}, "")  # nothing that it could complain of is asked below
    spread = told.optional_child("document_nll")
    score, markers = told.optional_child("learnability"), told.optional_child("markers")
    unlikely, own = told.optional_child("unlikely"), told.optional_child("own_overlap")
    return Corpus(
        total=total,
        accepted=accepted,
        rejected=rejected,
        mean_tokens=tokens.number("mean", 0.0),
        median_tokens=tokens.number("p50", 0.0),
        lengths=measured.lengths("lengths"),
        student_tokens=of_student,
        perplexity=alignment.number("perplexity", 1.0) if alignment else None,
        document_nll=(spread.number("p10"), spread.number("p50"), spread.number("p90")) if spread else None,
        dropped=told.optional_count("dropped"),
        nats_per_answer=_spread(score.child("nats_per_answer")) if score else None,
        departures_per_answer=_spread(score.child("departures_per_answer")) if score else None,
        rank_surprisal_ratio=score.number("rank_surprisal_ratio", 0.0) if score else None,
        by_position=told.numbers("by_position"),
        by_step=tuple(step.number("nll", 0.0) for step in told.children("by_step")),
        unlikely={p: unlikely.number(p, 0.0, 1.0) for p in unlikely.data} if unlikely else {},
        markers_per_1k=markers.number("total", 0.0) if markers else None,
        own_overlap=own.number("mean", 0.0, 1.0) if own else None,
    )


def _spread(node: Node) -> Spread:
    return Spread(*(node.number(key, 0.0) for key in ("mean", "sd", "p10", "p50", "p90")))
