"""How much more flipped tokens differ: beside unflipped tokens of the same confidence, entropy and position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moediag.figures.floors import draw_floor
from moediag.figures.registry import NO_DIFFERENCE, NO_FLIP, Frames, Panel, figure
from moediag.figures.style import (
    GREY,
    RunStyle,
    add_words,
    figure_text,
    legend_below,
    panel_grid,
    state,
)
from moediag.figures.ticks import layer_ticks, log_axis
from moediag.numbers import count, sig

BOUND_REACH: Final = 4.0
"""The axis of the excess reaches at most this factor beyond the largest one for the sake of an interval."""

_NOTE: Final = (
    "Not controlled: difficulty that these do not show. An association, only forced routes show a cause. "
    "Bars: 95 % of the excess, cut where they leave the axis; pale: too few prompts."
)


def _no_excess(frames: Frames) -> str:
    rows = frames["flip_excess"]
    if rows.empty:
        return f"{NO_FLIP} on a scored token"
    if not rows["excess"].notna().any():
        return "no unflipped token stands in the strata of the flipped ones"
    return "" if rows["flipped_mean"].max() > 0 or rows["unflipped_mean"].max() > 0 else NO_DIFFERENCE


@figure(
    "flip_excess", "flip_excess",
    title="How much more flipped tokens differ than unflipped ones like them",
    caption="Mean difference of tokens by number of flipped layers, with unflipped tokens of the same p_infer, entropy "
    "and position, and the excess by first flipped layer. Difficulty that these do not show is not controlled: an "
    "association, only forcing the routes shows a cause.",
    section="excess",
    floor_of="abs_logp_diff.mean",
    is_routing=True,
    absent=_no_excess,
)  # fmt: skip
def plot_flip_excess(
    frames: Mapping[str, pd.DataFrame],
    *,
    panel: Panel,
) -> Figure:
    """Draw abs(logp_diff) of flipped tokens against matched ones, by flipped layers; the excess by first flipped layer.

    Args:
        frames: label -> ``flip_excess`` frame.
        panel: floor of the mean abs(logp_diff) [nat]; drawn on the left.
    """
    figure, panels = panel_grid(2 * len(frames), panel.width, 3.3)
    for nth, (label, frame) in enumerate(frames.items()):
        left, right = panels[2 * nth], panels[2 * nth + 1]
        left.set_title(f"{figure_text(label, 16)}: by flipped layers")
        right.set_title("Excess by first flipped layer")
        _draw_pairs(left, _group(frame, "n_flipped_layers"), panel.styles[label])
        draw_floor(left, panel.floor_value(label))
        _draw_excess(right, _group(frame, "first_flipped_layer"), panel.styles[label])
    floored = panel.floor_words("the mean", frames)
    notes = [panel.caption, floored, _matched(frames), _NOTE, _unmatched(frames)]
    add_words(figure, excess_finding(frames), *notes)
    return figure


def excess_finding(frames: Mapping[str, pd.DataFrame]) -> str:
    """The title: tokens with any flip against unflipped ones like them, with the interval of the excess."""
    parts = []
    for label, frame in frames.items():
        rows = frame[(frame["grouping"] == "any_flip") & frame["excess"].notna()]
        if rows.empty:
            parts.append(f"{figure_text(label)}: no flipped token has an unflipped one like it")
            continue
        row = rows.iloc[0]
        low, high = row["excess_ci_low"], row["excess_ci_high"]
        bounds = "" if math.isnan(low) else f" (95 %: {sig(low, 2)} to {sig(high, 2)})"
        ratio = "" if math.isnan(row["ratio"]) else f", {sig(row['ratio'], 2)}× unflipped tokens like them"
        parts.append(
            f"{figure_text(label)}: flipped tokens differ by {sig(row['flipped_mean'], 2)} nat{ratio}; "
            f"excess {sig(row['excess'], 2)} nat{bounds}"
        )
    return "\n".join(parts) or "No run"


def _group(frame: pd.DataFrame, grouping: str) -> pd.DataFrame:
    rows: pd.DataFrame = frame[(frame["grouping"] == grouping) & frame["excess"].notna()]
    return rows.sort_values("group_low")


def _matched(frames: Mapping[str, pd.DataFrame]) -> str:
    on = sorted({words for frame in frames.values() for words in frame["matched_on"]})
    return f"Matched on {'; or on '.join(on)}." if on else ""


def _unmatched(frames: Mapping[str, pd.DataFrame]) -> str:
    n = sum(int(frame.loc[frame["grouping"] == "any_flip", "n_unmatched"].sum()) for frame in frames.values())
    return f"Left out, fewer than two unflipped tokens like them: {count(n, 'token')}." if n else ""


def _names(rows: pd.DataFrame) -> list[str]:
    """Group ends as words, with the tokens behind them: a last group of two tokens must not look like a trend."""
    ends = zip(rows["group_low"].astype(int), rows["group_high"].astype(int), rows["n_tokens"], strict=True)
    return [f"{low}\n{_short(n)}" if low == high else f"{low}–{high}\n{_short(n)}" for low, high, n in ends]


def _short(n: int) -> str:
    """A count that fits under a tick."""
    return f"{n:,}" if n < 10_000 else f"{n / 1e3:.0f}k" if n < 999_500 else f"{n / 1e6:.1f}M"


def _bars(rows: pd.DataFrame, at: pd.Series[float]) -> npt.NDArray[np.float64]:
    """Lengths of the excess's interval around a drawn value, never negative."""
    low, high = rows["excess"] - rows["excess_ci_low"], rows["excess_ci_high"] - rows["excess"]
    return np.vstack([np.minimum(low.clip(lower=0), 0.999 * at.abs()), high.clip(lower=0)]).astype(np.float64)


