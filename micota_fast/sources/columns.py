"""Keys by other names: `columns: {problem: question}` reads our key `problem` from the row's `question`."""

from collections.abc import Mapping
from typing import Any

from micota_fast.errors import InputError

# What others call our keys, for the advice that a refusal gives; nothing is read from them unasked.
_ALIASES = {
    "problem": ("question", "prompt", "instruction", "query", "input", "Problem", "Question"),
    "answer": ("expected_answer", "ground_truth", "final_answer", "gold", "target", "Answer", "solution"),
    "completion": ("response", "output", "generation", "deepseek_solution", "answer", "solution", "text"),
    "messages": ("conversation", "chosen", "dialog", "chat", "chats", "items"),
}


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return a row with our keys for its own.

    Args:
        row: as it was read.
        columns: our key -> the row's; a key that it does not name stays as it is.

    Raises:
        InputError: keys that `columns` names are missing, all of which are listed.
    """
    if missing := [key for key in columns.values() if row.get(key) is None]:
        raise InputError(f"`columns` names {quoted(missing)}, which the row lacks; it has {quoted(row)}")
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


def quoted(keys: Any) -> str:
    """Return keys for a message: 'a', 'b'."""
    return ", ".join(map(repr, keys)) or "(none)"


def advice(missing: list[str], row: Mapping[str, Any]) -> str:
    """Return how `columns` could name the missing keys, to end a message with: what likely holds them, or `...`."""
    free = {key: value for key, value in row.items() if value is not None}
    guesses = {}
    for ours in missing:
        guesses[ours] = next((key for key in _ALIASES.get(ours, ()) if key in free), "...")
        free.pop(guesses[ours], None)
    return f"`columns: {{{', '.join(f'{ours}: {theirs}' for ours, theirs in guesses.items())}}}`"
