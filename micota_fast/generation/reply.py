"""What a server's answer to one request holds, once it is seen that it can be the answer to that request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from micota_fast.generation.endpoint import SHOWN_CHARACTERS, RetryableError
from micota_fast.generation.scores import Scores, read_places


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or the piece of one that one request has brought."""

    text: str
    reason: str  # "stop" or "length"
    tokens: int
    ids: list[int]  # empty where the server gives none
    scores: Scores | None  # of `ids` and what was inserted before them; None: not asked for, or no ids


def read_reply(
    answer: dict[str, Any], max_new_tokens: int, vocab_size: int, top_logprobs: int, inserted: Sequence[int] = ()
) -> Reply:
    """Check an answer of /generate against what was asked.

    Args:
        answer: as decoded.
        max_new_tokens: that were asked for.
        vocab_size: ids that the model has.
        top_logprobs: log-probabilities that were asked for at each place; 0: none.
        inserted: ids at the end of the prompt whose log-probabilities were asked for as well.

    Raises:
        RetryableError: it has not SGLang's shape, the server ended it with an error, or its numbers cannot be: more
            tokens than were asked for, ids that are not in the vocabulary or are not as many as it counts, or what
            `read_places` refuses.
    """
    try:
        meta = answer["meta_info"]
        text, tokens, ids = answer["text"], meta["completion_tokens"], answer.get("output_ids") or []
        reason = meta["finish_reason"]["type"]
        if type(text) is not str or type(tokens) is not int or type(ids) is not list:
            raise TypeError(f"{tokens!r:.60} tokens, of text {text!r:.60}, ids {ids!r:.60}")
    except (AttributeError, KeyError, TypeError) as error:
        raise RetryableError(f"an answer that is not SGLang's: {error!r}") from None
    if reason not in ("stop", "length"):
        raise RetryableError(f"the server ended the answer with {str(meta['finish_reason'])[:SHOWN_CHARACTERS]}")
    if not 0 <= tokens <= max_new_tokens:
        raise RetryableError(f"an answer of {tokens:,} tokens, though at most {max_new_tokens:,} were asked for")
    if ids and len(ids) != tokens:
        raise RetryableError(f"an answer with {len(ids)} `output_ids`, but a count of {tokens} tokens")
    _check_ids(ids, vocab_size)
    if not top_logprobs or len(ids) != tokens:
        return Reply(text, reason, tokens, ids, None)
    try:
        own, places = meta["output_token_logprobs"], meta["output_top_logprobs"]
        if inserted:  # the first place is that of the id before them
            own, places = meta["input_token_logprobs"][1:] + own, meta["input_top_logprobs"][1:] + places
    except (KeyError, TypeError) as error:
        raise RetryableError(f"an answer without the log-probabilities asked for: {error!r}") from None
    return Reply(text, reason, tokens, ids, read_places([*inserted, *ids], own, places, top_logprobs, vocab_size))


def _check_ids(ids: list[Any], vocab_size: int) -> None:
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise RetryableError(f"an answer with the token id {i!r:.60}; the model has {vocab_size} ids")
