"""Flipped layers per token against independence: do flips come together?

If layers flipped independently, many tokens would have one flip and hardly any several. Where flips cluster,
fewer tokens are touched, and those more often.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moediag.figures.floors import share
from moediag.figures.registry import NO_FLIP, Frames, Panel, figure
from moediag.figures.style import (
    GREY,
    INK,
    RunStyle,
    add_words,
    figure_text,
    legend_below,
    panel_grid,
)
from moediag.figures.ticks import log_axis
from moediag.numbers import count, percent, times


def _no_flipped_token(frames: Frames) -> str:
    rows = frames["flips_per_token"]
    flipped = rows.loc[rows["n_flipped_layers"] > 0, "n_tokens"].sum()
    return "" if flipped else f"{NO_FLIP} in {count(rows['n_tokens'].sum(), 'routed token')}"


@figure(
    "flips_per_token", "flips_per_token",
    title="Flipped layers per token against independence",
    caption="Share of tokens with that many flipped layers; open: what independent layers of the same rates would "
    "give.",
    section="depth",
    floor_of="any_layer_share",
    is_routing=True,
    absent=_no_flipped_token,
)  # fmt: skip
def plot_flips_per_token(
    frames: Mapping[str, pd.DataFrame],
    *,
    panel: Panel,
) -> Figure:
    """Draw the share of tokens by number of flipped layers, and what independent layers would give.

    Args:
        frames: label -> ``flips_per_token`` frame.
        panel: floor of the share of tokens with a flip [1]; said in the caption.
    """
    figure, panels = panel_grid(len(frames), panel.width, 2.7)
    for ax, (label, frame) in zip(panels, frames.items(), strict=False):
        ax.set_title(f"{figure_text(label)}: {count(frame['n_tokens'].sum(), 'routed token')}")
        _draw_shares(ax, frame, panel.styles[label])
    floored = panel.floor_words("the share of tokens with a flip", frames, share)
    note = "Independence: layers that flip at the same rates, each on its own."
    add_words(figure, flips_finding(frames), panel.caption, floored, note)
    return figure


def flips_finding(frames: Mapping[str, pd.DataFrame]) -> str:
    """The title: tokens with a flip, and with two and more, against independence."""
    parts = []
    for label, frame in frames.items():
        n, name = int(frame["n_tokens"].sum()), figure_text(label)
        (any_, many), (any_alone, many_alone) = (
            [float(frame.loc[frame["n_flipped_layers"] >= k, column].sum()) for k in (1, 2)]
            for column in ("share", "independent_share")
        )
        if any_ == 0:
            parts.append(f"{name}: no flip in {count(n, 'routed token')}")
            continue
        words = f"{name}: {percent(any_)} of tokens flip somewhere ({percent(any_alone)} if layers were independent)"
        if many > 0 and many_alone > 0 and any_alone < 0.9:
            words += f", {percent(many)} in several layers ({times(many, many_alone)} independence)"
        parts.append(words)
    return "\n".join(parts) or "No run"


def _draw_shares(ax: Axes, frame: pd.DataFrame, style: RunStyle) -> None:
    n = max(int(frame["n_tokens"].sum()), 1)
    lowest = 0.4 / n
    seen = frame[frame["n_tokens"] > 0]
    alone = frame[frame["independent_share"] > lowest]
    for rows, column, colour, line, face, name in (
        (alone, "independent_share", INK, (0, (3, 1.5)), "white", "if layers were independent"),
        (seen, "share", style.colour, "-", style.colour, "observed"),
    ):
        ax.plot(rows["n_flipped_layers"], rows[column], color=colour, linestyle=line, marker="o", markersize=4.5,
                markerfacecolor=face, linewidth=1.2, label=name)  # fmt: skip
    ax.axhline(1 / n, color=GREY, linestyle=(0, (1, 2)), linewidth=1.0, label="1/n: one token")
    last = max(float(seen["n_flipped_layers"].max()), float(np.nan_to_num(alone["n_flipped_layers"].max())))
    log_axis(ax, "y", 0.6 * lowest, 2.0)
    ax.set_xlim(-0.5, last + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    ax.set_xlabel("flipped MoE layers of a token")
    ax.set_ylabel("share of tokens, log axis")
    legend_below(ax, *ax.get_legend_handles_labels())
