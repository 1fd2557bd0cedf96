"""Figures of training losses: by arm, and of two runs."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from micota_fast.report.drawing import RULE, THEME, Drawing, Figure, new_figure, set_log_axis
from micota_fast.report.inputs import Inputs, LossCurve
from micota_fast.report.summary import Summary, mean_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MplFigure

PAIR = tuple(colour for colour, (name, _) in THEME.items() if name in ("--series-blue", "--series-vermillion"))
"""Colours of the first run and of the second."""


def loss_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Figure | None:
    """Draw the training loss, one panel per arm on common axes.

    Seeds are thin, their mean is bold and smoother, the other arms' means are grey.
    """
    training = inputs.training
    seeds = {name: [thinned(curve) for curve in curves] for name, curves in training.items()}
    means = {name: thinned(mean_curve(curves), limit=60) for name, curves in training.items()}
    finite = [loss for curves in seeds.values() for curve in curves for loss in curve.losses if math.isfinite(loss)]
    if not finite:
        return None
    last = max(curve.steps[-1] for curves in training.values() for curve in curves)
    drawings = []
    for name, mean in means.items():
        end = mean.losses[-1] if mean.losses else math.nan
        figure, axes = _panel(finite, last)
        for other, curve in means.items():
            if other != name:
                axes.plot(curve.steps, curve.losses, color=RULE, linewidth=1.0)
        for curve in seeds[name]:
            axes.plot(curve.steps, curve.losses, color=colours[name], linewidth=0.6, alpha=0.5)
        axes.plot(mean.steps, mean.losses, color=colours[name], linewidth=1.9)
        words = f"ends at {end:.3f}" if math.isfinite(end) else "diverged"
        drawings.append(Drawing(figure, f"Training loss of the {name} arm: {words}.", name))
    caption = "Thin: seeds; bold: their mean over short windows of steps"
    if len(drawings) > 1:
        caption += "; grey: the other arms. Losses on different corpora are not comparable as scores"
    return Figure("Training loss by arm.", f"{caption}.", drawings)


def loss_pair(pairs: Mapping[str, tuple[Sequence[LossCurve], Sequence[LossCurve]]]) -> list[Drawing]:
    """Draw the losses of two runs over each other, one panel per training on common axes; [] if none is finite.

    Args:
        pairs: training -> the curves of the first run's seeds and of the second's; call it within `drawing_style`.
    """
    curves = [curve for pair in pairs.values() for seeds in pair for curve in seeds]
    finite = [loss for curve in curves for loss in thinned(curve).losses if math.isfinite(loss)]
    if not finite:
        return []
    last = max(curve.steps[-1] for curve in curves)
    drawings = []
    for name, pair in pairs.items():
        figure, axes = _panel(finite, last)
        words = []
        for seeds, colour in zip(pair, PAIR, strict=True):
            for curve in map(thinned, seeds):
                axes.plot(curve.steps, curve.losses, color=colour, linewidth=0.6, alpha=0.5)
            mean = thinned(mean_curve(seeds), limit=60)
            axes.plot(mean.steps, mean.losses, color=colour, linewidth=1.9)
            end = mean.losses[-1] if mean.losses else math.nan
            words.append(f"ends at {end:.3f}" if math.isfinite(end) else "diverged")
        drawings.append(Drawing(figure, f"Training loss of {name}: first run {words[0]}, second {words[1]}.", name))
    return drawings


def _panel(finite: Sequence[float], last: int) -> "tuple[MplFigure, Axes]":
    """Make axes that fit these losses and steps up to `last`; logarithmic if the losses span a wide range."""
    figure, axes = new_figure(300, 190)
    if min(finite) > 0 and max(finite) / min(finite) > 8:
        set_log_axis(axes, "y", min(finite) / 1.12, max(finite) * 1.12)
    else:
        pad = 0.05 * (max(finite) - min(finite)) or 0.1
        axes.set_ylim(min(finite) - pad, max(finite) + pad)
    axes.set_xlim(0, last * 1.02)
    axes.grid(axis="y", color=RULE, linewidth=0.5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token")
    return figure, axes


def thinned(curve: LossCurve, limit: int = 240) -> LossCurve:
    """Reduce a curve to about `limit` points, each the mean of consecutive steps: a line has no room for more."""
    width = -(-len(curve.steps) // limit)
    if width <= 1:
        return curve
    # The last window takes the remainder too, so that no point is noisier than the others. A point stands at its
    # window's end: the last one is the last step.
    bounds = [*range(0, len(curve.steps) - width + 1, width), len(curve.steps)]
    windows = list(itertools.pairwise(bounds))
    # A step that was skipped has no loss; the others of its window do.
    finite = ([loss for loss in curve.losses[start:end] if math.isfinite(loss)] for start, end in windows)
    losses = tuple(float(np.mean(part)) if part else math.nan for part in finite)
    return LossCurve(tuple(curve.steps[end - 1] for _, end in windows), losses)
