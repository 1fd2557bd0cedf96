"""The formats of training rows, each turned into a conversation of {"role", "content"} messages.

| format     | keys                                                     | origin                                   |
|------------|----------------------------------------------------------|------------------------------------------|
| completion | `problem`, `completion`                                  | ours: what `micota filter` writes        |
| solution   | `problem`, `solution` (and no `completion`)              | problems with a worked solution          |
| messages   | `messages`: [{`role`, `content`}]                        | OpenAI's chat format                     |
| ShareGPT   | `conversations`: [{`from`: human, gpt, system; `value`}] | ShareGPT; `system` may stand beside it   |
| Alpaca     | `instruction`, `output`, maybe `input` and `system`      | Stanford Alpaca                          |

Only a problem is put through the recipe's prompt. Completion, solution and Alpaca rows without a `system` of their own
get the recipe's; `messages` and `conversations` are taken as they stand. Keys whose value is null count as absent, and
other keys are left aside, except those that would change what the model reads (`tools`, `history`, ...). A row's
`weight` is read by `load_documents`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from micota_fast.chat.encoding import Chat
from micota_fast.chat.template import Message
from micota_fast.errors import InputError

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_OPENAI_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
_UNSUPPORTED = ("tools", "functions", "history")  # part of what the model would have read


def to_messages(row: Mapping[str, Any], chat: Chat) -> list[Message]:
    """Read the conversation in a row: an optional system message, then user and assistant in turn, the assistant last.

    Raises:
        InputError: the row is of no known format or of two, a text is not a string, a key is not supported, the roles
            are out of order or an assistant's message is empty. The message says what, not where.
    """
    row = {key: value for key, value in row.items() if value is not None}
    found = [name for name, (keys, _) in _FORMATS.items() if all(key in row for key in keys)]
    if "completion" in found and "solution" in found:
        found.remove("solution")
    if not found:
        known = "; ".join("+".join(keys) for keys, _ in _FORMATS.values())
        raise InputError(f"unknown row format: keys {', '.join(map(repr, row)) or '(none)'} hold none of {known}")
    if len(found) > 1:
        raise InputError(f"row fits several formats ({', '.join(found)}): remove the keys of all but one")
    for key in _UNSUPPORTED:
        if row.get(key):
            raise InputError(f"key {key!r} is not supported")
    if row.get("system") and found[0] not in ("ShareGPT", "Alpaca"):
        raise InputError(f"key 'system' is not part of the {found[0]} format")
    messages = _FORMATS[found[0]][1](row, chat)
    _check_order(messages)
    return messages


def _text(holder: Mapping[str, Any], key: str, of: str = "") -> str:
    value = holder[key]
    if not isinstance(value, str):
        raise InputError(f"{of}key {key!r} must be a string, got {type(value).__name__} {value!r:.60}")
    return value


def _from_completion(row: Mapping[str, Any], chat: Chat) -> list[Message]:
    key = "completion" if "completion" in row else "solution"
    return [*chat.prompt_messages(_text(row, "problem")), {"role": "assistant", "content": _text(row, key)}]


def _from_alpaca(row: Mapping[str, Any], chat: Chat) -> list[Message]:
    system = _text(row, "system") if row.get("system") else ""
    user = _text(row, "instruction")
    if row.get("input"):
        user += "\n" + _text(row, "input")
    return [
        *([{"role": "system", "content": system}] if system else chat.system_messages()),
        {"role": "user", "content": user},
        {"role": "assistant", "content": _text(row, "output")},
    ]


def _conversation(items: Any, name: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> list[Message]:
    if not isinstance(items, list) or not items:
        raise InputError(f"key {name!r} must be a list of messages, got {items!r:.60}")
    messages: list[Message] = []
    for number, item in enumerate(items, 1):
        of = f"message {number}: "
        if not isinstance(item, dict):
            raise InputError(f"{of}expected an object, got {type(item).__name__}")
        for key in (role_key, text_key):
            if key not in item:
                raise InputError(f"{of}key {key!r} is missing")
        for key, value in item.items():
            if key not in (role_key, text_key) and value not in (None, [], {}, ""):
                raise InputError(f"{of}key {key!r} is not supported")
        role = _text(item, role_key, of)
        if role not in roles:
            raise InputError(f"{of}unknown {role_key} {role!r}; known: {', '.join(roles)}")
        messages.append({"role": roles[role], "content": _text(item, text_key, of)})
    return messages


def _from_messages(row: Mapping[str, Any], chat: Chat) -> list[Message]:
    return _conversation(row["messages"], "messages", "role", "content", _OPENAI_ROLES)


def _from_sharegpt(row: Mapping[str, Any], chat: Chat) -> list[Message]:
    messages = _conversation(row["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES)
    if row.get("system"):
        return [{"role": "system", "content": _text(row, "system")}, *messages]
    return messages


def _check_order(messages: list[Message]) -> None:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    skipped = len(messages) - len(turns)
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            raise InputError(f"message {number + skipped + 1}: expected the {expected}, found the {message['role']}")
        if expected == "assistant" and not message["content"].strip():
            raise InputError(f"message {number + skipped + 1}: the assistant's text is empty")
    if len(turns) % 2 or not turns:
        raise InputError("the conversation does not end with the assistant")


_Reader = Callable[[Mapping[str, Any], Chat], list[Message]]
_FORMATS: dict[str, tuple[tuple[str, ...], _Reader]] = {
    "completion": (("problem", "completion"), _from_completion),
    "solution": (("problem", "solution"), _from_completion),
    "messages": (("messages",), _from_messages),
    "ShareGPT": (("conversations",), _from_sharegpt),
    "Alpaca": (("instruction", "output"), _from_alpaca),
}
