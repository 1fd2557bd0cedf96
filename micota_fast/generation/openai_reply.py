"""An answer of OpenAI's chat completions, whole or as a stream of events."""

from dataclasses import dataclass
from typing import Any

from micota_fast.common.json_io import encode_json, parse_json
from micota_fast.errors import InputError
from micota_fast.generation.endpoint import SHOWN_CHARACTERS, RetryableError, error_message

MOST_TOKENS = 1 << 31  # of a prompt or an answer: what a row's numbers can hold, and more than any model writes
# What servers call the ways in which an answer ends. TGI has names of its own.
FINISH_REASONS = {
    "stop": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
    "content_filter": "content_filter",
}


@dataclass(frozen=True, slots=True)
class ChatReply:
    """An answer, once it is seen that it can be one."""

    thought: str  # "": the server gives none, or leaves it in the answer
    answer: str
    reason: str  # "stop", "length" or "content_filter"
    prompt_tokens: int
    completion_tokens: int  # those of the thought included


def read_whole(answer: dict[str, Any], url: str) -> ChatReply:
    """Check an answer that was not streamed.

    Args:
        answer: as decoded.
        url: of the server.

    Raises:
        RetryableError: it has not the shape of an answer, or the server ended it with an error.
        InputError: the server does not say how many tokens it has used.
    """
    pieces = _Pieces(url)
    pieces.add(answer, "message")
    return pieces.joined()


class EventReader:
    """Reads an answer from the lines of an event stream.

    Args:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        self._pieces = _Pieces(url)
        self._done = False

    def take(self, line: bytes) -> None:
        """Read one line; comments, by which a proxy is kept from closing the connection, are passed over.

        Raises:
            RetryableError: it is not an event of an answer, or the server reports an error.
        """
        field, _, value = line.strip().partition(b":")
        if field != b"data":
            return
        if value.strip() == b"[DONE]":
            self._done = True
            return
        try:
            event = parse_json(value, "an event of its answer")
        except InputError as error:
            raise RetryableError(str(error)) from None
        self._pieces.add(event, "delta")

    def reply(self) -> ChatReply:
        """Return the answer when all lines were read.

        Raises:
            RetryableError: the stream has broken off.
            InputError: it says nowhere how many tokens were used.
        """
        if not self._done and not self._pieces.complete:
            raise RetryableError("its stream broke off before the end of the answer")
        return self._pieces.joined()


class _Pieces:
    """What has come of an answer so far."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._thought: list[str] = []
        self._answer: list[str] = []
        self._reason: str | None = None
        self._usage: Any = None

    @property
    def complete(self) -> bool:
        return self._reason is not None and self._usage is not None

    def add(self, event: dict[str, Any], key: str) -> None:
        """Take in an event, or a whole answer; `key` is where a choice holds its text."""
        if event.get("error"):
            raise RetryableError(f"the server ended the answer with {error_message(encode_json(event))}")
        if event.get("usage"):
            self._usage = event["usage"]
        try:
            choices = event["choices"]
            if not choices and key == "delta":  # the event that brings the usage
                return
            [choice] = choices
            text = choice.get(key) or {}
            # vLLM has sent both names with the same text.
            self._thought.append(_text(text, "reasoning_content") or _text(text, "reasoning"))
            self._answer.append(_text(text, "content") or _text(text, "refusal"))
            reason = choice.get("finish_reason")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RetryableError(f"an answer that is not OpenAI's: {error!r:.200}") from None
        self._reason = self._reason if reason is None else str(reason)

    def joined(self) -> ChatReply:
        if self._reason is None:
            raise RetryableError("an answer that is not OpenAI's: it has no `finish_reason`")
        if self._reason not in FINISH_REASONS:
            raise RetryableError(f"the server ended the answer with {self._reason[:SHOWN_CHARACTERS]!r}")
        if self._usage is None:
            raise InputError(
                f"{self._url} does not say how many tokens an answer has (`usage`); if it says so of answers that are "
                f"not streamed, set `openai.stream: false`"
            )
        usage = self._usage if isinstance(self._usage, dict) else {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        known = [count for count in counts if type(count) is int and 0 <= count < MOST_TOKENS]
        if len(known) != 2:
            raise RetryableError(f"an answer with an impossible `usage`: {self._usage!r:.200}")
        thought, answer = "".join(self._thought), "".join(self._answer)
        return ChatReply(thought, answer, FINISH_REASONS[self._reason], *known)


def _text(message: dict[str, Any], key: str) -> str:
    value = message.get(key)
    if value is None:
        return ""
    if type(value) is not str:
        raise TypeError(f"`{key}` is {value!r:.60}")
    return value
