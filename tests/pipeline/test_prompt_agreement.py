"""A recipe whose training rows carry another prompt or system message than its evaluation says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.paths import RECIPES
from micota_fast.config import loader
from micota_fast.config.recipe import Recipe
from micota_fast.pipeline.graph import build_stages
from micota_fast.pipeline.prompt_agreement import prompt_differences

ASKED = "1+2?\nPlease reason step by step, and put your final answer within \\boxed{}."
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def said(tmp_path: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> list[str]:
    """What is said of the micro recipe with one arm, and with a file as its corpus if `rows` are given."""
    recipe = yaml.safe_load((RECIPES / "micro.yaml").read_text())
    micro = RECIPES.parent / "micro"
    text = json.dumps(recipe).replace("../micro", str(micro))
    recipe = json.loads(text) | {"arms": {"short": "short"}}
    if rows is not None:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe |= {"corpora": {"short": {"file": "rows.jsonl"}}, "align": [], "student_answers": None}
        recipe["models"].pop("assistant-long")
        recipe["models"].pop("assistant-mid")
    for key, value in options.items():
        stage, _, option = key.partition("__")
        recipe[stage].setdefault("chat", {})[option] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return prompt_differences(build_stages(loader.load(Recipe, path), path, tmp_path / "run"))


def conversation(*messages: dict[str, str]) -> dict[str, Any]:
    return {"messages": [*messages, {"role": "assistant", "content": "3"}]}


def test_nothing_is_said_where_they_agree(tmp_path: Path) -> None:
    assert said(tmp_path) == []
    assert said(tmp_path, [conversation(SYSTEM, {"role": "user", "content": ASKED})]) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"evaluate__system": None}, ["'You are a helpful assistant.', and `evaluate.chat.system` puts no system"]),
        ({"train__prompt": "{problem}"}, ["rows have another prompt than the evaluation on press-4, press-5,"]),
        ({"evaluate__prompt": "{problem}"}, ["rows have another prompt than the evaluation on press-4, press-5,"]),
        ({"train__template_kwargs": {"thinks": True}}, ["{'thinks': True}, and `evaluate.chat.template_kwargs` {}"]),
    ],
)
def test_options_that_differ_are_named_once_for_all_seeds(
    tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    (line,) = said(tmp_path, **options)
    assert line.startswith("students trained on short: ")
    assert all(word in line for word in words)


def test_rows_of_a_file_are_looked_at(tmp_path: Path) -> None:
    rows = [conversation({"role": "user", "content": "1+2?"}), conversation(SYSTEM, {"role": "user", "content": ASKED})]
    system, prompt = said(tmp_path, rows)
    assert "students trained on rows.jsonl: 1 of the first 2 rows have no system message" in system
    assert "1 of the first 2 rows have another prompt" in prompt


def test_rows_that_cannot_be_read_are_left_to_the_training(tmp_path: Path) -> None:
    assert said(tmp_path, [{"text": "what is it?"}]) == []
