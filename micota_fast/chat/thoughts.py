"""A reasoning model's thought in the text of its answer, and what training makes of it.

DeepSeek-R1-Distill, QwQ and Qwen3-Thinking-2507 end their generation prompt with `<think>\\n`, so a completion of
theirs begins inside the thought and holds the closing tag alone.
"""

import re
from typing import Literal, NamedTuple

from micota_fast.errors import InputError

OPEN, CLOSE = "<think>", "</think>"
Thinking = Literal["keep", "strip", "wrap"]


def opening_of(prompt: str) -> str:
    """Return what a prompt opens at its end, such as `<think>\\n`; "": nothing."""
    found = re.search(rf"{OPEN}\s*\Z", prompt)
    return found.group() if found else ""


class Thought(NamedTuple):
    """An assistant's text, cut where its thought ends."""

    thought: str | None  # between the tags, white space included; None: it holds no thought
    answer: str  # what follows the closing tag, white space included


def split_thought(text: str, opened: str = "") -> Thought:
    """Cut an assistant's text into thought and answer.

    Args:
        text: with both tags, with the closing tag alone (the prompt opened the thought), or with none.
        opened: what the generation prompt opened, such as `<think>\\n`; the text may repeat it.

    Raises:
        InputError: the thought never closes, or is opened or closed twice, or text stands before it.
    """
    if opened:
        text = with_opening(text, opened)
    if (opens := text.count(OPEN)) > 1:
        raise InputError(f"the thought is opened {opens} times ({OPEN}): it must be one pair of tags")
    if (closes := text.count(CLOSE)) > 1:
        raise InputError(f"the thought is closed {closes} times ({CLOSE}): it must be one pair of tags")
    if not closes:
        if opens:
            raise InputError(f"the thought never closes: {OPEN} without {CLOSE}")
        return Thought(None, text)
    before, answer = text.split(CLOSE)
    outside, tag, thought = before.rpartition(OPEN)
    if (tag and outside.strip()) or OPEN in answer:
        raise InputError(f"the thought does not begin the text: {OPEN} must come first and {CLOSE} after it")
    return Thought(thought, answer)


def training_text(text: str, opened: str, thinking: Thinking, tags: tuple[str, str] = (OPEN, CLOSE)) -> str:
    """Return the text to train on: one well-formed thought (`keep`, or in `tags` with `wrap`), or the answer alone.

    A text without a thought is returned as it is. White space within the thought and after it stays, but for `strip`.

    Raises:
        InputError: as `split_thought`; or nothing follows the thought.
    """
    thought, answer = split_thought(text, opened)
    if thought is None:
        return text
    if not answer.strip():
        raise InputError(f"nothing follows the thought: there is no answer after {CLOSE}")
    if thinking == "strip":
        return answer.lstrip()
    start, end = (OPEN, CLOSE) if thinking == "keep" else tags
    if (start, end) == (OPEN, CLOSE) and text.lstrip().startswith(OPEN):
        return text
    body = thought if thought.startswith("\n") else "\n" + thought
    return f"{start}{body}{end}{answer}"


def with_opening(text: str, opened: str) -> str:
    """Put what the generation prompt opened before a completion, unless it repeats it."""
    return text if text.lstrip().startswith(OPEN) else opened + text


def join_thought(thought: str, answer: str, ended: bool) -> str:
    """Return a completion whose thought, if there is any, stands in one pair of tags.

    Args:
        thought: what a reasoning server returns besides the answer; "": nothing.
        answer: the content. If the server does not part the two and the prompt has opened the thought, the opening tag
            is missing in it, and is restored.
        ended: whether the model has ended the answer by itself; else a thought without an answer is left open.
    """
    if not thought.strip():
        before, close, _ = answer.partition(CLOSE)
        return f"{OPEN}\n" + answer if close and OPEN not in before else answer
    if not answer and not ended:
        return f"{OPEN}\n" + thought.lstrip("\n")
    return f"{OPEN}\n" + thought.strip("\n") + f"\n{CLOSE}\n\n" + answer.lstrip("\n")
