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


def shared_end_tokens(checkpoints: Sequence[Path]) -> tuple[list[int], list[str]]:
    """Return the ids that end an answer of any of these checkpoints, as tokens of the first one's tokenizer.

    Each is read with its chat template, if it has one. An id that stands for another token in the first is left out.

    Returns:
        The ids, and a sentence for each token in which another checkpoint differs from the first.

    Raises:
        InputError: a tokenizer or template cannot be read, or no token ends an answer.
    """
    first, *others = checkpoints
    chat = _chat(first)
    ids, notes = list(chat.eos_ids), list[str]()
    for folder in others:
        other = _chat(folder)
        for i in (i for i in other.eos_ids if i not in ids):
            text = other.tokenizer.library.id_to_token(i)
            own = chat.tokenizer.library.id_to_token(i) if i < chat.vocab_size else None
            if own != text:
                instead = "does not have" if own is None else f"calls {own!r}"
                notes.append(f"{folder} ends an answer with {text!r}, the id {i}, which {first} {instead}: left out")
            else:
                notes.append(f"{folder} ends an answer with {text!r}, the id {i}, too")
                ids.append(i)
    return ids, notes


def end_token_file(source: Path, eos_ids: Sequence[int]) -> dict[str, str]:
    """Return name and text of the generation_config.json that a model made from the checkpoint `source` needs.

    It is the source's own, every other key as it stands, with all of `eos_ids` under `eos_token_id`. Empty if the
    source's files name them already, so that they can be copied as they are.

    Raises:
        InputError: the source's file cannot be read.
    """
    content = read_json_if_there(source / GENERATION_CONFIG)
    if content is None:  # then transformers takes these from config.json, and once there is such a file no longer
        config = read_json_if_there(source / "config.json") or {}
        content = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    named = content.get("eos_token_id")
    if set(eos_ids) <= set(named if isinstance(named, list) else [named]):
        return {}
    content["eos_token_id"] = list(eos_ids)
    return {GENERATION_CONFIG: json.dumps(content, indent=2, ensure_ascii=False) + "\n"}


def _chat(folder: Path) -> Chat:
    return Chat.from_checkpoint(folder, ChatConfig(use_template=load_chat_template(folder) is not None))
