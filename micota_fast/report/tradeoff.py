"""The paper's point as a figure: accuracy against the length of the answers, by arm."""

from collections.abc import Mapping

from micota_fast.report.drawing import COLUMN, MUTED, Drawing, Figure, label_points, new_figure, set_log_axis
from micota_fast.report.inputs import Inputs
from micota_fast.report.summary import BASE, Summary, percent

TRADEOFF = "Accuracy against answer length, by arm."
LOGARITHMIC_ABOVE = 4.0
"""Ratio of the longest to the shortest mean answer from which the axis of lengths is logarithmic."""


def tradeoff_figure(inputs: Inputs, summary: Summary, colours: Mapping[str, str]) -> Figure | None:
    """Draw the average accuracy of each arm against the mean length of its answers. None if lengths are missing."""
    arms = {arm.name: arm for arm in summary.arms}
    lengths = {name: arm.answers.mean_tokens for name, arm in arms.items() if arm.answers.mean_tokens}
    if len(lengths) < 2:
        return None
    figure, axes = new_figure(COLUMN, 250)
    shortest, longest = min(lengths.values()), max(lengths.values())
    logarithmic = longest > LOGARITHMIC_ABOVE * shortest
    if logarithmic:
        pad = (longest / shortest) ** 0.12
        set_log_axis(axes, "x", shortest / pad, longest * pad)
    else:
        margin = 0.12 * (longest - shortest) or 0.1 * longest
        axes.set_xlim(shortest - margin, longest + margin)
    shown = [arms[name].average for name in lengths]
    chance = summary.average_chance
    levels = [*(row.low for row in shown), *(row.high for row in shown), *([] if chance is None else [chance])]
    margin = 100 * max(0.08 * (max(levels) - min(levels)), 0.005)
    axes.set_ylim(100 * min(levels) - margin, 100 * max(levels) + margin)
    points, lines, words = {}, [], []
    for name, length in lengths.items():
        average = arms[name].average
        mean, low, high = 100 * average.mean, 100 * average.low, 100 * average.high
        # With caps: arms of one length cover each other's lines.
        axes.plot([length, length], [low, high], color=colours[name], linewidth=2.0, marker="_", markersize=9)
        if name == BASE:  # a ring: distinct without colours, and it hides no other point
            axes.plot(length, mean, "o", color=colours[name], markersize=11, markerfacecolor="none", zorder=4)
        else:
            axes.plot(length, mean, "o", color=colours[name], markersize=7)
        points[f"{name} (untouched)" if name == BASE else name] = (length, mean)
        lines.append(((length, low), (length, high)))
        words.append(f"{name} {length:,.0f} tokens, {percent(average.mean)}%")
    left, right = axes.get_xlim()
    for level, dashes in [(arms[BASE].average.mean, (3, 3)), *([] if chance is None else [(chance, (1, 2))])]:
        axes.plot([left, right], [100 * level] * 2, color=MUTED, linewidth=0.9, dashes=dashes, zorder=0)
        lines.append(((left, 100 * level), (right, 100 * level)))
    if chance is not None:
        words.append(f"chance {percent(chance)}%")
    axes.set_xlabel("mean answer, tokens" + (", logarithmic" if logarithmic else ""))
    axes.set_ylabel("average accuracy, %")
    label_points(axes, points, lines, {} if chance is None else {"chance": 100 * chance})
    caption = "Point and line: mean and 95% interval; ring and dashed: the untouched student"
    description = f"Average accuracy against mean length of the answers: {'; '.join(words)}."
    drawing = Drawing(figure, description)
    return Figure(TRADEOFF, f"{caption}{'' if chance is None else '; dotted: chance'}.", [drawing])
