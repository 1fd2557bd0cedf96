"""Where an assistant's text stands in what a chat template renders, whatever the template does to its thought.

A template may open the thought in the generation prompt, leave the thought out of what it renders, or put an empty one
before an answer that has none.
"""

import re
from typing import NamedTuple

from micota_fast.chat.thoughts import CLOSE, OPEN, opening_of, split_thought
from micota_fast.errors import InputError


class Place(NamedTuple):
    """A prompt, and the text that begins with it and ends with the answer."""

    prompt: str
    answered: str  # up to the end of the answer, without what the template writes after it
    inserted: str  # what the template puts before the answer and no message holds, white space apart
    unopened: bool = False  # the generation prompt opens a thought, and the answer is rendered without one


def place_answer(prompt: str, answered: str, tail: str, text: str, template: str) -> Place:
    """Find an assistant's text in the rendered conversation; a thought that the template drops is put back.

    Args:
        prompt: what the template generates from.
        answered: the conversation that ends with the assistant, rendered.
        tail: what the template writes after an assistant's last message.
        text: of the assistant, as `thoughts.training_text` returns it.
        template: its name, for messages.

    Raises:
        InputError: the template renders another text than the assistant's, or opens or closes a thought twice, or opens
            one before an answer that has none.
    """
    opened = opening_of(prompt)
    head = prompt.removesuffix(opened)
    body = answered.removesuffix(tail)
    whole = answered.endswith(tail)
    if whole and body.startswith(prompt):
        rest = body[len(prompt) :]
        own = _without_opening(text) if opened else text
        if _ends_with(rest, own):
            _check_tags(prompt, rest, template)
            return Place(prompt, body, _before(rest, own))
    thought, answer = split_thought(text)
    if whole and body.startswith(head):
        rest = body[len(head) :]
        if thought is None and opened and _same(rest, text):
            return Place(head, body, "", unopened=True)
        if thought is not None and _same(rest, answer):
            if opened:
                text = opened + _without_opening(text)
            _check_tags(head, text, template)
            return Place(prompt, head + text, "")
    if not answered.startswith(prompt):
        raise InputError(
            f"the chat template of {template} renders the answered conversation unlike the prompt it generates from: "
            f"{first_difference(prompt, answered)}"
        )
    raise InputError(
        f"the chat template of {template} drops or rewrites part of the message, so the model would learn another "
        f"text; train on a template that keeps it (`chat.template`)"
    )


def first_difference(expected: str, got: str) -> str:
    """Quote two texts from where they begin to differ."""
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    return f"expected {expected[at : at + 40]!r}, found {got[at : at + 40]!r}"


def _check_tags(prompt: str, rest: str, template: str) -> None:
    found = re.search(rf"{OPEN}\s*({CLOSE}\s*)?\Z", prompt)
    text = (found.group() if found else "") + rest
    for tag, verb in ((OPEN, "opens"), (CLOSE, "closes")):
        if text.count(tag) > 1:
            raise InputError(
                f"the chat template of {template} {verb} the thought a second time ({tag}); `chat.thinking: strip` "
                f"leaves the row's own thought out, and `chat.template` names another template"
            )
    if OPEN in text and CLOSE not in text:
        raise InputError(
            f"the chat template of {template} opens a thought ({OPEN}) before an answer that closes none; "
            f"`chat.template` names another template"
        )


def _without_opening(text: str) -> str:
    return text.lstrip().removeprefix(OPEN).lstrip("\n") if text.lstrip().startswith(OPEN) else text


def _same(a: str, b: str) -> bool:
    return "".join(a.split()) == "".join(b.split())


def _ends_with(text: str, content: str) -> bool:
    """Whether `text` ends with `content`, whatever white space a template trims or sets between its parts."""
    return text.rstrip().endswith(content.strip()) or "".join(text.split()).endswith("".join(content.split()))


def _before(rest: str, own: str) -> str:
    """What precedes `own` at the end of `rest`, without white space; most templates put nothing there."""
    if rest.strip() == own.strip():
        return ""
    return "".join(rest.split()).removesuffix("".join(own.split()))
