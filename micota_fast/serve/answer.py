"""The text of an answer while it is made: decoded as its tokens come, each of them once or twice and no more."""

from typing import Any, NamedTuple

from micota_fast.chat.encoding import Chat
from micota_fast.serve.engine import Request

UNFINISHED = "\ufffd"  # what half a character, whose other bytes are still to come, decodes to


class Progress(NamedTuple):
    """What there is of an answer at one moment."""

    text: str
    ids: list[int]
    finish_reason: dict[str, Any] | None


class Answer:
    """Follows one request.

    Args:
        chat: decodes its ids.
        request: it.
    """

    def __init__(self, chat: Chat, request: Request) -> None:
        self.request = request
        self._chat, self._params = chat, request.params
        # The text of all ids before `_settled`; what follows is decoded together with those from `_context` on, as a
        # decoder may treat the first token of a text differently.
        self._text, self._context, self._settled = "", 0, 0

    def progress(self) -> Progress:
        """Text, ids and finish reason so far, of one and the same moment.

        A matched stop token or string is cut off the text, unless the request keeps it, and stays among the ids. Until
        the end, what may become a stop string is held back, so that a text only ever grows.
        """
        reason = self.request.finish_reason  # read before the ids, which the engine writes first
        ids = list(self.request.output_ids)
        if reason is None:
            self._settle(ids)
            return Progress(self._text[: len(self._text) - self._maybe_stop()], ids, None)
        matched = None
        if reason["type"] == "stop" and not self._params.no_stop_trim:
            matched = reason["matched"]
        shown = ids[:-1] if isinstance(matched, int) else ids
        text = self._chat.decode(shown, self._params.skip_special_tokens)
        if isinstance(matched, str) and matched in text:
            text = text[: text.find(matched)]
        return Progress(text, ids, reason)

    def _settle(self, ids: list[int]) -> None:
        skip = self._params.skip_special_tokens
        before = self._chat.decode(ids[self._context : self._settled], skip)
        after = self._chat.decode(ids[self._context :], skip)
        if len(after) > len(before) and not after.endswith(UNFINISHED):
            self._text += after[len(before) :]
            self._context, self._settled = self._settled, len(ids)

    def _maybe_stop(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        if self._params.no_stop_trim:
            return 0
        longest = max(map(len, self._params.stop), default=1) - 1
        tail = self._text[-longest:] if longest else ""
        lengths = range(len(tail), 0, -1)
        return next((n for n in lengths if any(stop.startswith(tail[-n:]) for stop in self._params.stop)), 0)
