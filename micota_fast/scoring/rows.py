"""The rows that are scored, as ids: what is sent to the scoring model, and what the student will be trained on."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.chat.encoding import Chat, Encoded, Segment
from micota_fast.chat.tokenizer import TextError
from micota_fast.common.json_io import parse_json
from micota_fast.common.records import Completion, parse_row
from micota_fast.data.rows import to_messages
from micota_fast.errors import InputError
from micota_fast.scoring.agreement import Agreement
from micota_fast.sources.rows import SourceRow, read_rows

_BATCH_CHARS = 4_000_000  # text tokenised at once


class Key(NamedTuple):
    """What names a row."""

    id: str  # of the problem
    sample: int


@dataclass(frozen=True)
class Rows:
    """R rows of a prompt and an answer, end to end, as `micota train` cuts them.

    Attributes:
        keys: of each row.
        input_ids: int32 [total], the scoring model's ids of prompt and answer.
        offsets: int64 [R+1], where each row begins in `input_ids`.
        prompts: int64 [R], tokens of each prompt, at least 1.
        answer_ids: int32 [answers], the student's ids of the answers, each through its end of turn.
        answer_offsets: int64 [R+1], where each answer begins in `answer_ids`.
    """

    keys: list[Key]
    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompts: NDArray[np.int64]
    answer_ids: NDArray[np.int32]
    answer_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def levels(self) -> NDArray[np.int8]:
        """int8 [R], -1: nobody says which rows are hard."""
        return np.full(len(self), -1, np.int8)

    @property
    def sizes(self) -> NDArray[np.uint32]:
        """uint32 [R], tokens of each row: the longest are scored first."""
        return np.diff(self.offsets).astype(np.uint32)

    def sent(self, row: int) -> list[int]:
        """Return the scoring model's ids of a row, prompt and answer."""
        ids: list[int] = self.input_ids[self.offsets[row] : self.offsets[row + 1]].tolist()
        return ids

    def answer(self, row: int) -> NDArray[np.int32]:
        """Return the student's ids of a row's answer."""
        return self.answer_ids[self.answer_offsets[row] : self.answer_offsets[row + 1]]

    @cached_property
    def sha256(self) -> str:
        """Hex digest of keys and arrays: what is sent, and what the scores are for."""
        digest = hashlib.sha256(repr([tuple(key) for key in self.keys]).encode())
        for array in (self.input_ids, self.offsets, self.prompts, self.answer_ids, self.answer_offsets):
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
        return digest.hexdigest()


class _Texts(NamedTuple):
    where: str
    segments: list[Segment]


def load_rows(source: str, teacher: Chat, student: Chat | None) -> tuple[Rows, Agreement]:
    """Tokenise every row for both models, and see that its answer is the same tokens to both.

    Args:
        source: completions, in any form that `sources.rows.read_rows` reads.
        teacher: of the scoring model.
        student: of the model that will be trained; None: it has the teacher's tokenizer.

    Raises:
        InputError: the file cannot be read or holds no row; or, with file:line, a row is not a completion, its key
            occurs twice, its answer is empty or cannot be trained on, or its tokens differ between the two.
    """
    agreement = Agreement(teacher, student)
    keys: dict[Key, str] = {}
    inputs: list[Encoded] = []
    answers: list[NDArray[np.int32]] = []
    for batch in _batches(source, keys):
        texts = [_texts(row, raw, teacher) for row, raw in batch]
        encoded = _encode(teacher, texts)
        learned = encoded if student is None else _encode(student, [_texts(row, raw, student) for row, raw in batch])
        for (where, _), sent, own in zip(texts, encoded, learned, strict=True):
            _check(sent, teacher, where)
            answer = own.input_ids[own.supervised]
            agreement.check(sent.input_ids[sent.supervised], answer, where)
            inputs.append(sent)
            answers.append(answer)
    if not inputs:
        raise InputError(f"{source}: no rows to score")
    return (
        Rows(
            keys=list(keys),
            input_ids=np.concatenate([ids for ids, _ in inputs]),
            offsets=_offsets([len(ids) for ids, _ in inputs]),
            prompts=np.array([int(np.argmax(supervised)) for _, supervised in inputs], np.int64),
            answer_ids=np.concatenate(answers),
            answer_offsets=_offsets([len(answer) for answer in answers]),
        ),
        agreement,
    )


def _batches(source: str, keys: dict[Key, str]) -> Iterator[list[tuple[SourceRow, dict[str, Any]]]]:
    batch: list[tuple[SourceRow, dict[str, Any]]] = []
    size = 0
    for row in read_rows(source):
        raw = parse_json(row.line, row.where)
        completion = parse_row(Completion, raw, row.where)
        key = Key(completion.id, completion.sample)
        if key in keys:
            raise InputError(f"{row.where}: ({key.id!r}, sample {key.sample}) occurs already at {keys[key]}")
        keys[key] = row.where
        batch.append((row, raw))
        size += len(row.line)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _texts(row: SourceRow, raw: dict[str, Any], chat: Chat) -> _Texts:
    """A row as one model reads it: its prompt and its answer."""
    try:
        segments = chat.segments(to_messages(raw, chat), raw.get("chat_template_kwargs"))
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None
    return _Texts(row.where, segments)


def _encode(chat: Chat, texts: list[_Texts]) -> list[Encoded]:
    try:
        return chat.encode_segments([segments for _, segments in texts])
    except TextError as error:
        raise InputError(f"{texts[error.index].where}: {error}") from None


def _check(encoded: Encoded, chat: Chat, where: str) -> None:
    ids, supervised = encoded
    try:
        chat.check_ids(ids)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if not supervised[1:].any() or supervised[0]:
        raise InputError(f"{where}: there is no prompt that an answer follows, so its first token has no score")


def _offsets(lengths: list[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
