"""Flips as maps: by layer and position, and by layer and margin.

Invariant: a cell's rate is the frame's; cells on fewer than twenty choices are hatched, cells without any white.
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
from matplotlib.ticker import MaxNLocator

from moediag.analysis.margins import MIN_CHOICES
from moediag.figures.floors import share
from moediag.figures.heat import draw_cells, hatch_thin, layer_axis, rate_bar, rate_norm
from moediag.figures.margins import NO_MARGINS, SPACE_LABEL, Space, bin_edges, no_margins, tie_place
from moediag.figures.registry import NO_FLIP, Frames, Panel, figure
from moediag.figures.style import (
    INK,
    add_words,
    figure_text,
    panel_grid,
)
from moediag.figures.ticks import tick_decades
from moediag.notation import POOLED
from moediag.numbers import count, percent, sig, times

FloatArray = npt.NDArray[np.float64]

_TOO_FEW: Final = f"no cell of the map holds {MIN_CHOICES} choices"
_THIN: Final = f"Hatched: fewer than {MIN_CHOICES} choices, no rate. White: none."


def _no_flip_in_map(frames: Frames) -> str:
    rows = frames["flips_by_layer_position"]
    if not rows["n_flipped"].sum():
        return f"{NO_FLIP} in {count(rows['n_choices'].sum(), 'choice')}"
    return "" if (rows["n_choices"] >= MIN_CHOICES).any() else _TOO_FEW


@figure(
    "flip_map", "flips_by_layer_position",
    title="Flip rate by layer and position",
    caption="Share of expert sets that differ, per MoE layer and bin of positions in the response.",
    section="depth",
    floor_of="flip_rate",
    is_routing=True,
    absent=_no_flip_in_map,
)  # fmt: skip
def plot_flip_map(
    frames: Mapping[str, pd.DataFrame],
    *,
    panel: Panel,
) -> Figure:
    """Draw the flip rate over layer and position in the response.

    Args:
        frames: label -> ``flips_by_layer_position`` frame.
        panel: floor of the flip rate over all layers [1]; marked on the colour bar.
    """
    figure, panels = panel_grid(len(frames), panel.width, 3.2)
    for ax, (label, frame) in zip(panels, frames.items(), strict=False):
        ax.set_title(f"{figure_text(label)}: {count(frame['n_choices'].sum(), 'choice')}")
        mesh = _draw_positions(ax, frame)
        rate_bar(mesh, ax, "flip rate", panel.floor_value(label))
    floored = panel.floor_words("the flip rate", frames, share)
    add_words(figure, map_finding(frames), panel.caption, floored, _thin_note(frames))
    return figure


def map_finding(frames: Mapping[str, pd.DataFrame]) -> str:
    """The title: the layers that flip least and most, and the first against the last well-filled positions."""
    parts = []
    for label, frame in frames.items():
        layers = _rates(frame, "layer")
        rate, choices = _rates(frame, "position_low"), frame.groupby("position_low")["n_choices"].sum()
        full = rate[choices >= 0.2 * choices.max()]
        least, most = layers.idxmin(), layers.idxmax()
        words = f"layer {most} flips most, {percent(layers.max())}, layer {least} least, {percent(layers.min())}"
        if least == most:
            words = f"flip rate {percent(layers.max())}"
        if len(full) > 1 and full.iloc[0] > 0:
            words += f"; the last positions flip {times(full.iloc[-1], full.iloc[0])} as often as the first"
        parts.append(f"{figure_text(label)}: {words}")
    return "\n".join(parts) or "No run"


def _rates(frame: pd.DataFrame, key: str) -> pd.Series[float]:
    """Flips over choices of all cells of a row or column of the map."""
    sums = frame.groupby(key)[["n_flipped", "n_choices"]].sum()
    rates: pd.Series[float] = sums["n_flipped"] / sums["n_choices"]
    return rates


def _draw_positions(ax: Axes, frame: pd.DataFrame) -> object:
    layers = range(int(frame["layer"].max()) + 1)
    lows = np.sort(frame["position_low"].unique())
    rates, n = (_table(frame, layers, lows, column) for column in ("flip_rate", "n_choices"))
    rates = np.where(n < MIN_CHOICES, np.nan, rates)
    x_edges = np.append(lows, frame["position_high"].max() + 1).astype(np.float64)
    y_edges = layer_axis(ax, layers)
    mesh = draw_cells(ax, x_edges, y_edges, rates, rate_norm(rates))
    hatch_thin(ax, x_edges, y_edges, n < MIN_CHOICES)
    ax.set_xlabel("position in the response [token]")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return mesh


def _table(frame: pd.DataFrame, layers: range, lows: npt.NDArray[np.int64], column: str) -> FloatArray:
    """Layer x position of one column, NaN where the frame has no row."""
    table = frame.pivot(index="layer", columns="position_low", values=column).reindex(index=layers, columns=lows)
    return table.to_numpy(np.float64)


def _thin_note(frames: Mapping[str, pd.DataFrame]) -> str:
    return _THIN if any((frame["n_choices"] < MIN_CHOICES).any() for frame in frames.values()) else ""


def _no_margins_by_layer(frames: Frames) -> str:
    rows = frames["margin_curve"]
    if reason := no_margins(frames):
        return reason
    if not ((rows["layer"] >= 0) & (rows["bin_high"] > 0) & (rows["n_choices"] >= MIN_CHOICES)).any():
        return _TOO_FEW
    return "" if rows["n_flipped"].sum() else f"{NO_FLIP} in {count(_pooled_choices(rows), 'choice')}"


def _pooled_choices(rows: pd.DataFrame) -> int:
    first = next(iter(rows["space"]))
    return int(rows.loc[(rows["layer"] == POOLED) & (rows["space"] == first), "n_choices"].sum())


@figure(
    "margins_by_layer", "margin_curve", "margin_noise",
    title="Margins and flips layer by layer",
    caption="Left: where the margins of a layer lie. Right: P(flip | margin) of each layer; the mark is its noise "
    "sigma.",
    section="margins",
    floor_of="flip_rate",
    is_routing=True,
    not_captured=NO_MARGINS,
    absent=_no_margins_by_layer,
)  # fmt: skip
def plot_margins_by_layer(
    curves: Mapping[str, pd.DataFrame],
    noise: Mapping[str, pd.DataFrame] | None = None,
    *,
    space: Space = "choice",
    panel: Panel,
) -> Figure:
    """Draw, layer by layer, where margins lie and how often a choice flips at each; one row per run.

    Args:
        curves: label -> ``margin_curve`` frame.
        noise: label -> ``margin_noise`` frame; sigma is marked on the map of flips.
        space: ``choice`` (the score TopK compares) or ``logit`` (raw router logits).
        panel: floor of the flip rate over all layers [1]; said in the caption.
    """
    sigmas = {label: _sigmas((noise or {}).get(label), space) for label in curves}
    figure, panels = panel_grid(2 * len(curves), panel.width, 3.2)
    for nth, (label, frame) in enumerate(curves.items()):
        rows = frame[(frame["space"] == space) & (frame["layer"] >= 0)]
        left, right = panels[2 * nth], panels[2 * nth + 1]
        left.set_title(f"{figure_text(label, 24)}: where margins lie")
        right.set_title("How often a choice flips")
        _draw_margin_maps(left, right, rows, sigmas[label], space)
    floored = panel.floor_words("the flip rate", curves, share)
    note = f"{_THIN} First column: exact ties."
    if any(len(rows) for rows in sigmas.values()):
        note += " Marks: sigma, the noise of the score difference that would make as many flips."
    add_words(figure, noise_finding(curves, sigmas), panel.caption, floored, note)
    return figure


def noise_finding(curves: Mapping[str, pd.DataFrame], sigmas: Mapping[str, pd.DataFrame]) -> str:
    """The title: the implied noise of the first and of the last layer, per run."""
    parts = []
    for label in curves:
        rows, name = sigmas[label], figure_text(label)
        if rows.empty:
            parts.append(f"{name}: margins of the layers, no noise scale")
            continue
        first, last = rows.iloc[0], rows.iloc[-1]
        words = f"router noise sigma {sig(first['sigma'], 2)} at layer {first['layer']:.0f}"
        if len(rows) > 1:
            ratio = times(last["sigma"], first["sigma"])
            words += f", {sig(last['sigma'], 2)} at layer {last['layer']:.0f} ({ratio})"
        parts.append(f"{name}: {words}")
    return "\n".join(parts) or "No run"


def _sigmas(noise: pd.DataFrame | None, space: str) -> pd.DataFrame:
    if noise is None:
        return pd.DataFrame({"layer": [], "sigma": []})
    rows: pd.DataFrame = noise[(noise["space"] == space) & (noise["layer"] >= 0) & noise["sigma"].notna()]
    return rows.sort_values("layer")


def _draw_margin_maps(left: Axes, right: Axes, rows: pd.DataFrame, sigmas: pd.DataFrame, space: str) -> None:
    layers = range(int(rows["layer"].max()) + 1)
    bins = _all_bins(rows)
    edges = bin_edges(bins)
    tie = tie_place(edges)
    x_edges = np.concatenate([[tie / 10**0.2, tie * 10**0.2], edges])
    n, rate = (_margin_table(rows, layers, bins, column) for column in ("n_choices", "flip_rate"))
    rate = np.where(n < MIN_CHOICES, np.nan, rate)  # one choice that flipped would be the darkest cell of the map
    shares = n / np.nansum(n, axis=1, keepdims=True)
    for ax, values, words in ((left, shares, "share of the layer's choices"), (right, rate, "P(flip | margin)")):
        y_edges = layer_axis(ax, layers)
        mesh = draw_cells(ax, x_edges, y_edges, values, rate_norm(values))
        _dress_margins(ax, edges, space, str(next(iter(rows["side"]))))
        rate_bar(mesh, ax, words)
    hatch_thin(right, x_edges, y_edges, n < MIN_CHOICES)
    size = 2.5 if len(sigmas) > 16 else 4.5
    right.plot(sigmas["sigma"], sigmas["layer"], "D", color="white", markeredgecolor=INK, markersize=size,
               clip_on=False)  # fmt: skip


def _all_bins(rows: pd.DataFrame) -> pd.DataFrame:
    """Every bin above 0 that some layer has, with the gaps closed by empty bins: edges must join."""
    found = rows[(rows["bin_high"] > 0) & (rows["n_choices"] > 0)][["bin_low", "bin_high"]].drop_duplicates()
    found = found.sort_values("bin_low", ignore_index=True)
    low, high = found["bin_low"].to_numpy(), found["bin_high"].to_numpy()
    gap = high[:-1] < low[1:] * (1 - 1e-9)
    filled = pd.concat([found, pd.DataFrame({"bin_low": high[:-1][gap], "bin_high": low[1:][gap]})])
    return filled.sort_values("bin_low", ignore_index=True)


def _margin_table(rows: pd.DataFrame, layers: range, bins: pd.DataFrame, column: str) -> FloatArray:
    """Layer x (ties, nothing, bins) of one column; NaN without a choice."""
    held = rows[rows["n_choices"] > 0]
    table = held.pivot(index="layer", columns=["bin_low", "bin_high"], values=column).reindex(index=layers)
    empty = np.full(len(layers), np.nan)
    keys = [(0.0, 0.0), None, *zip(bins["bin_low"], bins["bin_high"], strict=True)]
    return np.column_stack([table[key].to_numpy(np.float64) if key in table.columns else empty for key in keys])


def _dress_margins(ax: Axes, edges: FloatArray, space: str, side: str) -> None:
    ax.set_xscale("log")
    tie = tie_place(edges)
    ax.set_xlim(tie / 10**0.2, float(edges[-1]))
    tick_decades(ax.xaxis, float(edges[0]), float(edges[-1]), most=5)
    decades = ax.xaxis.get_major_locator()()
    label = ax.xaxis.get_major_formatter()
    ax.set_xticks([tie, *decades], ["tie", *(label(value) for value in decades)])
    ax.set_xlabel(SPACE_LABEL[space].format(side=side))
    if not math.isclose(tie * 10**0.2, edges[0]):
        ax.axvline(float(edges[0]), color=INK, linewidth=0.4)
