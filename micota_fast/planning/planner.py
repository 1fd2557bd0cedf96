"""What a recipe will take: goes over its stages and knows the models and corpora that each hands to the next.

Counts of stages that are done are read from what they have left. All else is a plan: shapes are exact, lengths and
efficiencies are `Assumptions`, each with its source. The arithmetic of each stage is in `costs`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from micota_fast.chat.encoding import Chat
from micota_fast.common.dtypes import FLOATS, bytes_per_element
from micota_fast.common.gpu_specs import GPU
from micota_fast.common.importing import imported
from micota_fast.common.json_io import parse_json
from micota_fast.config.generation import ChatConfig
from micota_fast.config.recipe import LaunchConfig
from micota_fast.errors import InputError
from micota_fast.model.config import ModelConfig
from micota_fast.pipeline.stage import Stage
from micota_fast.pipeline.stages import VERBS
from micota_fast.planning.assumptions import KNOWN_SETS, REASONING, Assumptions
from micota_fast.planning.shapes import shapes_of
from micota_fast.sources.hub import is_hub
from micota_fast.sources.problems import read_problems
from micota_fast.sources.rows import read_rows

ON_CPU = "on the CPU"
SAMPLED_PROMPTS = 200  # tokenised to know their length, if the tokenizer is here


@dataclass
class Cost:
    """What one stage takes.

    Attributes:
        stage: its name.
        verb: of the stage.
        tokens: read and written; in training those of all epochs.
        flops: floating-point operations.
        hours: None on a CPU, whose time is not estimated, and at a server that runs already.
        gpus: GPUs that are used.
        memory: bytes that each GPU (or process) must have at least.
        host: bytes of the host's memory that all processes of a machine take for what they keep off their GPUs.
        disk: bytes that stay.
        passing: further bytes on the disk while it runs.
        how: what the figures are made of, in words.
        done: whether it is done, so that `hours` is measured.
        too_big: why it cannot run on this GPU.
        left_out: what of it `hours` leaves out, and why.
        remedy: what makes it fit, or that nothing does (`remedies`); empty: it fits.
    """

    stage: str
    verb: str
    tokens: float = 0
    flops: float = 0
    hours: float | None = None
    gpus: int = 0
    memory: float = 0
    host: float = 0
    disk: float = 0
    passing: float = 0
    how: str = ""
    done: bool = False
    too_big: str = ""
    left_out: list[str] = field(default_factory=list)
    remedy: str = ""


@dataclass
class Corpus:
    """Rows of a prompt and an answer.

    Attributes:
        rows: how many.
        prompt: mean tokens of a prompt.
        answer: mean tokens of an answer.
        context: mean tokens of the document that a token lies in, over all tokens.
        counted: whether the figures are those of a finished stage, not assumed.
    """

    rows: float
    prompt: float
    answer: float
    context: float
    counted: bool = False

    @property
    def tokens(self) -> float:
        """Of all rows."""
        return self.rows * (self.prompt + self.answer)


class Model(NamedTuple):
    """A checkpoint that exists or will be made.

    Attributes:
        config: its shapes.
        answer: mean tokens of its answers.
        folder: of the checkpoint whose tokenizer it has.
    """

    config: ModelConfig
    answer: float
    folder: str

    @property
    def width(self) -> int:
        """Bytes of a stored value."""
        name = self.config.dtype_name
        return bytes_per_element(name if name in FLOATS else "float32")


class Planner:
    """Costs of stages, each after those it needs.

    Args:
        launch: processes of a training stage.
        gpu: runs every stage whose options do not ask for a CPU; None: there is none.
        assumed: what shapes do not say.
        answer_tokens: mean length of answers by name of a corpus, or of the untouched student's ("base").
        done: seconds that each finished stage took, by name; their outputs are read.

    Attributes:
        models: by location, as stages have made them.
        corpora: by location, as stages have made them.
        scores: entries per token (K) of scores, by location, as stages have made them.
    """

    def __init__(
        self,
        launch: LaunchConfig,
        gpu: GPU | None,
        assumed: Assumptions,
        answer_tokens: Mapping[str, float],
        done: Mapping[str, float],
    ) -> None:
        self.launch, self.gpu, self.assumed = launch, gpu, assumed
        self.answer_tokens, self.done = answer_tokens, done
        self.models: dict[str, Model] = {}
        self.corpora: dict[str, Corpus] = {}
        self.scores: dict[str, int] = {}
        self._longest_assumed = 0  # tokens of an answer
        self._problems: dict[str, tuple[int, float]] = {}

    def costs(self, stages: Sequence[Stage]) -> list[Cost]:
        """Return the cost of each stage, in order.

        Raises:
            InputError: a model's shapes or a file's size cannot be known.
        """
        limits = [stage.settings.max_new_tokens for stage in stages if stage.verb in ("generate", "evaluate")]
        self._longest_assumed = max(1, max(limits) // 4)  # in a world of short answers, those assumed are short, too
        costs = []
        for stage in stages:
            cost = self.cost(stage)
            if stage.name in self.done:
                cost.done, cost.hours, cost.passing = True, self.done[stage.name] / 3600, 0
                cost.too_big, cost.left_out = "", []
            costs.append(cost)
        return costs

    def cost(self, stage: Stage) -> Cost:
        """Return what a stage costs if it is run now, after those it needs (`costs`)."""
        estimate = VERBS[stage.verb].cost
        if estimate is None:
            return Cost(stage.name, stage.verb, how=ON_CPU, left_out=[ON_CPU])
        cost: Cost = imported(estimate)(self, stage)
        return cost

    def model(self, location: str) -> Model:
        """Return the model there: made by a stage, or with the length of answers that its name suggests.

        Raises:
            InputError: its shapes cannot be known.
        """
        if location not in self.models:
            self.models[location] = Model(shapes_of(location), self.answer_length(location), location)
        return self.models[location]

    def answer_length(self, name: str) -> float:
        """Return the mean tokens of an untouched model's answers, as its name suggests."""
        tokens = self.assumed.long_tokens if REASONING.search(name) else self.assumed.short_tokens
        return min(tokens, self._longest_assumed)

    def problems(
        self,
        path: str,
        limit: int | None,
        model: Model | None,
        chat: ChatConfig,
        columns: Mapping[str, str],
        known: int | None = None,
    ) -> tuple[int, float]:
        """Return how many problems a file has, and the mean tokens of their prompts.

        Args:
            path: their file.
            limit: only the first ones count; None: all.
            model: reads the prompts; None: its tokenizer is not known.
            chat: makes them.
            columns: our key -> the file's.
            known: how many there are, if the file is missing.

        Raises:
            InputError: the file is missing, and how many problems it has is not known.
        """
        key = repr((path, limit, model and model.folder, chat, columns, known))
        if key not in self._problems:  # every evaluation reads the same ones
            self._problems[key] = self._counted_problems(path, limit, model, chat, columns, known)
        return self._problems[key]

    def _counted_problems(
        self,
        path: str,
        limit: int | None,
        model: Model | None,
        chat: ChatConfig,
        columns: Mapping[str, str],
        known: int | None,
    ) -> tuple[int, float]:
        a = self.assumed
        if not (is_hub(path) or Path(path).is_file()):
            count = known or KNOWN_SETS.get(Path(path).stem)
            if count is None:
                raise InputError(f"no such file: {path}; its problems must be counted")
            return min(count, limit or count), a.problem_chars / a.chars_per_token + a.template_tokens
        problems = read_problems(path, limit, columns, need_answers=False)
        if model is not None and Path(model.folder, "tokenizer.json").is_file():
            rendered = Chat.from_checkpoint(model.folder, chat)
            lengths = [len(rendered.encode_prompt(p.problem)) for p in problems[:SAMPLED_PROMPTS]]
            return len(problems), float(np.mean(lengths))
        chars = float(np.mean([len(p.problem) for p in problems]))
        return len(problems), chars / a.chars_per_token + a.template_tokens

    def corpus(self, location: str) -> Corpus:
        """Return the corpus there: made by a stage, or a file that has been there from the beginning.

        Raises:
            InputError: there is none.
        """
        if location not in self.corpora:
            if not (is_hub(location) or Path(location).is_file()):
                raise InputError(f"no such file: {location}; its rows must be counted")
            self.corpora[location] = self.counted(location)
        return self.corpora[location]

    def counted(self, path: str | Path) -> Corpus:
        """Count a corpus of any format: our own rows state their tokens, of others the characters are counted."""
        prompts, answers = [], []
        for where, _, line in read_rows(path):
            row = parse_json(line, where)
            ours = "completion_tokens" in row
            text = sum(len(str(value)) for value in row.values()) / self.assumed.chars_per_token
            prompts.append(row["prompt_tokens"] if ours else self.assumed.template_tokens)
            answers.append(row["completion_tokens"] if ours else text)
        return _counted(np.array(prompts, dtype=float), np.array(answers, dtype=float))

    def answers(self, rows: float, prompt: float, answer: float) -> Corpus:
        """Return a corpus whose answers have this mean length and the spread that is assumed."""
        length = max(1.0, prompt + answer)
        return Corpus(rows, prompt, answer, length + (self.assumed.length_cv * answer) ** 2 / length)

    def on_gpu(self, device: str) -> bool:
        """Return whether a stage whose `device` option is this runs on a GPU."""
        return self.gpu is not None and device != "cpu"


def _counted(prompts: NDArray[np.float64], answers: NDArray[np.float64]) -> Corpus:
    lengths = prompts + answers
    if not len(lengths) or not lengths.sum():
        return Corpus(0, 0, 0, 0, counted=True)
    context = float((lengths**2).sum() / lengths.sum())
    return Corpus(len(lengths), float(prompts.mean()), float(answers.mean()), context, counted=True)
