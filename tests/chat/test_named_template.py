"""`chat.template` and `chat.template_kwargs`: one template for prompts and training text, part of every fingerprint."""

from pathlib import Path
from typing import Any

import pytest

from helpers.chats import QWEN3, chat_of, conversation, make_chat_checkpoint, write_config
from micota_fast.chat.template import chat_identity, template_file
from micota_fast.config.generation import ChatConfig, GenerateConfig
from micota_fast.errors import InputError

SHOUTING = (
    "{% for m in messages %}<|im_start|>{{ m.role | upper }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>ASSISTANT\n{% endif %}"
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_chat_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(params=["file.jinja", "folder", "folder/tokenizer_config.json"])
def named(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / request.param
    if path.suffix == ".jinja":
        path.write_text(SHOUTING)
    else:
        folder = path if path.suffix != ".json" else path.parent
        folder.mkdir()
        write_config(folder, chat_template=SHOUTING)
    return str(path)


def test_a_named_template_renders_prompts_and_training_text(checkpoint: Path, named: str) -> None:
    chat = chat_of(checkpoint, template=named, prompt="{problem}")
    prompt, answer = chat.segments(conversation("1+2?", "3"))
    assert prompt.text == "<|im_start|>USER\n1+2?<|im_end|>\n<|im_start|>ASSISTANT\n"
    assert answer.text == "3<|im_end|>"
    assert chat.decode(chat.encode_prompt("1+2?"), skip_special_tokens=False) == prompt.text
    assert template_file(ChatConfig(template=named)) == {"chat_template.jinja": SHOUTING}


def test_its_contents_count_and_its_place_does_not(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jinja", tmp_path / "b.jinja"
    first.write_text(SHOUTING)
    second.write_text(SHOUTING)
    one, other = ChatConfig(template=str(first)), ChatConfig(template=str(second))
    assert chat_identity(one) == chat_identity(other) != chat_identity(ChatConfig())
    second.write_text(SHOUTING + " ")
    assert chat_identity(one) != chat_identity(other)
    assert "template" not in chat_identity(ChatConfig()), "what was made before the option existed stays valid"
    assert chat_identity(ChatConfig(template_kwargs={"a": 1})) != chat_identity(ChatConfig())


def test_names_for_the_template_hold_for_prompts_and_rows_may_have_their_own(tmp_path: Path) -> None:
    folder = make_chat_checkpoint(tmp_path / "qwen3", QWEN3)
    thinks = chat_of(folder, prompt="{problem}")
    quiet = chat_of(folder, prompt="{problem}", template_kwargs={"enable_thinking": False})
    empty = "<think>\n\n</think>\n\n"
    asked = quiet.render(quiet.prompt_messages("1+2?"), True)
    assert asked == thinks.render(thinks.prompt_messages("1+2?"), True) + empty
    prompt, answer = quiet.segments(conversation("1+2?", "3"))
    assert (prompt.text, answer.text) == (asked, "3<|im_end|>")
    prompt, _ = quiet.segments(conversation("1+2?", "<think>\nHm.\n</think>\n\n3"), {"enable_thinking": True})
    assert prompt.text == asked.removesuffix(empty)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such Jinja file or checkpoint"), ({}, "has no chat template"), ({"chat_template": 3}, "must be a str")],
)
def test_a_name_without_a_template_is_refused(tmp_path: Path, checkpoint: Path, content: Any, said: str) -> None:
    if content is not None:
        (tmp_path / "there").mkdir()
        write_config(tmp_path / "there", **content)
    with pytest.raises(InputError, match=said):
        chat_of(checkpoint, template=str(tmp_path / "there"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template_kwargs": {"x": float("nan")}}, "`template_kwargs` cannot be written as JSON"),
        ({"template_kwargs": {"messages": []}}, "messages cannot be set"),
        ({"thinking_tags": ("<r>", "<r>")}, "must differ"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ChatConfig(**options)


IN_A_MACRO = "{% macro turn(m) %}{{ m.content if shout_it else '' }}{% endmacro %}" + SHOUTING
SET_IF_MISSING = "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}" + SHOUTING
IN_A_BRANCH = "{% if false %}{% set ns = namespace(found=thinking_budget|default(3)) %}{% endif %}" + SHOUTING


@pytest.mark.parametrize(
    ("source", "name"),
    [(IN_A_MACRO, "shout_it"), (SET_IF_MISSING, "enable_thinking"), (IN_A_BRANCH, "thinking_budget")],
)
def test_a_name_for_the_template_is_one_that_it_looks_at_anywhere(
    source: str, name: str, tmp_path: Path, checkpoint: Path
) -> None:
    file = tmp_path / "a.jinja"
    file.write_text(source)
    chat_of(checkpoint, template=str(file), template_kwargs={name: False})
    said = rf"`chat\.template_kwargs`: '{name[:-1]}' is not a variable of .*{file}.*"
    with pytest.raises(InputError, match=rf"{said}; did you mean `{name}`\? Known: .*{name}$"):
        chat_of(checkpoint, template=str(file), template_kwargs={name: False, name[:-1]: False})


@pytest.mark.parametrize("name", ["tools", "bos_token", "namespace", "m", "no_such"])
def test_a_name_that_the_template_would_never_get_is_refused(name: str, tmp_path: Path, checkpoint: Path) -> None:
    write_config(checkpoint, bos_token="<|im_start|>")
    file = tmp_path / "a.jinja"
    file.write_text("{{ tools }}{{ bos_token }}{{ namespace() }}" + SHOUTING)
    with pytest.raises(InputError, match=rf"'{name}' is not a variable of .* that can be set; known: none$"):
        chat_of(checkpoint, template=str(file), template_kwargs={name: 1})


def test_a_template_that_refuses_says_so_itself(tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "strict.jinja"
    file.write_text("{{ raise_exception('only poems') }}")
    with pytest.raises(InputError, match="only poems"):
        chat_of(checkpoint, template=str(file)).segments(conversation("1+2?", "3"))


def test_bare_text_and_other_servers_take_no_template() -> None:
    with pytest.raises(InputError, match="need `use_template: true`"):
        ChatConfig(use_template=False, template_kwargs={"a": 1})
    options: dict[str, Any] = {"model": "m", "problems": "p", "out": "o", "api": "openai", "url": "http://127.0.0.1/v1"}
    with pytest.raises(InputError, match=r"`chat\.template` needs SGLang's native API"):
        GenerateConfig(**options, chat=ChatConfig(template="a.jinja"))
    GenerateConfig(**options, chat=ChatConfig(template_kwargs={"enable_thinking": False}))