def _draw_pairs(ax: Axes, rows: pd.DataFrame, style: RunStyle) -> None:
    """Flipped and matched unflipped mean of each group, joined: the gap is the excess."""
    values = rows[["flipped_mean", "unflipped_mean"]].to_numpy(np.float64)
    values = values[values > 0]
    if not len(values):
        state(ax, "No flipped token has an unflipped one like it.")
        return
    x = np.arange(len(rows))
    pale: Any = np.where(rows["excess_ci_low"].isna(), 0.35, 1.0)
    ax.vlines(x, rows["unflipped_mean"], rows["flipped_mean"], color=GREY, linewidth=1.0, linestyle=(0, (1, 1.5)))
    ax.errorbar(x, rows["flipped_mean"], _bars(rows, rows["flipped_mean"]), fmt="none", color=style.colour,
                capsize=2, elinewidth=1.0)  # fmt: skip
    ax.scatter(x, rows["flipped_mean"], s=28, marker=style.marker, color=style.colour, alpha=pale, linewidths=0,
               label="flipped tokens", zorder=3)  # fmt: skip
    ax.plot(x, rows["unflipped_mean"], style.marker, color="white", markeredgecolor=GREY, markersize=5,
            markeredgewidth=1.3, label="unflipped tokens like them")  # fmt: skip
    highest = np.nanmax((rows["flipped_mean"] + _bars(rows, rows["flipped_mean"])[1]).fillna(rows["flipped_mean"]))
    log_axis(ax, "y", float(values.min()) / 1.6, float(highest) * 1.6)
    ax.set_xticks(x, _names(rows))
    ax.set_xlim(-0.5, len(rows) - 0.5)
    ax.set_xlabel("flipped MoE layers (below: tokens)")
    ax.set_ylabel("mean abs(logp diff) [nat]")
    legend_below(ax, *ax.get_legend_handles_labels(), columns=1, down=0.64)


def _draw_excess(ax: Axes, rows: pd.DataFrame, style: RunStyle) -> None:
    """Excess with its interval over the first flipped layer; tokens flip later on as well."""
    if rows.empty:
        state(ax, "No flipped token has an unflipped one like it.")
        return
    bars = np.vstack([(rows["excess"] - rows["excess_ci_low"]).clip(lower=0),
                      (rows["excess_ci_high"] - rows["excess"]).clip(lower=0)])  # fmt: skip
    size = 5 if len(rows) <= 16 else 3
    ax.errorbar(rows["group_low"], rows["excess"], bars, fmt=style.marker, color=style.colour, markersize=size,
                capsize=2 if len(rows) <= 16 else 0, elinewidth=1.0)  # fmt: skip
    ax.axhline(0, color=GREY, linewidth=0.8)
    # One interval of few prompts may be a hundred times as wide as all others: the axis does not follow it.
    reach = BOUND_REACH * float(rows["excess"].abs().max())
    low, high = ax.get_ylim()
    if reach > 0:
        ax.set_ylim(max(low, -reach), min(high, reach))
    ticks = layer_ticks(int(rows["group_low"].max()), 8)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xlabel("first flipped MoE layer")
    ax.set_ylabel("excess: flipped − unflipped [nat]")
