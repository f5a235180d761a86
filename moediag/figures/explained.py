"""Flips explained and forecast: what the noise of scores makes of near ties, layer by layer, and how well it fits.

Left: the observed flip rate with its interval, what the pair's own noise explains (cross-fitted by prompt), and what
the pair would flip if it had the noise of another. Right: the prediction held against what happened, choice by choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moediag.analysis.flips.explained import METHOD_WORDS, best_method, source_words
from moediag.analysis.margins import MIN_CHOICES
from moediag.figures.floors import draw_floor, share
from moediag.figures.registry import NO_FLIP, Frames, Panel, figure
from moediag.figures.style import (
    DENSE_COLOURS,
    DENSE_LINES,
    GREY,
    INK,
    MARKERS,
    MOE_COLOURS,
    RunStyle,
    add_words,
    figure_text,
    legend_below,
    panel_grid,
)
from moediag.figures.ticks import layer_ticks, log_axis, power
from moediag.notation import POOLED
from moediag.numbers import count, percent

LEAST: Final = 1e-4
"""Predictions below it share the lowest bin of the frame; the axes end there."""

_COLOURS: Final = (*DENSE_COLOURS, *MOE_COLOURS[1:])
_NOTE: Final = "Bars: 95 %, clustered by prompt. Predictions have none: the noise they take is an estimate, too."


def _no_explanation(frames: Frames) -> str:
    rows = frames["explained_flips"]
    if not rows["explained"].notna().any():
        return "no flip could be explained (neither margins nor router logits of both arms)"
    return "" if rows["observed"].max() > 0 else f"{NO_FLIP} in {count(rows['n_choices'].max(), 'choice')}"


@figure(
    "explained_flips", "explained_flips", "flip_calibration", "forecast_flips",
    title="Flips observed, explained by noise at near ties, and forecast for the noise of other pairs",
    caption="Left: flip rate by layer; explained from one side's scores and the noise of other prompts of this pair, "
    "forecast for this pair if it had the noise of another. Right: predicted against observed shares; on the "
    "diagonal the explanation is right.",
    section="margins",
    floor_of="flip_rate",
    is_routing=True,
    absent=_no_explanation,
)  # fmt: skip
def plot_explained_flips(
    explained: Mapping[str, pd.DataFrame],
    calibration: Mapping[str, pd.DataFrame],
    forecasts: Mapping[str, pd.DataFrame] | None = None,
    *,
    panel: Panel,
) -> Figure:
    """Draw observed, explained and forecast flip rates by layer, and the calibration of the explanation.

    Args:
        explained: label -> ``explained_flips`` frame; of its methods the best with a prediction is drawn.
        calibration: label -> ``flip_calibration`` frame.
        forecasts: label -> ``forecast_flips`` frame.
        panel: floor of the flip rate over all layers [1]; drawn on the left.
    """
    figure, panels = panel_grid(2 * len(explained), panel.width, 3.6)
    silent: set[str] = set()
    for nth, (label, frame) in enumerate(explained.items()):
        left, right = panels[2 * nth], panels[2 * nth + 1]
        method = best_method(frame)
        rows = frame[frame["method"] == method]
        left.set_title(f"{figure_text(label, 20)}: flip rate by layer")
        draw_rates(left, rows[rows["layer"] != POOLED], panel.styles[label])
        silent |= draw_forecasts(left, (forecasts or {}).get(label))
        _dress_rates(left, rows, panel.floor_value(label))
        right.set_title("Is the explanation right, choice by choice?")
        curve = calibration[label]
        draw_calibration(right, curve[(curve["method"] == method) & (curve["layer"] == POOLED)], panel.styles[label])
        _say_errors(right, rows[rows["layer"] == POOLED].iloc[0])
    add_words(
        figure,
        explained_finding(explained),
        panel.caption,
        panel.floor_words("the flip rate", explained, share),
        _method_note(explained),
        _NOTE,
        f"No flip forecast, not drawn: {', '.join(sorted(silent))}." if silent else "",
    )
    return figure


def explained_finding(explained: Mapping[str, pd.DataFrame]) -> str:
    """The title: how many choices flip, and how many the pair's noise explains."""
    parts = []
    for label, frame in explained.items():
        row = _best_pooled(frame)
        parts.append(
            f"{figure_text(label)}: {percent(row['observed'])} of choices flip, near ties under the pair's own noise "
            f"explain {percent(row['explained'])}"
        )
    return "\n".join(parts) or "No run"


def _best_pooled(frame: pd.DataFrame) -> pd.Series[Any]:
    return frame[(frame["method"] == best_method(frame)) & (frame["layer"] == POOLED)].iloc[0]


def _method_note(explained: Mapping[str, pd.DataFrame]) -> str:
    """What was explained from, how much, and what that leaves out."""
    if not explained:
        return ""
    rows = [_best_pooled(frame) for frame in explained.values()]
    methods = sorted({METHOD_WORDS.get(str(row["method"]), str(row["method"])) for row in rows})
    notes = sorted({str(row["note"]) for row in rows} - {""})
    choices = max(int(frame["n_choices"].max()) for frame in explained.values())
    parts = [f"Explained from {' or '.join(methods)}, up to {count(choices, 'choice')}", *notes]
    return f"{'; '.join(parts)}."


