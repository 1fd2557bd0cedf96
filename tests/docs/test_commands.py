"""Every block of README and docs is executed here, or read by what would read it, or carries a mark that says why not.

The pages are executed one after the other in one folder, in which the models they name are tiny ones. A mark is a
comment on the line before a block: `<!-- needs: gpu -->`, `<!-- run by: tests/FILE -->`, or, of a configuration without
a command, `<!-- read as: VERB -->`.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.markdown import PAGES, Block, blocks, prose
from helpers.paths import ROOT
from micota_fast.cli import main
from micota_fast.common.importing import imported
from micota_fast.config.loader import load
from micota_fast.pipeline.stages import VERBS

MICRO = ROOT / "micota_fast" / "micro"
MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": "student",
    "Qwen/Qwen2.5-7B-Instruct": "assistant",
    "Qwen/Qwen2.5-14B-Instruct": "assistant",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": "teacher",
}
NEEDS = {"a finished run", "cluster", "gpu", "network"}
PROGRAMS = r"(micota|bash|sbatch|pip|python|git|vllm) "
NAME = re.compile(r"# ([\w-]+\.yaml)\b")
ALL = [block for page in PAGES for block in blocks(page)]


def problems(block: Block) -> list[str]:
    """Say why a block is neither executed nor excused."""
    kind, value = block.mark or ("", "")
    wrong = []
    if block.language not in ("bash", "yaml", "python", "text"):
        wrong.append(f"a block in {block.language or 'no language'}: bash, yaml, python or text expected")
    if block.language in ("text", "") and re.search(rf"^\s*{PROGRAMS}", block.text, re.M):
        wrong.append("a command in a block that is not bash")
    if kind == "needs":
        wrong += [f"needs {each}: unknown" for each in value.split(", ") if each not in NEEDS]
    elif kind == "run by":
        program = next((word for word in shlex.split(block.text, comments=True) if "/" in word), "nothing")
        if not (ROOT / value).is_file() or Path(program).stem not in (ROOT / value).read_text(encoding="utf-8"):
            wrong.append(f"{value} does not name {program}")
    elif kind == "read as":
        if block.language != "yaml" or value not in VERBS:
            wrong.append("`read as` goes with yaml and a verb")
    elif kind:
        wrong.append(f"unknown mark {kind}")
    elif block.language == "bash":
        wrong += [f"not executed: {line}" for line in commands(block) if not line.startswith("micota ")]
    elif block.language == "yaml" and not NAME.match(block.text):
        wrong.append("does not begin with the file's name")
    return wrong


def commands(block: Block) -> list[str]:
    """Return the lines of a block without their comments."""
    return [shlex.join(words) for line in block.text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("block", ALL, ids=lambda block: block.place)
def test_a_block_is_executed_or_says_why_not(block: Block) -> None:
    assert not problems(block), block.place


@pytest.mark.parametrize("block", [block for block in ALL if block.mark], ids=lambda block: block.place)
def test_what_a_block_that_is_not_executed_names_exists(block: Block) -> None:
    if block.language != "bash":
        return
    for words in map(shlex.split, commands(block)):
        assert words[0] != "micota" or words[1] in VERBS
        for word in words:
            assert not re.match(r"(scripts|bench)/", word) or (ROOT / word).is_file(), word


def test_no_command_stands_outside_a_block() -> None:
    for page in PAGES:
        assert not re.search(rf"^(    |\t){PROGRAMS}", prose(page), re.M), page


def test_blocks_that_nobody_executes_are_found() -> None:
    page = ROOT / "docs" / "made-up.md"
    marked = [
        Block(page, 1, "bash", "pip install x\n", None),
        Block(page, 2, "", "micota train x\n", None),
        Block(page, 3, "bash", "micota train x\n", ("needs", "luck")),
        Block(page, 4, "yaml", "model: x\n", None),
        Block(page, 5, "bash", "python bench/gone.py\n", ("run by", "tests/bench/test_bench.py")),
        Block(page, 6, "bash", "micota train x\n", ("because", "so")),
    ]
    assert all(problems(block) for block in marked)


def test_configurations_without_a_command_are_read(tmp_path: Path) -> None:
    recipe = next(block.text for block in blocks(ROOT / "README.md") if block.text.startswith("# compare.yaml"))
    read = [block for block in ALL if block.mark and block.mark[0] == "read as"]
    assert len(read) >= 3
    for block in read:
        assert block.mark
        file, verb = tmp_path / "config.yaml", block.mark[1]
        content = yaml.safe_load(block.text)
        if verb == "run":
            content = together(yaml.safe_load(recipe), content)
        file.write_text(yaml.safe_dump(content))
        load(imported(VERBS[verb].options or ""), file, [])


def together(one: Any, other: Any) -> Any:
    """Merge two mappings of mappings; elsewhere the second wins."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other
    return one | {key: together(one.get(key), value) for key, value in other.items()}


def prepare(folder: Path) -> None:
    """Make the files that the pages presume."""
    for model, name in MODELS.items():
        (folder / model).parent.mkdir(exist_ok=True)
        (folder / model).symlink_to(MICRO / "checkpoints" / name)
    chats = (ROOT / "examples" / "chats.jsonl").read_text().splitlines()[:4]
    (folder / "chats.jsonl").write_text("\n".join(chats) + "\n")
    asked = [json.loads(line) for line in (MICRO / "problems" / "press-4.jsonl").read_text().splitlines()[:2]]
    for name in ("problems.jsonl", "math_train.jsonl", "test.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "data").mkdir()
    for name in ("math_train", "aime2024", "amc23", "olympiadbench", "math500", "gsm8k_test"):
        shutil.copy(folder / "problems.jsonl", folder / "data" / f"{name}.jsonl")
    rest = {"sample": 0, "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 6, "seed": 0}
    answered = [{**row, "completion": f"\\boxed{{{row['answer']}}}", **rest} for row in asked]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered))
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "Add.", "input": "1 1", "output": "2"}]))


@pytest.mark.slow
def test_the_pages_commands_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    done: set[str] = set()
    for page in PAGES:
        configs: dict[str, Any] = {}
        used: set[str] = set()
        script = ""  # the blocks of Python are one program, as a reader would save them
        for block in blocks(page):
            if block.mark:
                continue
            if block.language == "yaml" and (name := NAME.match(block.text)):
                Path(name[1]).write_text(block.text)
                configs[name[1]] = yaml.safe_load(block.text)
            elif block.language == "python":
                script += block.text
            for line in commands(block) if block.language == "bash" else []:
                words = shlex.split(line)[1:]
                used |= {word.removeprefix("config=") for word in words}
                made_of = json.dumps([words, [configs.get(word) for word in words]])
                if made_of not in done:  # the same with the same configuration has been executed for another page
                    assert main(words) == 0, f"{block.place}: {line}"
                done.add(made_of)
        if script:
            Path("page.py").write_text(script)
            ran = subprocess.run([sys.executable, "page.py"], capture_output=True, text=True, check=False, timeout=400)
            assert ran.returncode == 0, f"{page}: {ran.stdout}{ran.stderr}"
        assert configs.keys() <= used, f"{page}: no command uses {configs.keys() - used}"
