"""Figure-1-style: how far apart the two engines' log-probabilities are, body and tail, dense against MoE.

Left, one row per run: a histogram of abs(logp_diff) on a log axis with the mean and the p99 marked and
every token beyond the p99 as a tick; right: the share of tokens beyond a threshold. Means and quantiles
are read from the metrics frame and never computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from moediag.analysis.tokens import Tokens
from moediag.figures.floors import FloorArgument, floor_value
from moediag.figures.registry import Panel, figure, token_counts
from moediag.figures.style import (
    GREY,
    INK,
    RunStyle,
    add_words,
    caption_text,
    figure_text,
    figure_width,
    first_of_each_kind,
    is_column,
    legend_below,
    new_figure,
    state,
)
from moediag.figures.ticks import log_axis, power
from moediag.numbers import percent, sig, times

FLOAT_EDGE: Final = 1e-6
"""Differences below this [nat] share one bar with the exact zeros: float32 log-probs resolve no finer."""

_BINS_PER_DECADE: Final = 6
_ZERO_BAR: Final = (FLOAT_EDGE * 10**-0.75, FLOAT_EDGE * 10**-0.25)
_ROW: Final = 1.0
_BODY: Final = 0.58  # a histogram's height in its row; the rest holds labels and the tail's ticks

_READING: Final = (
    "Hatched bar at 0: differences below 1e-6 nat, zeros included. Ticks under a row: tokens beyond its p99."
)
FIGURE1_NOTE: Final = "Figure-1-style: the axes of the original (IcePop, Fig. 1) could not be verified."


def abs_logp_diff(tokens: pd.DataFrame) -> npt.NDArray[np.float64]:
    """abs(logp_train - logp_infer) [nat] of the tokens both arms scored."""
    return Tokens(tokens).abs_diff_T


@figure(
    "figure1", "tokens", "tail_curve", "logp_metrics",
    title="How far apart the log-probabilities are: body and tail",
    caption="Left: tokens by size of abs(logp_train − logp_infer), differences of 0 apart. Right: share of tokens "
    "beyond.",
    floor_of="abs_logp_diff.mean",
)  # fmt: skip
def plot_figure1(
    tokens: Mapping[str, pd.DataFrame],
    tail_curves: Mapping[str, pd.DataFrame],
    metrics: Mapping[str, pd.DataFrame],
    *,
    panel: Panel,
) -> Figure:
    """Draw abs(logp_diff) of one or several runs: the body per run on the left, the tails on the right.

    Args:
        tokens: label -> ``tokens`` frame.
        tail_curves: label -> ``tail_curve`` frame.
        metrics: label -> ``logp_metrics`` frame; mean, p99 and max are read from it.
        panel: floor of the mean abs(logp_diff) [nat].
    """
    rows = max(len(tokens), 1)
    if is_column(panel.width):
        figure = new_figure(panel.width, 4.0 + 0.8 * rows)
        body, tail = figure.subplots(2, 1, height_ratios=(1 + 0.8 * rows, 2.6))
    else:
        figure = new_figure(panel.width, 2.3 + 0.7 * rows)
        body, tail = figure.subplots(1, 2, width_ratios=(1.2, 1))
    draw_body(body, tokens, metrics, panel.styles, panel.floor)
    draw_tail(tail, tail_curves, panel.styles)
    note = panel.caption or caption_text(token_counts(tokens))
    floored = panel.floor_words("the mean", tokens)
    if any((panel.floor_value(label) or 0) >= FLOAT_EDGE for label in tokens):
        floored += " It is the black line of long dashes."
    add_words(figure, figure1_finding(metrics, panel.styles), note, floored, _READING, FIGURE1_NOTE)
    return figure


def metric(frame: pd.DataFrame | None, name: str) -> float:
    """A value of a ``logp_metrics`` frame; NaN when it is not there."""
    if frame is None:
        return math.nan
    values = frame.loc[frame["metric"] == name, "value"]
    return float(values.iloc[0]) if len(values) else math.nan


def figure1_finding(metrics: Mapping[str, pd.DataFrame], styles: Mapping[str, RunStyle]) -> str:
    """The title: each run's mean and p99 in words, MoE runs against the first dense run."""
    _, dense = first_of_each_kind({label: styles[label].is_moe for label in metrics})
    parts = []
    for label, frame in metrics.items():
        mean, p99 = metric(frame, "abs_logp_diff.mean"), metric(frame, "abs_logp_diff.p99")
        text = f"{figure_text(label)}: mean {sig(mean)} nat, p99 {sig(p99)} nat"
        if math.isnan(mean):
            text = f"{figure_text(label)}: no token scored by both arms"
        elif mean == 0:
            text = f"{figure_text(label)}: no difference, bit for bit"
        elif dense is not None and styles[label].is_moe and metric(metrics[dense], "abs_logp_diff.mean") > 0:
            base = metrics[dense]
            by_mean, by_p99 = (times(a, metric(base, f"abs_logp_diff.{k}")) for a, k in ((mean, "mean"), (p99, "p99")))
            text = f"{figure_text(label)}: mean {sig(mean)} nat, {by_mean} {figure_text(dense)}; p99 {by_p99}"
        if label != dense or len(metrics) == 1:
            parts.append(text)
    return "\n".join(parts) or "No run"


