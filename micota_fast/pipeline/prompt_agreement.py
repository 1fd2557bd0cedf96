"""Whether students are trained on prompts like those that they are evaluated with."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from micota_fast.chat.prompt import Prompt
from micota_fast.chat.template import Message
from micota_fast.common.json_io import parse_json
from micota_fast.config.evaluation import EvaluateConfig
from micota_fast.config.train import TrainConfig
from micota_fast.data.rows import to_messages
from micota_fast.errors import InputError
from micota_fast.pipeline.stage import Stage
from micota_fast.sources.columns import renamed
from micota_fast.sources.hub import is_hub
from micota_fast.sources.rows import read_rows

ROWS = 100  # of each corpus, from its beginning
SHOWN = 60  # characters of a text


def prompt_differences(stages: Sequence[Stage]) -> list[str]:
    """Say where the prompt or the system message of training rows differs from that of the student's evaluation.

    A corpus that a stage has yet to make is taken for what it will hold, rows of `problem` and `completion`. One of the
    Hub is not looked at.

    Args:
        stages: of a recipe.

    Returns:
        One sentence for each difference, with the corpora that have it. Rows that cannot be read are left to the stage
        that trains on them.
    """
    trained = {stage.name: stage for stage in stages if stage.verb == "train"}
    corpora: dict[str, dict[str, None]] = {}  # of each difference
    for stage in stages:
        source = stage.inputs[0].stage if stage.verb == "evaluate" else None
        if source in trained:
            train = trained[source].settings
            data = Path(train.data)
            corpus = data.parent.name if data.name == "corpus.jsonl" else data.name
            for difference in _differences(train, stage.settings):
                corpora.setdefault(difference, {})[corpus] = None
    return [f"students trained on {', '.join(names)}: {difference}" for difference, names in corpora.items()]


def _differences(train: TrainConfig, evaluate: EvaluateConfig) -> Iterator[str]:
    ours, theirs = train.chat, evaluate.chat
    if ours.template_kwargs != theirs.template_kwargs:
        yield (
            f"`train.chat.template_kwargs` are {ours.template_kwargs}, and `evaluate.chat.template_kwargs` "
            f"{theirs.template_kwargs}"
        )
    if ours.use_template != theirs.use_template or (theirs.template is not None and theirs.template != ours.template):
        yield "`train.chat` and `evaluate.chat` name different templates"
    rows = list(_rows(train))
    asked = [messages for messages, _ in rows]
    systems = Counter(messages[0]["content"] if messages[0]["role"] == "system" else None for messages in asked)
    wanted = theirs.system if theirs.use_template else None
    if asked and (others := len(asked) - systems[wanted]):
        other = next(system for system, _ in systems.most_common() if system != wanted)
        yield (f"{_share(others, asked)} {_quoted(other)}, and `evaluate.chat.system` puts {_quoted(wanted)}")
    users = [next(message["content"] for message in messages if message["role"] == "user") for messages in asked]
    prompts = {benchmark.name: benchmark.prompt or theirs.prompt for benchmark in evaluate.benchmarks}
    for prompt in dict.fromkeys(prompts.values()):
        before, after = prompt.split("{problem}", 1)
        alike = [text.startswith(before) and text.endswith(after) for text in users]
        others = sum(
            prompt != ours.prompt if by_prompt else not ends for ends, (_, by_prompt) in zip(alike, rows, strict=True)
        )
        if others:
            names = ", ".join(benchmark for benchmark, its in prompts.items() if its == prompt)
            yield (
                f"{_share(others, asked)} another prompt than the evaluation on {names}: "
                f"{prompt[:SHOWN]!r}{'...' if len(prompt) > SHOWN else ''}"
            )


def _rows(train: TrainConfig) -> Iterator[tuple[list[Message], bool]]:
    """The first conversations of a corpus, and whether `chat.prompt` makes them; none of what is still on the Hub."""
    prompts = Prompt(train.chat)
    if is_hub(train.data):
        return
    if not Path(train.data).is_file():
        yield to_messages({"problem": "1+2?", "completion": "3"}, prompts), True
        return
    with contextlib.suppress(InputError):
        for line in islice(read_rows(train.data), ROWS):
            row = renamed(parse_json(line.line, ""), train.columns)
            yield to_messages(row, prompts, train.columns), row.get("problem") is not None


def _share(number: int, of: Sequence[object]) -> str:
    return "rows have" if number == len(of) else f"{number} of the first {len(of)} rows have"


def _quoted(system: str | None) -> str:
    if system is None:
        return "no system message"
    return f"the system message {system[:SHOWN]!r}" + ("..." if len(system) > SHOWN else "")
