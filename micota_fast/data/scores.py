"""The teacher's log-probabilities of training rows: which rows of a store belong to which tokens of a document."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.chat.encoding import Encoded
from micota_fast.common.fingerprint import of_json
from micota_fast.errors import InputError
from micota_fast.sources.top_logprobs import TopLogprobs, TopLogprobsRow
from micota_fast.sources.top_logprobs_journal import Key


class Place(NamedTuple):
    """Where a document's scored tokens lie: n of them from its token `start` on, in the store under `key`."""

    key: Key
    start: int
    n: int


@dataclass(frozen=True)
class Scores:
    """A store, and the places in it of D documents, in their order."""

    store: TopLogprobs
    vocab_size: int  # of the student: what the teacher knows besides is absent
    own_tokens: bool = False  # training reads the log-probabilities of the text's own tokens alone, and not the K
    places: list[Place] = field(default_factory=list)

    @property
    def top_k(self) -> int:
        """Entries of a token that training reads."""
        return 0 if self.own_tokens else self.store.top_k

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the store and the places in it."""
        return of_json([self.store.fingerprint, self.vocab_size, self.places])

    def place(self, row: Mapping[str, Any], ids: NDArray[np.int32], supervised: NDArray[np.bool_]) -> Place:
        """Find a row's scored tokens among those of its last answer, id by id.

        What the teacher did not score before and after them, such as a template's text and the end of the turn, has
        hard targets alone.

        Args:
            row: with `id`, and `sample` (default 0): its key in the store.
            ids, supervised: the row's tokens, [n].

        Raises:
            InputError: the row has no key or the store none of its name, or the store's tokens are others.
        """
        key = _key(row)
        if key not in self.store:
            raise InputError(
                f"({key[0]!r}, sample {key[1]}) has no score in {self.store.folder}: score these rows, or leave it out"
            )
        scored = self.store[key].token_ids_T
        begin, end = _last_answer(supervised)
        n = len(scored)
        # Of several places the last: what a template adds goes before the text.
        for start in range(end - n, begin - 1, -1):
            if np.array_equal(ids[start : start + n], scored):
                return Place(key, start, n)
        answer = ids[begin:end]
        most = min(n, len(answer))
        differ = np.flatnonzero(answer[:most] != scored[:most])
        if len(differ):
            at = int(differ[0])
            what = f"token {at} of the answer is {answer[at]}, and {scored[at]} in the store"
        else:
            what = f"the answer has {len(answer)} tokens, and {n} in the store"
        raise InputError(
            f"({key[0]!r}, sample {key[1]}) was scored in {self.store.folder} as another text, or by another "
            f"tokenizer: {what}; score these rows again"
        )

    def describe(self, documents: Sequence[Encoded]) -> str:
        """Return a line for the log: how many of the documents' targets have a score."""
        spans = [self.rows_of(d, len(document.input_ids))[0] for d, document in enumerate(documents)]
        scored = sum(span.stop - span.start for span in spans)
        targets = sum(int(document.supervised[1:].sum()) for document in documents)
        what, of = "soft targets", f"with the teacher's {self.top_k} likeliest"
        if self.own_tokens:
            what, of = "reverse KL", "with the teacher's log-probability"
        return (
            f"{what}: {scored:,} of {targets:,} supervised tokens, {of}; the others, such as ends of turns, have hard "
            f"targets"
        )

    def rows_of(self, document: int, length: int) -> tuple[slice, TopLogprobsRow]:
        """Return the positions in a document whose next token is scored, and the rows of the store for them.

        Args:
            document: its number.
            length: its tokens, of which truncation may have left fewer than were scored.
        """
        key, start, n = self.places[document]
        first, last = max(start, 1), min(start + n, length)  # nothing predicts a document's first token
        ids_T, own_T, top_ids_TK, top_logprobs_TK = self.store[key]
        taken = slice(first - start, max(last, first) - start)
        at = slice(first - 1, max(last, first) - 1)
        return at, TopLogprobsRow(ids_T[taken], own_T[taken], top_ids_TK[taken], top_logprobs_TK[taken])


def _key(row: Mapping[str, Any]) -> Key:
    name, sample = row.get("id"), row.get("sample")
    name = str(name) if type(name) is int else name  # as other stages read it
    sample = 0 if sample is None else sample
    if not isinstance(name, str) or type(sample) is not int:
        raise InputError(f"`id` (text) and `sample` (integer) name a row's score, got {name!r:.60} and {sample!r:.60}")
    return name, sample


def _last_answer(supervised: NDArray[np.bool_]) -> tuple[int, int]:
    """First token of the last run of supervised ones, and the token after its last."""
    end = int(np.flatnonzero(supervised)[-1]) + 1
    before = np.flatnonzero(~supervised[:end])
    return (int(before[-1]) + 1 if len(before) else 0), end
