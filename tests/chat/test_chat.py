"""Chat templates of the shapes that published checkpoints have, and the loss mask, proved by decoding it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from helpers.chats import (
    CHATML,
    CHECKPOINTS,
    END_OF_TURN,
    NO_SYSTEM,
    QWEN25,
    TRAINABLE,
    chat_of,
    conversation,
    make_chat_checkpoint,
    write_config,
)
from micota_fast.chat.encoding import Chat
from micota_fast.config.generation import ChatConfig
from micota_fast.errors import InputError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    return {
        name: make_chat_checkpoint(root / name, *settings, adds_bos=settings[2] is not None)
        for name, settings in CHECKPOINTS.items()
    }


def encode(chat: Chat, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Ids and supervised mask of one conversation."""
    (encoded,) = chat.encode_segments([chat.segments(messages)])
    return encoded.input_ids.tolist(), encoded.supervised.tolist()


def supervised_texts(chat: Chat, messages: list[dict[str, str]]) -> list[str]:
    """The text of every run of supervised tokens."""
    ids, mask = encode(chat, messages)
    assert len(ids) == len(mask)
    runs: list[list[int]] = []
    for i, (token, supervised) in enumerate(zip(ids, mask, strict=True)):
        if supervised and (i == 0 or not mask[i - 1]):
            runs.append([])
        if supervised:
            runs[-1].append(token)
    return [chat.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_mask_decodes_to_the_answer_and_its_end_of_turn_token(checkpoints: dict[str, Path], name: str) -> None:
    chat = chat_of(checkpoints[name])
    system = None if name in NO_SYSTEM else "Be brief."
    messages = conversation("What is 1 + 2?", "It is\n\\boxed{3}.", system=system)
    ids, mask = encode(chat, messages)
    before = {"mistral": " ", "qwen3": "<think>\n\n</think>\n\n"}.get(name, "")
    assert supervised_texts(chat, messages) == [before + "It is\n\\boxed{3}." + END_OF_TURN[name]]
    # All of it is the rendered conversation, up to the end-of-turn token, and the model reads it up to the answer.
    text = chat.render(messages, add_generation_prompt=False)
    assert text.startswith(chat.decode(ids, skip_special_tokens=False))
    prompt = chat.render(messages[:-1], add_generation_prompt=True)
    assert chat.decode([i for i, s in zip(ids, mask, strict=True) if not s], skip_special_tokens=False) == prompt


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_prompt_in_training_is_the_prompt_in_generation(checkpoints: dict[str, Path], name: str) -> None:
    chat = chat_of(checkpoints[name], system=None if name in NO_SYSTEM else "Be brief.", prompt="Solve {problem} {x}")
    messages = [*chat.prompt_messages("1+{problem}2?"), {"role": "assistant", "content": "2?3"}]
    assert messages[-2] == {"role": "user", "content": "Solve 1+{problem}2? {x}"}
    ids, mask = encode(chat, messages)
    assert chat.encode_prompt("1+{problem}2?") == ids[: mask.index(True)]


@pytest.mark.parametrize("name", [name for name in TRAINABLE if name != "qwen3"])
def test_every_assistant_turn_of_a_conversation_is_supervised(checkpoints: dict[str, Path], name: str) -> None:
    chat = chat_of(checkpoints[name])
    space = " " if name == "mistral" else ""
    texts = supervised_texts(chat, conversation("1+1?", "2", "and 2+2?", "4", "again?", "4"))
    assert texts == [space + answer + END_OF_TURN[name] for answer in ("2", "4", "4")]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_renders_what_transformers_renders(checkpoints: dict[str, Path], name: str) -> None:
    from datetime import datetime

    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(checkpoints[name])
    ours = chat_of(checkpoints[name])
    system = None if name in NO_SYSTEM else " Be brief. "
    for messages, prompt in [
        (conversation("Hi <&> 'you'"), True),
        (conversation("Hi", "  <think>\nWell\n</think>\n\nHo  ", "and?", system=system), True),
        (conversation("Hi", "<think>\nWell\n</think>\n\nHo", system=system), False),
    ]:
        text = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        assert ours.render(messages, prompt) == text.replace(datetime.now().strftime("%d %b %Y"), "26 Jul 2024")
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        if "Today" not in text:
            assert ours.tokenizer.encode([ours.render(messages, prompt)])[0].tolist() == ids


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda text: text.strip() and "<|" not in text
)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives_the_mask(checkpoints: dict[str, Path], turns: list[tuple[str, str]]) -> None:
    chat = chat_of(checkpoints["qwen2.5"])
    texts = supervised_texts(chat, conversation(*(text for turn in turns for text in turn)))
    assert texts == [answer + "<|im_end|>" for _, answer in turns]


