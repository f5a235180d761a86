"""Whole responses: log(pi_train / pi_infer) of the product over a response, against its length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moediag.figures.registry import NO_DIFFERENCE, NOT_SCORED, Frames, Panel, figure
from moediag.figures.style import (
    GREY,
    HALO,
    INK,
    RunStyle,
    add_words,
    figure_text,
    legend_below,
    panel_grid,
    state,
)
from moediag.numbers import count, sig

MIN_SEQUENCES: Final = 5
"""A mean is drawn, and compared in the title, for bins of at least that many responses."""

_MANY: Final = 2000


def _no_sequences(frames: Frames) -> str:
    rows = frames["sequences"]
    drawn = rows.loc[rows["n_tokens"] > 0, "log_ratio_sum"]
    if not drawn.notna().any():
        return NOT_SCORED
    return "" if (drawn != 0).any() else NO_DIFFERENCE


@figure(
    "sequence_drift", "sequences", "drift_by_length",
    title="Log-ratio of whole responses against their length",
    caption="One point per response: log(pi_train / pi_infer) of the product over its tokens; bars are means per bin.",
    section="drift",
    floor_of="abs_log_ratio_mean",
    absent=_no_sequences,
)  # fmt: skip
def plot_sequence_drift(
    sequences: Mapping[str, pd.DataFrame],
    by_length: Mapping[str, pd.DataFrame] | None = None,
    *,
    panel: Panel,
) -> Figure:
    """Draw the log-ratio of every response over its length, with means per bin of lengths.

    Args:
        sequences: label -> ``sequences`` frame.
        by_length: label -> ``drift_by_length`` frame; means and intervals are read from it.
        panel: floor of the mean abs(log-ratio) of a response [nat]; drawn on both sides of 0.
    """
    bins = {label: (by_length or {}).get(label, pd.DataFrame()) for label in sequences}
    figure, panels = panel_grid(len(sequences), panel.width, 3.0, sharex=True, sharey=True)
    for ax, (label, frame) in zip(panels, sequences.items(), strict=False):
        rows = frame[np.isfinite(frame["log_ratio_sum"]) & (frame["n_tokens"] > 0)]
        ax.set_title(f"{figure_text(label)}: {count(len(rows), 'response')}")
        if rows.empty:
            state(ax, "No token was scored by both arms.")
            continue
        _draw_sequences(ax, rows, bins[label], panel.styles[label])
        _draw_floor_band(ax, panel.floor_value(label))
    _dress(panels, sequences)
    floored = panel.floor_words("the mean abs(log-ratio)", sequences)
    note = f"Means of bins of at least {MIN_SEQUENCES} responses; grey: 95 %, clustered by prompt, where there is one."
    add_words(figure, sequence_finding(sequences, bins), panel.caption, floored, note)
    return figure


def sequence_finding(sequences: Mapping[str, pd.DataFrame], bins: Mapping[str, pd.DataFrame]) -> str:
    """The title: mean absolute log-ratio of the shortest and of the longest bin that hold enough responses."""
    parts = []
    for label in sequences:
        rows, name = bins[label], figure_text(label)
        full = rows[rows["n_sequences"] >= MIN_SEQUENCES] if len(rows) else rows
        full = full[full["abs_log_ratio_mean"].notna()] if len(full) else full
        if not len(full):
            parts.append(f"{name}: too few responses for a mean by length")
            continue
        words = [
            f"{sig(row['abs_log_ratio_mean'])} nat at {row['length_low']:.0f}–{row['length_high']:.0f} tokens"
            for _, row in full.iloc[[0, -1]].iterrows()
        ]
        parts.append(f"{name}: mean abs(log-ratio) of a response {', '.join(dict.fromkeys(words))}")
    return "\n".join(parts) or "No run"


def _draw_sequences(ax: Axes, rows: pd.DataFrame, bins: pd.DataFrame, style: RunStyle) -> None:
    dots = ax.plot(rows["n_tokens"], rows["log_ratio_sum"], "o", color=style.colour, markersize=3, alpha=0.5,
                   markeredgewidth=0, label="response")  # fmt: skip
    dots[0].set_rasterized(len(rows) > _MANY)
    held = bins[bins["n_sequences"] >= MIN_SEQUENCES] if len(bins) else bins
    for nth, (_, row) in enumerate(held.iterrows()):
        ends, mean = [row["length_low"], row["length_high"]], row["log_ratio_mean"]
        ax.plot(ends, [mean, mean], color=INK, linewidth=2.0, label="mean per bin" if nth == 0 else None)
        low, high = ([row[f"log_ratio_mean_ci_{end}"]] * 2 for end in ("low", "high"))
        ax.fill_between(ends, low, high, color=INK, alpha=0.18, linewidth=0)
        for sign in (-1, 1):
            name = "mean absolute value" if nth == 0 and sign > 0 else None
            ax.plot(ends, [sign * row["abs_log_ratio_mean"]] * 2, color=INK, linewidth=1.0, linestyle=(0, (4, 2)),
                    label=name)  # fmt: skip


def _draw_floor_band(ax: Axes, value: float | None) -> None:
    if value is not None:
        ax.axhspan(-value, value, color=GREY, alpha=0.18, linewidth=0)
        ax.annotate("floor", (1.0, value), (-2, 1), xycoords=ax.get_yaxis_transform(), textcoords="offset points",
                    ha="right", va="bottom", fontsize=8, color=INK, path_effects=HALO)  # fmt: skip


def _left_end(sequences: Mapping[str, pd.DataFrame]) -> float:
    """0, unless all responses are about as long: they would stand in a corner."""
    lengths = np.concatenate([frame["n_tokens"].to_numpy(np.float64) for frame in sequences.values()])
    lengths = lengths[lengths > 0]
    is_wide = not len(lengths) or lengths.min() < 0.5 * lengths.max() or lengths.max() < 40
    return 0.0 if is_wide else math.floor(0.8 * lengths.min())


def _dress(panels: list[Axes], sequences: Mapping[str, pd.DataFrame]) -> None:
    sizes = [float(frame["log_ratio_sum"].abs().max()) for frame in sequences.values() if len(frame)]
    # Symmetric: a drift to one side must look like one. The upper end leaves room for the legend.
    reach = 1.15 * max([size for size in sizes if math.isfinite(size)], default=1.0) or 1.0
    for ax in panels:
        if not ax.lines:
            continue
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set_ylim(-reach, reach)
        ax.set_xlim(_left_end(sequences), None)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        for product in (0.5, 2):
            if math.log(2) < reach:
                ax.axhline(math.log(product), color=GREY, linewidth=0.6, linestyle=(0, (1, 2)))
                ax.annotate(f"ratio {product:g}", (0, math.log(product)), (2, 1), xycoords=ax.get_yaxis_transform(),
                            textcoords="offset points", fontsize=8, color=GREY)  # fmt: skip
        ax.set_xlabel("length of the response [token]")
        ax.set_ylabel("log(pi_train / pi_infer) [nat]")
    named = next((ax for ax in panels if ax.lines), None)
    if named is not None:
        handles, names = named.get_legend_handles_labels()
        legend_below(named, handles, names, columns=3 if len(panels) == 1 else 2)
