"""The check of prompts before the first is sent: what a generation of many problems spends its first minutes on."""

import asyncio
from pathlib import Path

import pytest

from micota_fast.chat.encoding import Chat
from micota_fast.common.records import Problem, write_rows
from micota_fast.config.generation import ChatConfig
from micota_fast.errors import InputError
from micota_fast.generation import prompts
from micota_fast.generation.problem_file import ProblemFile
from micota_fast.generation.prompts import Prompts


def test_it_can_be_broken_off(tmp_path: Path, qwen2_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop turns between two batches, so that Ctrl-C is heard."""
    monkeypatch.setattr(prompts, "CHECKED_AT_ONCE", 10)
    write_rows(tmp_path / "problems.jsonl", [Problem(f"p{i}", "1 + 1 =", "2") for i in range(1000)])
    chat = Chat.from_checkpoint(qwen2_checkpoint, ChatConfig(system=None, prompt="{problem}"))
    read = []

    async def broken_off() -> None:
        with ProblemFile(tmp_path / "problems.jsonl") as problems:
            all_ = Prompts(problems, chat)
            checking = asyncio.create_task(all_.check(1000, 1000, 16, tmp_path / "checked"))
            some = all_._some
            monkeypatch.setattr(all_, "_some", lambda start, end: read.append(end) or some(start, end))
            for _ in range(5):
                await asyncio.sleep(0)
            checking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await checking

    asyncio.run(broken_off())
    assert 0 < len(read) < 10
    assert not (tmp_path / "checked").exists()


def test_one_corpus_is_not_cut_off_at_two_lengths(tmp_path: Path, qwen2_checkpoint: Path) -> None:
    write_rows(tmp_path / "problems.jsonl", [Problem(f"p{i}", "1 + 1 =", "2") for i in range(3)])
    chat = Chat.from_checkpoint(qwen2_checkpoint, ChatConfig(system=None, prompt="{problem}"))
    with ProblemFile(tmp_path / "problems.jsonl") as problems:

        def check(context: int, max_new_tokens: int) -> None:
            asyncio.run(Prompts(problems, chat).check(context - 2, context, max_new_tokens, tmp_path / "checked"))

        check(512, 400)
        check(512, 400)
        check(2048, 400)  # nothing is cut off at either
        check(512, 400)
        with pytest.raises(InputError, match="context is 256 tokens and was 512 when the first answers were made"):
            check(256, 400)
        check(512, 400)  # as before
