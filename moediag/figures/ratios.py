"""The ratio pi_train / pi_infer against the IcePop band: which tokens the mask would take, and on which side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from moediag.analysis.measures import ICEPOP_BAND
from moediag.analysis.tokens import Tokens
from moediag.corrections.bands import band_name
from moediag.figures.floors import share
from moediag.figures.registry import Panel, figure, no_difference
from moediag.figures.style import (
    INK,
    LIGHT,
    RunStyle,
    add_words,
    figure_text,
    label_outer,
    panel_grid,
    state,
)
from moediag.figures.ticks import log_axis
from moediag.numbers import count, percent

_BINS_IN_BAND: Final = 80
_MAX_BINS: Final = 400
_RATIOS: Final = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100, 1e3, 1e4, 1e5, 1e6)


@figure(
    "ratio_histogram", "tokens", "corrections",
    title="Ratio pi_train / pi_infer and the IcePop band",
    caption="Tokens outside the closed band 0.5 to 5 would get no update.",
    section="tail",
    floor_of="masked_share",
    absent=no_difference,
)  # fmt: skip
def plot_ratio_histogram(
    tokens: Mapping[str, pd.DataFrame],
    corrections: Mapping[str, pd.DataFrame] | None = None,
    *,
    panel: Panel,
) -> Figure:
    """Draw tokens by ratio on a log axis, with the IcePop band 0.5 to 5 and what lies outside it.

    Args:
        tokens: label -> ``tokens`` frame.
        corrections: label -> ``corrections`` frame; shares outside the band are read from it.
        panel: floor of the share outside the band [1]; said in the caption.
    """
    ratios = {label: Tokens(frame).diff_T for label, frame in tokens.items()}
    figure, panels = panel_grid(len(ratios), panel.width, 2.5, sharex=True, sharey=True)
    edges = band_edges(np.concatenate([*ratios.values(), np.zeros(1)]))
    for ax, (label, values) in zip(panels, ratios.items(), strict=False):
        _draw_histogram(ax, values, edges, panel.styles[label])
        _mark_shares(ax, icepop_row((corrections or {}).get(label)))
        ax.set_title(figure_text(label))
        ax.set_xlabel("ratio = pi_train / pi_infer, log axis")
    if not any(len(values) for values in ratios.values()):
        state(panels[0], "No token was scored by both arms.")
    else:
        _dress(panels, ratios, edges)
    floored = panel.floor_words("the share outside", tokens, share)
    note = f"Bins of {edges[1] - edges[0]:.2g} nat. Outside the closed band (grey) the mask sets the weight to 0."
    add_words(figure, ratio_finding(tokens, corrections or {}), panel.caption, floored, note)
    return figure


def icepop_row(corrections: pd.DataFrame | None) -> pd.Series | None:
    """The row of IcePop with the band 0.5 to 5, whatever other presets there are."""
    rows = () if corrections is None else (row for _, row in corrections.iterrows())
    return next((row for row in rows if row["method"] == band_name(*ICEPOP_BAND)), None)


def ratio_finding(tokens: Mapping[str, pd.DataFrame], corrections: Mapping[str, pd.DataFrame]) -> str:
    """The title: the share outside the band with its interval and its two sides, per run."""
    parts = []
    for label, frame in tokens.items():
        row, name = icepop_row(corrections.get(label)), figure_text(label)
        if row is None or math.isnan(row["masked_share"]):
            parts.append(f"{name}: {count(len(Tokens(frame)), 'token')} scored by both arms")
            continue
        bounds = ""
        if not math.isnan(row["masked_share_ci_low"]):
            bounds = f" (95 %: {percent(row['masked_share_ci_low'])} to {percent(row['masked_share_ci_high'])})"
        below, above = row["below_share"], row["above_share"]
        sides = f"{percent(below)} below, {percent(above)} above"
        if min(below, above) == 0:
            sides = f"all {'below' if below > 0 else 'above'}"
        if row["masked_share"] == 0:
            parts.append(f"{name}: none of {count(row['n_tokens'], 'token')} leaves the IcePop band 0.5 to 5")
        else:
            parts.append(
                f"{name}: {percent(row['masked_share'])} of tokens{bounds} leave the IcePop band 0.5 to 5, {sides}"
            )
    return "\n".join(parts) or "No run"


def band_edges(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Edges [nat] of equal bins that hold every value; both ends of the band are edges, so no bin straddles one."""
    low, high = (math.log(end) for end in ICEPOP_BAND)
    step = (high - low) / _BINS_IN_BAND
    # Ratios of e^50 happen in faulty pairs: their bins are wider, not more.
    while (max(values.max(), high) - min(values.min(), low)) / step > _MAX_BINS:
        step *= 2
    inside = round((high - low) / step)
    before = math.ceil(max(low - values.min(), 0) / step + 1e-9) + 3
    after = math.ceil(max(values.max() - high, 0) / step + 1e-9) + 3
    edges = low + (high - low) / max(inside, 1) * np.arange(-before, max(inside, 1) + after + 1)
    return np.asarray(edges)


def _draw_histogram(ax: Axes, values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64], style: RunStyle) -> None:
    counts = np.histogram(values, edges)[0].astype(np.float64)
    low, high = (math.log(end) for end in ICEPOP_BAND)
    ax.axvspan(low, high, color=LIGHT, alpha=0.45, linewidth=0)
    ax.stairs(counts, edges, baseline=0.5, fill=True, color=style.colour, alpha=0.75)
    for end in (low, high):
        ax.axvline(end, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))


def _mark_shares(ax: Axes, row: pd.Series | None) -> None:
    if row is None:
        return
    low, high = (math.log(end) for end in ICEPOP_BAND)
    for place, side, words in (
        (low, "right", f"{percent(row['below_share'])}\nbelow 0.5"),
        (high, "left", f"{percent(row['above_share'])}\nabove 5"),
    ):
        ax.annotate(words, (place, 0.98), (-4 if side == "right" else 4, 0), xycoords=ax.get_xaxis_transform(),
                    textcoords="offset points", ha=side, va="top", fontsize=8)  # fmt: skip


def _dress(panels: list[Axes], ratios: Mapping[str, npt.NDArray[np.float64]], edges: npt.NDArray[np.float64]) -> None:
    most = max(float(np.histogram(values, edges)[0].max()) for values in ratios.values())
    # Room for the words beside both ends of the band.
    room = 0.6 * math.log(ICEPOP_BAND[1] / ICEPOP_BAND[0])
    low, high = (
        min(float(edges[0]), math.log(ICEPOP_BAND[0]) - room),
        max(float(edges[-1]), math.log(ICEPOP_BAND[1]) + room),
    )
    places = [math.log(ratio) for ratio in _RATIOS if low <= math.log(ratio) <= high]
    label_outer(panels, "tokens per bin")
    for ax in panels:
        log_axis(ax, "y", 0.6, most * 4)
        ax.set_xlim(low, high)
        far = high - low > 12
        ax.xaxis.set_major_locator(FixedLocator([p for p in places if not far or abs(p) > 2 or p == 0]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda x, _: f"{math.exp(x):.3g}")
