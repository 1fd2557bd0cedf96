"""A teacher whose template opens a thought in the prompt, as R1-Distill's does, through a whole recipe."""

import json
import re
from pathlib import Path

import pytest
import yaml

from helpers.checkpoints import CHAT_TEMPLATE, make_checkpoint
from micota_fast.cli import main
from micota_fast.sources.completions import iter_completions

OPENED = "<|im_start|>assistant\n<think>\n"
# Opens a thought in the prompt, and leaves thoughts out of the answers that it renders.
TEMPLATE = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", OPENED).replace(
    "message.content +", "message.content.split('</think>')[-1] +"
)
ROWS = 40


def recipe(folder: Path) -> Path:
    """A recipe whose teacher, with random weights, thinks 8 tokens and is then made to answer."""
    teacher = make_checkpoint(folder / "teacher")
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    (teacher / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    make_checkpoint(folder / "student", seed=1)
    for name, number in {"train": ROWS, "test": 4}.items():
        rows = [{"id": f"{name}-{i}", "problem": f"What is {i} plus {i}?", "answer": f"{2 * i}"} for i in range(number)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "name": "reasoning",
        "seeds": [1],
        "problems": {"train": {"path": "train.jsonl"}},
        "models": {"teacher": {"checkpoint": "teacher"}, "student": {"checkpoint": "student"}},
        "corpora": {"long": {"generate": {"model": "teacher"}}},
        "student": "student",
        "arms": {"long": "long"},
        "generate": {
            "max_new_tokens": 160,
            "temperature": 1.0,
            "thinking_budget": 8,
            "serve": {"dtype": "float32", "device": "cpu"},
        },
        "filter": {"require_correct": False, "require_boxed": False, "max_tokens": 256},
        "train": {"epochs": 1, "pack_tokens": 512, "dtype": "float32", "device": "cpu"},
        "evaluate": {
            "max_new_tokens": 16,
            "serve": {"dtype": "float32", "device": "cpu"},
            "benchmarks": [{"name": "sums", "path": "test.jsonl"}],
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_the_student_learns_one_well_formed_thought(tmp_path: Path) -> None:
    assert main(["run", str(recipe(tmp_path)), "--out", str(tmp_path / "run")]) == 0
    completions = list(iter_completions(tmp_path / "run/answers/long/completions.jsonl"))
    assert {row.opened for row in completions} == {"<think>\n"}
    assert not any("<think>" in row.completion for row in completions), "each begins within its thought"
    log = (tmp_path / "run/student/long-seed1/log.txt").read_text()
    counts = json.loads((tmp_path / "run/corpus/long/corpus.jsonl.counts.json").read_text())
    assert f"rows: {counts['accepted']} completion" in log
    assert f"thoughts: {counts['accepted']} kept, each in one pair of tags" in log
    (learned,) = re.findall(r"learned: (['\"].*)", log)
    assert re.fullmatch(r"<think>\n.*\n</think>\n\n.*<\|im_end\|>", eval(learned), re.DOTALL)
