"""How a problem is put to a model: the messages that `chat.prompt` and `chat.system` make of it."""

from micota_fast.chat.template import Message
from micota_fast.config.generation import ChatConfig


class Prompt:
    """The messages that ask a problem, without a tokenizer or a template.

    `Chat` has the same methods, and refuses what a tokenizer would misread.
    """

    def __init__(self, config: ChatConfig) -> None:
        self._config = config

    def prompt_messages(self, problem: str) -> list[Message]:
        """Return the configured system message (if any) and the user's."""
        user = {"role": "user", "content": self._config.prompt.replace("{problem}", problem)}
        return [*self.system_messages(), user]

    def system_messages(self) -> list[Message]:
        """Return the configured system message, if any; bare text (no template) has no place for one."""
        if self._config.system is None or not self._config.use_template:
            return []
        return [{"role": "system", "content": self._config.system}]
