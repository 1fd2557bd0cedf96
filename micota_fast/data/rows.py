"""The formats of training rows, each turned into a conversation of {"role", "content"} messages.

| format                | keys                                                    | origin                             |
|-----------------------|---------------------------------------------------------|------------------------------------|
| completion            | `problem`, `completion`                                 | ours: what `micota filter` writes  |
| solution              | `problem`, `solution`                                   | problems with a worked solution    |
| generations           | `problem`, `generations`: [text]                        | Open-R1: the first that is correct |
| prompt and completion | `prompt`, `completion`: texts, or lists of messages     | TRL, OpenAI                        |
| messages              | `messages`: [{`role`, `content`}]                       | OpenAI, TRL, distilabel            |
| ShareGPT              | `conversations`: [{`from`, `value`}], or as in messages | ShareGPT; maybe `system` as well   |
| Alpaca                | `instruction`, `output`, maybe `input` and `system`     | Stanford Alpaca                    |

Only a problem is put through the recipe's prompt. Rows of text without a `system` of their own get the recipe's; lists
of messages are taken as they stand. `reasoning_content`, of a row of text or of an assistant's message, is the thought
that precedes the answer. Keys whose value is null count as absent, and other keys are left aside, except those that
would change what the model reads (`tools`, `images`, ...) or that say that the row is not to be learned as it stands
(`rejected`, `label`, ...). A row's `weight` and `chat_template_kwargs` are read by `load_documents`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

from micota_fast.chat.template import Message
from micota_fast.chat.thoughts import join_thought, with_opening
from micota_fast.errors import InputError
from micota_fast.sources.columns import advice, quoted

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_OPENAI_ROLES = {"user": "user", "assistant": "assistant", "system": "system"}
# Part of what the model would have read.
_UNSUPPORTED = (
    "tools",
    "functions",
    "history",
    "image",
    "images",
    "video",
    "videos",
    "audio",
    "audios",
)


class Asks(Protocol):
    """How problems are put to a model: a `chat.encoding.Chat`, or what knows its options alone."""

    def prompt_messages(self, problem: str) -> list[Message]:
        """Return the conversation that asks a problem."""

    def system_messages(self) -> list[Message]:
        """Return the system message for rows that bring none, if there is one."""


def to_messages(row: Mapping[str, Any], chat: Asks, named: Collection[str] = ()) -> list[Message]:
    """Read the conversation in a row: an optional system message, then user and assistant in turn, the assistant last.

    Args:
        row: decoded, with our keys.
        chat: puts problems through its prompt.
        named: keys that the user has named (`columns`); they decide between formats that a row fits.

    Raises:
        InputError: the row is of no known format or of two, a text is not a string, a key is not supported, the roles
            are out of order or an assistant's message is empty. The message says what, not where.
    """
    row = {key: value for key, value in row.items() if value is not None}
    _refuse_preferences(row)
    name = format_name(row, named)
    for key in _UNSUPPORTED:
        if row.get(key):
            raise InputError(f"key {key!r} is not supported")
    kind = _FORMATS[name]
    for key in ("system", "reasoning_content"):
        if row.get(key) and key not in kind.optional:
            raise InputError(f"key {key!r} is not part of the {name} format")
    messages = kind.read(row, chat)
    _check_order(messages)
    return messages


def format_name(row: Mapping[str, Any], named: Collection[str] = ()) -> str:
    """Return the name of a row's format; raises InputError if it is of none or of several."""
    row = {key: value for key, value in row.items() if value is not None}
    found = [name for name, kind in _FORMATS.items() if all(key in row for key in kind.keys)]
    if len(found) > 1 and (meant := [name for name in found if set(named) & set(_FORMATS[name].keys)]):
        found = meant
    # Rows with a completion come with the solution that it was judged by, and Open-R1's with what was chosen of them.
    for first, others in {"completion": ("solution", "generations"), "generations": ("solution",)}.items():
        if first in found:
            found = [name for name in found if name not in others]
    texts = row.get("generations")
    if found == ["generations", "messages"] and isinstance(texts, list) and _last_text(row["messages"]) in texts:
        found = ["generations"]
    if not found:
        raise InputError(f"unknown row format: {_diagnosis(row)}")
    if len(found) > 1:
        key = _FORMATS[found[-1]].keys[-1]
        raise InputError(
            f"row fits several formats ({', '.join(found)}): remove the keys of all but one, or name a key of the one "
            f"that is meant, as in `columns: {{{key}: {key}}}`"
        )
    return found[0]


class _Elsewhere(NamedTuple):
    """Rows of others that are not read as they stand."""

    keys: tuple[str, ...]
    name: str
    remedy: str


