"""Margins: how close the router's call was, for choices that flipped and for choices that did not.

One row of panels per MoE run. Left: the infer arm's margin of flipped and of kept choices, each group
normalised by itself. Right: P(flip | margin), pooled with intervals, thin lines for single layers. Exact
ties (margin 0) have no place on a log axis and stand apart, on the left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moediag.analysis.margins import MIN_CHOICES
from moediag.figures.floors import share
from moediag.figures.registry import Frames, Panel, figure
from moediag.figures.style import (
    GREY,
    INK,
    LIGHT,
    RunStyle,
    add_words,
    figure_text,
    legend_below,
    panel_grid,
    state,
)
from moediag.figures.ticks import tick_decades
from moediag.numbers import count, percent, sig

Space = Literal["choice", "logit"]

SPACE_LABEL: Final[dict[str, str]] = {
    "choice": "margin of the {side} arm [choice score]",
    "logit": "margin of the {side} arm [raw router logits]",
}

NO_MARGINS: Final = "no margins were captured (expert ids only)"


def no_margins(frames: Frames) -> str:
    """Why no margin can be drawn; empty where one can."""
    return "" if frames["margin_curve"]["n_choices"].sum() > 0 else NO_MARGINS


@figure(
    "margins", "margin_curve",
    title="Margins of flipped and of kept choices, and how often a choice flips",
    caption="Left: margins of the choices that flipped and that did not. Right: P(flip | margin).",
    section="margins",
    floor_of="flip_rate",
    is_routing=True,
    not_captured=NO_MARGINS,
    absent=no_margins,
)  # fmt: skip
def plot_margins(
    frames: Mapping[str, pd.DataFrame],
    *,
    space: Space = "choice",
    panel: Panel,
) -> Figure:
    """Draw the margins of flipped and kept choices, and P(flip | margin), one row per MoE run.

    Args:
        frames: label -> ``margin_curve`` frame; runs without choices (dense) are left out.
        space: ``choice`` (the score TopK compares) or ``logit`` (raw router logits).
        panel: floor of the flip rate over all layers [1]; said in the caption.
    """
    curves = {label: frame[frame["space"] == space].sort_values("bin_low") for label, frame in frames.items()}
    curves = {label: frame for label, frame in curves.items() if frame["n_choices"].sum() > 0}
    figure, panels = panel_grid(2 * max(len(curves), 1), panel.width, 3.5)
    rows = [(panels[i], panels[i + 1]) for i in range(0, len(panels), 2)]
    for (left, right), (label, frame) in zip(rows, curves.items(), strict=False):
        draw_margin_groups(left, _pooled(frame), label, panel.styles[label])
        draw_flip_curve(right, frame, panel.styles[label])
        for ax in (left, right):
            _dress(ax, _pooled(frame), space)
    if not curves:
        for ax in rows[0]:
            state(ax, "No routed choice in this score space: nothing to draw.")
    banded = any(frame["flip_rate_ci_low"].notna().any() for frame in curves.values())
    note = f"Thin lines: single layers, bins of at least {MIN_CHOICES} choices. "
    note += "Bars: 95 %, clustered by prompt." if banded else "No interval could be given."
    floored = panel.floor_words("the flip rate", curves, share)
    add_words(figure, margin_finding(curves), panel.caption, floored, note if curves else "")
    return figure


def _pooled(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["layer"] == -1]


def _ties(frame: pd.DataFrame) -> pd.Series[bool]:
    return (frame["bin_low"] == 0) & (frame["bin_high"] == 0)


def margin_finding(curves: Mapping[str, pd.DataFrame]) -> str:
    """The title: P(flip) in the closest margin bin with choices against the widest, per run."""
    parts = []
    for label, curve in curves.items():
        pooled = _pooled(curve)
        bins = _wide_bins(_bins(pooled))
        if pooled["n_flipped"].sum() == 0:
            parts.append(f"{figure_text(label)}: none of {count(pooled['n_choices'].sum(), 'choice')} flipped")
        elif len(bins):
            first, last = bins.iloc[0], bins.iloc[-1]
            parts.append(
                f"{figure_text(label)}: P(flip) is {percent(first['flip_rate'])} at margins below "
                f"{sig(first['bin_high'], 2)}, {percent(last['flip_rate'])} at {sig(last['bin_low'], 2)} and more"
            )
        else:
            parts.append(f"{figure_text(label)}: {count(pooled['n_choices'].sum(), 'choice')}, too few for a rate")
    return "\n".join(parts) or "No routing to compare"


def _bins(pooled: pd.DataFrame) -> pd.DataFrame:
    """The bins to draw: margins above 0, no empty ends, and an empty bin in every gap (edges must join)."""
    rows: pd.DataFrame = pooled[pooled["bin_high"] > 0]
    held = rows["n_choices"].to_numpy() > 0
    rows = rows[np.logical_or.accumulate(held) & np.logical_or.accumulate(held[::-1])[::-1]]
    gap = rows["bin_high"].to_numpy()[:-1] < rows["bin_low"].to_numpy()[1:]
    if not gap.any():
        return rows
    empty = pd.DataFrame({"bin_low": rows["bin_high"].to_numpy()[:-1][gap]})
    empty["bin_high"] = rows["bin_low"].to_numpy()[1:][gap]
    empty[["n_choices", "n_flipped"]] = 0
    return pd.concat([rows, empty]).sort_values("bin_low", ignore_index=True)


def _wide_bins(bins: pd.DataFrame) -> pd.DataFrame:
    """The first and the last bin, each widened inwards until it holds enough choices for a rate."""
    ends = []
    for rows in (bins, bins[::-1]):
        enough = rows[: int((rows["n_choices"].cumsum() < MIN_CHOICES).sum()) + 1]
        n = enough["n_choices"].sum()
        if n < MIN_CHOICES:
            return bins[:0]
        rate = enough["n_flipped"].sum() / n
        ends.append({"bin_low": enough["bin_low"].min(), "bin_high": enough["bin_high"].max(), "flip_rate": rate})
    return pd.DataFrame(ends)


def bin_edges(bins: pd.DataFrame) -> npt.NDArray[np.float64]:
    """Finite, positive edges to draw: an open bin is given the width (in decades) of its neighbour."""
    low, high = bins["bin_low"].to_numpy(np.float64), bins["bin_high"].to_numpy(np.float64)
    edges = np.append(low, high[-1])
    inner = edges[(edges > 0) & np.isfinite(edges)]
    inner = inner if len(inner) else np.array([1e-3])
    ratio = float(inner[1] / inner[0]) if len(inner) > 1 else 10.0
    edges[0] = edges[0] if edges[0] > 0 else inner[0] / ratio
    edges[-1] = edges[-1] if np.isfinite(edges[-1]) else inner[-1] * ratio
    return edges


def tie_place(edges: npt.NDArray[np.float64]) -> float:
    """Where exact ties are drawn: a third of a decade left of the first edge."""
    return float(edges[0]) / 10**0.4


def draw_margin_groups(ax: Axes, pooled: pd.DataFrame, label: str, style: RunStyle) -> None:
    """Histogram of margins, flipped (colour) and kept (grey), each group's shares adding up to 1."""
    bins, ties = _bins(pooled), pooled[_ties(pooled)]
    edges = bin_edges(bins) if len(bins) else np.array([1e-3, 1.0])
    kept_bins, kept_ties = (rows["n_choices"] - rows["n_flipped"] for rows in (bins, ties))
    groups = (
        ("kept", kept_bins, int(kept_ties.sum()), GREY, LIGHT),
        ("flipped", bins["n_flipped"], int(ties["n_flipped"].sum()), style.colour, style.colour),
    )
    tie_words = []
    for nth, (group, counts, tied, colour, fill) in enumerate(groups):
        n = int(counts.sum()) + tied
        if n and len(bins):
            alpha = 0.8 if group == "kept" else 0.35
            ax.stairs(counts / n, edges, fill=True, color=fill, alpha=alpha)
            ax.stairs(counts / n, edges, color=colour, linewidth=1.6, label=f"{group}: {count(n, 'choice')}")
        tie_words.append(f"{tied:,} {group}")
        if tied:
            place = tie_place(edges) * 10 ** (0.14 * (nth - 0.5))
            ax.bar(place, tied / n, place * 0.3, color=fill, alpha=0.5, edgecolor=colour, hatch="///")
    ax.set_title(f"{figure_text(label)}: margins")
    ax.set_ylabel("share of the group per bin [1]")
    ax.set_ylim(bottom=0)
    handles, names = ax.get_legend_handles_labels()
    if handles:
        negative = int(pooled.loc[pooled["bin_low"] < 0, "n_choices"].sum())
        below = f"\nbelow 0, not drawn: {count(negative, 'choice')}" if negative else ""
        title = f"exact ties: {', '.join(reversed(tie_words))}{below}"
        legend_below(ax, handles, names, columns=1, title=title, title_fontsize=8)


