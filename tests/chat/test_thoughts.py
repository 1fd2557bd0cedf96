"""Thoughts in an assistant's text become one pair of tags, the answer alone, or are refused by name."""

import json
from pathlib import Path

import pytest

from helpers.chats import make_chat_checkpoint
from helpers.paths import CASES
from micota_fast.chat.encoding import Chat
from micota_fast.chat.thought_counts import ThoughtCounts
from micota_fast.chat.thoughts import training_text
from micota_fast.config.generation import ChatConfig
from micota_fast.errors import InputError

TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
# Templates that open a thought in the generation prompt, and what they make of an assistant's text.
ANSWERS = {
    "keeps": "{{ '<think>\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content "
    "else '') + '\n</think>\n\n' + m.content.split('</think>')[-1].lstrip() }}",
    "strips": "{{ m.content.split('</think>')[-1] }}",
    "doubles": "{{ '<think>\n\n</think>\n\n' + m.content }}",
}
FULL = "<think>\nSo 3.\n</think>\n\nIt is 3."
ORPHAN = "So 3.\n</think>\n\nIt is 3."


@pytest.mark.parametrize(("text", "opened"), [(FULL, ""), (FULL, "<think>\n"), (ORPHAN, ""), (ORPHAN, "<think>\n")])
def test_a_thought_has_one_pair_of_tags_or_those_given_or_is_left_out(text: str, opened: str) -> None:
    assert training_text(text, opened, "keep") == FULL
    assert training_text(text, opened, "strip") == "It is 3."
    assert training_text(text, opened, "wrap", ("<r>", "</r>")) == "<r>\nSo 3.\n</r>\n\nIt is 3."


@pytest.mark.parametrize("thinking", ["keep", "strip", "wrap"])
def test_a_text_without_a_thought_stays_as_it_is(thinking: str) -> None:
    assert training_text("It is 3.", "", thinking) == "It is 3."  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "opened", "why"),
    [
        ("<think>\nSo 3", "", "never closes"),
        ("So 3", "<think>\n", "never closes"),
        ("<think>a<think>b</think>c", "", "opened 2 times"),
        ("a</think>b</think>c", "<think>\n", "closed 2 times"),
        ("Hm <think>a</think>b", "", "does not begin"),
        ("a</think>b<think>c", "", "does not begin"),
        ("<think>a</think>\n", "", "nothing follows"),
    ],
)
def test_a_malformed_thought_is_refused_by_name(text: str, opened: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        training_text(text, opened, "keep")


def template(name: str) -> str:
    answer = f"{{% if m.role == 'assistant' %}}{ANSWERS[name]}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    return f"{{% for m in messages %}}{TURN}{answer}{{{{ '<|im_end|>\n' }}}}{{% endfor %}}{ASKS}"


def parts(folder: Path, source: str, text: str, counts: ThoughtCounts | None = None, **chat: object) -> tuple[str, str]:
    """The end of the prompt, and the supervised text."""
    made = Chat.from_checkpoint(make_chat_checkpoint(folder, source), ChatConfig(**chat))  # type: ignore[arg-type]
    messages = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": text}]
    prompt, answer = made.segments(messages, None, counts)
    return prompt.text.rpartition("assistant\n")[2], answer.text


@pytest.mark.parametrize("name", ["keeps", "strips"])
@pytest.mark.parametrize("text", [FULL, ORPHAN])
def test_the_thought_follows_the_prompt_that_opens_it_once(tmp_path: Path, name: str, text: str) -> None:
    assert parts(tmp_path / "a", template(name), text) == ("<think>\n", ORPHAN + "<|im_end|>")


def test_stripped_answers_stand_as_the_template_renders_answers(tmp_path: Path) -> None:
    counts = ThoughtCounts()
    assert parts(tmp_path / "a", template("strips"), FULL, counts, thinking="strip") == ("", "It is 3.<|im_end|>")
    assert any("1 answers have no thought" in line for line in counts.lines())


def test_what_a_template_inserts_is_counted(tmp_path: Path) -> None:
    counts = ThoughtCounts()
    assert parts(tmp_path / "a", template("keeps"), "It is 3.", counts) == (
        "<think>\n",
        "\n</think>\n\nIt is 3.<|im_end|>",
    )
    assert any("inserts an empty thought" in line and "before 1 answers" in line for line in counts.lines())


def test_a_template_that_closes_a_thought_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"message 2 .*a second time"):
        parts(tmp_path / "a", template("doubles"), FULL)


OPENED = "{% if m.role == 'assistant' %}<think>\n{% endif %}{{ m.content }}<|im_end|>\n"
OPENS_ALWAYS = f"{{% for m in messages %}}{TURN}{OPENED}{{% endfor %}}{ASKS}"


@pytest.mark.parametrize("chat", [{}, {"thinking": "strip"}, {"thinking": "wrap", "thinking_tags": ("<r>", "</r>")}])
def test_an_answer_is_never_learned_inside_a_thought_that_stays_open(tmp_path: Path, chat: dict[str, object]) -> None:
    with pytest.raises(InputError, match="before an answer that closes none"):
        parts(tmp_path / "a", OPENS_ALWAYS, FULL if chat else "It is 3.", **chat)


def test_a_wrapped_thought_does_not_follow_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an empty thought before the wrapped one"):
        parts(tmp_path / "a", template("keeps"), FULL, thinking="wrap", thinking_tags=("<r>", "</r>"))


CASE = "It is \\boxed{3}.<|im_end|>"


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are outside the repository")
@pytest.mark.parametrize("name", ["prefill_keep", "prefill_rewrap", "prefill_strip"])
@pytest.mark.parametrize("rows", ["full", "orphan", "unclosed", "none"])
def test_cases_of_other_projects_give_the_right_text(tmp_path: Path, name: str, rows: str) -> None:
    source = (CASES / "think" / f"{name}.jinja").read_text()
    row = json.loads((CASES / "think" / f"{rows}.jsonl").read_text())
    text = row["messages"][1]["content"]
    if rows == "unclosed":
        with pytest.raises(InputError, match="never closes"):
            parts(tmp_path / "a", source, text)
        return
    wanted = {"full": f"So 1+2 is 3.\n</think>\n\n{CASE}", "none": f"\n</think>\n\n{CASE}"}
    wanted["orphan"] = wanted["full"]
    expected = ("", CASE) if (name, rows) == ("prefill_strip", "none") else ("<think>\n", wanted[rows])
    assert parts(tmp_path / "a", source, text) == expected
    if name == "prefill_strip":
        assert parts(tmp_path / "b", source, text, thinking="strip") == ("", CASE)