_ELSEWHERE = (
    _Elsewhere(("completions", "labels"), "TRL's stepwise supervision", "no option reads it"),
    _Elsewhere(("segments",), "axolotl's template-free input_output", "no option reads it; write `messages`"),
    _Elsewhere(("text",), "plain text", "no option reads it, as nothing says where the answer begins"),
    _Elsewhere(
        ("instruction", "generation"), "distilabel's text generation", "`columns: {output: generation}` reads it"
    ),
    _Elsewhere(
        ("instruction", "generations"),
        "distilabel's generations",
        "`columns: {problem: instruction}` reads the first of them",
    ),
    _Elsewhere(("conversation",), "distilabel's conversation", "`columns: {messages: conversation}` reads it"),
    _Elsewhere(("items",), "ShareGPT's export", "`columns: {conversations: items}` reads it"),
    _Elsewhere(
        ("problem", "deepseek_reasoning", "deepseek_solution"),
        "OpenThoughts' metadata",
        "`columns: {reasoning_content: deepseek_reasoning, completion: deepseek_solution}` reads it",
    ),
    _Elsewhere(("question", "answer"), "questions", "`columns: {problem: question, completion: answer}` reads it"),
    _Elsewhere(("query", "response"), "queries", "`columns: {problem: query, completion: response}` reads it"),
    _Elsewhere(("prompt", "response"), "a prompt and a response", "`columns: {completion: response}` reads it"),
    _Elsewhere(("prompt",), "a prompt alone", "there is nothing to learn; `micota generate` could answer it"),
    _Elsewhere(("custom_id",), "OpenAI's batch files", "no option reads it; write `messages`"),
)


def _diagnosis(row: Mapping[str, Any]) -> str:
    for keys, name, remedy in _ELSEWHERE:
        if all(key in row for key in keys):
            return f"keys {quoted(row)} look like {name}; {remedy}"
    known = "; ".join("+".join(kind.keys) for kind in _FORMATS.values())
    missing = next((["completion"] for key in ("problem", "prompt") if key in row), ["problem", "completion"])
    hint = advice(missing, row)
    return f"keys {quoted(row)} hold none of {known}. {hint} says which keys to read instead"


def _refuse_preferences(row: Mapping[str, Any]) -> None:
    """Of two answers one is bad, and a row that is marked as bad is not to be learned."""
    if "rejected" in row and "chosen" in row:
        chosen = row["chosen"]
        if isinstance(chosen, list) and len(chosen) > 1:
            columns = "messages: chosen"
        elif "conversations" in row:
            raise InputError("a preference pair (chosen, rejected): no option reads it; append the chosen answer")
        else:
            key = next((key for key in ("prompt", "instruction", "problem", "question") if key in row), "...")
            ours = {"instruction": "output: chosen", "problem": "completion: chosen", "prompt": "completion: chosen"}
            columns = ours.get(key, f"problem: {key}, completion: chosen")
        raise InputError(f"a preference pair (chosen, rejected): `columns: {{{columns}}}` trains on the chosen answer")
    if "non_preferred_output" in row:
        raise InputError("OpenAI's preference pair (preferred_output, non_preferred_output): no option reads it")
    for key in ("label", "kto_tag"):
        if isinstance(row.get(key), bool):
            raise InputError(
                f"key {key!r} marks the answer as {'good' if row[key] else 'bad'} (an unpaired preference): keep only "
                f"the good rows, and leave the key out"
            )


def _text(holder: Mapping[str, Any], key: str, of: str = "") -> str:
    value = holder[key]
    if not isinstance(value, str):
        raise InputError(f"{of}key {key!r} must be a string, got {type(value).__name__} {value!r:.60}")
    return value


def _answer(holder: Mapping[str, Any], key: str, of: str = "") -> Message:
    text = _text(holder, key, of)
    if key == "completion" and holder.get("opened"):
        text = with_opening(text, _text(holder, "opened", of))
    if holder.get("reasoning_content"):
        text = join_thought(_text(holder, "reasoning_content", of).strip(), text, True)
    return {"role": "assistant", "content": text}


def _from_problem(key: str) -> "_Read":
    return lambda row, chat: [*chat.prompt_messages(_text(row, "problem")), _answer(row, key)]


def _from_generations(row: Mapping[str, Any], chat: Asks) -> list[Message]:
    texts = row["generations"]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"key 'generations' must be a list of texts, got {texts!r:.60}")
    good = [text for text, is_good in zip(texts, _verdicts(row, len(texts)), strict=True) if is_good]
    if not good:
        raise InputError(f"none of {len(texts)} `generations` is complete and correct; leave the row out")
    chosen = _last_text(row.get("messages"))
    if chosen not in texts:
        chosen = good[0]
    if chosen not in good:
        raise InputError("`messages` end with a generation that is incomplete or wrong; remove `messages`, or the row")
    return [*chat.prompt_messages(_text(row, "problem")), {"role": "assistant", "content": chosen}]