def draw_rates(ax: Axes, rows: pd.DataFrame, style: RunStyle) -> None:
    """Observed rates with their bars and the explained ones, by layer."""
    ax.plot(rows["layer"], rows["explained"], color=INK, linewidth=1.2, marker="o" if len(rows) <= 16 else "",
            markersize=4, markerfacecolor="white", label="explained")  # fmt: skip
    ax.errorbar(rows["layer"], rows["observed"], _bars(rows, "observed"), fmt=style.marker, color=style.colour,
                markersize=4.5, elinewidth=1.2, label="observed")  # fmt: skip


def _bars(rows: pd.DataFrame, name: str) -> npt.NDArray[np.float64]:
    """Lengths of an interval around its value, never negative: errorbar refuses those."""
    low, high = rows[name] - rows[f"{name}_ci_low"], rows[f"{name}_ci_high"] - rows[name]
    return np.vstack([low.clip(lower=0), high.clip(lower=0)]).astype(np.float64)


def draw_forecasts(ax: Axes, forecasts: pd.DataFrame | None) -> set[str]:
    """One dashed line per source of noise; returns the sources that flip nothing, which are not drawn."""
    silent: set[str] = set()
    rows = pd.DataFrame() if forecasts is None else forecasts[forecasts["layer"] != POOLED]
    nth = 0
    for source, of_source in rows.groupby("noise_from", sort=False) if len(rows) else ():
        if not (of_source["forecast"] > 0).any():
            silent.add(figure_text(source_words(source)))
            continue
        ax.plot(of_source["layer"], of_source["forecast"], color=_COLOURS[nth % len(_COLOURS)],
                linestyle=DENSE_LINES[nth % len(DENSE_LINES)], linewidth=1.2, markersize=3.5,
                marker=MARKERS[1 + nth % (len(MARKERS) - 1)],
                label=f"forecast: if it had the {figure_text(source_words(source))}")  # fmt: skip
        nth += 1
    return silent


def _dress_rates(ax: Axes, rows: pd.DataFrame, floor: float | None) -> None:
    deepest = int(rows["layer"].max())
    ax.set_xticks(layer_ticks(deepest, 8))
    # Right of the deepest layer there is room for the word "floor", which would hide its points.
    ax.set_xlim(-0.4 - 0.02 * deepest, deepest + 0.4 + 0.12 * (deepest + 1))
    ax.set_xlabel("MoE layer")
    ax.set_ylabel("share of choices that flip")
    top = 1.08 * ax.dataLim.y1 or 1.0
    ax.set_ylim(-0.04 * top, top)  # a layer without a flip shows its whole point
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    draw_floor(ax, floor)
    handles, names = ax.get_legend_handles_labels()
    # What was seen stands first; matplotlib lists points with bars last.
    order = sorted(range(len(names)), key=lambda i: names[i] != "observed")
    legend_below(ax, [handles[i] for i in order], [names[i] for i in order], columns=1)


def draw_calibration(ax: Axes, curve: pd.DataFrame, style: RunStyle) -> None:
    """Observed over predicted share by bin of the prediction, on log axes; a bin without a flip hangs at the bottom."""
    ax.plot([LEAST, 1], [LEAST, 1], color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), label="a perfect explanation")
    held = curve[(curve["predicted"] >= LEAST) & (curve["n_choices"] >= MIN_CHOICES)]
    flipped, none = held[held["observed"] > 0], held[held["observed"] == 0]
    ax.errorbar(flipped["predicted"], flipped["observed"], _bars(flipped, "observed"), fmt=f"-{style.marker}",
                color=style.colour, markersize=4.5, linewidth=1.2, elinewidth=1.2, label="all layers")  # fmt: skip
    if len(none):
        ax.plot(none["predicted"], np.full(len(none), 1.3 * LEAST), "v", color=style.colour, markersize=4.5,
                markerfacecolor="white", label="bin without a flip")  # fmt: skip
    for which in ("x", "y"):
        log_axis(ax, which, LEAST / 1.6, 1.6)
    ax.set_xlabel("P(flip) given one side's scores, by bin")
    ax.set_ylabel("share that flipped")
    n_below = int(curve.loc[curve["predicted"] < LEAST, "n_choices"].sum())
    n_flipped = float((curve["observed"] * curve["n_choices"])[curve["predicted"] < LEAST].sum())
    words = f"below {power(LEAST)}: {count(n_below, 'choice')}, {round(n_flipped):,} flipped" if n_below else ""
    legend_below(ax, *ax.get_legend_handles_labels(), columns=1, title=words or None, title_fontsize=8)


def _say_errors(ax: Axes, row: pd.Series[Any]) -> None:
    """The size of the misfit beside what chance alone would show."""
    words = (
        f"mean error {percent(row['calibration_error'])}\n"
        f"(chance alone: {percent(row['calibration_error_expected'])})\n"
        f"slope {row['calibration_slope']:.2f} (1 is perfect)"
    )
    ax.text(0.03, 0.97, words, transform=ax.transAxes, ha="left", va="top", fontsize=8)
