"""Two tokenizers that must cut the same answers into the same tokens: the scoring model's and the student's.

Ids stand for themselves if both tokenizers have the same token there. One pair of special tokens may differ: those that
end a turn, which the two models' templates choose (`<｜end▁of▁sentence｜>` and `<|im_end|>`, say).
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from micota_fast.chat.encoding import Chat
from micota_fast.errors import InputError

ABSENT = -1  # in place of the id of a token that the student does not have


class Agreement:
    """The table from the scoring model's ids to the student's.

    Args:
        teacher: of the scoring model.
        student: of the model that will be trained; None: it has the teacher's tokenizer.

    Attributes:
        special: the teacher's token that ends a turn -> the student's; empty: they are the same.
        unknown: number of the teacher's ids that the student does not have.
    """

    def __init__(self, teacher: Chat, student: Chat | None) -> None:
        self._teacher, self._student = teacher, student or teacher
        self.special: dict[str, str] = {}
        self._ids = np.arange(teacher.vocab_size, dtype=np.int32)
        if student is None:
            self.unknown = 0
            return
        ours, theirs = (chat.tokenizer.library.get_vocab(with_added_tokens=True) for chat in (teacher, student))
        # Rows of the embedding beyond the tokenizer's last token are no tokens, so the student does not have them.
        self._ids[:] = ABSENT
        for token, i in ours.items():
            if theirs.get(token) == i and i < min(teacher.vocab_size, student.vocab_size):
                self._ids[i] = i
        end, students_end = teacher.end_of_turn_id, student.end_of_turn_id
        if end is not None and students_end is not None and end != students_end:
            self._ids[self._ids == students_end] = ABSENT  # the teacher ends nothing with it, and no id may come twice
            self._ids[end] = students_end
            self.special = {teacher.token(end): student.token(students_end)}
        self.unknown = int((self._ids == ABSENT).sum())

    @property
    def sha256(self) -> str:
        """Hex digest of the table: two students whose answers have the same tokens may differ in others."""
        return hashlib.sha256(self._ids.astype("<i4").tobytes()).hexdigest()

    def to_student(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the student's ids of the teacher's, `ABSENT` for tokens that the student does not have."""
        return self._ids[ids]

    def check(self, teachers: NDArray[np.int32], students: NDArray[np.int32], where: str) -> None:
        """See that an answer is the same tokens to both.

        Args:
            teachers: its ids by the scoring model's tokenizer.
            students: its ids by the student's.
            where: of the row, which opens the message.

        Raises:
            InputError: naming the first position that differs, and both tokens.
        """
        known = self.to_student(teachers)
        n = min(len(known), len(students))
        differs = np.flatnonzero(known[:n] != students[:n])
        if not len(differs) and len(known) == len(students):
            return
        place = int(differs[0]) if len(differs) else n
        raise InputError(
            f"{where}: token {place} of the answer is {_named(self._teacher, teachers, place)} to the scoring model "
            f"and {_named(self._student, students, place)} to the student: their tokenizers cut this text differently, "
            f"so the scores of one mean nothing to the other; score with a model that has the student's tokenizer"
        )


def _named(chat: Chat, ids: NDArray[np.int32], place: int) -> str:
    if place >= len(ids):
        return "nothing (its text has ended)"
    return f"{chat.token(int(ids[place]))!r} (id {ids[place]})"
