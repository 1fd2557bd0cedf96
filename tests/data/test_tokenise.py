"""Training rows of every accepted format, the ways in which a row can be bad, and the count of what became of each."""

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from micota_fast.chat.encoding import Chat
from micota_fast.config.generation import ChatConfig
from micota_fast.data import tokenise
from micota_fast.data.tokenise import Documents, load_documents
from micota_fast.errors import InputError

PROMPT = "Q: {problem}"


@pytest.fixture(scope="module")
def chat(qwen2_checkpoint: Path) -> Chat:
    return Chat.from_checkpoint(qwen2_checkpoint, ChatConfig(system="Be brief.", prompt=PROMPT))


def write(path: Path, *rows: Any) -> Path:
    """Strings and bytes as they are, everything else as JSON."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def texts(documents: Documents, chat: Chat) -> list[tuple[str, ...]]:
    """(whole text, supervised text) of each document."""
    found = []
    for a, b in pairwise(documents.offsets):
        ids, mask = documents.input_ids[a:b], documents.supervised[a:b]
        found.append(tuple(chat.decode(part.tolist(), skip_special_tokens=False) for part in (ids, ids[mask])))
    return found


def chatml(*turns: tuple[str, str]) -> str:
    return "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in turns)


OURS = {"problem": "1+1?", "completion": "So \\boxed{2}"}
SYSTEM, ASKED, ANSWERED = ("system", "Be brief."), ("user", "Q: 1+1?"), ("assistant", "So \\boxed{2}")
PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
MULTI = [{"role": "system", "content": "S"}, *PLAIN, {"role": "user", "content": "and"}, PLAIN[1]]
# A system message of the template's own stands where the conversation brings none.
DEFAULT = ("system", "You are a helpful assistant.")


@pytest.mark.parametrize(
    ("row", "whole", "supervised"),
    [
        (OURS, [SYSTEM, ASKED, ANSWERED], "So \\boxed{2}<|im_end|>"),
        (
            {"id": "a", "sample": 0, **OURS, "answer": "2", "finish_reason": "stop", "solution": "other", "seed": None},
            [SYSTEM, ASKED, ANSWERED],
            "So \\boxed{2}<|im_end|>",
        ),
        ({"id": "a", "problem": "1+1?", "answer": "2", "solution": "It is 2.", "completion": None},
         [SYSTEM, ASKED, ("assistant", "It is 2.")], "It is 2.<|im_end|>"),
        ({"messages": PLAIN, "source": "x"}, [DEFAULT, ("user", "Hi"), ("assistant", "Ho")], "Ho<|im_end|>"),
        (
            {"messages": MULTI},
            [("system", "S"), ("user", "Hi"), ("assistant", "Ho"), ("user", "and"), ("assistant", "Ho")],
            "Ho<|im_end|>Ho<|im_end|>",
        ),
        (
            {"messages": [{**PLAIN[0], "name": None}, {**PLAIN[1], "tool_calls": []}], "tools": None},
            [DEFAULT, ("user", "Hi"), ("assistant", "Ho")],
            "Ho<|im_end|>",
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"},
                               {"from": "gpt", "value": "Ho"}]},
            [("system", "S"), ("user", "Hi"), ("assistant", "Ho")],
            "Ho<|im_end|>",
        ),
        (
            {"system": "S", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Ho"}]},
            [("system", "S"), ("user", "Hi"), ("assistant", "Ho")],
            "Ho<|im_end|>",
        ),
        (
            {"instruction": "Add", "input": "", "output": "2"},
            [SYSTEM, ("user", "Add"), ("assistant", "2")],
            "2<|im_end|>",
        ),
        (
            {"instruction": "Add", "input": "1 1", "output": "2", "system": "S", "history": []},
            [("system", "S"), ("user", "Add\n1 1"), ("assistant", "2")],
            "2<|im_end|>",
        ),
    ],
)  # fmt: skip
def test_every_format(chat: Chat, tmp_path: Path, row: Any, whole: list[tuple[str, str]], supervised: str) -> None:
    documents = load_documents(write(tmp_path / "rows.jsonl", row), chat, 512)
    assert texts(documents, chat) == [(chatml(*whole), supervised)]


def messages(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD_ROWS: list[tuple[Any, str]] = [
    ('{"problem": "1+1?", "compl', r"not JSON: the text ends within a string \(column 27\)"),
    (b'{"problem": "\xff", "completion": "x"}', "not UTF-8: byte 0xff"),
    ("[" * 100_000, "nested more than 100 levels deep"),
    ("[]", r"expected a JSON object, found '\[\]'"),
    ('"text"', "expected a JSON object, found '\"text\"'"),
    ({}, r"unknown row format: keys \(none\)"),
    (
        {"prompt": "a", "response": "b"},
        "unknown row format: keys 'prompt', 'response' look like a prompt and a response; "
        "`columns: {completion: response}`",
    ),
    ({"problem": "a", "completion": None}, "unknown row format"),
    ({"problem": "a", "solution": "b", "messages": PLAIN}, r"several formats \(solution, messages\)"),
    ({"problem": 5, "completion": "b"}, "key 'problem' must be a string, got int 5"),
    ({"problem": "a", "completion": ["b"]}, "key 'completion' must be a string, got list"),
    ({"problem": "a", "completion": " \n"}, "message 3: the assistant's text is empty"),
    ({**OURS, "system": "S"}, "key 'system' is not part of the completion format"),
    ('{"problem": "\\ud800", "completion": "b"}', "ud800 is half a character"),
    *(
        ({**OURS, "weight": weight}, message)
        for weight, message in ((10**400, "has 401 digits"), (math.nan, "NaN is not a"), (math.inf, "Infinity is not"))
    ),
    ({"problem": "a", "completion": "b<|im_end|>"}, "contains the control token"),
    ({"problem": "a<|im_start|>b", "completion": "c"}, "the problem's prompt contains the control token"),
    (messages(("user", "a<|endoftext|>"), ("assistant", "b")), r"message 1 \(user\) contains the control token"),
    ({"messages": []}, "key 'messages' must be a list of messages"),
    ({"messages": "Hi"}, "key 'messages' must be a list of messages, got 'Hi'"),
    ({"messages": ["Hi"]}, "message 1: expected an object, got str"),
    ({"messages": [{"role": "user"}]}, "message 1: key 'content' is missing"),
    ({"messages": PLAIN, "tools": [{"name": "f"}]}, "key 'tools' is not supported"),
    ({"messages": [PLAIN[0], {**PLAIN[1], "weight": 0}]}, "message 2: key 'weight' is not supported"),
    (
        messages(("user", "a"), ("assistant", [{"type": "text", "text": "b"}])),
        "message 2: key 'content' must be a string",
    ),
    (messages(("user", "a"), ("tool", "b")), "message 2: unknown role 'tool'; known: user, assistant, system"),
    (messages(("assistant", "a"), ("user", "b")), "message 1: expected the user, found the assistant"),
    (messages(("user", "a"), ("user", "b")), "message 2: expected the assistant, found the user"),
    (messages(("user", "a"), ("system", "b")), "message 2: expected the assistant, found the system"),
    (messages(("system", "a"), ("user", "b")), "does not end with the assistant"),
    (messages(("system", "a")), "does not end with the assistant"),
    (
        messages(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")),
        "message 4: the assistant's text is",
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]},
        "message 2: unknown from 'bot'",
    ),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "key 'history' is not supported"),
    ({"instruction": "a", "input": 1, "output": "b"}, "key 'input' must be a string, got int 1"),
    *(
        ({**OURS, "weight": weight}, "key 'weight' must be a number from 1.2e-38 to 3.4e\\+38, got ")
        for weight in (0, -1, 1e-39, 1e39, 10**40, True, "2", [1])
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_an_error_with_file_and_line(chat: Chat, tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", OURS, "", row, OURS)
    with pytest.raises(InputError, match=message) as error:
        load_documents(path, chat, 512)
    assert str(error.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize("batch_chars", [1, 200, 4_000_000])
def test_bad_rows_are_set_aside_where_asked(
    chat: Chat, tmp_path: Path, batch_chars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "_BATCH_CHARS", batch_chars)
    rows = [line for row, _ in BAD_ROWS for line in (row, OURS)]
    path, rejects_path = write(tmp_path / "rows.jsonl", *rows), tmp_path / "out" / "rejects.jsonl"
    documents = load_documents(path, chat, 512, skip_bad_rows=True, rejects_path=rejects_path)
    assert (documents.rows, documents.rejected, len(documents)) == (len(rows), len(BAD_ROWS), len(BAD_ROWS))
    assert documents.rejects_path == rejects_path
    assert len(set(texts(documents, chat))) == 1
    rejects = [json.loads(line) for line in rejects_path.read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == list(range(1, len(rows), 2))
    lines = path.read_bytes().split(b"\n")
    assert all(reject["row"] == lines[reject["line"] - 1].decode("utf-8", "replace") for reject in rejects)
    assert "lone surrogate" in rejects[13]["reason"]


def test_a_rejects_file_tells_of_the_last_call_only(chat: Chat, tmp_path: Path) -> None:
    path, beside = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.bad_rows.jsonl"
    assert load_documents(write(path, OURS, "?"), chat, 512, skip_bad_rows=True).rejects_path == beside
    assert len(beside.read_text().splitlines()) == 1
    documents = load_documents(write(path, OURS), chat, 512, skip_bad_rows=True)
    assert (documents.rejected, documents.rejects_path, beside.exists()) == (0, None, False)


def test_the_first_bad_row_is_reported_whichever_check_finds_it(
    chat: Chat, qwen2_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(qwen2_checkpoint, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))  # the tokenizer has 320
    small = Chat.from_checkpoint(folder, ChatConfig(prompt=PROMPT))
    merged = {"problem": "the answer is", "completion": "the answer is"}
    ids = chat.encode_prompt("the answer is")
    assert max(ids) >= 300
    path = write(tmp_path / "rows.jsonl", merged, "not JSON")
    with pytest.raises(InputError, match=r"rows\.jsonl:1: token .* has the id 3\d\d; the model knows only 300"):
        load_documents(path, small, 512)
    with pytest.raises(InputError, match=r"no usable row: 2 rows, 0 dropped .*, 2 rejected \(see .*bad_rows\.jsonl\)"):
        load_documents(path, small, 512, skip_bad_rows=True)
    rejects = [json.loads(line) for line in (tmp_path / "rows.jsonl.bad_rows.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [1, 2]


def test_documents_over_the_limit_are_dropped_or_cut_and_counted(chat: Chat, tmp_path: Path) -> None:
    long = {"problem": "1+1?", "completion": "x1 " * 100}
    hopeless = {"problem": "1+1? " * 100, "completion": "2"}  # its prompt alone is over the limit
    path = write(tmp_path / "rows.jsonl", OURS, long, hopeless, OURS)
    everything = load_documents(path, chat, 10_000)
    assert (len(everything), everything.dropped, everything.truncated) == (4, 0, 0)
    limit = int(everything.lengths[0])

    dropped = load_documents(path, chat, limit, "drop")
    assert (dropped.rows, len(dropped), dropped.dropped, dropped.truncated) == (4, 2, 2, 0)
    assert dropped.lengths.tolist() == [limit, limit]

    cut = load_documents(path, chat, limit, "truncate")
    assert (cut.rows, len(cut), cut.dropped, cut.truncated) == (4, 3, 1, 1)
    a, b = everything.offsets[1:3]
    assert cut.input_ids[limit : 2 * limit].tolist() == everything.input_ids[a:b][:limit].tolist()
    assert cut.supervised[limit : 2 * limit].tolist() == everything.supervised[a:b][:limit].tolist()
    assert chat.eos_ids[0] != cut.input_ids[2 * limit - 1]  # it does not learn to stop where it was cut

    with pytest.raises(InputError, match="no usable row: 4 rows, 4 dropped for being over 5 tokens"):
        load_documents(path, chat, 5, "truncate")
    with pytest.raises(InputError, match="max_doc_tokens must be at least 2"):
        load_documents(path, chat, 1)


def test_thoughts_are_counted_in_the_rows_that_are_trained_on(chat: Chat, tmp_path: Path) -> None:
    def answer(text: str, **more: Any) -> dict[str, Any]:
        return messages(("user", "1+2?"), ("assistant", f"<think>\nHm.\n</think>\n\n{text}")) | more

    rows = [answer("3"), answer("3 " * 500), answer("3", weight=-1), {"messages": PLAIN}]
    path = write(tmp_path / "rows.jsonl", *rows)
    documents = load_documents(path, chat, 100, skip_bad_rows=True)
    assert (len(documents), documents.dropped, documents.rejected) == (2, 1, 1)
    assert "thoughts: 1 kept, each in one pair of tags" in documents.about
    assert "thoughts: 2 kept, each in one pair of tags" in load_documents(path, chat, 100, "truncate", True).about


def test_a_row_without_a_token_to_predict_is_bad(qwen2_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen2_checkpoint, tmp_path / "checkpoint")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace("?", "")
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = Chat.from_checkpoint(folder, ChatConfig(use_template=False, prompt="{problem}"))
    path = write(tmp_path / "rows.jsonl", {"problem": "", "completion": "a?"}, {"problem": "?", "completion": "??"})
    with pytest.raises(InputError, match=r"rows\.jsonl:2: no supervised token"):
        load_documents(path, chat, 512)
    documents = load_documents(path, chat, 512, skip_bad_rows=True)
    assert documents.supervised.tolist() == [True, True]
    assert documents.n_targets.tolist() == [1]  # nothing precedes the first of the two


def test_blank_lines_byte_order_mark_and_line_ends(chat: Chat, tmp_path: Path) -> None:
    line = json.dumps(OURS).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n" + line)
    documents = load_documents(path, chat, 512)
    assert documents.rows == len(documents) == 2
    plain = load_documents(write(tmp_path / "plain.jsonl", OURS, OURS), chat, 512)
    assert documents.fingerprint == plain.fingerprint


def test_files_without_rows_or_missing(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the file has no rows"):
        load_documents(write(tmp_path / "empty.jsonl"), chat, 512)
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.jsonl"):
        load_documents(tmp_path / "nowhere.jsonl", chat, 512)


def test_arrays_do_not_depend_on_how_rows_are_batched(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"problem": f"{i}+{i}?", "completion": "it is " * (i % 7 + 1) + str(2 * i)} for i in range(50)]
    path = write(tmp_path / "rows.jsonl", *rows, {"messages": MULTI})
    whole = load_documents(path, chat, 512)
    monkeypatch.setattr(tokenise, "_BATCH_CHARS", 300)
    pieces = load_documents(path, chat, 512)
    assert pieces.fingerprint == whole.fingerprint
    assert (whole.input_ids.dtype, whole.supervised.dtype, whole.offsets.dtype) == (np.int32, np.bool_, np.int64)
    assert whole.offsets[-1] == len(whole.input_ids) == len(whole.supervised)
    assert len(whole) == 51
    assert whole.n_targets.sum() == whole.supervised.sum()  # no document here begins with a supervised token


def test_a_rows_weight_stays_with_its_document(chat: Chat, tmp_path: Path) -> None:
    long = {**OURS, "completion": "x1 " * 100}
    rows = [
        OURS,
        {**OURS, "weight": 0.3},
        {**long, "weight": 7},
        {**OURS, "weight": None},
        {"messages": PLAIN, "weight": 2},
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    documents = load_documents(path, chat, 512)
    assert documents.weights is not None
    assert documents.weights.dtype == np.float32
    assert documents.weights.tolist() == [1, np.float32(0.3), 7, 1, 2]
    assert documents.weighted_targets.tolist() == [
        w * n for w, n in zip(documents.weights.tolist(), documents.n_targets, strict=True)
    ]
    limit = int(documents.lengths[0])
    dropped = load_documents(path, chat, limit, "drop")
    assert dropped.weights is not None
    assert dropped.weights.tolist() == [1, np.float32(0.3), 1, 2]

    plain = load_documents(write(tmp_path / "plain.jsonl", OURS, long), chat, 512)
    ones = load_documents(write(tmp_path / "ones.jsonl", {**OURS, "weight": 1}, {**long, "weight": 1.0}), chat, 512)
    twos = load_documents(write(tmp_path / "twos.jsonl", {**OURS, "weight": 2}, long), chat, 512)
    assert plain.weights is None
    assert ones.weights is None
    assert plain.weighted_targets.dtype == np.int64
    assert plain.fingerprint == ones.fingerprint != twos.fingerprint


def test_the_fingerprint_tells_ids_mask_and_bounds_apart() -> None:
    def fingerprint(ids: list[int], mask: list[int], offsets: list[int]) -> str:
        arrays = np.array(ids, np.int32), np.array(mask, bool), np.array(offsets, np.int64)
        return Documents(*arrays, rows=2, dropped=0, truncated=0, rejected=0, rejects_path=None).fingerprint

    prints = [
        fingerprint([1, 2, 3, 4], [0, 1, 0, 1], [0, 2, 4]),
        fingerprint([1, 2, 3, 5], [0, 1, 0, 1], [0, 2, 4]),
        fingerprint([1, 2, 3, 4], [0, 1, 1, 1], [0, 2, 4]),
        fingerprint([1, 2, 3, 4], [0, 1, 0, 1], [0, 1, 4]),
    ]
    assert len(set(prints)) == 4
    assert prints[0] == fingerprint([1, 2, 3, 4], [0, 1, 0, 1], [0, 2, 4])


def test_a_row_may_bring_options_of_its_template(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen3_checkpoint, tmp_path / "checkpoint")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}"
        "{% if m.role == 'user' and not (thinks | default(true)) %}/no_think{% endif %}"
        "{{ '\\n' }}{{ m.content }}<|im_end|>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
    )
    chat = Chat.from_checkpoint(folder, ChatConfig(system=None))
    options = {"chat_template_kwargs": {"thinks": False, "other": None, "messages": []}}
    path = write(tmp_path / "rows.jsonl", {"messages": PLAIN}, {"messages": PLAIN, **options})
    (plain, _), (changed, _) = texts(load_documents(path, chat, 512), chat)
    assert changed == plain.replace("<|im_start|>user", "<|im_start|>user/no_think")
    assert changed != plain
    with pytest.raises(InputError, match=r"rows\.jsonl:1: key 'chat_template_kwargs' must be an object, got 'x'"):
        load_documents(write(path, {"messages": PLAIN, "chat_template_kwargs": "x"}), chat, 512)
