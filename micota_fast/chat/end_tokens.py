"""The tokens that end an answer, written where transformers and other servers look for them.

A checkpoint names its end tokens in up to four places, of which generation_config.json is the one that every engine
reads. A base model whose template ends a turn with a token that is not its `eos_token` would, once trained on chats,
never stop there.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from micota_fast.chat.encoding import Chat
from micota_fast.chat.template import load_chat_template
from micota_fast.common.json_io import read_json_if_there
from micota_fast.config.generation import ChatConfig

GENERATION_CONFIG = "generation_config.json"


def shared_end_tokens(checkpoints: Sequence[Path]) -> list[int]:
    """Return the ids that end an answer of any of these checkpoints, as tokens of the first one's tokenizer.

    Each is read with its chat template, if it has one. An id that stands for another token in the first is left out.

    Raises:
        InputError: a tokenizer or template cannot be read, or no token ends an answer.
    """
    chats = [
        Chat.from_checkpoint(folder, ChatConfig(use_template=load_chat_template(folder) is not None))
        for folder in checkpoints
    ]
    name = chats[0].tokenizer.id_to_token
    ids = (i for chat in chats for i in chat.eos_ids if name(i) == chat.tokenizer.id_to_token(i))
    return list(dict.fromkeys(ids))


def end_token_file(source: Path, eos_ids: Sequence[int]) -> dict[str, str]:
    """Return name and text of the generation_config.json that a model made from the checkpoint `source` needs.

    It is the source's own with all of `eos_ids` under `eos_token_id`. Empty if the source's files name them already, so
    that they can be copied as they are.

    Raises:
        InputError: the source's file cannot be read.
    """
    own = read_json_if_there(source / GENERATION_CONFIG)
    # Without such a file transformers takes the ids from config.json; with one that names none, none.
    named = (read_json_if_there(source / "config.json") or {} if own is None else own).get("eos_token_id")
    known = named if isinstance(named, list) else [named]
    if set(eos_ids) <= set(known):
        return {}
    content = (own or {}) | {"eos_token_id": list(eos_ids)}
    return {GENERATION_CONFIG: json.dumps(content, indent=2, ensure_ascii=False) + "\n"}
