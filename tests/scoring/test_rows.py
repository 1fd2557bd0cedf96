"""Rows that the scoring model could not read are refused before anything is sent."""

import json
import shutil
from pathlib import Path

import pytest

from micota_fast.chat.encoding import Chat
from micota_fast.common.records import Completion, write_rows
from micota_fast.config.generation import ChatConfig
from micota_fast.errors import InputError
from micota_fast.scoring.rows import load_rows


def test_a_token_that_the_scoring_model_has_no_row_for_is_refused(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2_checkpoint, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))  # the tokenizer has 320
    row = Completion("p", 0, "1 + 1 =", "2", "the answer is 2", "stop", 9, 9, None)
    write_rows(tmp_path / "rows.jsonl", [row])
    chat = Chat.from_checkpoint(folder, ChatConfig(system=None, prompt="{problem}"))
    with pytest.raises(InputError, match=r"rows\.jsonl:1: token .* has the id 3\d\d; the model knows only 300"):
        load_rows(str(tmp_path / "rows.jsonl"), chat, None)