def _verdicts(row: Mapping[str, Any], number: int) -> list[bool]:
    """Return for each generation whether it is complete and a verifier found it correct, if one was asked."""
    verdicts = {}
    for key in ("is_reasoning_complete", "correctness_math_verify", "correctness_llama"):
        if row.get(key):
            verdicts[key] = row[key]
            if not isinstance(row[key], list) or len(row[key]) != number:
                raise InputError(f"key {key!r} must be a list of {number}, one for each of `generations`")
    complete = verdicts.pop("is_reasoning_complete", [True] * number)
    correct = [any(of[i] is True for of in verdicts.values()) or not verdicts for i in range(number)]
    return [complete[i] is True and correct[i] for i in range(number)]


def _last_text(messages: Any) -> Any:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return last.get("content") if isinstance(last, dict) else None


def _as_it_stands(row: Mapping[str, Any], chat: Asks, user: str, answer: Message) -> list[Message]:
    """A user's text that is not put through the recipe's prompt, and its answer."""
    system = _text(row, "system") if row.get("system") else ""
    head: list[Message] = [{"role": "system", "content": system}] if system else chat.system_messages()
    return [*head, {"role": "user", "content": user}, answer]


def _from_prompt(row: Mapping[str, Any], chat: Asks) -> list[Message]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _as_it_stands(row, chat, prompt, _answer(row, "completion"))
    if type(prompt) is not type(completion):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise InputError(f"keys 'prompt' and 'completion' must both be texts or both be lists of messages, got {kinds}")
    for key in ("system", "reasoning_content"):
        if row.get(key):
            raise InputError(f"key {key!r} is not part of a prompt and completion of messages")
    messages = _conversation(prompt, "prompt")
    if any(message["role"] == "assistant" for message in messages):
        raise InputError("key 'prompt' holds an assistant's message, which would be learned; give it as `messages`")
    return messages + _conversation(completion, "completion")


def _from_alpaca(row: Mapping[str, Any], chat: Asks) -> list[Message]:
    user = _text(row, "instruction")
    if row.get("input"):
        user += "\n" + _text(row, "input")
    return _as_it_stands(row, chat, user, _answer(row, "output"))


def _conversation(items: Any, name: str) -> list[Message]:
    if not isinstance(items, list) or not items:
        raise InputError(f"key {name!r} must be a list of messages, got {items!r:.60}")
    messages: list[Message] = []
    for number, item in enumerate(items, 1):
        of = f"message {number}: "
        if not isinstance(item, dict):
            raise InputError(f"{of}expected an object, got {type(item).__name__}")
        sharegpt = "from" in item or "value" in item
        role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
        if missing := [key for key in (role_key, text_key) if key not in item]:
            keys = f"keys {quoted(missing)} are" if len(missing) > 1 else f"key {missing[0]!r} is"
            raise InputError(f"{of}{keys} missing; it has {quoted(item)}")
        role, roles = _text(item, role_key, of), _SHAREGPT_ROLES if sharegpt else _OPENAI_ROLES
        read = (role_key, text_key, *(("reasoning_content",) if roles.get(role) == "assistant" else ()))
        for key, value in item.items():
            if key not in read and value not in (None, [], {}, ""):
                raise InputError(f"{of}key {key!r} is not supported")
        if role not in roles:
            raise InputError(f"{of}unknown {role_key} {role!r}; known: {', '.join(roles)}")
        if roles[role] == "assistant":
            messages.append(_answer(item, text_key, of))
        else:
            messages.append({"role": roles[role], "content": _text(item, text_key, of)})
    return messages


def _from_messages(row: Mapping[str, Any], chat: Asks) -> list[Message]:
    return _conversation(row["messages"], "messages")


def _from_sharegpt(row: Mapping[str, Any], chat: Asks) -> list[Message]:
    messages = _conversation(row["conversations"], "conversations")
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


_Read = Callable[[Mapping[str, Any], Asks], list[Message]]


class _Format(NamedTuple):
    keys: tuple[str, ...]  # all of them must be there
    read: _Read
    optional: tuple[str, ...] = ()  # of `system` and `reasoning_content`, those that it may have


_FORMATS: dict[str, _Format] = {
    "completion": _Format(("problem", "completion"), _from_problem("completion"), ("reasoning_content",)),
    "solution": _Format(("problem", "solution"), _from_problem("solution"), ("reasoning_content",)),
    "generations": _Format(("problem", "generations"), _from_generations),
    "prompt and completion": _Format(("prompt", "completion"), _from_prompt, ("system", "reasoning_content")),
    "messages": _Format(("messages",), _from_messages),
    "ShareGPT": _Format(("conversations",), _from_sharegpt, ("system",)),
    "Alpaca": _Format(("instruction", "output"), _from_alpaca, ("system", "reasoning_content")),
}
