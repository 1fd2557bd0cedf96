"""A checkpoint's chat template, found in its files and rendered in the limited process (`rendering` says how)."""

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from micota_fast.chat.limits import Allowance, Handle
from micota_fast.common.json_io import read_json_if_there
from micota_fast.config import loader
from micota_fast.config.generation import ChatConfig
from micota_fast.config.suggestions import did_you_mean
from micota_fast.errors import InputError

MIB = 1 << 20
MAX_SOURCE_BYTES = 1 << 20  # of chat_template.jinja; the longest published ones have some 30,000
_COMPILING = Allowance(1.5, 512 * MIB)

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
        self._handle = Handle(where, "open_template", _COMPILING, source, where, dict(special_tokens))
        self._handle.open()

    def check_options(self, names: Iterable[str]) -> None:
        """See that the template looks at each of these names: it would pass over one that is misspelt.

        Raises:
            InputError: it does not.
        """
        known: list[str] = self._handle.run("template_variables", _COMPILING)
        for name in names:
            if name not in known:
                asked = did_you_mean(name, known, f"known: {', '.join(known) or 'none'}")
                raise InputError(
                    f"`chat.template_kwargs`: {name!r} is not a variable of the chat template of {self.where} that "
                    f"can be set; {asked}"
                )

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


class TemplateSource(NamedTuple):
    """The Jinja text of a chat template, the file that holds it, and how messages name it."""

    text: str
    file: Path
    where: str


def load_chat_template(checkpoint: Path, instead: str | None = None) -> ChatTemplate | None:
    """Compile the template of a checkpoint; or another one, which sees this checkpoint's special tokens.

    Args:
        checkpoint: its folder.
        instead: as `chat.template` names it; None: the checkpoint's own.

    Returns:
        None if the checkpoint has no template.

    Raises:
        InputError: as `find_template` and `named_template`; or the template does not parse or breaks its limits.
    """
    source = find_template(checkpoint) if instead is None else named_template(instead)
    if source is None:
        return None
    config_path = checkpoint / "tokenizer_config.json"
    tokens = special_tokens(read_json_if_there(config_path) or {}, config_path)
    return ChatTemplate(source.text, source.where, tokens)


def named_template(name: str) -> TemplateSource:
    """Read the template that `chat.template` names: a Jinja file, or a checkpoint's folder or JSON file that has one.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = Path(name)
    if not path.exists():
        raise InputError(f"`chat.template`: {name}: no such Jinja file or checkpoint")
    if path.is_file() and path.suffix != ".json":
        return _read_jinja(path)
    found = find_template(path) if path.is_dir() else _read_json(path)
    if found is None:
        raise InputError(f"`chat.template`: {name} has no chat template")
    return found


def find_template(checkpoint: Path) -> TemplateSource | None:
    """Read the template from the first of chat_template.jinja, chat_template.json and tokenizer_config.json.

    Returns:
        None if the checkpoint has no template.

    Raises:
        InputError: a file or key is not what it should be.
    """
    jinja_path = checkpoint / "chat_template.jinja"
    if jinja_path.is_file():
        return _read_jinja(jinja_path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _read_json(checkpoint / name)
        if found is not None:
            return found
    return None


def _read_json(path: Path) -> TemplateSource | None:
    """Read the key 'chat_template'; of several named templates (a list) the one called "default"."""
    value = (read_json_if_there(path) or {}).get("chat_template")
    where = f"{path}: key 'chat_template'"
    if value is None:
        return None
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        named = {entry["name"]: entry.get("template") for entry in entries}
        if "default" not in named:
            raise InputError(f"{where}: no template is named 'default' (found: {', '.join(named)})")
        value = named["default"]
    if not isinstance(value, str):
        raise InputError(f"{where}: must be a string or a list of named templates, got {type(value).__name__}")
    return TemplateSource(value, path, where)


def _read_jinja(path: Path) -> TemplateSource:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SOURCE_BYTES + 1)
        if len(content) > MAX_SOURCE_BYTES:
            raise InputError(f"{path}: is larger than {MAX_SOURCE_BYTES} bytes, which no chat template is")
        # any line end becomes a newline, as in `read_text`
        text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    return TemplateSource(text, path, str(path))


def template_file(config: ChatConfig) -> dict[str, str]:
    """Return name and text of the file that gives a checkpoint the template that is named; nothing if none is."""
    return {} if config.template is None else {"chat_template.jinja": named_template(config.template).text}


def chat_identity(config: ChatConfig) -> dict[str, Any]:
    """Return what a prompt depends on besides the model: the options, with a named template's contents for its path.

    Raises:
        InputError: as `named_template`.
    """
    found: dict[str, Any] = loader.identity(config)
    if config.template is not None:
        found["template"] = hashlib.sha256(named_template(config.template).text.encode()).hexdigest()
    return found