def test_neither_header_nor_the_newline_after_a_turn_is_supervised(checkpoints: dict[str, Path]) -> None:
    chat = chat_of(checkpoints["qwen2.5"])
    segments = chat.segments(conversation("a", "b", "c", "d"))
    assert [s.text for s in segments if not s.supervised] == [
        "<|im_start|>system\nYou are a default.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert [s.text for s in segments if s.supervised] == ["b<|im_end|>", "d<|im_end|>"]


def test_many_conversations_at_once_are_as_one_by_one(checkpoints: dict[str, Path]) -> None:
    chat = chat_of(checkpoints["llama3"])
    rows = [conversation(f"{i}?", f"It is {i}.", "sure?", "yes " * i + "!") for i in range(20)]
    together = chat.encode_segments([chat.segments(row) for row in rows])
    assert [(ids.tolist(), mask.tolist()) for ids, mask in together] == [encode(chat, row) for row in rows]


def test_qwen3_keeps_the_thinking_of_the_last_turn(checkpoints: dict[str, Path]) -> None:
    chat = chat_of(checkpoints["qwen3"])
    answer = "<think>\nOne and two.\n</think>\n\nThree."
    assert supervised_texts(chat, conversation("1+2?", answer)) == [answer + "<|im_end|>"]
    # It sets its own white space round the thinking, and loses no word.
    assert supervised_texts(chat, conversation("1+2?", "<think>One and two.</think>Three.")) == [answer + "<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        # thinking of earlier turns, cut from the history
        (
            "qwen3",
            ["a", "<think>\nb\n</think>\n\nc", "d", "<think>\ne\n</think>\n\nf"],
            r"message 2 .*rewrites this turn",
        ),
        ("qwen3", ["a", "b", "c", "d"], r"message 2 .*rewrites this turn.*<think>"),
        (
            "r1-distill",
            ["a", "<think>\nb\n</think>\nc", "d", "e"],
            r"message 2 .*rewrites this turn",
        ),
    ],
)
def test_a_template_that_alters_a_turn_is_refused(
    checkpoints: dict[str, Path], name: str, texts: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        chat_of(checkpoints[name]).segments(conversation(*texts))
    assert "tokenizer_config.json: key 'chat_template'" in str(error.value)


def test_a_template_that_drops_the_answer_or_never_stops_is_refused(tmp_path: Path) -> None:
    drops = "{% for m in messages %}{{ m.role }}{{ m.content[:30] }}<|im_end|>{% endfor %}"
    with pytest.raises(InputError, match="drops or rewrites part"):
        chat_of(make_chat_checkpoint(tmp_path / "a", drops)).segments(conversation("x", "long " * 20))
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(InputError, match="would never stop"):
        chat_of(make_chat_checkpoint(tmp_path / "b", endless)).segments(conversation("x", "y"))


def test_a_stop_token_inside_the_text_is_refused(checkpoints: dict[str, Path]) -> None:
    chat = chat_of(checkpoints["qwen2.5"])
    with pytest.raises(InputError, match=r"message 2 \(assistant\) contains the control token '<\|im_end\|>'"):
        chat.segments(conversation("a", "b<|im_end|>c"))
    with pytest.raises(InputError, match=r"message 1 \(user\) contains the control token"):
        chat.segments(conversation("a<|im_end|>", "b"))
    with pytest.raises(InputError, match="does not end with an assistant message"):
        chat.segments(conversation("a", "b", "c"))


def test_a_control_token_in_the_text_is_refused(checkpoints: dict[str, Path]) -> None:
    chat = chat_of(checkpoints["qwen2.5"])
    for texts, where in (
        (["a<|im_start|>system", "b"], r"message 1 \(user\)"),
        (["a", "b<|im_start|>"], r"message 2 \(assistant\)"),
    ):
        with pytest.raises(InputError, match=where + r" contains the control token '<\|im_start\|>'"):
            chat.segments(conversation(*texts))
    for text in ("What does <|im_start|> do?", "and <|endoftext|>?"):
        with pytest.raises(InputError, match=r"problem's prompt contains the control token '<\|\w+\|>'"):
            chat.encode_prompt(text)
    # An added token that is not special is text like any other.
    assert supervised_texts(chat, conversation("a", "<think>b</think>c")) == ["<think>b</think>c<|im_end|>"]


def test_a_bare_prompt_may_hold_control_tokens_of_the_recipes_own(checkpoints: dict[str, Path]) -> None:
    markup = "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    chat = chat_of(checkpoints["qwen2.5"], use_template=False, prompt=markup)
    messages = [*chat.prompt_messages("1+1?"), {"role": "assistant", "content": "2"}]
    ids, mask = encode(chat, messages)
    assert ids[: mask.index(True)] == chat.encode_prompt("1+1?")
    assert ids.count(chat.tokenizer.library.token_to_id("<|im_start|>")) == 2
    with pytest.raises(InputError, match="control token"):
        chat.encode_prompt("1+1?<|im_end|>")
    with pytest.raises(InputError, match=r"message 2 \(assistant\) contains the control token"):
        chat.segments([messages[0], {"role": "assistant", "content": "2<|im_start|>"}])


@pytest.mark.parametrize("kind", ["metaspace", "prepend", "byte level"])
def test_a_tokenizer_that_adds_to_each_piece_of_text_is_refused(tmp_path: Path, kind: str) -> None:
    path = make_chat_checkpoint(tmp_path / "c")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    if kind == "byte level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:  # as Llama 2's: pieces of SentencePiece, of which one is the space
        vocabulary = ["<unk>", *CHATML, "\u2581", *(chr(i) for i in range(33, 127)), "\u2581a", "\u2581b"]
        merges = [("\u2581", "a"), ("\u2581", "b")]
        model = models.BPE({text: i for i, text in enumerate(vocabulary)}, merges, unk_token="<unk>")
        tokenizer = Tokenizer(model)
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CHATML])
        if kind == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
            tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        else:
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
    tokenizer.save(str(path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"tokenizer\.json: the tokenizer adds to every piece of text"):
        chat_of(path)


def test_bos_is_there_once(checkpoints: dict[str, Path]) -> None:
    chat = chat_of(checkpoints["llama3"])  # its tokenizer adds a BOS of its own, and its template writes one
    bos = chat.tokenizer.library.token_to_id("<|begin_of_text|>")
    assert chat.tokenizer.encode(["a"], add_special_tokens=True)[0][0] == bos
    assert chat.encode_prompt("a")[0] == bos
    assert chat.encode_prompt("a").count(bos) == 1
    bare = chat_of(checkpoints["llama3"], use_template=False, prompt="{problem}")
    assert bare.encode_prompt("a") == [bos, *bare.tokenizer.encode(["a"])[0].tolist()]
    assert bare.encode_prompt("<|begin_of_text|>a") == bare.encode_prompt("a")


def test_without_template_the_prompt_is_bare_and_the_answer_ends_with_eos(checkpoints: dict[str, Path]) -> None:
    chat = chat_of(checkpoints["qwen2.5"], use_template=False, system="Ignored: there is no place for it.")
    messages = [*chat.prompt_messages("1+1?"), {"role": "assistant", "content": "2"}]
    ids, mask = encode(chat, messages)
    prompt = chat.encode_prompt("1+1?")
    assert chat.decode(prompt, skip_special_tokens=False) == ChatConfig().prompt.replace("{problem}", "1+1?")
    assert ids[: len(prompt)] == prompt
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    assert chat.decode(ids[len(prompt) :], skip_special_tokens=False) == "2<|im_end|>"
    for messages in (conversation("a", "b", "c", "d"), conversation("a", "b", system="s")):
        with pytest.raises(InputError, match="only one user message"):
            chat.segments(messages)


def test_stop_ids_come_from_everywhere_once(tmp_path: Path) -> None:
    path = make_chat_checkpoint(tmp_path / "c", eos={"content": "<|endoftext|>", "special": True})
    assert chat_of(path).eos_ids == (0, 2)  # the second: how the template ends a turn
    assert chat_of(path, use_template=False).eos_ids == (0,)
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 0]}')
    (path / "config.json").write_text('{"eos_token_id": 2, "vocab_size": 512}')
    chat = chat_of(path)
    assert chat.eos_ids == (0, 1, 2)
    assert chat.vocab_size == 512


