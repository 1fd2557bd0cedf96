"""Templates and tokenizers that take any amount of time or memory: refused by name, at load or with the row."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import (
    CHATML,
    CHECKPOINTS,
    LATE_TEMPLATE,
    LATE_TEXT,
    QWEN25,
    chat_of,
    conversation,
    make_chat_checkpoint,
    sequence,
    split,
    with_late_pattern,
    with_parts,
)
from helpers.waiting import soon
from micota_fast.chat.limits import PROCESS, OverLimitError
from micota_fast.chat.rendering import Renderer
from micota_fast.chat.tokenizer import TextError, read_vocabulary
from micota_fast.data.tokenise import load_documents
from micota_fast.errors import InputError
from micota_fast.merge.vocabulary import difference

TEMPLATES = {
    "lipsum": "{{ lipsum(10**7) }}",
    "nested loops": "{% for a in range(10**4) %}{% for b in range(10**4) %}{% for c in range(10**4) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "long output": "{% for a in range(10**4) %}{% for b in range(10**4) %}{{ a }}{% endfor %}{% endfor %}",
    "indented JSON": "{{ messages|tojson(indent=10**9) }}",
    "constant repetition": "{{ 'a' * 10**9 }}",
    "repetition": "{{ 'a' * (messages|length * 10**9) }}",
    "repeated message": "{{ messages[0].content * 3000000 }}",
    "width of a format": "{{ '%1000000000d' % messages|length }}",
    "centered": "{{ messages[0].content|center(10**9) }}",
    "recursive macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "joined ranges": "{% for a in range(99999) %}{{ range(99999)|join|length }}{% endfor %}",
    "doubled text": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubled list": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
    "{{ ns.s|tojson }}",
    "power": "{{ 9 ** (messages|length * 10**9) }}",
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if x %}" * 3000 + "{% endif %}" * 3000,
}


def replaced(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


PREPENDED = {"type": "Prepend", "prepend": "b" * 1000}
WHOLE = {"Sequence": {"id": "A", "type_id": 0}}
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "chained replacements": {"normalizer": sequence("normalizers", *[replaced("a", "a" * 100)] * 6)},
    "prepended": {"normalizer": sequence("normalizers", PREPENDED, *[replaced("b", "b" * 1000)] * 3)},
    "nested repeats": {"pre_tokenizer": split("(a+)+b")},
    "ambiguous alternatives": {"pre_tokenizer": split("(z|z)*y")},
    "many repeats": {"pre_tokenizer": split("a*a*a*a*a*a*a*a*b")},
    "deep pattern": {"pre_tokenizer": split("(" * 100_000 + "a" + ")" * 100_000)},
    "character map of noise": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "EAAAAP" + "/" * 80}},
    "endless character map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "added tokens": {
        "added_tokens": [{"id": 400 + i, "content": f"<t{i}>", **ADDED} for i in range(250_000)],
    },
    "text many times": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [WHOLE] * 1000,
            "pair": [WHOLE, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        }
    },
    "decoder": {"decoder": sequence("decoders", *[replaced("a", "a" * 1000)] * 4)},
}


def rows(path: Path, *problems: str) -> Path:
    path.write_text("".join(json.dumps({"problem": text, "completion": "It is 2."}) + "\n" for text in problems))
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_bounds_is_refused_at_load(tmp_path: Path, name: str) -> None:
    path = make_chat_checkpoint(tmp_path / "c", template=TEMPLATES[name] + QWEN25)
    with soon(), pytest.raises(InputError, match=r"tokenizer_config\.json: key 'chat_template': ") as error:
        chat_of(path)
    assert isinstance(error.value, OverLimitError) == ("cannot be compiled" not in str(error.value))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_without_bounds_is_refused_at_load(tmp_path: Path, name: str) -> None:
    path = with_parts(tmp_path / "c", **TOKENIZERS[name])
    with soon(), pytest.raises(InputError, match=r"tokenizer\.json: "):
        chat_of(path.parent)
    with pytest.raises(InputError, match=r"tokenizer\.json: "):
        read_vocabulary(path)
    with pytest.raises(InputError, match=r"tokenizer\.json: "):
        difference(path.parent, make_chat_checkpoint(tmp_path / "other"))


def test_a_row_on_which_the_template_explodes_is_named(tmp_path: Path) -> None:
    chat = chat_of(make_chat_checkpoint(tmp_path / "c", template=LATE_TEMPLATE))
    path = rows(tmp_path / "rows.jsonl", "What is 1 + 1?", "BOOM", "What is 2 + 0?")
    with pytest.raises(InputError, match=r"rows\.jsonl:2: .*tokenizer_config\.json: .*CPU time"):
        load_documents(path, chat, 512)
    documents = load_documents(path, chat, 512, skip_bad_rows=True)
    assert (len(documents), documents.rejected) == (2, 1)
    kept = load_documents(rows(tmp_path / "kept.jsonl", "What is 1 + 1?", "What is 2 + 0?"), chat, 512)
    assert documents.fingerprint == kept.fingerprint


def test_a_row_on_which_the_tokenizer_fails_is_named(tmp_path: Path) -> None:
    chat = chat_of(with_late_pattern(tmp_path / "c").parent)
    path = rows(tmp_path / "rows.jsonl", "What is 1 + 1?", LATE_TEXT, "What is 2 + 0?", LATE_TEXT)
    with pytest.raises(InputError, match=r"rows\.jsonl:2: .*tokenizer\.json: .*retry-limit"):
        load_documents(path, chat, 512)
    documents = load_documents(path, chat, 512, skip_bad_rows=True)
    assert (len(documents), documents.rejected) == (2, 2)
    rejects = Path(f"{path}.bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in rejects] == [2, 4]
    kept = load_documents(rows(tmp_path / "kept.jsonl", "What is 1 + 1?", "What is 2 + 0?"), chat, 512)
    assert documents.fingerprint == kept.fingerprint
    with pytest.raises(TextError) as error:
        chat.tokenizer.encode(["fine", LATE_TEXT, "fine"])
    assert error.value.index == 1


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_texts_are_those_of_the_template_in_this_process(tmp_path: Path, name: str) -> None:
    template, special, bos, eos = CHECKPOINTS[name]
    chat = chat_of(make_chat_checkpoint(tmp_path / "c", template, special, bos, eos))
    tokens = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    here = Renderer(template, "here", tokens)
    for messages in (
        conversation("What is 1 + 2?"),
        conversation("né\r\n\u2028 中文 👩‍👩‍👧 <b>", "It\tis\\n 3.", "  And?  "),
    ):
        for header in (False, True):
            assert chat.render(messages, header) == here.render(messages, header, {})


def test_the_process_is_started_again_when_it_was_killed(tmp_path: Path) -> None:
    one, other = (
        chat_of(make_chat_checkpoint(tmp_path / "a")),
        chat_of(make_chat_checkpoint(tmp_path / "b", "x<|im_end|>")),
    )
    before = [chat.encode_prompt("What is 1 + 1?") for chat in (one, other)]
    assert PROCESS._process is not None
    os.kill(PROCESS._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, PROCESS._process.pid, os.WEXITED | os.WNOWAIT)
    assert [chat.encode_prompt("What is 1 + 1?") for chat in (one, other)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_to_all_processes_of_a_job_leave_it_alone(tmp_path: Path, number: signal.Signals) -> None:
    chat = chat_of(make_chat_checkpoint(tmp_path / "a"))
    before = chat.encode_prompt("What is 1 + 1?")
    assert PROCESS._process is not None
    pid = PROCESS._process.pid
    os.kill(pid, number)
    assert chat.encode_prompt("What is 1 + 1?") == before
    assert PROCESS._process.pid == pid


def test_what_is_no_longer_used_is_closed(tmp_path: Path) -> None:
    path = make_chat_checkpoint(tmp_path / "c")
    kept = chat_of(path)
    kept.encode_prompt("a")
    before = len(PROCESS._open)
    for _ in range(5):
        chat_of(path).encode_prompt("a")
    kept.encode_prompt("a")
    assert len(PROCESS._open) <= before


def test_a_fork_has_a_process_of_its_own(tmp_path: Path) -> None:
    chat = chat_of(make_chat_checkpoint(tmp_path / "c"))
    expected = chat.encode_prompt("a")
    child = os.fork()
    if child == 0:
        os._exit(0 if chat.encode_prompt("a") == expected else 1)
    assert [chat.encode_prompt("a") for _ in range(100)] == [expected] * 100
    assert os.waitpid(child, 0)[1] == 0


def test_a_long_honest_text_is_tokenised_as_the_library_does(tmp_path: Path) -> None:
    chat = chat_of(make_chat_checkpoint(tmp_path / "c", special=CHATML))
    texts = ["The answer is 42. " * n for n in (1, 0, 60_000, 3, 120_000)]  # in several calls
    expected = [encoding.ids for encoding in chat.tokenizer.library.encode_batch(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in chat.tokenizer.encode(texts)] == expected
