"""On-policy rounds in a recipe's graph: the student answers, a model scores the answers, the student learns, again."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from micota_fast.config.recipe import SEEDS_APART, OnPolicyCorpus, Recipe
from micota_fast.config.train import TrainSettings
from micota_fast.errors import InputError
from micota_fast.pipeline.answers import COMPLETIONS, answer_options, answer_stage, filter_options, filter_stage
from micota_fast.pipeline.builder import Builder
from micota_fast.pipeline.own_samples import check_sampling
from micota_fast.pipeline.scores import score_stage
from micota_fast.pipeline.stage import Artefact
from micota_fast.pipeline.training import train_stage
from micota_fast.sources.hub import is_hub
from micota_fast.sources.problems import read_problems
from micota_fast.sources.rows import read_rows


class Round(NamedTuple):
    """One round of a training.

    Attributes:
        name: of its answers, corpus and scores.
        stage: of its training.
    """

    name: str
    stage: str


def rounds_of(stage: str, spec: OnPolicyCorpus) -> list[Round]:
    """Return the rounds of a training; the last one's stage is the training's result.

    A round's name does not depend on how many follow it: with more `rounds` those that are done stay done.
    """
    kind, _, run = stage.partition("/")
    names = [f"{run}-round{number}" for number in range(1, spec.rounds + 1)]
    return [Round(name, f"{kind}/{name}") for name in names]


def trainings_in_rounds(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield the stage and the corpus of each training in rounds that a recipe may have."""
    for name, arm in recipe.students.items():
        if recipe.corpora[arm.corpus].on_policy is not None:
            yield from ((f"student/{name}-seed{seed}", arm.corpus) for seed in recipe.seeds)
    for name, model in recipe.models.items():
        if model.train is not None and recipe.corpora[model.train.corpus].on_policy is not None:
            yield f"model/{name}", model.train.corpus


def corpora_of_rounds(recipe: Recipe) -> dict[str, str]:
    """Return the corpus, name under `corpora`, that each round's answers belong to, by the round's name."""
    found: dict[str, str] = {}
    for stage, corpus in trainings_in_rounds(recipe):
        spec = recipe.corpora[corpus].on_policy
        assert spec is not None
        found |= {each.name: corpus for each in rounds_of(stage, spec)}
    return found


def round_stages(
    builder: Builder,
    stage: str,
    corpus: str,
    student: Artefact,
    scorer: Artefact,
    overrides: dict[str, Any],
    where: str,
) -> None:
    """Enter the stages of all rounds of one training.

    Problems are put to the student by a server that the run starts, also if its checkpoint has one: later rounds need
    it anyway.

    Args:
        builder: of the graph.
        stage: name of the training.
        corpus: name of the on-policy corpus.
        student: that the first round starts from.
        scorer: the model `by`.
        overrides: of the recipe's `train`, for this training.
        where: the recipe's part that has them.

    Raises:
        InputError: an option is bad, each round would start from fresh weights, or the reverse divergence would be
            estimated on answers that are no samples of the student's distribution.
    """
    recipe, spec = builder.recipe, builder.recipe.corpora[corpus].on_policy
    assert spec is not None
    part = f"corpora.{corpus}.on_policy"
    learning = builder.settings(TrainSettings, recipe.train, overrides, where)
    if learning.init == "random":
        key = f"{where}.init" if "init" in overrides else "train.init"
        raise InputError(
            f"{builder.path}, `{key}: random`: each round of {stage} would start from fresh weights instead of those "
            f"of the round before; train them as a model of their own first (models.NAME.train), and name it as "
            f"`student`"
        )
    served = dataclasses.replace(builder.served(recipe.generate, recipe.student), url=None, api="sglang")
    right = spec.keep == "right"
    rules = {"require_correct": True} if right else {"require_correct": False, "require_boxed": False}
    model = student
    for number, (name, training) in enumerate(rounds_of(stage, spec)):
        filtering = filter_options(builder, name, rules | {"allow_empty": False}, f"{part}.keep")
        answering = answer_options(
            builder, name, spec.problems, recipe.student, served, spec.overrides, f"{part}.overrides", filtering
        )
        if learning.soft is not None and learning.soft.divergence == "reverse":
            check_sampling(builder, answering, f"{part}.overrides")
        answering.slice = (number * spec.problems_per_round, spec.problems_per_round)
        answering.seed += SEEDS_APART * learning.seed + number + 1
        if answering.seed >= 2**63:
            raise InputError(
                f"{builder.path}, `{part}`: the seed of sampling is `generate.seed` + {SEEDS_APART} * the training's "
                f"seed {learning.seed} + the round's number, and must fit 64 bits; choose a smaller seed"
            )
        answer_stage(builder, name, spec.problems, answering, model)
        rows = filter_stage(builder, name, filtering)
        scores = score_stage(builder, name, f"{part}.by", spec.by, spec.top, rows, scorer, student, learning.chat)
        model = train_stage(builder, training, model, rows, {}, scores, overrides, where)


def check_problems(builder: Builder, corpus: str, names: Sequence[str]) -> None:
    """Check that an on-policy corpus has the problems of a round, with answers if it keeps right ones alone.

    Reads a round's number of rows; all of them for their answers, until one of these rounds has been answered, which
    reads them, too. A set of the Hub is left to the stage that reads it.

    Args:
        builder: of the graph.
        corpus: its name.
        names: of the rounds that answer its problems.

    Raises:
        InputError: there are fewer problems; or naming the first one without an answer.
    """
    spec = builder.recipe.corpora[corpus].on_policy
    assert spec is not None
    source, wanted = builder.recipe.problems[spec.problems], spec.problems_per_round
    location = builder.file(source.path, f"problems.{spec.problems}.path").location
    is_here = not is_hub(location) and Path(location).is_file()
    found = wanted if source.limit is None else min(source.limit, wanted)
    if is_here:
        found = sum(1 for _ in islice(read_rows(location), found))
    if found < wanted:
        raise InputError(
            f"{builder.path}, `corpora.{corpus}.on_policy.problems_per_round: {wanted}`: `problems.{spec.problems}` "
            f"has {found}, and a round asks each problem once; set it to {found} at most"
        )
    if spec.keep != "right" or not is_here:
        return
    if any(Path(builder.out(f"answers/{name}", COMPLETIONS)).exists() for name in names):
        return
    try:
        read_problems(location, source.limit, source.columns)
    except InputError as error:
        raise InputError(
            f"{builder.path}, `corpora.{corpus}.on_policy.keep: right` needs problems with answers: {error}"
        ) from None
