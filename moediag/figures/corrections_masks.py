"""How much every correction masks, and how far two corrections mask the same tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moediag.corrections.correction import parse_correction
from moediag.figures.heat import draw_cells, rate_bar, rate_norm
from moediag.figures.registry import SIMULATION_FIGURES, Frames, Panel, figure
from moediag.figures.style import (
    DENSE_COLOURS,
    GREY,
    HALO,
    INK,
    MOE_COLOURS,
    add_words,
    figure_text,
    is_column,
    legend_below,
    name_width,
    new_figure,
    state,
)
from moediag.figures.ticks import log_axis
from moediag.numbers import count, percent

_ROW: float = 0.17
"""Height of a correction's row [inch]: names stand clear of each other."""
_MOST_NUMBERED: int = 20
"""Masks whose cells have room for two digits each, and their columns for a number."""


@figure(
    "masked_shares", "correction_statistics",
    title="Share of tokens that every correction masks",
    caption="All corrections on the same logged tokens; masked = weight 0, no update. Figure-10-style.",
    section="first",
    into=SIMULATION_FIGURES,
)  # fmt: skip
def plot_masked_shares(statistics: pd.DataFrame, *, panel: Panel) -> Figure:
    """Draw the share of tokens that every correction masks, with its interval, least first; none is one row of all.

    Args:
        statistics: frame ``correction_statistics``.
    """
    rows = statistics.sort_values("masked_share", ascending=False, kind="stable").reset_index(drop=True)
    some, none = rows[rows["masked_share"] > 0], rows[rows["masked_share"] == 0]
    n_rows = len(some) + bool(len(none))
    figure = new_figure(panel.width, 1.1 + _ROW * max(n_rows, 6))
    ax = figure.subplots()
    n = int(rows["n_tokens"].max()) if len(rows) else 0
    low = 0.4 / max(n, 1)
    y = n_rows - 1 - some.index.to_numpy()
    ax.hlines(y, some["masked_share_ci_low"].clip(lower=low).fillna(some["masked_share"]),
              some["masked_share_ci_high"].fillna(some["masked_share"]), color=GREY, linewidth=1.4)  # fmt: skip
    for is_whole, marker, colour, words in (
        (False, "o", MOE_COLOURS[0], "single tokens"),
        (True, "s", DENSE_COLOURS[0], "whole sequences only"),
    ):
        part = some[_is_by_sequence(some) == is_whole]
        if part.empty:
            continue
        ax.plot(part["masked_share"], n_rows - 1 - part.index, linestyle="none", marker=marker, markersize=4,
                color=colour, label=f"masks {words}")  # fmt: skip
    names = [figure_text(name, name_width(panel.width)) for name in some["correction"]]
    if len(none):
        high = none["masked_share_ci_high"].max()  # NaN: none of them can mask
        words = "cannot mask" if np.isnan(high) else f"mask none (95 %: up to {percent(high)})"
        ax.annotate(words, (0.0, 0), (4, 0), color=GREY, xycoords=ax.get_yaxis_transform(),
                    textcoords="offset points", va="center", path_effects=HALO)  # fmt: skip
        names.append(f"{len(none)} others" if names else count(len(none), "correction"))
    ax.set_yticks(range(n_rows), names[::-1])
    ax.set_ylim(-0.7, n_rows - 0.3)
    log_axis(ax, "x", low, 1.3)
    ax.set_xlabel("share of tokens masked, log axis")
    legend_below(ax, *ax.get_legend_handles_labels())
    note = f"One token is {percent(1 / max(n, 1))}. "
    if n_unable := int(none["masked_share_ci_high"].isna().sum()):
        note += f"{n_unable} of those that mask none never mask. "
    note += "Bars: 95 %, clustered by prompt. For scale: the IcePop post saw 1 to 2 per mille of tokens at first."
    add_words(figure, share_title(rows), panel.caption, note)
    return figure


def share_title(rows: pd.DataFrame) -> str:
    """The finding: from least to most, and who masks none."""
    some = rows[rows["masked_share"] > 0]
    none = len(rows) - len(some)
    if some.empty:
        return f"None of {count(len(rows), 'correction')} masks a token"
    most, least = some.iloc[0], some.iloc[-1]
    words = (
        f"The same tokens, {count(len(some), 'mask')}: from {percent(least['masked_share'])} "
        f"({figure_text(least['correction'], 34)}) to {percent(most['masked_share'])} masked "
        f"({figure_text(most['correction'], 34)})"
    )
    return words + (f"; {none} of {len(rows)} mask none" if none else "")