def draw_body(
    ax: Axes,
    tokens: Mapping[str, pd.DataFrame],
    metrics: Mapping[str, pd.DataFrame],
    styles: Mapping[str, RunStyle],
    floor: FloorArgument = None,
) -> None:
    """One histogram row per run on a shared log axis; differences of 0 stand apart on the left."""
    values = {label: abs_logp_diff(frame) for label, frame in tokens.items()}
    ax.set_title("Body: tokens by difference")
    if not any(len(v) for v in values.values()):
        state(ax, "No token was scored by both arms.")
        return
    top = max((float(v.max()) for v in values.values() if len(v)), default=0.0)
    edges = _log_edges(max(top, 1e-2))
    shares = {k: np.histogram(v, edges)[0] / max(len(v), 1) for k, v in values.items()}
    highest = max(float(share.max()) for share in shares.values())
    near_zero = max((float(np.mean(v < FLOAT_EDGE)) for v in values.values() if len(v)), default=0.0)
    # Many zeros (confident tokens) would flatten every other bar: past twice the highest, theirs is cut.
    scale = _BODY / (max(highest, min(near_zero, 2 * highest)) or near_zero)
    for row, label in enumerate(reversed(list(values))):
        base = row * _ROW
        ax.stairs(shares[label] * scale + base, edges, baseline=base, fill=True, color=styles[label].colour, alpha=0.55)
        _draw_zero_bar(ax, values[label], base, scale, styles[label].colour)
        _mark_row(ax, values[label], metrics.get(label), base, styles[label].colour)
        _mark_floor(ax, floor_value(floor, label), base)
    _dress_body(ax, list(reversed(list(values))), float(edges[-1]))


def _log_edges(top: float) -> npt.NDArray[np.float64]:
    first = math.log10(FLOAT_EDGE)
    n_bins = math.ceil((math.log10(top) - first) * _BINS_PER_DECADE + 1e-9)
    edges: npt.NDArray[np.float64] = 10 ** (first + np.arange(n_bins + 1) / _BINS_PER_DECADE)
    # The largest difference belongs into the last bin, whatever the rounding of the power.
    edges[-1] = max(edges[-1], top)
    return edges


def _draw_zero_bar(ax: Axes, values: npt.NDArray[np.float64], base: float, scale: float, colour: str) -> None:
    share = float(np.mean(values < FLOAT_EDGE)) if len(values) else 0.0
    height = min(share * scale, _BODY)
    low, high = _ZERO_BAR
    ax.bar(low, height, high - low, base, align="edge", color=colour, alpha=0.35, hatch="///", edgecolor=colour)
    cut = " (bar cut)" if share * scale > _BODY * 1.001 else ""
    ax.text(low, base + height + 0.03, f"{percent(share)} at 0{cut}", ha="left", va="bottom", fontsize=8, color=INK)


def _mark_row(ax: Axes, values: npt.NDArray[np.float64], frame: pd.DataFrame | None, base: float, colour: str) -> None:
    mean, p99 = metric(frame, "abs_logp_diff.mean"), metric(frame, "abs_logp_diff.p99")
    if not len(values) or not max(mean, p99) >= FLOAT_EDGE:
        return
    marks = ((mean, f"mean {sig(mean)} ", "right", "-"), (p99, f" p99 {sig(p99)}", "left", (0, (2, 1))))
    for value, words, side, line in marks:
        if value >= FLOAT_EDGE:
            ax.plot([value, value], [base, base + _BODY + 0.25], color=colour, linestyle=line, linewidth=1.5)
            ax.text(value, base + _BODY + 0.15, words, ha=side, va="bottom", fontsize=8, color=INK)
    beyond = values[values > max(p99, FLOAT_EDGE)]
    ax.plot(beyond, np.full(len(beyond), base - 0.06), "|", color=colour, markersize=6, markeredgewidth=0.6, alpha=0.6)


