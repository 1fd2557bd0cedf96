"""What a server's answer to one request holds, once it is seen that it can be the answer to that request."""

from dataclasses import dataclass
from typing import Any

from micota_fast.generation.endpoint import SHOWN_CHARACTERS, RetryableError


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or the piece of one that one request has brought."""

    text: str
    reason: str  # "stop" or "length"
    tokens: int
    ids: list[int]  # empty where the server gives none
    top_logprobs: list[Any]  # [place] of [k] (token id, log-probability)


def read_reply(answer: dict[str, Any], max_new_tokens: int, vocab_size: int, top_logprobs: int) -> Reply:
    """Check an answer of /generate against what was asked.

    Args:
        answer: as decoded.
        max_new_tokens: that were asked for.
        vocab_size: ids that the model has.
        top_logprobs: log-probabilities that were asked for at each place.

    Raises:
        RetryableError: it has not SGLang's shape, the server ended it with an error, or its numbers cannot be: more
            tokens than were asked for, ids that are not in the vocabulary or are not as many as it counts.
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
        raise RetryableError(f"an answer that counts {tokens:,} tokens, of {max_new_tokens:,} asked for")
    if ids and len(ids) != tokens:
        raise RetryableError(f"an answer of {len(ids)} `output_ids` that counts {tokens} tokens")
    _check_ids(ids, vocab_size)
    if not top_logprobs:
        return Reply(text, reason, tokens, ids, [])
    try:
        places = [[(i, logprob) for logprob, i, *_ in place] for place in meta["output_top_logprobs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise RetryableError(f"an answer without the log-probabilities asked for: {error!r}") from None
    if len(places) != tokens or any(len(place) != top_logprobs for place in places):
        raise RetryableError(f"an answer of {tokens} tokens without {top_logprobs} log-probabilities at each of them")
    for place in places:
        _check_ids([i for i, _ in place], vocab_size)
        if any(type(logprob) not in (float, int) for _, logprob in place):
            raise RetryableError(f"an answer with a log-probability that is not a number: {place!r:.100}")
    return Reply(text, reason, tokens, ids, places)


def _check_ids(ids: list[Any], vocab_size: int) -> None:
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise RetryableError(f"an answer with the token id {i!r:.60}; the model has {vocab_size} ids")
