"""What may enter a store: rows that the loss can take, or an error that names the document and the position."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from micota_fast.errors import InputError
from micota_fast.sources.top_logprobs_journal import Key

MOST_LOGPROB = 0.01  # a probability may be above 1 by what float16 and a server's sums round
MOST_SUM = 1.01  # as the loss has it: by how much rounding to float16 may raise the sum of a row's probabilities
with np.errstate(over="ignore", invalid="ignore"):  # NaN of NaN, and inf of what no log-probability is
    _EXP = np.exp(np.arange(1 << 16, dtype=np.uint16).view(np.float16), dtype=np.float32)  # of every float16, by bits


def check_key(key: Key) -> None:
    """See that a document's key can be stored: an id in UTF-8 and a sample of 64 bits.

    Raises:
        InputError: naming the id; it or the sample is of another type, holds a lone surrogate or is too large.
    """
    name, sample = key
    if not isinstance(name, str) or not isinstance(sample, int):
        raise InputError(f"({name!r:.60}, sample {sample!r:.60}): an id must be text, and a sample a whole number")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"id {name!r:.60} holds half a character (a lone surrogate), which no text can hold; rename it"
        ) from None
    if not -(2**63) <= sample < 2**63:
        raise InputError(f"id {name!r:.60}: its sample must fit 64 bits, not {sample!r:.60}")


def checked_rows(
    key: Key,
    token_ids_T: Any,
    token_logprobs_T: Any,
    top_ids_TK: Any,
    top_logprobs_TK: Any,
    top_k: int,
    vocab_size: int | None,
) -> tuple[NDArray[Any], ...]:
    """Return a document's arrays in the types of the store; see `TopLogprobsWriter.append`.

    Args:
        vocab_size: ids that there are; None: it is not known.

    Raises:
        ValueError: naming the document, and the position if it is one row that cannot be.
    """
    where = f"({key[0]!r}, sample {key[1]})"
    ids, top_ids = np.asarray(token_ids_T), np.asarray(top_ids_TK)
    own, logprobs = np.asarray(token_logprobs_T, np.float64), np.asarray(top_logprobs_TK)
    shape = (len(ids), top_k)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{where}: token_ids: integers [T] expected, not {ids.dtype} {list(ids.shape)}")
    if own.shape != ids.shape:
        raise ValueError(f"{where}: token_logprobs: {list(ids.shape)} expected, not {list(own.shape)}")
    if not ids.size:
        top_ids, logprobs = np.empty(shape, np.int32), np.empty(shape, np.float16)
    if top_ids.shape != shape or logprobs.shape != shape or top_ids.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: top_ids and top_logprobs: {list(shape)} expected, integers and numbers, not {top_ids.dtype} "
            f"{list(top_ids.shape)} and {logprobs.dtype} {list(logprobs.shape)}"
        )
    # An id that int32 cannot hold is outside of every vocabulary.
    known = np.iinfo(np.int32).max if vocab_size is None else vocab_size

    def refuse(bad_T: Any, what: str) -> None:
        if bad_T.any():
            t = int(np.argmax(bad_T))
            raise ValueError(
                f"{where}, position {t}: {what}: token {ids[t]} of log-probability {own[t]:.4g}, likeliest "
                f"{top_ids[t].tolist()!s:.200} of {logprobs[t].tolist()!s:.200}"
            )

    # All rows at once first, and row by row only to name one: this is on the way of every token of a store.
    lowest, highest = ids.min(initial=0), ids.max(initial=0)
    if lowest < 0 or highest >= known:
        refuse((ids < 0) | (ids >= known), f"a token_id that is not from 0 to {known - 1}")
    # Below the lowest float32 it would be kept as -inf.
    refuse(
        ~((own >= np.finfo(np.float32).min) & (own <= MOST_LOGPROB)),
        f"a token_logprob that is not finite and below {MOST_LOGPROB}",
    )
    lowest, highest = top_ids.min(initial=0), top_ids.max(initial=0)
    if lowest < -1 or highest >= known:
        refuse((top_ids < -1).any(1) | (top_ids >= known).any(1), f"a top_id that is not from -1 to {known - 1}")
    if lowest < 0:
        refuse(((top_ids < 0) & (logprobs > -np.inf)).any(1), "an id of -1, which is absent, with a log-probability")
    kept = ids.astype("<i4"), own.astype("<f4"), top_ids.astype("<i4"), logprobs.astype("<f2")
    sorted_ids = np.sort(kept[2], axis=1)
    again = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    if again.any():
        refuse((again & (sorted_ids[:, 1:] >= 0)).any(1), "a top_id that appears twice")
    refuse(
        ~(total_probability(kept[3]) <= MOST_SUM),
        f"log-probabilities that are NaN, or of probabilities whose sum is above {MOST_SUM}",
    )
    return kept


def total_probability(logprobs_TK: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return the sum of each row's probabilities, [T]."""
    total_T: NDArray[np.float32] = _EXP.take(logprobs_TK.view("<u2")) @ np.ones(logprobs_TK.shape[1], np.float32)
    return total_T
