"""A checkpoint's chat template, found in its files and rendered in the limited process (`rendering` says how)."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from micota_fast.chat.limits import Allowance, Handle
from micota_fast.common.json_io import read_json_if_there
from micota_fast.errors import InputError

MIB = 1 << 20
MAX_SOURCE_BYTES = 1 << 20  # of chat_template.jinja; the longest published ones have some 30,000

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class ChatTemplate:
    """A template that has been compiled.

    Args:
        source: the Jinja text.
        where: file (and key) it came from, for messages.
        special_tokens: names such as `bos_token` and their text, visible to the template.

    Raises:
        InputError: the template does not parse, or takes more time or memory than an honest one.
    """

    def __init__(self, source: str, where: str, special_tokens: Mapping[str, str]) -> None:
        self.where = where
        self._handle = Handle(where, "open_template", Allowance(1.5, 512 * MIB), source, where, dict(special_tokens))
        self._handle.open()

    def render(
        self, conversations: Sequence[tuple[Sequence[Message], bool]], options: Mapping[str, Any] | None = None
    ) -> list[str]:
        """The text of each conversation, with the header of the assistant's next turn if asked for.

        `options` are further names that the template may look at, such as `enable_thinking`.

        Raises:
            InputError: the template refuses a conversation (`raise_exception`) or fails on it.
            OverLimitError: it takes more time or memory than an honest one.
        """
        asked = [([dict(message) for message in messages], header) for messages, header in conversations]
        characters = sum(len(value) for messages, _ in asked for message in messages for value in message.values())
        allowance = Allowance(0.5 + 2e-6 * characters, 256 * MIB + 64 * characters)
        texts: list[str] = self._handle.run("render", allowance, asked, dict(options or {}))
        return texts


def special_tokens(tokenizer_config: Mapping[str, Any], where: Path) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like, each given as text or as {"content": text}; null ones are left out.

    Raises:
        InputError: one is neither.
    """
    tokens: dict[str, str] = {}
    for name, value in tokenizer_config.items():
        if name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if value is None:
                continue
            if not isinstance(text, str):
                raise InputError(f"{where}: key {name!r} must be a string or an object with a string 'content'")
            tokens[name] = text
    return tokens


def load_chat_template(checkpoint: Path) -> ChatTemplate | None:
    """Read the template from the first of chat_template.jinja, chat_template.json and tokenizer_config.json.

    Of several named templates (a list in tokenizer_config.json) the one called "default" is taken.

    Returns:
        None if the checkpoint has no template.

    Raises:
        InputError: a file or key is not what it should be, or the template does not parse or breaks its limits.
    """
    config_path = checkpoint / "tokenizer_config.json"
    tokenizer_config = read_json_if_there(config_path) or {}
    tokens = special_tokens(tokenizer_config, config_path)
    jinja_path = checkpoint / "chat_template.jinja"
    if jinja_path.is_file():
        try:
            with jinja_path.open("rb") as file:
                content = file.read(MAX_SOURCE_BYTES + 1)
            if len(content) > MAX_SOURCE_BYTES:
                raise InputError(f"{jinja_path}: is larger than {MAX_SOURCE_BYTES} bytes, which no chat template is")
            # any line end becomes a newline, as in `read_text`
            source = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{jinja_path}: cannot be read: {error}") from None
        return ChatTemplate(source, str(jinja_path), tokens)
    for path in (checkpoint / "chat_template.json", config_path):
        value = (read_json_if_there(path) or {}).get("chat_template")
        where = f"{path}: key 'chat_template'"
        if value is None:
            continue
        if isinstance(value, list):
            entries = [entry for entry in value if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
            named = {entry["name"]: entry.get("template") for entry in entries}
            if "default" not in named:
                raise InputError(f"{where}: no template is named 'default' (found: {', '.join(named)})")
            value = named["default"]
        if not isinstance(value, str):
            raise InputError(f"{where}: must be a string or a list of named templates, got {type(value).__name__}")
        return ChatTemplate(value, where, tokens)
    return None
