"""F(tau): the share of tokens whose ratio leaves [1/tau, tau], with its interval, down to one token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from moediag.figures.floors import share
from moediag.figures.registry import NO_DIFFERENCE, NOT_SCORED, Frames, Panel, figure
from moediag.figures.style import (
    GREY,
    INK,
    RunStyle,
    add_words,
    figure_text,
    legend_below,
    panel_grid,
    state,
)
from moediag.figures.ticks import log_axis
from moediag.numbers import count, percent

HEADLINE: Final = "extreme_share_2"
_TAUS: Final = (1.001, 1.01, 1.1, 1.5, 2, 5, 20, 100)
_FIRST: Final = 1e-3  # below it nearly every token differs


def _no_tail(frames: Frames) -> str:
    curve = frames["tail_curve"]
    if not (curve["n_tokens"] > 0).any():
        return NOT_SCORED
    return "" if (curve["n_above"] > 0).any() else NO_DIFFERENCE


@figure(
    "tail_curve", "tail_curve", "logp_metrics",
    title="Extreme tokens: F(tau), the share whose ratio leaves [1/tau, tau]",
    caption="The band is the 95 % interval, clustered by prompt; below 1/n the data end, not the tail.",
    section="tail",
    floor_of="extreme_share_2",
    absent=_no_tail,
)  # fmt: skip
def plot_tail_curve(
    curves: Mapping[str, pd.DataFrame],
    metrics: Mapping[str, pd.DataFrame] | None = None,
    *,
    panel: Panel,
) -> Figure:
    """Draw F(tau) of one or several runs with interval bounds.

    Args:
        curves: label -> ``tail_curve`` frame.
        metrics: label -> ``logp_metrics`` frame; F(2) of the title is read from it.
        panel: floor of F(2) [1], drawn at tau = 2.
    """
    shown = {label: frame for label, frame in curves.items() if (frame["n_above"] > 0).any()}
    figure, (ax,) = panel_grid(1, panel.width, 3.3)
    if shown:
        _dress(ax, shown)
    else:
        state(ax, "No token differs: every tail is empty.")
    for label, frame in shown.items():
        _draw_curve(ax, label, frame, panel.styles[label])
        _mark_floor(ax, panel.floor_value(label))
    if shown:
        ax.plot([], [], color=GREY, linestyle=(0, (1, 2)), linewidth=1.0, label="1/n: one token")
        legend_below(ax, *ax.get_legend_handles_labels())
    note = "Bands: 95 %, clustered by prompt." if _is_banded(shown) else "No interval could be given."
    floored = panel.floor_words("F(2)", curves, share)
    add_words(figure, tail_finding(curves, metrics or {}), panel.caption, floored, note)
    return figure


def tail_finding(curves: Mapping[str, pd.DataFrame], metrics: Mapping[str, pd.DataFrame]) -> str:
    """The title: F(2) with its interval, per run."""
    parts = []
    for label, curve in curves.items():
        frame = metrics.get(label)
        rows = frame[frame["metric"] == HEADLINE] if frame is not None else pd.DataFrame()
        name = figure_text(label)
        if not (curve["n_above"] > 0).any():
            parts.append(f"{name}: no token differs")
        elif len(rows):
            parts.append(f"{name}: {_headline(rows.iloc[0])}")
        else:
            parts.append(f"{name}: {count(curve['n_tokens'].max(), 'token')}")
    return "\n".join(parts) or "No run"


def _headline(row: pd.Series) -> str:
    """F(2) in words."""
    if row["value"] == 0:
        return f"F(2) = 0, none of {count(row['n_tokens'], 'token')} differs by more than a factor of 2"
    words = f"F(2) = {percent(row['value'])} of tokens differ by more than a factor of 2"
    return words + (
        "" if math.isnan(row["ci_low"]) else f" (95 %: {percent(row['ci_low'])} to {percent(row['ci_high'])})"
    )


def _is_banded(curves: Mapping[str, pd.DataFrame]) -> bool:
    return any(bool(frame["share_above_ci_low"].notna().any()) for frame in curves.values())


def _drawn(frame: pd.DataFrame) -> pd.DataFrame:
    """Thresholds that some token passes; beyond the last one the data end, and a bound alone would look like data."""
    return frame[(frame["n_above"] > 0) & (frame["threshold"] > 0)]


def _draw_curve(ax: Axes, label: str, frame: pd.DataFrame, style: RunStyle) -> None:
    rows, n = _drawn(frame), int(frame["n_tokens"].max())
    bottom = ax.get_ylim()[0]
    low = np.maximum(rows["share_above_ci_low"].to_numpy(np.float64), bottom)
    ax.fill_between(rows["threshold"], low, rows["share_above_ci_high"], color=style.colour, alpha=0.22, linewidth=0)
    ax.plot(rows["threshold"], rows["share_above"], color=style.colour, linestyle=style.line,
            label=f"{figure_text(label, 24)} (n = {n:,})")  # fmt: skip
    ax.axhline(1 / n, color=style.colour, linestyle=(0, (1, 2)), linewidth=1.0)


def _mark_floor(ax: Axes, value: float | None) -> None:
    if value is not None:
        ax.plot([math.log(2)], [value], marker="v", color=INK, linestyle="none", markersize=5)
        ax.annotate("floor of F(2)", (math.log(2), value), (-6, 0), textcoords="offset points", ha="right", va="center",
                    fontsize=8)  # fmt: skip


def _dress(ax: Axes, curves: Mapping[str, pd.DataFrame]) -> None:
    drawn = [_drawn(frame) for frame in curves.values()]
    last = max(float(rows["threshold"].max()) for rows in drawn)
    lowest = min(1 / int(frame["n_tokens"].max()) for frame in curves.values())
    log_axis(ax, "x", min(_FIRST, last / 2), max(last * 1.5, math.log(6)))
    log_axis(ax, "y", min(lowest, 0.1) * 0.6, 1.3)
    ax.set_xlabel("abs(logp_train − logp_infer) > ln(tau) [nat]")
    ax.set_ylabel("F(tau), share of tokens")
    ax.axvline(math.log(2), color=GREY, linewidth=0.8)
    top = ax.secondary_xaxis("top")
    low, high = ax.get_xlim()
    taus = [tau for tau in _TAUS if low <= math.log(tau) <= high]
    top.xaxis.set_major_locator(FixedLocator([math.log(tau) for tau in taus]))
    top.xaxis.set_minor_locator(NullLocator())
    top.xaxis.set_major_formatter(lambda x, _: f"{math.exp(x):.4g}")
    top.set_xlabel("max(ratio, 1/ratio) > tau")