def draw_flip_curve(ax: Axes, curve: pd.DataFrame, style: RunStyle) -> None:
    """P(flip | margin bin): pooled points with intervals, thin lines by layer (dark = deep)."""
    pooled = _pooled(curve)
    bins, ties = _bins(pooled), pooled[_ties(pooled)]
    edges = bin_edges(bins) if len(bins) else np.array([1e-3, 1.0])
    centre = dict(zip(bins["bin_low"], np.sqrt(edges[:-1] * edges[1:]), strict=False))
    _draw_layers(ax, curve, centre)
    held = bins["n_choices"] >= MIN_CHOICES
    thin = ~held & (bins["n_choices"] > 0)
    places = bins["bin_low"].map(centre)
    # A line through bins of one or two choices would zigzag between 0 and 100 %: those are dots of their own.
    for place, rows, kind, name in (
        (places[held], bins[held], "-o", "all layers"),
        (places[thin], bins[thin], "o", f"fewer than {MIN_CHOICES} choices"),
        (tie_place(edges), ties, "D", "exact ties"),
    ):
        if rows["n_choices"].sum() > 0:
            _draw_pooled(ax, place, rows, kind, name, style.colour)
    ax.set_title("How often a choice flips")
    ax.set_ylabel("P(flip | margin bin)")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    top = max(0.02, 1.15 * float(pooled["flip_rate"].max())) if pooled["flip_rate"].notna().any() else 1.0
    ax.set_ylim(-0.035 * top, top)  # a bin without a flip shows its whole point
    legend_below(ax, *ax.get_legend_handles_labels())


