"""The accuracy within a token budget: what long chains of thought cost at every question."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from micota_fast.report.drawing import (
    COLUMN,
    INK,
    RULE,
    Drawing,
    Figure,
    new_figure,
    set_log_axis,
    spread_labels,
    wrapped,
)
from micota_fast.report.inputs import EvaluatedModel, Inputs
from micota_fast.report.summary import BASE, Summary, percent


def within(inputs: Inputs, limit: int) -> Inputs | None:
    """Return the inputs as if answers of more than `limit` tokens were wrong; None if graded rows are missing.

    A model that writes token by token begins the same answer under a lower `max_new_tokens`, so this is what an
    evaluation under this limit would have found, except that an answer cut off behind its final answer might count.
    """
    if any(model.graded is None for model in _models(inputs)):
        return None
    arms = {name: [_within(model, limit) for model in of_arm] for name, of_arm in inputs.arms.items()}
    return replace(inputs, base=_within(inputs.base, limit), arms=arms)


def _models(inputs: Inputs) -> list[EvaluatedModel]:
    return [inputs.base, *(model for of_arm in inputs.arms.values() for model in of_arm)]


def _within(model: EvaluatedModel, limit: int) -> EvaluatedModel:
    assert model.graded is not None
    graded = {name: of.within(limit) for name, of in model.graded.items()}
    results = {
        name: replace(result, correct=sum(graded[name].correct), accuracy=sum(graded[name].correct) / result.n)
        for name, result in model.benchmarks.items()
    }
    return replace(model, graded=graded, benchmarks=results)


def ladder(inputs: Inputs) -> list[int]:
    """Return the limits to show: powers of 2 and the means of two, from the shortest correct answer to the longest."""
    graded = [of for model in _models(inputs) if model.graded is not None for of in model.graded.values()]
    tokens = [n for of in graded for of_problem in of.correct_tokens for n in of_problem]
    if not tokens:
        return []
    steps = sorted({step for k in range(40) for step in (1 << k, 3 << k)})
    first = max((step for step in steps if step < min(tokens)), default=1)
    last = min(step for step in steps if step >= max(tokens))
    return [step for step in steps if first <= step <= last]


def budget_curves(inputs: Inputs) -> dict[str, list[tuple[int, float]]]:
    """Return for each arm (limit, average accuracy) of each limit of the ladder; nothing if graded rows are missing."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for limit in ladder(inputs):
        cut = within(inputs, limit)
        if cut is None:
            return {}
        for name, models in {BASE: [cut.base], **cut.arms}.items():
            curves.setdefault(name, []).append((limit, _average(models)))
    return curves


def _average(models: Sequence[EvaluatedModel]) -> float:
    every = [math.fsum(of.accuracy for of in m.benchmarks.values()) / len(m.benchmarks) for m in models]
    return math.fsum(every) / len(every)


def budget_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Figure | None:
    """Draw the average accuracy of each arm against a limit on the tokens of an answer."""
    curves = budget_curves(inputs)
    if not curves:
        return None
    limits = [limit for limit, _ in next(iter(curves.values()))]
    if len(limits) < 3:
        return None
    figure, axes = new_figure(COLUMN, 215)
    top = 1.06 * max(100 * accuracy for points in curves.values() for _, accuracy in points) or 1.0
    for name, points in curves.items():
        heights = [100 * accuracy for _, accuracy in points]
        axes.plot(limits, heights, color=colours[name], linewidth=1.8, marker="o", markersize=3.4)
    ends = {name: 100 * points[-1][1] / top for name, points in curves.items()}
    for name, height in spread_labels(ends).items():
        axes.plot([1.03, 1.075], [height] * 2, color=colours[name], lw=2.4, transform=axes.transAxes, clip_on=False)
        axes.text(1.095, height, wrapped(name), transform=axes.transAxes, va="center", color=INK, fontsize=10)
    set_log_axis(axes, "x", limits[0] / 1.1, limits[-1] * 1.1)
    axes.set_ylim(0, top)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_xlabel("tokens that an answer may have, logarithmic")
    axes.set_ylabel("average accuracy, %")
    told = (
        f"{name} {', '.join(f'{percent(accuracy)}% at {limit:,}' for limit, accuracy in points)}"
        for name, points in curves.items()
    )
    description = f"Average accuracy by the tokens that an answer may have: {'; '.join(told)}."
    caption = "Answers that end later count as wrong; mean over seeds."
    return Figure("Accuracy within a token budget, by arm.", caption, [Drawing(figure, description)])
