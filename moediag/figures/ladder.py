"""The ladder drawn: the mean difference of every rung that was run, beside what rounding makes there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moediag.figures.registry import NO_DIFFERENCE, Frames, Panel, figure
from moediag.figures.style import GREY, INK, RunStyle, add_words, figure_text, figure_width, name_width, new_figure
from moediag.figures.ticks import log_axis
from moediag.numbers import sig

_ROW: Final = 0.34
_HEAD: Final = 0.9
"""Height of a rung, and of a panel's title and axis [inch]."""


def _nothing_run(frames: Frames) -> str:
    means = frames["ladder"]["mean"]
    if not means.notna().any():
        return "no rung with a number was run"
    return "" if (means > 0).any() else NO_DIFFERENCE


@figure(
    "ladder", "ladder",
    title="The ladder: what each rung differs by, beside rounding",
    caption="Mean abs(logp_diff) of every rung that was run; the grey bar is what one unit in the last place makes "
    "there.",
    section="ladder",
    floor_of="abs_logp_diff.mean",
    absent=_nothing_run,
)  # fmt: skip
def plot_ladder(frames: Mapping[str, pd.DataFrame], *, panel: Panel) -> Figure:
    """Draw the mean difference of every rung with a number, its interval, and its yardstick.

    Args:
        frames: label -> ``ladder`` frame.
    """
    shown = {label: frame[frame["mean"].notna()].reset_index(drop=True) for label, frame in frames.items()}
    shown = {label: frame for label, frame in shown.items() if len(frame)}
    heights = [_HEAD + _ROW * len(frame) for frame in shown.values()] or [_HEAD]
    figure = new_figure(panel.width, sum(heights))
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    above = [frame.loc[:, ["mean", "yardstick"]].to_numpy().ravel() for frame in shown.values()]
    positive = np.concatenate([*above, [1.0]])
    positive = positive[positive > 0]
    ends = float(positive.min()) / 30, 3 * float(np.max(positive[:-1], initial=0.0) or 1.0)
    for nth, (label, frame) in enumerate(shown.items()):
        ax = figure.add_subplot(grid[nth])
        _draw(ax, frame, panel.styles[label], ends)
        ax.set_title(figure_text(label, name_width(panel.width)))
        if nth == len(shown) - 1:
            ax.set_xlabel("mean abs(logp_diff) [nat]")
    exact = "0: bit for bit the same." if any((f["mean"] == 0).any() for f in shown.values()) else ""
    note = "Grey: one unit in the last place, or float32's own."
    add_words(figure, ladder_finding(shown), panel.caption, exact, note)
    return figure


def ladder_finding(frames: Mapping[str, pd.DataFrame]) -> str:
    """The title: the first rung that breaks, or that none does."""
    parts = []
    for label, frame in frames.items():
        broken = frame[frame["finding"].isin(("beyond rounding", "different"))]
        if len(broken):
            row = broken.iloc[0]
            words = f"breaks at {row['rung']}, {row['compared']}: {sig(row['mean'])} nat"
        else:
            words = f"none of {len(frame)} rungs is beyond rounding"
        parts.append(f"{figure_text(label)}: {words}")
    return "\n".join(parts) or "No run"


def _draw(ax: Axes, frame: pd.DataFrame, style: RunStyle, ends: tuple[float, float]) -> None:
    y_R, width = np.arange(len(frame))[::-1], 5 * name_width(figure_width(ax)) // 4
    mean_R = np.maximum(frame["mean"].to_numpy(float), ends[0])
    for y, (_, row) in zip(y_R, frame.iterrows(), strict=True):
        if row["yardstick"] > 0:
            ax.plot([row["yardstick"]] * 2, [y - 0.33, y + 0.33], color=GREY, linewidth=3, alpha=0.6)
        if row["mean"] > 0 and row["mean_ci_low"] > 0:
            ax.plot([row["mean_ci_low"], row["mean_ci_high"]], [y, y], color=style.colour, linewidth=1.4)
    ax.plot(mean_R, y_R, linestyle="none", marker=style.marker, color=style.colour, markersize=4.5)
    ax.set_yticks(y_R, [figure_text(f"{row['rung']} {row['compared']}", width) for _, row in frame.iterrows()])
    ax.set_ylim(-0.7, len(frame) - 0.3)
    log_axis(ax, "x", ends[0] / 1.5, ends[1])  # the same for every run
    if (mean_R == ends[0]).any():  # 0 has no place on a log axis, and gets one at its left end
        ticks, label = [tick for tick in ax.get_xticks() if tick > 3 * ends[0]], ax.xaxis.get_major_formatter()
        ax.set_xticks([ends[0], *ticks], ["0", *map(label, ticks)])
    ax.tick_params(axis="y", length=0, colors=INK)
    ax.grid(axis="y", visible=False)
