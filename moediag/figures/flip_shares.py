"""What flips explain: tokens with a flip among all, the part of the mismatch on them, and the part beyond their like.

Two bars per run. Above: tokens. Below: the sum of abs(logp_diff), of which the solid part is what flipped tokens differ
more than unflipped ones like them, the pale part what they would differ by without a flip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moediag.figures.floors import share
from moediag.figures.registry import NO_DIFFERENCE, NO_FLIP, Frames, Panel, figure
from moediag.figures.style import INK, LIGHT, add_words, figure_text, is_column, legend_below, new_figure
from moediag.numbers import percent

_NOTE: Final = (
    "Explained: what they differ more than unflipped tokens of the same p_infer, entropy and position. Bars: 95 %, "
    "clustered by prompt."
)


def _absent(frames: Frames) -> str:
    shares = _values(frames["flip_shares"])["value"]
    if not shares["flip_token_share"] > 0:
        return f"{NO_FLIP} on a scored token"
    return "" if np.isfinite(shares["flip_mass_share"]) else NO_DIFFERENCE


@figure(
    "flip_shares", "flip_shares",
    title="What flips explain of the mismatch",
    caption="Tokens with a flip, their part of the sum of abs(logp_diff), and how much of it is more than unflipped "
    "tokens of the same p_infer, entropy and position differ by. Difficulty that these do not show is not controlled.",
    section="excess",
    floor_of="any_layer_share",
    is_routing=True,
    absent=_absent,
)  # fmt: skip
def plot_flip_shares(frames: Mapping[str, pd.DataFrame], *, panel: Panel) -> Figure:
    """Draw the share of tokens and of the mismatch that flips hold, and the part that they explain.

    Args:
        frames: label -> ``flip_shares`` frame.
        panel: floor of the share of tokens [1]; said in the caption.
    """
    figure = new_figure(panel.width, 1.0 + 0.75 * len(frames))
    ax = figure.subplots()
    names = []
    for nth, (label, frame) in enumerate(frames.items()):
        _draw(ax, 2.4 * nth, _values(frame), panel.styles[label].colour)
        names += [f"{figure_text(label, 12 if is_column(panel.width) else 22)}: tokens", "mismatch"]
    ax.set_yticks([2.4 * nth + row for nth in range(len(frames)) for row in (0, 1)], names)
    ax.invert_yaxis()
    ax.set_xlim(right=1)
    ax.xaxis.set_major_locator(MaxNLocator(2 if is_column(panel.width) else 5))
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    ax.set_xlabel(
        "share (mismatch: sum\nof abs(logp_diff))"
        if is_column(panel.width)
        else "share (mismatch: sum of abs(logp_diff))"
    )
    first = {word: handle for handle, word in zip(*ax.get_legend_handles_labels(), strict=True)}
    legend_below(ax, list(first.values())[::-1], list(first)[::-1], columns=1)
    floored = panel.floor_words("the share of tokens with a flip", frames, share)
    add_words(figure, flip_share_finding(frames), panel.caption, floored, _NOTE)
    return figure


def flip_share_finding(frames: Mapping[str, pd.DataFrame]) -> str:
    """The title: how many tokens flip, how much of the mismatch they hold, and how much flips explain."""
    parts = []
    for label, frame in frames.items():
        shares = _values(frame)["value"]
        parts.append(
            f"{figure_text(label)}: {percent(shares['flip_token_share'])} of tokens flip and hold "
            f"{percent(shares['flip_mass_share'])} of the mismatch; flips explain "
            f"{percent(shares['flip_explained_share'])}"
        )
    return "\n".join(parts) or "No run"


def _values(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_index("metric")[["value", "ci_low", "ci_high"]]


def _draw(ax: Axes, y: float, shares: pd.DataFrame, colour: str) -> None:
    tokens, mass, explained = (shares.loc[f"flip_{name}_share"] for name in ("token", "mass", "explained"))
    ax.barh([y, y + 1], 1.0, color=LIGHT, height=0.8, label="tokens without a flip")
    ax.barh([y, y + 1], [tokens["value"], mass["value"]], color=colour, alpha=0.45, height=0.8, label="with a flip")
    ax.barh(y + 1, explained["value"], color=colour, height=0.8, label="explained by flips")
    for row, each in ((y, tokens), (y + 0.8, explained), (y + 1.2, mass)):
        ax.hlines(row, each["ci_low"], each["ci_high"], color=INK, linewidth=1.2)
