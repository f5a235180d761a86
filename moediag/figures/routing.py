"""Agreement by depth: how often both engines choose the same experts, layer by layer.

Left: each MoE layer on its own. Right: the share of tokens whose sets agree in *all* layers up to that
one, which is the number that falls with depth. Dense runs have no routing and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moediag.figures.floors import draw_floor, share
from moediag.figures.registry import Frames, Panel, figure
from moediag.figures.style import (
    RunStyle,
    add_words,
    figure_text,
    legend_below,
    panel_grid,
    state,
)
from moediag.figures.ticks import layer_ticks
from moediag.numbers import count, percent


def _no_layers(frames: Frames) -> str:
    return "" if frames["agreement_by_layer"]["same_set_rate"].notna().any() else "no routing row was compared"


@figure(
    "agreement_by_depth", "agreement_by_layer",
    title="Same experts by depth, per layer and cumulative",
    caption="Share of tokens whose expert set is the same in both arms: in each layer, and in all layers up to it.",
    section="depth",
    floor_of="flip_rate",
    is_routing=True,
    absent=_no_layers,
)  # fmt: skip
def plot_agreement_by_depth(
    frames: Mapping[str, pd.DataFrame],
    *,
    panel: Panel,
) -> Figure:
    """Draw per-layer and cumulative same-set rates over the MoE layers, with 95 % intervals.

    Args:
        frames: label -> ``agreement_by_layer`` frame; runs without rows (dense) are left out.
        panel: floor of the flip rate over all layers [1]; drawn as agreement, 1 - floor, for single layers.
    """
    routed = {label: frame for label, frame in frames.items() if frame["same_set_rate"].notna().any()}
    figure, panels = panel_grid(2, panel.width, 3.0)
    columns = (("same_set_rate", "Each layer on its own"), ("cumulative_same_set_rate", "All layers up to this one"))
    for ax, (column, title) in zip(panels, columns, strict=True):
        ax.set_title(title)
        draw_agreement(ax, routed, column, panel.styles)
    if len(routed) > 1:
        legend_below(panels[-1], *panels[-1].get_legend_handles_labels(), columns=1, down=0.55)
    for value in {panel.floor_value(label) for label in routed}:
        draw_floor(panels[0], None if value is None else 1 - value, beyond=1.0)
    floored = panel.floor_words("the flip rate", routed, share)
    add_words(figure, agreement_finding(routed), panel.caption, floored, _interval_note(routed))
    return figure


def agreement_finding(frames: Mapping[str, pd.DataFrame]) -> str:
    """The title: first and last layer and all layers together, per run."""
    parts = []
    for label, frame in frames.items():
        first, last = frame.iloc[0], frame.iloc[-1]
        if len(frame) == 1:
            parts.append(f"{figure_text(label)}: {percent(first['same_set_rate'])} in the only MoE layer")
            continue
        parts.append(
            f"{figure_text(label)}: {percent(first['same_set_rate'])} at layer {first['layer']:.0f}, "
            f"{percent(last['same_set_rate'])} at layer {last['layer']:.0f}, "
            f"{percent(last['cumulative_same_set_rate'])} in all {count(len(frame), 'layer')}"
        )
    return "\n".join(f"Same experts, {part}" for part in parts) or "No routing to compare"


def _interval_note(frames: Mapping[str, pd.DataFrame]) -> str:
    if not frames:
        return ""
    rows = "; ".join(f"{figure_text(k)}: {count(f['n_tokens'].max(), 'routing row')}" for k, f in frames.items())
    banded = any(frame["same_set_rate_ci_low"].notna().any() for frame in frames.values())
    band = "Bands: 95 %, clustered by prompt." if banded else "No interval could be given."
    return f"{rows}. {band}"


def draw_agreement(ax: Axes, frames: Mapping[str, pd.DataFrame], column: str, styles: Mapping[str, RunStyle]) -> None:
    """One line with its band per run over MoE layers."""
    if not frames:
        state(ax, "No routing rows to compare (a dense model has none).")
        return
    for label, frame in frames.items():
        style = styles[label]
        low, high = frame[f"{column}_ci_low"], frame[f"{column}_ci_high"]
        ax.fill_between(frame["layer"], low, high, color=style.colour, alpha=0.2, linewidth=0)
        marker = style.marker if len(frame) <= 16 else ""
        ax.plot(frame["layer"], frame[column], color=style.colour, linestyle=style.line, marker=marker, markersize=4,
                clip_on=False, label=figure_text(label))  # fmt: skip
    _layer_ticks(ax, frames)
    _rate_axis(ax, frames, column)


def _layer_ticks(ax: Axes, frames: Mapping[str, pd.DataFrame]) -> None:
    """At most a dozen ticks; the decoder index in brackets where all runs agree on it."""
    pairs = pd.concat([frame[["layer", "decoder_layer"]] for frame in frames.values()]).drop_duplicates()
    deepest = int(pairs["layer"].max())
    ticks = layer_ticks(deepest, 8)
    bracketed = pairs["layer"].is_unique
    decoder = dict(zip(pairs["layer"], pairs["decoder_layer"], strict=True))
    ax.set_xticks(ticks, [f"{t}\n({decoder[t]})" if bracketed and t in decoder else str(t) for t in ticks])
    ax.set_xlim(-0.4, deepest + 0.4)
    brackets = "decoder layer in brackets" if bracketed else "decoder layers differ by run"
    ax.set_xlabel(f"MoE layer ({brackets})")


def _rate_axis(ax: Axes, frames: Mapping[str, pd.DataFrame], column: str) -> None:
    """Zoom so that the drop is seen, and write into the label that the axis does not start at 0."""
    lows = pd.concat([frame[[column, f"{column}_ci_low"]] for frame in frames.values()]).to_numpy(np.float64)
    lowest = float(np.nanmin(lows))
    drop = max(1 - lowest, 0.005)
    unit = 0.1 if drop > 0.2 else 0.02 if drop > 0.04 else 0.01
    start = 0.0 if drop > 0.5 else max(0.0, math.floor((1 - 1.25 * drop) / unit + 1e-9) * unit)
    ax.set_ylim(start, 1 + 0.05 * (1 - start))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    zoom = f"\naxis starts at {100 * start:.0f} %, not at 0" if start > 0 else ""
    ax.set_ylabel(f"tokens with the same expert set{zoom}")
