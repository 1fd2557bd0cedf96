"""What the report knows of a training corpus: what filtering left of it, and how the untrained student finds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from micota_fast.alignment.results import Alignment, Distribution
from micota_fast.common.schema import load
from micota_fast.corpus.results import CorpusCounts
from micota_fast.errors import InputError


@dataclass(frozen=True)
class Corpus:
    """One corpus as it was trained on: its counts.json and its alignment in one, see `CorpusCounts` and `Alignment`.

    Counts of the filter are None for a corpus that was not generated and filtered. What an alignment measures is None
    or empty without one, or if an earlier version made it.
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
    document_nll: Distribution | None
    dropped: int | None
    nats_per_answer: Distribution | None
    departures_per_answer: Distribution | None
    rank_surprisal_ratio: float | None
    top1: float | None
    by_position: tuple[float | None, ...]
    by_step: tuple[float, ...]
    unlikely: dict[str, float]
    markers_per_1k: float | None
    own_overlap: float | None


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
    counts = load(CorpusCounts, Path(files["counts"])) if "counts" in files else None
    alignment = load(Alignment, Path(files["alignment"])) if "alignment" in files else None
    # The student's tokens measure all corpora alike, whoever wrote them.
    measured = alignment or counts
    assert measured is not None  # one of the two files is named
    learnability = alignment.learnability if alignment else None
    return Corpus(
        total=counts.total if counts else None,
        accepted=counts.accepted if counts else None,
        rejected=counts.rejected if counts else {},
        mean_tokens=measured.tokens.mean,
        median_tokens=measured.tokens.p50,
        lengths=measured.lengths,
        student_tokens=alignment is not None,
        perplexity=alignment.perplexity if alignment else None,
        document_nll=alignment.document_nll if alignment else None,
        dropped=alignment.dropped if alignment else None,
        nats_per_answer=learnability.nats_per_answer if learnability else None,
        departures_per_answer=learnability.departures_per_answer if learnability else None,
        rank_surprisal_ratio=learnability.rank_surprisal_ratio if learnability else None,
        top1=learnability.top1 if learnability else None,
        by_position=alignment.by_position if alignment else (),
        by_step=tuple(step.nll for step in alignment.by_step) if alignment else (),
        unlikely=alignment.unlikely if alignment else {},
        markers_per_1k=alignment.markers.total if alignment and alignment.markers else None,
        own_overlap=alignment.own_overlap.mean if alignment and alignment.own_overlap else None,
    )
