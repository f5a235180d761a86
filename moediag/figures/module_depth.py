"""Growth by depth: how far the engines' residual streams are apart, layer by layer, beside what one module rounds by.

A picture, and no verdict: what has passed flips and blocks is amplified, in healthy models, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moediag.figures.registry import Frames, Panel, figure
from moediag.figures.style import GREY, INK, RunStyle, add_words, figure_text, panel_grid
from moediag.numbers import count, percent, times

_FEW: Final = 16
"""Layers up to which every point has a marker."""


def _no_streams(frames: Frames) -> str:
    stream = frames["module_checks"]["free_p50"]
    if not stream.notna().any():
        return "the engines' ordinary runs were not compared module by module"
    return "" if stream.max() > 0 else "the residual streams are bit for bit the same"


def streams(frame: pd.DataFrame) -> pd.DataFrame:
    """The residual streams of a ``module_checks`` frame by depth, in decoder layers from the embeddings.

    Returns:
        ``depth``, 0 for the embeddings, the number of decoder layers for what the final norm gets, parts of a layer in
        between; ``apart``, median relative difference of the engines' ordinary runs; ``module``, largest of both
        engines' median distances to float32 of a module on the same input, among those since the stream before.
    """
    layer = frame["decoder_layer"].to_numpy()
    is_stream = frame["free_p50"].notna().to_numpy()
    n_layers = int(layer.max()) + 1 if len(layer) else 0
    depth = np.where(layer >= 0, layer, np.where(np.arange(len(frame)) < np.argmax(layer >= 0), 0, n_layers))
    distance = frame[["train_p50", "infer_p50"]].max(axis=1).to_numpy(float)
    rows, last = [], -1
    for i in np.flatnonzero(is_stream):
        since = distance[last + 1 : i]
        known = since[np.isfinite(since)]
        own = np.flatnonzero(is_stream & (depth == depth[i]))
        within = 0.0 if depth[i] == n_layers else float((own < i).sum()) / len(own)
        rows.append((depth[i] + within, float(frame["free_p50"].iloc[i]), float(known.max()) if len(known) else np.nan))
        last = i
    return pd.DataFrame(rows, columns=["depth", "apart", "module"])


@figure(
    "module_depth", "module_checks",
    title="Growth by depth: the residual streams of ordinary runs",
    caption="Median relative difference of the engines' residual streams, nothing given; drawn, not judged.",
    section="ladder",
    not_captured="the engines' modules were not compared (moediag diagnose CKPT -o RUN --modules)",
    absent=_no_streams,
)  # fmt: skip
def plot_module_depth(frames: Mapping[str, pd.DataFrame], *, panel: Panel) -> Figure:
    """Draw how far the engines' residual streams are apart by depth, beside what a module rounds by on the same input.

    Args:
        frames: label -> ``module_checks`` frame.
    """
    drawn = {label: streams(frame) for label, frame in frames.items()}
    figure, axes = panel_grid(len(drawn), panel.width, 2.4)
    values = np.concatenate([one[["apart", "module"]].to_numpy().ravel() for one in drawn.values()] or [np.ones(1)])
    values = values[values > 0]
    ends = (float(values.min()) / 2, 2 * float(values.max())) if len(values) else (1e-8, 1.0)
    for ax, (label, one) in zip(axes, drawn.items(), strict=False):
        _draw(ax, one, panel.styles[label], ends)
        ax.set_title(figure_text(label))
    n_rows = {int(frame["n_rows"].max()) for frame in frames.values() if len(frame)}
    rows = f"n = {' and '.join(f'{n:,}' for n in sorted(n_rows))} token rows of the worst sequences." if n_rows else ""
    add_words(
        figure, depth_finding(drawn), panel.caption, rows,
        "Grey: the largest distance to float32 that a module before it has on the same input, in either engine.",
    )  # fmt: skip
    return figure


def depth_finding(drawn: Mapping[str, pd.DataFrame]) -> str:
    """The title: from where to where the streams drift apart."""
    parts = []
    for label, one in drawn.items():
        moved = one[one["apart"] > 0]
        if moved.empty:
            parts.append(f"{figure_text(label)}: no stream is apart")
            continue
        first, last = float(moved["apart"].iloc[0]), float(moved["apart"].iloc[-1])
        layers = count(int(one["depth"].max()), "layer")
        parts.append(
            f"{figure_text(label)}: streams {percent(first)} apart at first, {percent(last)} after {layers} "
            f"({times(last / first, 1.0)})"
        )
    return "\n".join(parts) or "No run"


def _draw(ax: Axes, one: pd.DataFrame, style: RunStyle, ends: tuple[float, float]) -> None:
    ax.set_yscale("log")
    is_few = one["depth"].max() <= _FEW
    ax.plot(one["depth"], one["module"].where(one["module"] > 0), color=GREY, linewidth=0.9)
    apart = one["apart"].where(one["apart"] > 0)
    ax.plot(one["depth"], apart, color=style.colour, linewidth=1.4, marker=style.marker if is_few else "", markersize=4)
    if (one["apart"] == 0).any():
        equal = one[one["apart"] == 0]
        ax.plot(equal["depth"], np.full(len(equal), ends[0] * 1.1), linestyle="none", marker="|", color=INK)
    ax.set_ylim(*ends)
    ax.set_xlim(-0.3, float(one["depth"].max()) + 0.3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.set_xlabel("decoder layers passed")
    ax.set_ylabel("relative difference")
