"""Training rows -> token arrays with a loss mask, every row accounted for."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from micota_fast.chat.encoding import Chat, Encoded, Segment
from micota_fast.chat.thought_counts import ThoughtCounts
from micota_fast.chat.tokenizer import TextError
from micota_fast.common.json_io import parse_json
from micota_fast.common.records import write_rows
from micota_fast.data.rows import format_name, to_messages
from micota_fast.data.scores import Place, Scores
from micota_fast.errors import InputError
from micota_fast.sources.columns import renamed
from micota_fast.sources.rows import SourceRow, read_rows

EXAMPLE_PARTS, EXAMPLE_CHARS = 4, 600  # of the row that the log shows
_BATCH_CHARS = 4_000_000  # text tokenised at once: about 1M tokens, some 100 MB in the tokenizer's own form


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, end to end: document d is `input_ids[offsets[d]:offsets[d + 1]]`.

    rows = len(self) + dropped + rejected.
    """

    input_ids: NDArray[np.int32]  # [total]
    supervised: NDArray[np.bool_]  # [total]; True where the token is the assistant's own
    offsets: NDArray[np.int64]  # [D+1]
    rows: int  # lines of the file that are not blank
    dropped: int  # over the limit: left out, or with no supervised token left once truncated
    truncated: int  # over the limit and kept, cut at its end
    rejected: int  # bad rows set aside
    rejects_path: Path | None  # where they lie; None: none
    about: tuple[str, ...] = ()  # lines for the log: formats of the rows, their thoughts, one example
    weights: NDArray[np.float32] | None = None  # [D], factor of the loss of each document's tokens; None: all 1
    scores: Scores | None = None  # the teacher's, of each document; None: targets are hard

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, [D]."""
        return np.diff(self.offsets)

    @cached_property
    def n_targets(self) -> NDArray[np.int64]:
        """Supervised tokens of each document that something precedes, which is how many terms its loss has, [D]."""
        # Document by document: numpy's reduceat takes 28 ns a token for this, count_nonzero a hundredth of that.
        counts = (np.count_nonzero(self.supervised[a:b]) for a, b in pairwise(self.offsets.tolist()))
        return np.fromiter(counts, np.int64, len(self)) - self.supervised[self.offsets[:-1]]

    @cached_property
    def weighted_targets(self) -> NDArray[np.int64] | NDArray[np.float64]:
        """`n_targets` times `weights`, [D]: what a document counts in its step's normalizer."""
        return self.n_targets if self.weights is None else self.n_targets * self.weights.astype(np.float64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all arrays and scores: equal exactly where training sees the same documents."""
        digest = hashlib.sha256()
        arrays = (self.input_ids, self.supervised, self.offsets)
        for array in arrays if self.weights is None else (*arrays, self.weights):
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
        if self.scores is not None:
            digest.update(self.scores.fingerprint.encode())
        return digest.hexdigest()


@dataclass
class _Row:
    source: SourceRow
    segments: list[Segment]
    thoughts: ThoughtCounts
    weight: float
    parsed: dict[str, Any]


def load_documents(
    path: str | Path,
    chat: Chat,
    max_doc_tokens: int,
    over_length: Literal["drop", "truncate"] = "drop",
    skip_bad_rows: bool = False,
    rejects_path: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    scores: Scores | None = None,
) -> Documents:
    """Tokenise every row (formats: `micota_fast.data.rows`) of a file or of a dataset of the Hub, in file order.

    A row's key `weight` (default 1) is the factor of its tokens' loss. It must be positive: a row that is to teach
    nothing has no place in the file.

    Args:
        max_doc_tokens: longest document. A longer one is left out ("drop") or loses its end ("truncate", which also
            takes its end-of-turn token, so the model does not learn to stop there).
        skip_bad_rows: set bad rows aside in `rejects_path` (line number, reason, the row) instead of raising.
        rejects_path: None stands for `<path>.bad_rows.jsonl`. Written only where rows were rejected; what an earlier
            call left there is removed.
        columns: our key -> the file's, as in `sources.columns.renamed`.
        scores: the teacher's of every row, without places yet: they are found by `id` and `sample` (`Scores.place`).

    Raises:
        InputError: the file cannot be read, holds no usable row, or (with file:line) a row is not a JSON object, is of
            no accepted format, cannot be rendered by the template as it stands, has no supervised token, has a
            token outside the model's vocabulary, its weight is not a positive float32, or `scores` lack it or are of
            other tokens.
    """
    if max_doc_tokens < 2:
        raise InputError(f"max_doc_tokens must be at least 2 (a token and the next one), not {max_doc_tokens}")
    aside = Path(f"{path}.bad_rows.jsonl" if rejects_path is None else rejects_path)
    rejects: list[dict[str, Any]] = []

    def reject(row: SourceRow, reason: InputError) -> None:
        if not skip_bad_rows:
            raise InputError(f"{row.where}: {reason}") from None
        text = row.line.decode("utf-8", "replace").rstrip("\r\n")
        rejects.append({"line": row.number, "reason": str(reason), "row": text})

    n_rows = dropped = truncated = 0
    documents: list[Encoded] = []
    weights: list[float] = []
    thoughts = ThoughtCounts()  # of the documents

    def tokenise(batch: list[_Row]) -> None:
        nonlocal dropped, truncated
        while True:
            try:
                encoded = chat.encode_segments([row.segments for row in batch])
                break
            except TextError as reason:
                tokenise(batch[: reason.index])  # an earlier line may hold an earlier error
                reject(batch[reason.index].source, reason)
                batch = batch[reason.index + 1 :]
        for row, (ids, supervised) in zip(batch, encoded, strict=True):
            place: Place | None = None
            try:
                chat.check_ids(ids)
                if not supervised[1:].any():
                    raise InputError("no supervised token: no token of the assistant's text follows another token")
                place = None if scores is None else scores.place(row.parsed, ids, supervised)
            except InputError as reason:
                reject(row.source, reason)
                continue
            if len(ids) > max_doc_tokens:
                ids, supervised = ids[:max_doc_tokens].copy(), supervised[:max_doc_tokens].copy()
                if over_length == "drop" or not supervised[1:].any():
                    dropped += 1
                    continue
                truncated += 1
            documents.append(Encoded(ids, supervised))
            thoughts.add(row.thoughts)
            weights.append(row.weight)
            if scores is not None and place is not None:
                scores.places.append(place)

    batch: list[_Row] = []
    chars = 0
    formats: Counter[str] = Counter()
    for source in read_rows(path):
        n_rows += 1
        its_thoughts = ThoughtCounts()
        try:
            parsed, segments = _read(source, chat, columns or {}, its_thoughts)
            formats[format_name(parsed, columns or ())] += 1
            weight = _weight(parsed)
        except InputError as reason:
            if not skip_bad_rows:
                tokenise(batch)  # an earlier line may hold an earlier error
            reject(source, reason)
            continue
        batch.append(_Row(source, segments, its_thoughts, weight, parsed))
        chars += sum(len(segment.text) for segment in segments)
        if chars >= _BATCH_CHARS:
            tokenise(batch)
            batch, chars = [], 0
    tokenise(batch)

    if rejects:
        rejects.sort(key=lambda reject: reject["line"])
        write_rows(aside, rejects)
    elif skip_bad_rows:
        aside.unlink(missing_ok=True)
    if not n_rows:
        raise InputError(f"{path}: the file has no rows")
    if not documents:
        raise InputError(
            f"{path}: no usable row: {n_rows} rows, {dropped} dropped for being over {max_doc_tokens} tokens "
            f"(`max_doc_tokens`, or else `pack_tokens`), {len(rejects)} rejected"
            + (f" (see {aside})" if rejects else "")
        )
    return Documents(
        input_ids=np.concatenate([ids for ids, _ in documents]),
        supervised=np.concatenate([mask for _, mask in documents]),
        offsets=np.concatenate([[0], np.cumsum([len(ids) for ids, _ in documents])]).astype(np.int64),
        rows=n_rows,
        dropped=dropped,
        truncated=truncated,
        rejected=len(rejects),
        rejects_path=aside if rejects else None,
        about=(
            "rows: " + ", ".join(f"{number:,} {name}" for name, number in formats.most_common()),
            *thoughts.lines(),
            *(() if scores is None else [scores.describe(documents)]),
            *_example(documents[0], chat),
        ),
        scores=scores,
        weights=None if all(weight == 1 for weight in weights) else np.array(weights, np.float32),
    )


def check_first_row(path: str | Path, chat: Chat, columns: Mapping[str, str]) -> None:
    """Read the first row as `load_documents` does, without tokenising it: often its fault is that of all rows.

    Raises:
        InputError: the file cannot be read, has no rows, or (with file:line) the first one is refused.
    """
    source = next(read_rows(path), None)
    if source is None:
        raise InputError(f"{path}: the file has no rows")
    try:
        _read(source, chat, columns, ThoughtCounts())
    except InputError as reason:
        raise InputError(f"{source.where}: {reason}") from None


def _read(
    source: SourceRow, chat: Chat, columns: Mapping[str, str], thoughts: ThoughtCounts
) -> tuple[dict[str, Any], list[Segment]]:
    """A row with our keys, and its text in what is learned and what is not."""
    parsed = renamed(parse_json(source.line, ""), columns)
    return parsed, chat.segments(to_messages(parsed, chat, columns), _template_options(parsed), thoughts)


def _example(document: Encoded, chat: Chat) -> list[str]:
    """Decode the first document, a line for each part that is or is not learned."""
    ids, mask = document
    ends = [*(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
    lines, start = [], 0
    for end in ends[:EXAMPLE_PARTS]:
        text = chat.decode(ids[start:end].tolist(), skip_special_tokens=False)
        half = EXAMPLE_CHARS // 2
        shown = text if len(text) <= EXAMPLE_CHARS else f"{text[:half]} ... {text[-half:]}"
        lines.append(f"  {'learned' if mask[start] else 'prompt '}: {shown!r}")
        start = end
    return ["first row, as it is trained on:", *lines]


def _template_options(row: dict[str, Any]) -> dict[str, Any]:
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise InputError(f"key 'chat_template_kwargs' must be an object, got {options!r:.60}")
    # In Parquet every row has the keys of all, and null where it has none.
    return {key: value for key, value in options.items() if value is not None}


def _weight(row: dict[str, Any]) -> float:
    weight = row.get("weight")
    if weight is None:
        return 1.0
    low, high = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not low <= weight <= high:
        raise InputError(
            f"key 'weight' must be a number from {low:.2g} to {high:.2g}, got {weight!r:.60}; "
            f"leave out a row that is to teach nothing"
        )
    return float(np.float32(weight))