def _draw_layers(ax: Axes, curve: pd.DataFrame, centre: dict[float, float]) -> None:
    """One thin line per layer, light to dark with depth."""
    enough = curve[(curve["bin_high"] > 0) & (curve["n_choices"] >= MIN_CHOICES) & (curve["layer"] >= 0)]
    layers = sorted(set(enough["layer"]))
    for layer in layers:
        rows = enough[enough["layer"] == layer]
        shade = colormaps["Greys"](0.35 + 0.5 * layer / max(layers[-1], 1))
        ax.plot(rows["bin_low"].map(centre), rows["flip_rate"], color=shade, linewidth=0.7)
    if layers:
        ax.plot([], [], color=GREY, linewidth=0.7, label=f"layers {layers[0]} to {layers[-1]} (dark = deep)")


def _draw_pooled(
    ax: Axes, place: pd.Series[float] | float, rows: pd.DataFrame, kind: str, label: str, colour: str
) -> None:
    rate = rows["flip_rate"].to_numpy(np.float64)
    # errorbar refuses negative lengths: an estimate that rounding puts just outside its bounds must not end the page.
    below = np.clip(rate - rows["flip_rate_ci_low"].to_numpy(np.float64), 0, None)
    above = np.clip(rows["flip_rate_ci_high"].to_numpy(np.float64) - rate, 0, None)
    x = np.broadcast_to(np.asarray(place, np.float64), rate.shape)
    face = "white" if kind == "o" else colour
    ax.errorbar(
        x, rate, np.vstack([below, above]), fmt=kind, color=colour, markersize=4, mfc=face, elinewidth=1.0, label=label
    )


def _dress(ax: Axes, pooled: pd.DataFrame, space: str) -> None:
    bins = _bins(pooled)
    ax.set_xscale("log")
    if len(bins):
        edges = bin_edges(bins)
        ax.set_xlim(tie_place(edges) / 10**0.3, float(edges[-1]) * 1.1)
        # Ticks within the bins only: left of them stand the exact ties, which have no place on the axis.
        tick_decades(ax.xaxis, float(edges[0]), float(edges[-1]))
    if (pooled.loc[_ties(pooled), "n_choices"] > 0).any() and len(bins):
        ax.axvline(float(edges[0]), color=INK, linewidth=0.6, linestyle=(0, (1, 2)))
        ax.text(tie_place(edges), 0.99, "ties", transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=8)
    side = next(iter(pooled["side"]), "infer")
    ax.set_xlabel(SPACE_LABEL[space].format(side=side))
