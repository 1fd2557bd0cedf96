"""The log-probabilities of generated answers: kept with the rows while a run lasts, and in a store once it ends."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from micota_fast.common.json_io import as_read_back, parse_json
from micota_fast.common.records import encode_row
from micota_fast.errors import InputError
from micota_fast.generation.scores import Scores, decode_scores, encode_scores
from micota_fast.sources.top_logprobs import TopLogprobs, TopLogprobsWriter, journal_of

_IDS, _SCORES = "completion_ids", "scores"  # keys of a journal's row that the finished row does not have


def scored_fields(ids: list[int], scores: Scores) -> dict[str, Any]:
    """Return what the journal keeps next to a row's own fields."""
    return {_IDS: ids, _SCORES: encode_scores(scores)}


def without_scores(line: bytes) -> bytes:
    """Return a line of the journal as the finished file has it."""
    row = parse_json(line, "a row of the journal")
    return encode_row({key: value for key, value in row.items() if key not in (_IDS, _SCORES)})


def write_store(folder: Path, top_k: int, made_by: Mapping[str, Any], lines: Iterable[bytes]) -> None:
    """Write the scores of the rows of a journal; answers that were given up on have none.

    Raises:
        InputError: the folder belongs to other completions, or cannot be written.
    """
    with TopLogprobsWriter(folder, top_k, made_by) as store:
        for line in lines:
            row = parse_json(line, "a row of the journal")
            key = row["id"], row["sample"]
            if _SCORES in row and key not in store:  # a run killed while it wrote the store has left it
                ids = row[_IDS]
                store.append(key, ids, *decode_scores(row[_SCORES], len(ids), top_k))


def check_no_store(folder: Path, out: Path) -> None:
    """See that no store is left where that of answers yet to be generated goes.

    Raises:
        InputError: there is one, or what a writer of one that was killed has left.
    """
    for place in (folder, journal_of(folder)):
        if place.exists():
            raise InputError(
                f"{place} belongs to another run: its answers are no longer complete in {out}; delete it to "
                f"start over, or write elsewhere"
            )


def check_store(folder: Path, out: Path, made_by: Mapping[str, Any]) -> None:
    """See that a finished file's store is there, whole, and of these completions.

    Raises:
        InputError: it is not.
    """
    if not folder.exists():
        raise InputError(f"{folder} is missing next to {out}; put it back, or delete {out} to generate both again")
    store = TopLogprobs(folder)
    if store.made_by != as_read_back(made_by):
        raise InputError(
            f"{folder} does not belong to {out}; put the right one back, or delete both to generate them again"
        )
    store.verify()
