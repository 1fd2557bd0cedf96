"""What a server's answer to a request for scores holds, once it is seen that it can be the answer to that request."""

from collections.abc import Sequence
from typing import Any

from micota_fast.generation.endpoint import RetryableError
from micota_fast.generation.scores import Scores, read_places


def read_scores(answer: dict[str, Any], answer_ids: Sequence[int], top: int, vocab_size: int) -> Scores:
    """Check an answer of /generate against what was asked.

    Args:
        answer: as decoded.
        answer_ids: the T ids that were to be scored; the first place of the answer is that of the id before them.
        top: log-probabilities that were asked for at each place.
        vocab_size: ids that the model has.

    Raises:
        RetryableError: it has not SGLang's shape, the server ended it with an error, or `read_places` refuses it.
    """
    try:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        own, places = meta["input_token_logprobs"][1:], meta["input_top_logprobs"][1:]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RetryableError(f"an answer without the log-probabilities asked for: {error!r}") from None
    if reason not in ("stop", "length"):
        raise RetryableError(f"the server ended the answer with {reason!r:.60}")
    return read_places(answer_ids, own, places, top, vocab_size)
