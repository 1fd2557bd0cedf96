"""The stages that write a model's answers and filter them, in a recipe's graph."""

import dataclasses
from typing import Any

from micota_fast.common.records import store_file
from micota_fast.config import loader
from micota_fast.config.corpus import FilterConfig, FilterSettings
from micota_fast.config.generation import GenerateConfig, GenerateSettings
from micota_fast.pipeline.builder import Builder
from micota_fast.pipeline.stage import Artefact, Stage

COMPLETIONS, CORPUS = "completions.jsonl", "corpus.jsonl"  # in the folders of the two stages


def filter_options(builder: Builder, name: str, overrides: dict[str, Any], where: str) -> FilterConfig:
    """Return how the answers of this name are filtered: the recipe's `filter`, then overrides of its part `where`."""
    return builder.settings(
        FilterConfig,
        builder.recipe.filter,
        overrides,
        where,
        completions=builder.out(f"answers/{name}", COMPLETIONS),
        out=builder.out(f"corpus/{name}", CORPUS),
    )


def filter_stage(builder: Builder, name: str, options: FilterConfig) -> Artefact:
    """Enter the stage that filters the answers of this name; return the corpus."""
    stage = f"corpus/{name}"
    outputs = (CORPUS, f"{CORPUS}.counts.json", f"{CORPUS}.rejects.jsonl")
    builder.add(Stage(stage, "filter", options, (builder.artefact(f"answers/{name}", COMPLETIONS),), outputs))
    return builder.artefact(stage, CORPUS)


def answer_options(
    builder: Builder,
    name: str,
    problems: str,
    model: str,
    served: GenerateSettings,
    overrides: dict[str, Any],
    where: str,
    rules: FilterConfig,
) -> GenerateConfig:
    """Return how the answers of this name are written.

    Args:
        builder: of the graph.
        name: of the answers.
        problems: name of their set.
        model: that writes them: what an API knows it by.
        served: the recipe's `generate`, for this model.
        overrides: of that.
        where: the recipe's part that has the overrides.
        rules: by which they will be filtered.
    """
    source, judged = builder.recipe.problems[problems], loader.plain(rules)
    return builder.settings(
        GenerateConfig,
        served,
        overrides,
        where,
        model=model,
        problems=source.path,
        columns=source.columns,
        limit=source.limit,
        out=builder.out(f"answers/{name}", COMPLETIONS),
        accept={field.name: judged[field.name] for field in dataclasses.fields(FilterSettings)},
    )


def answer_stage(
    builder: Builder, name: str, problems: str, options: GenerateConfig, model: Artefact | None
) -> Artefact:
    """Enter the stage that writes the answers of this name; return them.

    Args:
        builder: of the graph.
        name: of the answers.
        problems: name of their set.
        options: made by `answer_options`; where the files lie is filled in.
        model: writes them; None: an API has it.
    """
    inputs = []
    if model is not None:
        inputs.append(model)
        options.model = model.location
    inputs.append(builder.file(builder.recipe.problems[problems].path, f"problems.{problems}.path"))
    options.problems = inputs[-1].location
    options.chat, template = builder.template(options.chat, "generate.chat")
    stage, outputs = f"answers/{name}", [COMPLETIONS, f"{COMPLETIONS}.meta.json"]
    if options.top_logprobs:
        outputs.append(store_file(COMPLETIONS))
    builder.add(Stage(stage, "generate", options, (*inputs, *template), tuple(outputs)))
    return builder.artefact(stage, COMPLETIONS)
