"""The prompts of a generation: made of the problems, checked before the first is sent, made again when they are."""

import asyncio
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from micota_fast.chat.encoding import Chat
from micota_fast.chat.tokenizer import TextError
from micota_fast.common.json_io import read_json_if_there, write_json
from micota_fast.errors import InputError
from micota_fast.generation.problem_file import ProblemFile

OFFENDERS_NAMED = 3
CHECKED_AT_ONCE = 1024
KEPT = 1024  # prompts: the samples of a problem follow one another


class Prompts:
    """The prompt of each problem of a file.

    Attributes:
        problems: the file.
        chat: the tokenizer and template that make them.
        problem: the problem of an ordinal.
        ids: the ids of its prompt.
    """

    def __init__(self, problems: ProblemFile, chat: Chat) -> None:
        self.problems, self.chat = problems, chat
        self.problem = lru_cache(maxsize=KEPT)(problems.__getitem__)
        self.ids = lru_cache(maxsize=KEPT)(self._encode)

    def _encode(self, problem: int) -> list[int]:
        """The ids of a problem's prompt."""
        return self.chat.encode_prompt(self.problem(problem).problem)

    async def check(self, longest: int, context_length: int, max_new_tokens: int, checked: Path) -> None:
        """See that every prompt can be sent; that may take minutes, in which the event loop turns and can be stopped.

        Args:
            longest: prompt that the servers take, tokens.
            context_length: the servers', tokens.
            max_new_tokens: of an answer.
            checked: a file that says so where an earlier run has done it; it must go where model or problems change.

        Raises:
            InputError: naming the first problems whose prompts cannot be sent; or the context is another than that of
                an earlier run, so that answers of one corpus would be cut off at two lengths.
        """
        limits = {"vocab_size": self.chat.vocab_size, "longest": longest, "context_length": context_length}
        earlier = read_json_if_there(checked)
        if earlier == limits:
            return
        bad: list[str] = []
        number = most_ids = 0
        for start in range(0, len(self.problems), CHECKED_AT_ONCE):
            await asyncio.sleep(0)
            for problem_id, ids, refusal in self._some(start, min(start + CHECKED_AT_ONCE, len(self.problems))):
                most_ids = max(most_ids, len(ids))
                refusal = refusal or self._unsendable(ids, longest, context_length)
                if refusal is not None:
                    number += 1
                    if len(bad) < OFFENDERS_NAMED:
                        bad.append(f"problem {problem_id!r}: {refusal}")
        if bad:
            named = "; ".join(bad) + ("; ..." if number > OFFENDERS_NAMED else "")
            raise InputError(f"{number} of {len(self.problems)} prompts cannot be sent: {named}")
        before = context_length if earlier is None else earlier.get("context_length")
        if type(before) is not int:
            raise InputError(f"{checked}: key 'context_length' must be a whole number, not {before!r}")
        if before != context_length and most_ids + max_new_tokens + 1 > min(before, context_length):
            raise InputError(
                f"the servers' context is {context_length} tokens and was {before} when the first answers were made: "
                f"answers of one corpus would be cut off at two lengths; start servers as before, or lower "
                f"`max_new_tokens` and start over"
            )
        write_json(checked, limits)

    def _some(self, start: int, end: int) -> Iterator[tuple[str, Sequence[int], str | None]]:
        """(problem id, ids, why the prompt cannot be made) of problems start to end - 1, tokenised together."""
        some = [self.problems[i] for i in range(start, end)]
        texts: list[str] = []
        refusals: list[str | None] = []
        for problem in some:
            try:
                texts.append(self.chat.render(self.chat.prompt_messages(problem.problem), True))
                refusals.append(None)
            except InputError as error:
                texts.append("")
                refusals.append(str(error))
        while True:
            try:
                encoded = self.chat.tokenizer.encode(texts)
                break
            except TextError as error:
                texts[error.index], refusals[error.index] = "", str(error)
        for problem, ids, refusal in zip(some, encoded, refusals, strict=True):
            yield problem.id, ids.tolist(), refusal

    def _unsendable(self, ids: Sequence[int], longest: int, context_length: int) -> str | None:
        # An id outside the vocabulary kills an SGLang server.
        if max(ids, default=0) >= self.chat.vocab_size:
            return (
                f"its prompt has token id {max(ids)}; the model knows only {self.chat.vocab_size}: "
                f"the tokenizer does not belong to this checkpoint"
            )
        if len(ids) > longest:
            return (
                f"its prompt of {len(ids)} tokens leaves no room for an answer in "
                f"the server's context of {context_length}"
            )
        return None
