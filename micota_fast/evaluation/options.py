"""Multiple choice: a question and its options as one problem, whose answer is a letter."""

import hashlib
import string
from collections.abc import Sequence

from micota_fast.errors import InputError


def with_options(question: str, right: str, wrong: Sequence[str], seed: int) -> tuple[str, str]:
    """Return the question with its options listed below as A), B), ..., and the letter of the right one.

    Their order is that of the SHA-256 of seed, question and option: it is the same on every machine and in every
    order of the file, and the right option is under each letter equally often.

    Raises:
        InputError: a wrong option is the right one; or there are more than letters.
    """
    if right in wrong:
        raise InputError(f"the right option is among the wrong ones: {right!r:.60}")
    if len(wrong) >= len(string.ascii_uppercase):
        raise InputError(f"{len(wrong) + 1} options are more than there are letters")
    shuffled = sorted(
        [right, *wrong], key=lambda option: hashlib.sha256(f"{seed}\0{question}\0{option}".encode()).digest()
    )
    lines = [f"{letter}) {option}" for letter, option in zip(string.ascii_uppercase, shuffled, strict=False)]
    return "\n".join([question, "", *lines]), string.ascii_uppercase[shuffled.index(right)]
