"""The stage that scores a corpus, and its place in a recipe's graph."""

import dataclasses

from micota_fast.config.generation import ChatConfig
from micota_fast.config.scoring import ScoreConfig
from micota_fast.errors import InputError
from micota_fast.pipeline.builder import Builder
from micota_fast.pipeline.stage import Artefact, Stage

SCORES = "top_logprobs"  # the store, in the stage's folder


def score_stage(
    builder: Builder,
    name: str,
    where: str,
    by: str,
    top: int,
    rows: Artefact,
    model: Artefact,
    student: Artefact,
    chat: ChatConfig,
) -> Artefact:
    """Enter the stage that scores a corpus, unless it is there; returns the scores.

    The scoring model's prompt is as in `generate`; thoughts are treated as in the student's training, which learns that
    text.

    Args:
        builder: of the graph.
        name: of the scores.
        where: the recipe's part that names the scoring model.
        by: name of the scoring model.
        top: likeliest tokens that are kept at each position.
        rows: the corpus.
        model: scores it.
        student: will be trained on the scores, or has the tokenizer of the one that will be.
        chat: of that training.

    Raises:
        InputError: the model is only served by an API that gives no log-probabilities.
    """
    stage, recipe = f"scores/{name}", builder.recipe
    scores = builder.artefact(stage, SCORES)
    if stage in builder.made:
        return scores
    served = builder.served(recipe.generate, by)
    if served.api != "sglang":
        raise InputError(
            f"{builder.path}, `{where}`: {by} is asked by `generate.api: {served.api}`, and "
            f"scores need SGLang's native API"
        )
    asked, asked_template = builder.template(served.chat, "generate.chat")
    learned, learned_template = builder.template(chat, "train.chat")
    settings = ScoreConfig(
        top_k=top,
        completions=rows.location,
        model=model.location,
        student=student.location,
        chat=dataclasses.replace(asked, thinking=learned.thinking, thinking_tags=learned.thinking_tags),
        student_chat=learned,
        serve=served.serve,
        url=served.url,
        wait_for_server_s=served.wait_for_server_s,
        out=scores.location,
    )
    inputs = (rows, model, student, *asked_template, *learned_template)
    builder.add(Stage(stage, "score", settings, inputs, (SCORES,)))
    return scores
