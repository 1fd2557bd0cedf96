"""A model's log-probabilities at each token of a text: as a server sends them, and as a journal keeps them."""

import base64
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.generation.endpoint import RetryableError
from micota_fast.sources.top_logprobs_rows import MOST_SUM, total_probability

ROUNDING = 1e-3  # by which a log-probability may exceed 0
_OWN, _IDS, _LOGPROBS = np.dtype("<f4"), np.dtype("<i4"), np.dtype("<f2")
_LOWEST = float(np.finfo(_OWN).min)  # what is below would be kept as -inf


class Scores(NamedTuple):
    """A text's own token and the K likeliest ones at each of T positions."""

    token_logprobs: NDArray[np.float64]  # [T], natural
    ids: NDArray[np.int32]  # [T, K]
    logprobs: NDArray[np.float64]  # [T, K], natural, falling


def read_places(tokens: Sequence[int], own: list[Any], places: list[Any], top: int, vocab_size: int) -> Scores:
    """Check the log-probabilities of a server against the text that they are of.

    Args:
        tokens: the text's ids.
        own: SGLang's triples of these tokens.
        places: of SGLang's triples, the likeliest at each of these tokens.
        top: log-probabilities that were asked for at each place.
        vocab_size: ids that the model has.

    Raises:
        RetryableError: they are of other tokens or not as many as were asked for; or their numbers cannot be: ids that
            the model has not or that come twice, log-probabilities that are not finite, above 0, not in falling order
            or of probabilities that sum to more than 1.
    """
    try:
        own = [(logprob, i) for logprob, i, *_ in own]
        places = [[(logprob, i) for logprob, i, *_ in place] for place in places]
    except (TypeError, ValueError) as error:
        raise RetryableError(f"an answer without the log-probabilities asked for: {error!r}") from None
    scored = [i for _, i in own]
    if scored != list(tokens):
        raise RetryableError(f"log-probabilities of {len(scored)} tokens that are not the {len(tokens)} of the text")
    if len(places) != len(scored) or any(len(place) != top for place in places):
        raise RetryableError(f"scores of {len(scored)} tokens without {top} log-probabilities at each of them")
    for logprob, i in own:
        if not _is_logprob(logprob):
            raise RetryableError(f"an impossible log-probability of the text's token {i}: {logprob!r:.100}")
    for place in places:
        if len({i for _, i in place}) != top or not all(type(i) is int and 0 <= i < vocab_size for _, i in place):
            raise RetryableError(f"token ids that cannot be the likeliest of {vocab_size}: {place!r:.100}")
        values = [logprob for logprob, _ in place]
        if not all(map(_is_logprob, values)):
            raise RetryableError(f"an impossible log-probability: {place!r:.100}")
        if any(later > earlier for earlier, later in pairwise(values)):
            raise RetryableError(f"log-probabilities that are not in falling order: {place!r:.100}")
    scores = Scores(
        np.array([logprob for logprob, _ in own], np.float64),
        np.array([[i for _, i in place] for place in places], np.int32).reshape(len(places), top),
        np.array([[logprob for logprob, _ in place] for place in places], np.float64).reshape(len(places), top),
    )
    over = np.flatnonzero(total_probability(_kept(scores.logprobs)) > MOST_SUM)
    if len(over):
        raise RetryableError(f"probabilities that sum to more than 1: log-probabilities {places[over[0]]!r:.100}")
    return scores


def join_scores(pieces: Sequence[Scores]) -> Scores:
    """Return the scores of texts that follow each other, as those of one."""
    return Scores(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))


def encode_scores(scores: Scores) -> str:
    """Return the arrays in the types of the store, little-endian, one after the other in base64."""
    own = np.minimum(scores.token_logprobs, 0.0)
    pieces = own.astype(_OWN), scores.ids.astype(_IDS), _kept(scores.logprobs)
    return base64.b64encode(b"".join(piece.tobytes() for piece in pieces)).decode()


def decode_scores(
    text: str, tokens: int, top_k: int
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float16]]:
    """Return what `encode_scores` was given: float32 [tokens], int32 [tokens, top_k], float16 [tokens, top_k]."""
    data, size = base64.b64decode(text), tokens * top_k
    ids_at = tokens * _OWN.itemsize
    own, ids = np.frombuffer(data, _OWN, tokens), np.frombuffer(data, _IDS, size, ids_at)
    logprobs = np.frombuffer(data, _LOGPROBS, size, ids_at + size * _IDS.itemsize)
    return own, ids.reshape(tokens, top_k), logprobs.reshape(tokens, top_k)


def _kept(logprobs: NDArray[np.float64]) -> NDArray[np.float16]:
    return np.minimum(logprobs, 0.0).astype(_LOGPROBS)


def _is_logprob(value: Any) -> bool:
    return type(value) in (float, int) and _LOWEST <= value <= ROUNDING