def _is_by_sequence(rows: pd.DataFrame) -> pd.Series:
    """Corrections that mask whole sequences and no single token."""
    return rows["words"].map(
        lambda words: all(step.declared.masks != "token" for step in parse_correction(words).steps)
    )


def _too_few_masks(frames: Frames) -> str:
    rows = frames["overlap"]
    return "" if rows.loc[rows["n_masked"] > 0, "correction"].nunique() > 1 else "fewer than two corrections mask"


@figure(
    "mask_overlap", "overlap",
    title="Overlap of the masks",
    caption="Row by row: of the tokens that this correction masks, the share that another one masks, too.",
    section="overlap",
    absent=_too_few_masks,
    into=SIMULATION_FIGURES,
)  # fmt: skip
def plot_mask_overlap(overlap: pd.DataFrame, *, panel: Panel) -> Figure:
    """Draw which part of the tokens masked by one correction (row) another one masks, too (column).

    Args:
        overlap: frame ``overlap``.
    """
    some = overlap[overlap["n_masked"] > 0].sort_values("n_masked", kind="stable")
    names = list(dict.fromkeys(some["correction"]))
    if len(names) < 2:
        figure = new_figure(panel.width, 2.0)
        state(figure.subplots(), "Fewer than two corrections mask a token.")
        add_words(figure, "No two masks to compare", panel.caption)
        return figure
    table = overlap.pivot(index="correction", columns="other", values="share_masked_by_other").reindex(
        names, columns=names
    )
    figure = new_figure(panel.width, 1.2 + _ROW * max(len(names), 8))
    ax = figure.subplots()
    edges = np.asarray(np.arange(len(names) + 1) - 0.5, np.float64)
    values = table.to_numpy(np.float64)
    mesh = draw_cells(ax, edges, edges, values, rate_norm(np.ones((1, 1))))
    # Columns bear the numbers of rows: names on their heads would be longer than the map is high.
    ax.set_yticks(
        range(len(names)),
        [f"{figure_text(name, name_width(panel.width) - 4)}  {nth}" for nth, name in enumerate(names, 1)],
    )
    every = 1 if len(names) <= _MOST_NUMBERED / (1 + 2 * is_column(panel.width)) else 5
    ax.set_xticks(range(every - 1, len(names), every), [str(n) for n in range(every, len(names) + 1, every)])
    ax.invert_yaxis()
    ax.set_ylabel("of the tokens masked by")
    ax.set_xlabel("this share is masked by the correction of that number, too")
    rate_bar(mesh, ax, "share of the row's masked tokens")
    has_numbers = len(names) <= _MOST_NUMBERED and not is_column(panel.width)
    if has_numbers:
        _write_cells(ax, values)
    add_words(
        figure,
        overlap_title(overlap, names),
        panel.caption,
        "From the smallest mask to the largest; corrections that mask nothing are left out.",
        "Numbers: per cent, where it is neither none nor all." if has_numbers else "",
    )
    return figure


def overlap_title(overlap: pd.DataFrame, names: list[str]) -> str:
    """The finding: the least alike of the larger masks, by Jaccard."""
    rows = overlap[
        overlap["correction"].isin(names) & overlap["other"].isin(names) & (overlap["correction"] < overlap["other"])
    ]
    same = int((rows["jaccard"] == 1).sum())
    apart = int((rows["jaccard"] == 0).sum())
    middle = float(rows["jaccard"].median())
    return (
        f"{count(len(names), 'mask')}, {count(len(rows), 'pair')}: median Jaccard {percent(middle)}; the same tokens "
        f"in {same}, no token in common in {apart}"
    )


def _write_cells(ax: Axes, values: np.ndarray) -> None:
    """Per cent in two digits; none and all are read from the colour."""
    for (row, column), value in np.ndenumerate(values):
        if 0.005 <= value < 0.995:
            ax.text(column, row, f"{100 * value:.0f}", ha="center", va="center",
                    color="white" if value > 0.45 else INK)  # fmt: skip
