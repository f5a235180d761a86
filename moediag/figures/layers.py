"""Since which layer two engines differ in float32: router margins by depth, in units of float32's own rounding."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moediag.diagnosis.layers import FAR_ROW
from moediag.figures.registry import NO_DIFFERENCE, Frames, Panel, figure
from moediag.figures.style import GREY, RunStyle, add_words, figure_text, figure_width, is_column, new_figure
from moediag.figures.ticks import log_axis
from moediag.numbers import sig


def _nothing_apart(frames: Frames) -> str:
    return "" if (frames["layers_apart"]["times_max"] > 0).any() else NO_DIFFERENCE


@figure(
    "layers_apart", "layers_apart",
    title="Since which layer: both engines in float32, in units of float32's own rounding",
    caption="Router margins of both engines in float32, by layer, over what one unit in the last place makes there; "
    "line: median row, band: up to the largest.",
    section="ladder",
    absent=_nothing_apart,
)  # fmt: skip
def plot_layers_apart(frames: Mapping[str, pd.DataFrame], *, panel: Panel) -> Figure:
    """Draw the median row's difference by layer, the largest row's above it, and from where on a row differs.

    Args:
        frames: label -> ``layers_apart`` frame.
    """
    figure = new_figure(panel.width, 0.4 + 1.9 * max(len(frames), 1))
    axes = figure.subplots(max(len(frames), 1), 1, squeeze=False, sharey=True)[:, 0]
    top = max([10 * FAR_ROW, *(3 * float(np.nanmax(frame["times_max"])) for frame in frames.values())])
    for ax, (label, frame) in zip(axes, frames.items(), strict=False):
        _draw(ax, frame, panel.styles[label])
        ax.set_title(figure_text(label))
        log_axis(ax, "y", 0.1, top)
        ax.set_ylabel("rounding scales,\nlog axis")
    axes[-1].set_xlabel("decoder layer of the router; log-prob = of the token")
    add_words(
        figure, layers_finding(frames), panel.caption, f"Dotted: {FAR_ROW:g} rounding scales; a row above differs."
    )
    return figure


def layers_finding(frames: Mapping[str, pd.DataFrame]) -> str:
    """The title: the first layer that differs, or that none does."""
    parts = []
    for label, frame in frames.items():
        far = frame[frame["beyond_share"] > 0]
        if len(far):
            row = far.iloc[0]
            where = (
                f"decoder layer {row['decoder_layer']:.0f}" if row["decoder_layer"] >= 0 else "the log-probabilities"
            )
            words = f"differ from {where} on, by {sig(row['times_p50'])} rounding scales on a typical row"
        else:
            words = f"agree in every layer, to {sig(frame['times_max'].max())} rounding scales at most"
        parts.append(f"{figure_text(label)}: {words}")
    return "\n".join(parts) or "No run"


def _draw(ax: Axes, frame: pd.DataFrame, style: RunStyle) -> None:
    x_Q = np.arange(len(frame))
    middle_Q, largest_Q = (np.maximum(frame[name].to_numpy(float), 0.1) for name in ("times_p50", "times_max"))
    if len(frame) > 1:
        ax.fill_between(x_Q, middle_Q, largest_Q, color=style.colour, alpha=0.2, linewidth=0)
    else:
        ax.plot(np.repeat(x_Q, 2), [middle_Q[0], largest_Q[0]], color=style.colour, alpha=0.4, linewidth=4)
    ax.plot(x_Q, middle_Q, color=style.colour, linestyle=style.line, marker=style.marker, markersize=3.5)
    ax.axhline(1, color=GREY, linewidth=0.8)
    ax.axhline(FAR_ROW, color=GREY, linewidth=0.8, linestyle=":")
    names = [f"{layer:.0f}" if layer >= 0 else "log-prob" for layer in frame["decoder_layer"]]
    step = max(1, -(-len(names) // (8 if is_column(figure_width(ax)) else 16)))
    # The last name is the longest: its neighbour goes where it would stand on it.
    shown = [q for q in range(0, len(names) - 1, step) if len(names) - 1 - q >= 1.5 * step or step == 1] + [
        len(names) - 1
    ]
    ax.set_xticks(shown, [names[q] for q in shown])
