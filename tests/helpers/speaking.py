"""A base model that has learned chats: it ends its turn with a token that its files do not name as the end."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.checkpoints import make_checkpoint
from micota_fast.chat.encoding import Chat
from micota_fast.config.generation import ChatConfig

CHAT = ChatConfig(system=None, prompt="{problem}")
END_OF_TEXT, END_OF_TURN = 0, 2


def speaking_base(folder: Path, problem: str, words: int) -> tuple[Path, list[int]]:
    """Make a checkpoint that answers `problem` greedily with `words` tokens and then ends its turn.

    Returns its folder and the answer's ids, the end included.

    Its tokenizer, config.json and generation_config.json name <|endoftext|> as the end, its template writes <|im_end|>.
    """
    from transformers import AutoModelForCausalLM

    for seed in range(100):
        make_checkpoint(folder, "llama", seed=seed, eos_token_id=END_OF_TEXT)  # whose head is its own
        name_ends(folder)
        ids = torch.tensor([Chat.from_checkpoint(folder, CHAT).encode_prompt(problem)])
        model = AutoModelForCausalLM.from_pretrained(folder)
        free = model.generate(ids, max_new_tokens=60, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
        last = free[words]
        if {END_OF_TEXT, END_OF_TURN} & set(free) or last in free[:words]:
            continue
        weights = load_file(folder / "model.safetensors")
        head = weights["lm_head.weight"]
        head[[last, END_OF_TURN]] = head[[END_OF_TURN, last]]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, [*free[:words], END_OF_TURN]
    raise AssertionError("no seed gives such a model")


def name_ends(folder: Path) -> None:
    """Have a checkpoint's files name <|endoftext|>, and nothing else, as its end."""
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", "<|endoftext|>"),
        ("config.json", "eos_token_id", END_OF_TEXT),
        ("generation_config.json", "eos_token_id", END_OF_TEXT),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {key: value}))
