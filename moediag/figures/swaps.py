"""Which experts stand in for each other: the most frequent pairs, and expert against expert in the layers with most.

An expert's number means something within its layer only, so layers are never pooled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecBase
from matplotlib.ticker import MaxNLocator

from moediag.figures.floors import share
from moediag.figures.heat import count_bar, count_norm
from moediag.figures.registry import Frames, Panel, figure
from moediag.figures.style import (
    HEAT,
    INK,
    RunStyle,
    add_words,
    figure_text,
    is_column,
    legend_below,
    new_figure,
)
from moediag.numbers import count, percent

TOP_PAIRS: Final = 12
TOP_LAYERS: Final = 4
_MAP_INCHES: Final = 1.25


def _no_swaps(frames: Frames) -> str:
    return "no flip exchanged exactly one expert" if frames["expert_swaps"].empty else ""


@figure(
    "expert_swaps", "expert_swaps",
    title="Which experts stand in for each other",
    caption="Flips that exchange exactly one expert. Near ties swap both ways about equally often; one direction only "
    "points at a shifted score in one of the engines.",
    section="depth",
    floor_of="flip_rate",
    is_routing=True,
    absent=_no_swaps,
)  # fmt: skip
def plot_expert_swaps(
    frames: Mapping[str, pd.DataFrame],
    *,
    panel: Panel,
) -> Figure:
    """Draw the most frequent pairs of experts, both ways, and the maps of the layers with most swaps.

    Args:
        frames: label -> ``expert_swaps`` frame.
        panel: floor of the flip rate over all layers [1]; said in the caption.
    """
    narrow = is_column(panel.width)
    figure = new_figure(panel.width, (6.2 if narrow else 3.6) * max(len(frames), 1))
    outer = figure.add_gridspec(max(len(frames), 1), 1)
    for nth, (label, frame) in enumerate(frames.items()):
        rows, columns = (2, 1) if narrow else (1, 2)
        ratios = {"height_ratios": (1, 1.05)} if narrow else {"width_ratios": (1, 1.35)}
        inner = outer[nth].subgridspec(rows, columns, **ratios)
        bars = figure.add_subplot(inner[0])
        bars.set_title(f"{figure_text(label, 24)}: most frequent pairs")
        _draw_pairs(bars, frame, panel.styles[label])
        _draw_maps(figure, inner[1].subgridspec(2, 2), frame)
    floored = panel.floor_words("the flip rate", frames, share)
    add_words(figure, swap_finding(frames), panel.caption, floored, _coverage(frames))
    return figure


def pairs_of(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per layer and unordered pair of experts, the more frequent direction kept, most frequent pair first."""
    low, high = (getattr(np, end)(frame["expert_train"], frame["expert_infer"]) for end in ("minimum", "maximum"))
    both = frame["n_swaps"] + frame["n_reverse"]
    rows = frame.assign(low=low, high=high, both=both).sort_values("n_swaps", ascending=False, kind="stable")
    rows = rows.drop_duplicates(["layer", "low", "high"])
    return rows.sort_values("both", ascending=False, kind="stable", ignore_index=True)


def swap_finding(frames: Mapping[str, pd.DataFrame]) -> str:
    """The title: the most frequent pair, its layer, and how often it went either way."""
    parts = []
    for label, frame in frames.items():
        if frame.empty:
            parts.append(f"{figure_text(label)}: no flip exchanged exactly one expert")
            continue
        row = pairs_of(frame).iloc[0]
        of_flips = percent(row["both"] / max(row["n_flips"], 1))
        ways = f"{count(row['n_swaps'], 'time')} one way, {count(row['n_reverse'])} the other"
        parts.append(
            f"{figure_text(label)}: experts {row['expert_train']:.0f} and {row['expert_infer']:.0f} of layer "
            f"{row['layer']:.0f} swap most: {ways}, {of_flips} of its flips"
        )
    return "\n".join(parts) or "No run"


