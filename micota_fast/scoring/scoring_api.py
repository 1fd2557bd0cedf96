"""What is asked of SGLang servers for scores: the log-probabilities of the tokens of a text, and no answer to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from micota_fast.common.records import Completion
from micota_fast.errors import InputError
from micota_fast.generation.endpoint import Endpoint
from micota_fast.generation.request import REPLY_BYTES
from micota_fast.generation.schedule import Wanted
from micota_fast.generation.scores import Scores, encode_scores
from micota_fast.generation.sglang_servers import LOGPROB_BYTES, SGLangServers
from micota_fast.scoring.agreement import ABSENT, Agreement
from micota_fast.scoring.reply import read_scores
from micota_fast.scoring.rows import Rows

SPARE = 8  # tokens asked for beyond K, if the student does not have all of the scoring model's
NAMED = 3  # rows in a message


class ScoringApi(SGLangServers):
    """Asks for scores.

    Args:
        rows: what is scored.
        agreement: from the scoring model's ids to the student's.
        top_k: K, tokens kept at each position.
        vocab_size: ids that the scoring model has.
        model: what is served, as the recipe names it.
        checkpoint: its folder.
        request_timeout_s: seconds that one try of a request may take.

    Raises:
        InputError: the model has fewer than `top_k` tokens.
    """

    def __init__(
        self,
        rows: Rows,
        agreement: Agreement,
        top_k: int,
        vocab_size: int,
        model: str,
        checkpoint: Path,
        request_timeout_s: float,
    ) -> None:
        super().__init__(model, checkpoint, request_timeout_s)
        self._rows, self._agreement, self._top_k, self._vocab_size = rows, agreement, top_k, vocab_size
        if top_k > vocab_size - agreement.unknown:
            raise InputError(
                f"`top_k` is {top_k}; {model} has only {vocab_size - agreement.unknown} tokens that count here"
            )
        self._asked = min(top_k + min(SPARE, agreement.unknown), vocab_size)

    async def check_prompts(self, up: Sequence[Endpoint], folder: Path) -> None:
        """See that every row fits the context of all servers that are up.

        Raises:
            InputError: naming the first rows that do not.
        """
        longest = self.take_context(up)
        if len(over := np.flatnonzero(self._rows.sizes > longest)):
            named = "; ".join(f"{self._name(row)} of {self._rows.sizes[row]} tokens" for row in over[:NAMED].tolist())
            raise InputError(
                f"{len(over)} of {len(self._rows)} rows are longer than the {longest} tokens that the servers take: "
                f"{named}{'; ...' if len(over) > NAMED else ''}; filter by `max_tokens`, or serve a longer context"
            )

    async def answer(
        self, endpoint: Endpoint, session: aiohttp.ClientSession, wanted: Wanted
    ) -> tuple[Completion, dict[str, Any]]:
        """Return what is known of a row without its texts, and its scores in the student's ids.

        Raises:
            RetryableError: another try may succeed.
            InputError: the server refuses this request.
        """
        ids, first = self._rows.sent(wanted.problem), int(self._rows.prompts[wanted.problem])
        body = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": first - 1,  # the first place has no score: nothing that is returned precedes it
            "top_logprobs_num": self._asked,
        }
        most_bytes = REPLY_BYTES + (len(ids) - first + 1) * (self._asked + 1) * LOGPROB_BYTES
        try:
            answer = await self.post(endpoint, session, body, most_bytes)
        except InputError as error:
            raise InputError(f"{self._name(wanted.problem)}: {error}") from None
        scores = self.known_to_student(read_scores(answer, ids[first:], self._asked, self._vocab_size))
        key = self._rows.keys[wanted.problem]
        row = Completion(
            id=key.id,
            sample=key.sample,
            problem="",
            answer="",
            completion="",
            finish_reason="scored",
            prompt_tokens=first,
            completion_tokens=len(ids) - first,
            seed=None,
        )
        return row, {"scores": encode_scores(scores)}

    def aborted(self, wanted: Wanted) -> Completion:
        """Refuse to give a row up: training could not do without its scores.

        Raises:
            InputError: naming it.
        """
        raise InputError(
            f"{self._name(wanted.problem)} was never scored, though the servers answer others; see their logs, and "
            f"run the same command again (what was scored is kept)"
        )

    def known_to_student(self, scores: Scores) -> Scores:
        """Return the K likeliest tokens that the student has, by its ids; what is missing of K is ABSENT, with -inf."""
        ids_TA = self._agreement.to_student(scores.ids)
        order_TA = np.argsort(ids_TA == ABSENT, axis=1, kind="stable")[:, : self._top_k]
        ids_TK = np.take_along_axis(ids_TA, order_TA, 1)
        logprobs_TK = np.take_along_axis(scores.logprobs, order_TA, 1)
        return Scores(scores.token_logprobs, ids_TK, np.where(ids_TK == ABSENT, -np.inf, logprobs_TK))

    def _name(self, row: int) -> str:
        key = self._rows.keys[row]
        return f"row {row + 1} ({key.id!r}, sample {key.sample})"