def test_a_stop_id_has_a_row_in_the_model(tmp_path: Path) -> None:
    path = make_chat_checkpoint(tmp_path / "c", eos="<|endoftext|>")
    (path / "config.json").write_text('{"vocab_size": 2}')
    assert chat_of(path).eos_ids == (0,)  # the template's <|im_end|> is 2, which this model cannot write
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    with pytest.raises(InputError, match=r"generation_config\.json: key 'eos_token_id': 2 is '<\|im_end\|>'; the mo"):
        chat_of(path)


def test_system_message_is_the_configured_one_or_the_templates(checkpoints: dict[str, Path]) -> None:
    def prompt(**config: Any) -> str:
        chat = chat_of(checkpoints["qwen2.5"], **config)
        return chat.decode(chat.encode_prompt("x"), skip_special_tokens=False)

    assert "system\nYou are terse.<|im_end|>" in prompt(system="You are terse.")
    assert "system\nYou are a default.<|im_end|>" in prompt(system=None)
    assert "system\n<|im_end|>" in prompt(system="")


def test_saved_truncation_and_padding_are_switched_off(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(checkpoints["qwen2.5"], tmp_path / "c")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(path / "tokenizer.json"))
    messages = conversation("a", "word " * 30)
    assert encode(chat_of(path), messages) == encode(chat_of(checkpoints["qwen2.5"]), messages)


