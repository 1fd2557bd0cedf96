"""What a server's answer to a request for scores holds, once it is seen that it can be the answer to that request."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.generation.endpoint import RetryableError

ROUNDING = 1e-3  # by which a log-probability may exceed 0


class Scores(NamedTuple):
    """A text's own token and the K likeliest ones at each of T positions."""

    token_logprobs: NDArray[np.float64]  # [T], natural
    ids: NDArray[np.int32]  # [T, K]
    logprobs: NDArray[np.float64]  # [T, K], natural, falling


def read_scores(answer: dict[str, Any], answer_ids: Sequence[int], top: int, vocab_size: int) -> Scores:
    """Check an answer of /generate against what was asked.

    Args:
        answer: as decoded.
        answer_ids: the T ids that were to be scored; the first place of the answer is that of the id before them.
        top: log-probabilities that were asked for at each place.
        vocab_size: ids that the model has.

    Raises:
        RetryableError: it has not SGLang's shape, the server ended it with an error, it scores other tokens than were
            sent, or its numbers cannot be: ids that the model has not or that come twice, log-probabilities that are
            not finite, above 0 or not in falling order.
    """
    try:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]["type"]
        own = [(logprob, i) for logprob, i, *_ in meta["input_token_logprobs"][1:]]
        places = [[(logprob, i) for logprob, i, *_ in place] for place in meta["input_top_logprobs"][1:]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RetryableError(f"an answer without the log-probabilities asked for: {error!r}") from None
    if reason not in ("stop", "length"):
        raise RetryableError(f"the server ended the answer with {reason!r:.60}")
    scored = [i for _, i in own]
    if scored != list(answer_ids):
        raise RetryableError(f"scores of {len(scored)} other tokens than the {len(answer_ids)} that were sent")
    if len(places) != len(scored) or any(len(place) != top for place in places):
        raise RetryableError(f"scores of {len(scored)} tokens without {top} log-probabilities at each of them")
    for logprob, i in own:
        if not _is_logprob(logprob):
            raise RetryableError(f"a log-probability of the text's token {i} that is none: {logprob!r:.100}")
    for place in places:
        if len({i for _, i in place}) != top or not all(type(i) is int and 0 <= i < vocab_size for _, i in place):
            raise RetryableError(f"token ids that cannot be the likeliest of {vocab_size}: {place!r:.100}")
        values = [logprob for logprob, _ in place]
        if not all(map(_is_logprob, values)):
            raise RetryableError(f"a log-probability that is none: {place!r:.100}")
        if any(later > earlier for earlier, later in pairwise(values)):
            raise RetryableError(f"log-probabilities that are not in falling order: {place!r:.100}")
    return Scores(
        np.array([logprob for logprob, _ in own], np.float64),
        np.array([[i for _, i in place] for place in places], np.int32).reshape(len(places), top),
        np.array([[logprob for logprob, _ in place] for place in places], np.float64).reshape(len(places), top),
    )


def _is_logprob(value: Any) -> bool:
    return type(value) in (float, int) and math.isfinite(value) and value <= ROUNDING
