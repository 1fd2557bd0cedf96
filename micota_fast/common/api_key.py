"""The key of an API: it comes from the environment, goes to the API, and is written nowhere."""

import os

from micota_fast.errors import InputError


def read_key(variable: str | None) -> str | None:
    """Return the key that an environment variable holds; None: none is named.

    Raises:
        InputError: the variable is not set, or holds what no key can. The message does not show it.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"`openai.key_env`: the environment variable {variable} is not set; export it first")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"`openai.key_env`: ${variable} holds a character that no key has; it is not shown here")
    return key