def _mark_floor(ax: Axes, value: float | None, base: float) -> None:
    if value is not None and value >= FLOAT_EDGE:
        ax.plot([value, value], [base, base + _BODY], color=INK, linestyle=(0, (6, 2)), linewidth=1.0)


def _dress_body(ax: Axes, labels: list[str], top: float) -> None:
    ax.set_xscale("log")
    ax.set_xlim(_ZERO_BAR[0] * 0.8, top * 4)
    decades = [10.0**k for k in range(math.floor(math.log10(FLOAT_EDGE)), math.floor(math.log10(top)) + 1)]
    zero = math.sqrt(_ZERO_BAR[0] * _ZERO_BAR[1])
    narrow = is_column(figure_width(ax))
    ax.xaxis.set_major_locator(FixedLocator([zero, *decades[1::2]]))
    ax.xaxis.set_minor_locator(FixedLocator([d * k for d in decades for k in range(2, 10)]))
    ax.xaxis.set_major_formatter(lambda x, _: "0" if x < FLOAT_EDGE / 1.01 else power(x))
    ax.set_ylim(-0.14, (len(labels) - 1) * _ROW + 0.88)
    names = [figure_text(label, 10 if narrow else 14) for label in labels]
    middles = [row * _ROW + _BODY / 2 for row in range(len(labels))]
    ax.set_yticks(middles, names, rotation=90 if narrow else 0, va="center")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    for row in range(len(labels)):
        ax.axhline(row * _ROW, color=GREY, linewidth=0.6)
    ax.set_xlabel("abs(logp_train − logp_infer) [nat]")
    ax.set_ylabel("share per bin, one scale")


def draw_tail(ax: Axes, curves: Mapping[str, pd.DataFrame], styles: Mapping[str, RunStyle]) -> None:
    """The share of tokens with a larger difference, log-log, down to the resolution limit 1/n."""
    ax.set_title("Tail: tokens beyond")
    ax.set_xlabel("x: the same difference [nat]")
    ax.set_ylabel("share of tokens beyond x")
    shown = {k: f for k, f in curves.items() if (f["n_above"] > 0).any()}
    if not shown:
        scored = any((frame["n_tokens"] > 0).any() for frame in curves.values())
        state(ax, "No token differs: every tail is empty." if scored else "No token was scored by both arms.")
        return
    for label, frame in shown.items():
        line = frame[(frame["n_above"] > 0) & (frame["threshold"] > 0)]
        style = styles[label]
        name = f"{figure_text(label, 18)} (n = {frame['n_tokens'].max():,})"
        ax.plot(line["threshold"], line["share_above"], color=style.colour, linestyle=style.line, label=name)
    _draw_resolution(ax, shown, styles)
    _dress_tail(ax, shown)


def _draw_resolution(ax: Axes, curves: Mapping[str, pd.DataFrame], styles: Mapping[str, RunStyle]) -> None:
    """Below 1/n a curve cannot be: where it stops, the data stops, not the tail."""
    for label, frame in curves.items():
        n = int(frame["n_tokens"].max())
        ax.axhline(1 / n, color=styles[label].colour, linestyle=(0, (1, 2)), linewidth=1.0)
    ax.plot([], [], color=GREY, linestyle=(0, (1, 2)), linewidth=1.0, label="1/n: one token")


def _dress_tail(ax: Axes, curves: Mapping[str, pd.DataFrame]) -> None:
    last = max(float(f.loc[f["n_above"] > 0, "threshold"].max()) for f in curves.values())
    first = min(float(f.loc[f["threshold"] > 0, "threshold"].min()) for f in curves.values())
    lowest = min(0.1, *(1 / int(f["n_tokens"].max()) for f in curves.values()))
    log_axis(ax, "x", max(first, 1e-4), max(last * 1.5, 2.2))
    log_axis(ax, "y", lowest * 0.6, 1.5)
    for ratio in (2, 5):
        ax.axvline(math.log(ratio), color=GREY, linewidth=0.8)
        ax.text(
            math.log(ratio) * 0.96, 1.3, f"ratio {ratio}", rotation=90, ha="right", va="top", fontsize=8, color=GREY
        )
    legend_below(ax, *ax.get_legend_handles_labels(), columns=1)