def _coverage(frames: Mapping[str, pd.DataFrame]) -> str:
    """How many swaps the frame lists, of the flips that its layers had."""
    parts = []
    for label, frame in frames.items():
        layers = frame.drop_duplicates("layer")
        flips, single = int(layers["n_flips"].sum()), int(layers["n_single_flips"].sum())
        parts.append(
            f"{figure_text(label)}: {count(int(frame['n_swaps'].sum()), 'swap')} listed, of {count(single, 'flip')} "
            f"that exchange one expert ({count(flips, 'flip')} in all)."
        )
    return " ".join([*parts, "Maps: layers with most listed swaps; experts are numbered within a layer."])


def _draw_pairs(ax: Axes, frame: pd.DataFrame, style: RunStyle) -> None:
    rows = pairs_of(frame).head(TOP_PAIRS)
    y = np.arange(len(rows))[::-1]
    ax.barh(y, rows["n_swaps"], color=style.colour, height=0.7, label="train chose the first, infer the second")
    ax.barh(y, -rows["n_reverse"], color="white", edgecolor=style.colour, hatch="////", height=0.7, linewidth=0.8,
            label="the other way round")  # fmt: skip
    names = [
        f"layer {layer}: {first}, {second}"
        for layer, first, second in zip(rows["layer"], rows["expert_train"], rows["expert_infer"], strict=True)
    ]
    ax.set_yticks(y, names)
    ax.tick_params(axis="y", length=0)
    ax.axvline(0, color=INK, linewidth=0.8)
    reach = 1.08 * float(max(rows["n_swaps"].max(), rows["n_reverse"].max()))
    ax.set_xlim(-reach, reach)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("swaps [choice]")
    legend_below(ax, *ax.get_legend_handles_labels(), columns=1)


def _draw_maps(figure: Figure, grid: GridSpecBase, frame: pd.DataFrame) -> None:
    """Expert against expert, one small map per layer; squares, as large as a cell where cells are large enough."""
    swaps = frame.groupby("layer")["n_swaps"].sum()
    layers = sorted(swaps.sort_values(ascending=False, kind="stable").index[:TOP_LAYERS])
    n_experts = int(max(frame["expert_train"].max(), frame["expert_infer"].max())) + 1
    norm = count_norm(float(frame["n_swaps"].max()), float(frame["n_swaps"].min()))
    axes: list[Axes] = []
    dots: Any = None
    cells: Any = grid[:, :] if len(layers) == 1 else None
    for nth, layer in enumerate(layers):
        ax = figure.add_subplot(cells if cells is not None else grid[nth // 2, nth % 2])
        rows = frame[frame["layer"] == layer].sort_values("n_swaps", kind="stable")
        side = max(_MAP_INCHES * 72 / n_experts, 2.2) * (2 if cells is not None else 1)
        dots = ax.scatter(rows["expert_infer"], rows["expert_train"], s=side**2, c=rows["n_swaps"], marker="s",
                          cmap=HEAT, norm=norm, linewidths=0)  # fmt: skip
        _dress_map(ax, int(layer), n_experts, is_left=nth % 2 == 0, is_bottom=nth + 2 >= len(layers))
        axes.append(ax)
    count_bar(dots, axes, "swaps")


def _dress_map(ax: Axes, layer: int, n_experts: int, *, is_left: bool, is_bottom: bool) -> None:
    ax.set_title(f"layer {layer}")
    ax.set_aspect("equal")
    ax.plot([-0.5, n_experts - 0.5], [-0.5, n_experts - 0.5], color=INK, linewidth=0.5, linestyle=(0, (1, 2)))
    for axis, limits in ((ax.xaxis, ax.set_xlim), (ax.yaxis, ax.set_ylim)):
        limits(-0.5, n_experts - 0.5)
        axis.set_major_locator(MaxNLocator(4, integer=True))
    ax.tick_params(labelleft=is_left, labelbottom=is_bottom)
    if is_bottom:
        ax.set_xlabel("expert of infer")
    if is_left:
        ax.set_ylabel("expert of train")
