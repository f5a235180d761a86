"""Where in confidence the differences lie: abs(logp_diff) against p_infer, every token counted.

The x axis is log10(p / (1 - p)): most tokens are nearly certain, and a plain axis would put them into one column.
bf16 logits make regular stripes; the cells are small enough to show them. Means are read from the frame
``metrics_by_stratum``.
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
from matplotlib.ticker import FixedLocator, NullLocator

from moediag.analysis.tokens import Tokens
from moediag.figures.floors import draw_floor
from moediag.figures.heat import count_bar, count_norm, draw_cells
from moediag.figures.registry import Panel, figure, no_difference
from moediag.figures.style import (
    GREY,
    INK,
    add_words,
    figure_text,
    figure_width,
    label_outer,
    legend_below,
    panel_grid,
    state,
)
from moediag.figures.ticks import power, tick_decades
from moediag.numbers import sig

METRIC: Final = "abs_logp_diff.mean"
MIN_TOKENS: Final = 100
"""The title compares strata of at least that many tokens."""

_DECADES: Final = 5
_EDGE: Final = 5.0  # p beyond 1e-5 and 1 - 1e-5 is drawn in the outermost column
_CERTAINTY: Final = ((1e-4, "10⁻⁴"), (0.01, "0.01"), (0.1, "0.1"), (0.5, "0.5"), (0.9, "0.9"), (0.99, "0.99"),
                     (0.999, "0.999"), (0.9999, "0.9999"))  # fmt: skip

FloatArray = npt.NDArray[np.float64]


@figure(
    "logp_diff_by_p_infer", "tokens", "metrics_by_stratum",
    title="Size of the difference against the probability that infer gave the token",
    caption="Density of tokens; the line is the mean per stratum of p_infer. Rounding to bf16 shows as regular "
    "stripes.",
    section="tail",
    floor_of="abs_logp_diff.mean",
    absent=no_difference,
)  # fmt: skip
def plot_logp_diff_by_p_infer(
    tokens: Mapping[str, pd.DataFrame],
    strata: Mapping[str, pd.DataFrame] | None = None,
    *,
    panel: Panel,
) -> Figure:
    """Draw the density of tokens over p_infer and abs(logp_diff), with the mean per stratum of p_infer.

    Args:
        tokens: label -> ``tokens`` frame.
        strata: label -> ``metrics_by_stratum`` frame; means are read from it.
        panel: floor of the mean abs(logp_diff) [nat].
    """
    points = {label: _points(frame) for label, frame in tokens.items()}
    means = {label: p_strata((strata or {}).get(label)) for label in tokens}
    figure, panels = panel_grid(len(points), panel.width, 3.0, sharex=True, sharey=True)
    limits = y_limits([y for _, y in points.values()])
    if limits is None:
        state(panels[0], "No scored token differs.")
    else:
        _draw_all(panels, points, means, limits)
    for ax, label in zip(panels, tokens, strict=False):
        ax.set_title(figure_text(label))
        if limits is not None:
            draw_floor(ax, panel.floor_value(label))
    notes = [panel.caption, panel.floor_words("the mean", tokens), _notes(points, limits)]
    add_words(figure, p_finding(means), *notes)
    return figure


def p_strata(frame: pd.DataFrame | None) -> pd.DataFrame:
    """Rows of the mean abs(logp_diff) by p_infer, in order; none without the frame."""
    if frame is None:
        return pd.DataFrame({"stratum_low": [], "stratum_high": [], "value": [], "n_tokens": []})
    rows: pd.DataFrame = frame[(frame["stratifier"] == "p_infer") & (frame["metric"] == METRIC)]
    return rows.sort_values("stratum_low")


def p_finding(means: Mapping[str, pd.DataFrame]) -> str:
    """The title: the mean where infer was least and where it was most certain, per run."""
    parts = []
    for label, rows in means.items():
        full = rows[(rows["n_tokens"] >= MIN_TOKENS) & rows["value"].notna()]
        if full.empty:
            parts.append(f"{figure_text(label)}: too few tokens for means by p_infer")
            continue
        ends = [f"{sig(row['value'], 2)} nat at p_infer {_range(row)}" for _, row in full.iloc[[0, -1]].iterrows()]
        parts.append(f"{figure_text(label)}: mean abs(logp diff) {', '.join(dict.fromkeys(ends))}")
    return "\n".join(parts) or "No run"


def _range(row: pd.Series) -> str:
    low, high = float(row["stratum_low"]), float(row["stratum_high"])
    if low <= 0:
        return f"< {high:g}"
    return f"≥ {low:g}" if high > 1 else f"{low:g}–{high:g}"


def certainty(p: FloatArray) -> FloatArray:
    """log10(p / (1 - p)), cut where the axis ends."""
    p = np.clip(p, 10**-_EDGE, 1 - 10**-_EDGE)
    return np.asarray(np.log10(p) - np.log10(1 - p))


def _points(frame: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    tokens = Tokens(frame)
    return certainty(np.exp(tokens.logp_infer_T)), tokens.abs_diff_T


def y_limits(sizes: list[FloatArray]) -> tuple[float, float] | None:
    """Lowest and highest difference [nat] drawn on the log axis; None when nothing differs."""
    top = max((float(size.max()) for size in sizes if len(size)), default=0.0)
    if not top > 0:
        return None
    smallest = min(float(size[size > 0].min()) for size in sizes if (size > 0).any())
    low = max(smallest, top / 10**_DECADES)
    return 10 ** math.floor(math.log10(low)), top * 1.6


def _draw_all(
    panels: list[Axes],
    points: Mapping[str, tuple[FloatArray, FloatArray]],
    means: Mapping[str, pd.DataFrame],
    limits: tuple[float, float],
) -> None:
    most = max(len(x) for x, _ in points.values())
    n_bins = int(np.clip(math.sqrt(most), 24, 150))
    all_x = np.concatenate([x for x, _ in points.values()])
    x_edges = np.linspace(all_x.min() - 0.05, all_x.max() + 0.05, n_bins + 1)
    y_edges = np.concatenate([zero_strip(limits[0]), np.geomspace(*limits, n_bins + 1)])
    tables = {label: _table(x, y, x_edges, y_edges) for label, (x, y) in points.items()}
    norm = count_norm(max(float(np.nanmax(table, initial=1)) for table in tables.values()))
    for ax, (label, table) in zip(panels, tables.items(), strict=False):
        ax.set_yscale("log")
        mesh = draw_cells(ax, x_edges, y_edges, table, norm)
        _draw_means(ax, means[label])
        _dress(ax, x_edges, limits)
    label_outer(panels, "abs(logp_train − logp_infer) [nat]")
    count_bar(mesh, panels, "tokens per cell")
    named = next((ax for ax in panels if ax.get_legend_handles_labels()[0]), None)
    if named is not None:
        legend_below(named, *named.get_legend_handles_labels())


def zero_strip(low: float) -> FloatArray:
    """Edges of the strip below the axis that holds 0 and whatever is smaller than the axis shows."""
    return np.array([low / 10**0.7, low / 10**0.3])


def _table(x: FloatArray, y: FloatArray, x_edges: FloatArray, y_edges: FloatArray) -> FloatArray:
    """Tokens per cell, row 0 = the strip of zeros, row 1 = the gap above it; empty cells are NaN."""
    strip = math.sqrt(y_edges[0] * y_edges[1])
    placed = np.where(y < y_edges[2], strip, np.minimum(y, y_edges[-1] * (1 - 1e-12)))
    table = np.histogram2d(placed, x, (y_edges, x_edges))[0]
    return np.where(table > 0, table, np.nan)


def _draw_means(ax: Axes, rows: pd.DataFrame) -> None:
    for nth, (_, row) in enumerate(rows[rows["value"] > 0].iterrows()):
        ends = certainty(np.array([row["stratum_low"], row["stratum_high"]], np.float64))
        for colour, thick in (("white", 3.6), (INK, 1.6)):
            name = "mean per stratum of p_infer" if colour == INK and nth == 0 else None
            ax.plot(ends, [row["value"]] * 2, color=colour, linewidth=thick, solid_capstyle="butt", label=name)


def _dress(ax: Axes, x_edges: FloatArray, limits: tuple[float, float]) -> None:
    strip = zero_strip(limits[0])
    ax.set_xlim(float(x_edges[0]), float(x_edges[-1]))
    ax.set_ylim(float(strip[0]), limits[1])
    tick_decades(ax.yaxis, *limits)
    decades, label = ax.yaxis.get_major_locator()(), ax.yaxis.get_major_formatter()
    zero = math.sqrt(strip[0] * strip[1])
    ax.yaxis.set_major_locator(FixedLocator([zero, *decades]))
    ax.yaxis.set_major_formatter(lambda y, _: f"< {power(limits[0])}" if y < limits[0] * 0.99 else label(y))
    ax.axhline(float(limits[0]), color=GREY, linewidth=0.6)
    ticks = {math.log10(p / (1 - p)): words for p, words in _CERTAINTY}
    ax.xaxis.set_major_locator(FixedLocator(_spaced(ax, [x for x in ticks if x_edges[0] <= x <= x_edges[-1]])))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda x, _: min(ticks.items(), key=lambda item: abs(item[0] - x))[1])
    ax.set_xlabel("p_infer of the token, log-odds axis")


def _spaced(ax: Axes, ticks: list[float]) -> list[float]:
    """The ticks that have room for their labels, the middle first, then outwards from the ends of certainty."""
    low, high = ax.get_xlim()
    spec = ax.get_subplotspec()
    columns = spec.get_gridspec().ncols if spec is not None else 1
    apart = (high - low) * 0.42 / (0.75 * figure_width(ax) / columns)
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda x: (x != 0, abs(abs(x) - 2) > 0.1, -abs(x))):
        if all(abs(tick - other) >= apart for other in kept):
            kept.append(tick)
    return sorted(kept)


def _notes(points: Mapping[str, tuple[FloatArray, FloatArray]], limits: tuple[float, float] | None) -> str:
    if limits is None:
        return ""
    strip = f"Lowest strip: differences below {power(limits[0])} nat, zeros included."
    beyond = sum(int((np.abs(x) >= _EDGE - 1e-4).sum()) for x, _ in points.values())
    cut = f" Outermost columns hold {beyond:,} tokens with p below 10⁻⁵ or above 1 − 10⁻⁵." if beyond else ""
    return strip + cut