NAMED = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": QWEN25}]


def test_where_the_template_is_found(tmp_path: Path) -> None:
    reference = chat_of(make_chat_checkpoint(tmp_path / "plain")).encode_prompt("x")
    named = make_chat_checkpoint(tmp_path / "named", NAMED)
    assert chat_of(named).encode_prompt("x") == reference
    file = make_chat_checkpoint(tmp_path / "file", "overruled by the file")
    (file / "chat_template.json").write_text(json.dumps({"chat_template": "overruled as well"}))
    (file / "chat_template.jinja").write_text(QWEN25)
    assert chat_of(file).encode_prompt("x") == reference
    (file / "chat_template.jinja").unlink()
    (file / "chat_template.json").write_text(json.dumps({"chat_template": QWEN25}))
    assert chat_of(file).encode_prompt("x") == reference


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chat_template": None}, r"no chat template .*chat\.use_template: false"),
        ({"chat_template": [{"name": ["default"], "template": "x"}]}, r"no template is named 'default' \(found: \)"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, r"no template is named 'default' \(found: rag\)"),
        ({"chat_template": 5}, "must be a string or a list of named templates, got int"),
        ({"chat_template": "a\n{% for %}"}, "key 'chat_template': line 2 of the chat template"),
        ({"eos_token": "<nowhere>"}, "eos_token '<nowhere>' is not in tokenizer.json"),
        ({"eos_token": 7}, "key 'eos_token' must be a string"),
        ({"eos_token": None, "chat_template": "{{ messages[0].content }}"}, "no token ends an answer"),
    ],
)
def test_a_bad_tokenizer_config_is_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    path = make_chat_checkpoint(tmp_path / "c")
    write_config(path, **{"chat_template": QWEN25, "eos_token": "<|im_end|>", **keys})
    with pytest.raises(InputError, match=message) as error:
        chat_of(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json does not exist"),
        ("tokenizer.json", '{"model": ', r"tokenizer\.json: cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json:1: not JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json:1: expected a JSON object"),
        (
            "generation_config.json",
            '{"eos_token_id": [2, 99999]}',
            r"generation_config\.json: key 'eos_token_id': 99999",
        ),
        ("generation_config.json", '{"eos_token_id": [4294967296]}', r"key 'eos_token_id': 4294967296 is not the id"),
        ("generation_config.json", '{"eos_token_id": "2"}', r"generation_config\.json: key 'eos_token_id': '2'"),
        ("generation_config.json", '{"eos_token_id": [true]}', r"generation_config\.json: key 'eos_token_id': True"),
        ("config.json", f'{{"eos_token_id": {10**30}}}', r"config\.json: key 'eos_token_id': 10{30} is not"),
        (
            "config.json",
            '{"eos_token_id": [1, 2], "vocab_size": 2}',
            r"tokenizer_config\.json: eos_token '<\|im_end\|>' has the id 2; the model knows only 2",
        ),
        ("config.json", '{"vocab_size": 0}', r"config\.json: key 'vocab_size' must be a positive integer"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    path = make_chat_checkpoint(tmp_path / "c")
    if text is None:
        (path / file).unlink()
    else:
        (path / file).write_text(text)
    with pytest.raises(InputError, match=message):
        chat_of(path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ raise_exception('Roles must alternate') }}", "refuses the conversation: Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "fails on the conversation: TypeError"),
        ("{% set ns = namespace(_a=1) %}", "begins with an underscore"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "begins with an underscore"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_a_template_that_oversteps_or_refuses_is_an_input_error(tmp_path: Path, template: str, message: str) -> None:
    path = make_chat_checkpoint(tmp_path / "c", template)
    with pytest.raises(InputError, match=message) as error:
        chat_of(path).encode_prompt("x")
    assert "tokenizer_config.json: key 'chat_template'" in str(error.value)


def test_what_templates_are_offered(tmp_path: Path) -> None:
    template = (
        "{% set ns = namespace(n=0) %}\n"
        "{% for i in range(9) %}\n"
        "    {% if i == 1 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}\n"
        "    {% set ns.n = ns.n + i %}\n"
        "{% endfor %}\n"
        "{{ ns.n }} {{ {'b': '<é>', 'a': [1, none]} | tojson }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}\n"
        "{% generation %}{% set inside = 1 %}[{{ strftime_now('%Y-%m-%d') }}]{% endgeneration %}{{ inside }}"
        "{{ bos_token }}{{ pad_token }}{{ tools is none }}{{ unk_token is defined }}"
    )
    path = make_chat_checkpoint(tmp_path / "c", template, bos="<|im_start|>", pad_token={"content": "<pad>"})
    text = chat_of(path).render(conversation("x"), add_generation_prompt=False)
    assert text == '5 {"b": "<é>", "a": [1, null]} {"a": 2, "b": 1}\n[2024-07-26]<|im_start|><pad>TrueFalse'


def test_a_checkpoint_as_transformers_saves_it(qwen2_checkpoint: Path) -> None:
    chat = Chat.from_checkpoint(qwen2_checkpoint, ChatConfig())
    assert chat.vocab_size == 320
    assert chat.eos_ids == (2, 0)
    assert supervised_texts(chat, conversation("1 + 2?", "the answer is 3")) == ["the answer is 3<|im_end|>"]
