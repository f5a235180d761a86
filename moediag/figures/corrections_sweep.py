"""Bands of the ratio swept: what a band costs in masked tokens against the mismatch it leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from moediag.figures.corrections_tokens import Band, ratio_bands
from moediag.figures.registry import SIMULATION_FIGURES, Frames, Panel, figure
from moediag.figures.style import (
    DENSE_COLOURS,
    GREY,
    HALO,
    INK,
    LIGHT,
    MOE_COLOURS,
    NO_FLOOR,
    add_words,
    figure_width,
    legend_below,
    new_figure,
    state,
)
from moediag.figures.ticks import log_axis
from moediag.numbers import count, percent, sig

_LABEL: Final = 0.62
"""Points nearer than this [inch] would have their labels on each other."""
_LABEL_STEP: Final = 11
"""Distance of labels that would stand on each other [point]."""


def band_name(alpha: float, beta: float) -> str:
    """A band in words.

    Example:
        >>> band_name(0.5, 5.0), band_name(0.0, 2.0)
        ('0.5 to 5', '0 to 2')
    """
    return f"{alpha:.3g} to {beta:.3g}"


def _inputs(frames: Frames) -> tuple[object, ...]:
    in_use = {words: band for words, band in ratio_bands(frames).items() if words.startswith("icepop:")}
    return frames["sweep_by_band"], frames.get("recommended_band"), in_use


@figure(
    "band_frontier", "sweep_by_band",
    title="Masked share against the k3 that is left, band by band",
    caption="Every point is a band of the ratio. Left and low is good; on the frontier one is paid for with the other.",
    section="sweep",
    inputs=_inputs,
    into=SIMULATION_FIGURES,
)  # fmt: skip
def plot_band_frontier(
    sweep: pd.DataFrame,
    recommended: pd.DataFrame | None = None,
    presets: Mapping[str, Band] | None = None,
    *,
    panel: Panel,
) -> Figure:
    """Draw every band of a sweep by masked share and remaining k3, the frontier, the recommended band and presets.

    Args:
        sweep: frame ``sweep_by_band``.
        recommended: frame ``recommended_band``.
        presets: name -> band in use; those in the sweep are marked.
    """
    figure = new_figure(panel.width, 3.9)
    ax = figure.subplots()
    rows = sweep[sweep["kept_k3"] > 0]
    if rows.empty or not (rows["masked_share"] > 0).any():
        state(ax, "No band of the sweep masks a token." if len(sweep) else "No band was swept.")
        add_words(figure, "No band of the sweep masks a token", panel.caption)
        return figure
    zero = 0.5 / int(rows["n_tokens"].max())
    _draw_bands(ax, rows, zero)
    _draw_lines(ax, recommended)
    _dress(ax, rows, zero)
    _mark_presets(ax, rows, presets or {}, zero)
    _mark_recommended(ax, recommended, zero)
    handles, names = ax.get_legend_handles_labels()
    legend_below(ax, handles, names, columns=2)
    note = "Bars: 95 %, clustered by prompt, of bands on the frontier. Bands are not portable between stacks."
    add_words(figure, frontier_title(rows, recommended), panel.caption, _no_floor_words(recommended), note)
    return figure


def frontier_title(rows: pd.DataFrame, recommended: pd.DataFrame | None) -> str:
    """The finding: the recommended band with what it masks and leaves."""
    if recommended is None or recommended.empty or not math.isfinite(recommended.iloc[0]["alpha"]):
        return f"{count(len(rows), 'band')}: masked share against the k3 that is left"
    row = recommended.iloc[0]
    low, high = row["masked_share_ci_low"], row["masked_share_ci_high"]
    bounds = f" (95 %: {percent(low)} to {percent(high)})" if math.isfinite(low) else ""
    return (
        f"Band {band_name(row['alpha'], row['beta'])} masks {percent(row['masked_share'])} of tokens{bounds} and "
        f"leaves k3 {sig(row['kept_k3'])} of {sig(row['all_k3'])} nat"
    )


def _no_floor_words(recommended: pd.DataFrame | None) -> str:
    is_known = recommended is not None and len(recommended) and math.isfinite(recommended.iloc[0]["floor_k3"])
    return "" if is_known else f"{NO_FLOOR[:1].upper()}{NO_FLOOR[1:]} here."


def _x(shares: pd.Series, zero: float) -> pd.Series:
    return shares.clip(lower=zero)


def _draw_bands(ax: Axes, rows: pd.DataFrame, zero: float) -> None:
    ax.plot(_x(rows["masked_share"], zero), rows["kept_k3"], linestyle="none", marker="o", markersize=2.5, color=LIGHT,
            markeredgecolor=GREY, markeredgewidth=0.3, label=f"{count(len(rows), 'band')} of the sweep")  # fmt: skip
    front = rows[rows["is_on_k3_frontier"]].sort_values("masked_share")
    known = front[front["kept_k3_ci_low"].notna()]
    ax.vlines(_x(known["masked_share"], zero), known["kept_k3_ci_low"], known["kept_k3_ci_high"],
              color=DENSE_COLOURS[2], linewidth=0.8)  # fmt: skip
    ax.plot(_x(front["masked_share"], zero), front["kept_k3"], color=DENSE_COLOURS[0], marker="o", markersize=2.5,
            linewidth=1.2, label="frontier: no band masks less and leaves less")  # fmt: skip


def _draw_lines(ax: Axes, recommended: pd.DataFrame | None) -> None:
    """What nothing masked leaves, the floor, and the budget of masked tokens, as far as they are known."""
    if recommended is None or recommended.empty:
        return
    row = recommended.iloc[0]
    for value, words, line in (
        (row["all_k3"], "nothing masked", (0, (4, 2))),
        (row["floor_k3"], "A/A floor", (0, (1, 1.5))),
    ):
        if math.isfinite(value) and value > 0:
            ax.axhline(value, color=INK, linewidth=0.9, linestyle=line, label=f"k3, {words} ({sig(value)} nat)")
    if math.isfinite(row["budget"]) and row["budget"] > 0:
        ax.axvline(row["budget"], color=INK, linewidth=0.7, label=f"budget: {percent(row['budget'])} masked")


def _mark_presets(ax: Axes, rows: pd.DataFrame, presets: Mapping[str, Band], zero: float) -> None:
    """Bands in use, named under their point; bands that mask the same tokens share a point."""
    at: dict[tuple[float, float], list[str]] = {}
    for alpha, beta in dict.fromkeys(presets.values()):
        found = rows[np.isclose(rows["alpha"], alpha) & np.isclose(rows["beta"], beta)]
        if len(found):
            place = float(_x(found["masked_share"], zero).iloc[0]), float(found["kept_k3"].iloc[0])
            at.setdefault(place, []).append(band_name(alpha, beta))
    taken: list[tuple[float, int]] = []
    low, high = ax.get_xlim()
    apart = _LABEL * math.log(high / low) / (0.75 * figure_width(ax))
    for (x, y), names in sorted(at.items()):
        used = {level for other, level in taken if abs(math.log(x / other)) < apart}
        near = next(level for level in range(len(taken) + 1) if level not in used)
        taken.append((x, near))
        ax.plot([x], [y], marker="D", markersize=5, color=MOE_COLOURS[1], linestyle="none",
                label="bands in use" if len(taken) == 1 else None)  # fmt: skip
        is_edge = x < 3 * zero
        ax.annotate(", ".join(names), (x, y), (0 if is_edge else -2, -9 - _LABEL_STEP * near), va="top",
                    textcoords="offset points", ha="left" if is_edge else "center", path_effects=HALO,
                    arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5} if near else None)  # fmt: skip


def _mark_recommended(ax: Axes, recommended: pd.DataFrame | None, zero: float) -> None:
    if recommended is None or recommended.empty or not math.isfinite(recommended.iloc[0]["alpha"]):
        return
    row = recommended.iloc[0]
    label = f"recommended: {band_name(row['alpha'], row['beta'])}"
    ax.plot([max(row["masked_share"], zero)], [row["kept_k3"]], marker="*", markersize=13, color=MOE_COLOURS[0],
            markeredgecolor=INK, markeredgewidth=0.6, linestyle="none", label=label)  # fmt: skip


def _dress(ax: Axes, rows: pd.DataFrame, zero: float) -> None:
    low, high = float(rows["kept_k3"].min()), float(rows["kept_k3"].max())
    log_axis(ax, "y", low / 1.6, max(high * 1.6, low * 3))
    most = min(float(rows["masked_share"].max()) * 2, 1.3)
    log_axis(ax, "x", zero * 0.7, max(most, zero * 20))
    ax.set_xlabel("share of tokens masked, log axis")
    ax.set_ylabel("mean k3 of kept tokens [nat]")
    if (rows["masked_share"] == 0).any():
        ticks = [zero, *(tick for tick in ax.get_xticks() if tick > zero * 1.5)]
        formatter = ax.xaxis.get_major_formatter()
        ax.set_xticks(ticks)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, p: "none" if x <= zero * 1.01 else formatter(x, p)))
