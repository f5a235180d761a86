"""Which tokens corrections act on: tokens by ratio with the bands in use, and the entropy of what a band masks."""

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

from moediag.corrections.correction import Step, parse_correction
from moediag.figures.registry import SIMULATION_FIGURES, Frames, Panel, figure
from moediag.figures.style import (
    DENSE_COLOURS,
    GREY,
    HALO,
    INK,
    LIGHT,
    MOE_COLOURS,
    add_words,
    figure_text,
    figure_width,
    is_column,
    legend_below,
    name_width,
    new_figure,
    state,
)
from moediag.figures.ticks import log_axis
from moediag.numbers import count, percent, sig

Band = tuple[float, float]
FloatArray = npt.NDArray[np.float64]

_FARTHEST: Final = 7 * math.log(2)
"""Log-ratios beyond a factor of 128 are counted at the edge: a picture out to e^20 would show nothing of the body."""
_ROOM: Final = 0.35
_RATIOS: Final = (1 / 128, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 128)


def ratio_bands(frames: Frames) -> dict[str, Band]:
    """The bands on the token ratio among the corrections, and the recommended one first where there is one."""
    bands: dict[str, Band] = {}
    recommended = frames.get("recommended_band")
    if recommended is not None and len(recommended) and math.isfinite(recommended.iloc[0]["alpha"]):
        row = recommended.iloc[0]
        bands[f"recommended: {row['alpha']:.3g} to {row['beta']:.3g}"] = (float(row["alpha"]), float(row["beta"]))
    for words in frames["correction_statistics"]["words"]:
        steps = parse_correction(words).steps
        if len(steps) == 1 and (band := _band(steps[0])):
            bands[words] = band
    return bands


def _band(step: Step) -> Band | None:
    return step.bounds if step.declared.masks == "token" and step.declared.bounded.ratio else None


@figure(
    "ratio_bands", "ratio_counts",
    title="Ratio pi_train / pi_infer and the bands on it",
    caption="Tokens by ratio, both axes logarithmic; tokens beyond the axis are counted at its edge.",
    section="ratios",
    inputs=lambda frames: (frames["ratio_counts"], ratio_bands(frames)),
    into=SIMULATION_FIGURES,
)  # fmt: skip
def plot_ratio_bands(counts: pd.DataFrame, bands: Mapping[str, Band], *, panel: Panel) -> Figure:
    """Draw tokens by ratio, both axes logarithmic, and above them the bands on the token ratio.

    Args:
        counts: frame ``ratio_counts``.
        bands: name -> (lower, upper) bound of the ratio; 0 and inf = open. The first one is that of the title.
    """
    figure = new_figure(panel.width, 2.6 + 0.17 * len(bands))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[max(0.17 * len(bands), 0.3), 2.2])
    rows = counts[counts["n_tokens"] > 0]
    low, high = _limits(rows, bands)
    _draw_counts(lower, rows, low, high)
    for nth, (name, band) in enumerate(bands.items()):
        _draw_band(upper, len(bands) - 1 - nth, name, band, (low, high))
    _dress_bands(upper, lower, len(bands), low, high)
    note = f"Bins of {sig(_step(counts), 2)} nat. A band that runs off the axis is open on that side."
    add_words(figure, ratio_title(counts, bands), panel.caption, note)
    return figure


def ratio_title(counts: pd.DataFrame, bands: Mapping[str, Band]) -> str:
    """The finding: how far the tokens reach, and how many leave the first band."""
    n = int(counts["n_tokens"].sum())
    if not n:
        return "No scored token"
    edge = math.log(2) + 1e-9
    inside = counts.loc[(counts["bin_low"] >= -edge) & (counts["bin_high"] <= edge), "n_tokens"].sum()
    words = f"{percent(1 - inside / n)} of {count(n, 'token')} differ by a factor of 2 or more between train and infer"
    return words + (f"; above: {count(len(bands), 'band')} of the ratio" if bands else "")


def _step(counts: pd.DataFrame) -> float:
    inner = counts[np.isfinite(counts["bin_low"]) & np.isfinite(counts["bin_high"])]
    return float((inner["bin_high"] - inner["bin_low"]).iloc[0])


def _limits(rows: pd.DataFrame, bands: Mapping[str, Band]) -> tuple[float, float]:
    """Log-ratios drawn: every bound with room beside it and every token, but nothing beyond a factor of 128."""
    bounds = [math.log(end) for band in bands.values() for end in band if 0 < end < math.inf]
    seen = [*rows["bin_low"], *rows["bin_high"], *(b + _ROOM for b in bounds), *(b - _ROOM for b in bounds)]
    finite = [value for value in seen if math.isfinite(value)] or [0.0]
    low, high = max(min(finite), -_FARTHEST), min(max(finite), _FARTHEST)
    return min(low, -0.4), max(high, 0.4)


def _draw_counts(ax: Axes, rows: pd.DataFrame, low: float, high: float) -> None:
    inside = rows[(rows["bin_low"] >= low - 1e-9) & (rows["bin_high"] <= high + 1e-9)]
    most = float(inside["n_tokens"].max()) if len(inside) else 1.0
    for low_edge, high_edge, n in inside[["bin_low", "bin_high", "n_tokens"]].to_numpy(np.float64).tolist():
        ax.fill_between([low_edge, high_edge], 0.5, n, color=GREY, linewidth=0)
    log_axis(ax, "y", 0.6, most * 3)
    for is_left, rest in ((True, rows[rows["bin_low"] < low - 1e-9]), (False, rows[rows["bin_high"] > high + 1e-9])):
        if len(rest):
            _arrow(ax, low if is_left else high, is_left, int(rest["n_tokens"].sum()))


def _arrow(ax: Axes, edge: float, is_left: bool, n_tokens: int) -> None:
    """Tokens beyond the axis, counted at its edge."""
    words = f"{count(n_tokens, 'token')} {'below' if is_left else 'above'} {sig(math.exp(edge), 2)}"
    ax.annotate(
        words, (edge, 0.55), (26 if is_left else -26, 0), xycoords=ax.get_xaxis_transform(),
        textcoords="offset points", ha="left" if is_left else "right", va="center", fontsize=8,
        arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1.0}, path_effects=HALO,
    )  # fmt: skip


def _draw_band(ax: Axes, y: int, name: str, band: Band, limits: tuple[float, float]) -> None:
    low, high = (math.log(end) if 0 < end < math.inf else math.copysign(math.inf, end - 1) for end in band)
    colour = MOE_COLOURS[0] if name.startswith("recommended") else DENSE_COLOURS[0]
    ends = [max(low, limits[0]), min(high, limits[1])]
    ax.plot(ends, [y, y], color=colour, linewidth=2.0, solid_capstyle="butt")
    drawn = [end for end in (low, high) if limits[0] < end < limits[1]]
    ax.plot(drawn, [y] * len(drawn), linestyle="none", marker="|", markersize=6, color=colour)
    words = figure_text(name, name_width(figure_width(ax)))
    ax.annotate(words, (1.01, y), xycoords=ax.get_yaxis_transform(), va="center", annotation_clip=False)


def _dress_bands(upper: Axes, lower: Axes, n_bands: int, low: float, high: float) -> None:
    upper.set_ylim(-0.7, max(n_bands, 1) - 0.3)
    upper.set_yticks([])
    upper.spines["left"].set_visible(False)
    upper.spines["bottom"].set_visible(False)
    upper.tick_params(axis="x", length=0, labelbottom=False)
    lower.set_xlim(low, high)
    lower.set_ylabel("tokens per bin")
    lower.set_xlabel("ratio = pi_train / pi_infer, log axis")
    lower.axvline(0.0, color=INK, linewidth=0.8)
    lower.xaxis.set_major_locator(FixedLocator([math.log(r) for r in _ticks(low, high, 0.6 / figure_width(lower))]))
    lower.xaxis.set_minor_locator(NullLocator())
    lower.xaxis.set_major_formatter(lambda x, _: f"{math.exp(x):.3g}")


def _ticks(low: float, high: float, apart: float) -> list[float]:
    """Ratios to label, ``apart`` of the axis' length at least, 1 first and outwards; a narrow axis gets finer ones."""
    fine = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.7, 2)
    kept: list[float] = []
    for ratio in sorted(fine if high - low < 1.6 else _RATIOS, key=lambda ratio: abs(math.log(ratio))):
        is_free = all(abs(math.log(ratio / other)) >= apart * (high - low) for other in kept)
        if is_free and low - 1e-9 <= math.log(ratio) <= high + 1e-9:
            kept.append(ratio)
    return kept


@figure(
    "masked_entropy", "masked_entropy", "correction_statistics",
    title="Entropy of masked tokens",
    caption="Left: one correction's masked tokens against all tokens, Figure-11-style. Right: means of every "
    "correction.",
    section="entropy",
    into=SIMULATION_FIGURES,
)  # fmt: skip
def plot_masked_entropy(counts: pd.DataFrame, statistics: pd.DataFrame, *, panel: Panel) -> Figure:
    """Draw the entropy of the tokens that one correction masks against that of all tokens, and means of every one.

    Args:
        counts: frame ``masked_entropy``; its first correction is drawn on the left.
        statistics: frame ``correction_statistics``.
    """
    rows = statistics[statistics["masked_share"] > 0].sort_values("entropy_masked", na_position="first")
    height = max(3.0, 1.1 + 0.17 * len(rows))
    narrow = is_column(panel.width)
    figure = new_figure(panel.width, 2.8 + height if narrow else height)
    left, right = figure.subplots(2, 1, height_ratios=(2.8, height)) if narrow else figure.subplots(1, 2)
    name = str(counts["correction"].iloc[0]) if len(counts) else ""
    _draw_densities(left, counts[counts["correction"] == name], name)
    _draw_means(right, rows)
    note = "Bars: 95 %, clustered by prompt. Masked = weight 0; entropy of the infer side."
    add_words(figure, entropy_title(statistics, name), panel.caption, note)
    return figure


def entropy_title(statistics: pd.DataFrame, name: str) -> str:
    """The finding: whether what the correction masks has more entropy than what it keeps."""
    rows = statistics[statistics["correction"] == name]
    if rows.empty or not math.isfinite(rows.iloc[0]["entropy_masked"]):
        return f"{figure_text(name, 40) or 'No correction'} masks no token whose entropy is known"
    row = rows.iloc[0]
    n = count(row["n_entropy_masked"], "token")
    kept = f"{sig(row['entropy_kept'])} nat of kept tokens"
    where = _bounds(row, "entropy_masked")
    if not where:
        masked = f"mean entropy {sig(row['entropy_masked'])} nat against {kept}"
        return f"{figure_text(name, 40)} masks {n}, {masked}: too few to tell"
    low, high = row["entropy_masked_ci_low"], row["entropy_masked_ci_high"]
    higher, lower = low > row["entropy_kept_ci_high"], high < row["entropy_kept_ci_low"]
    words = "more than" if higher else "less than" if lower else "not clearly different from"
    return (
        f"{figure_text(name, 40)} masks {n} of {sig(row['entropy_masked'])} nat mean entropy{where}, {words} the {kept}"
    )


def _bounds(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    return f" (95 %: {sig(low)} to {sig(high)})" if math.isfinite(low) and math.isfinite(high) else ""


def _draw_densities(ax: Axes, rows: pd.DataFrame, name: str) -> None:
    if rows.empty or not rows["n_masked"].sum():
        state(ax, f"{figure_text(name, 40) or 'No correction'} masks no token whose entropy is known.")
        return
    handles, last = [], float(rows.loc[rows["n_tokens"] > 0, "bin_low"].max())
    for column, colour, words in (("n_tokens", LIGHT, "all tokens"), ("n_masked", MOE_COLOURS[0], "masked tokens")):
        shares, edges = _coarser(rows, column)
        shown = ax.stairs(shares, edges, fill=column == "n_tokens", color=colour, linewidth=1.6)
        handles.append((shown, f"{words} (n = {rows[column].sum():,})"))
    ax.set_xlim(0, last + 0.2)
    ax.set_ylim(bottom=0)
    ax.set_title(figure_text(name, 40))
    ax.set_xlabel("next-token entropy [nat]")
    ax.set_ylabel("share of the tokens per bin")
    legend_below(ax, [h for h, _ in handles], [w for _, w in handles], columns=1)


def _coarser(rows: pd.DataFrame, column: str) -> tuple[FloatArray, FloatArray]:
    """Shares in bins wide enough for the number of masked tokens."""
    every = 1 if rows["n_masked"].sum() >= 2000 else 2 if rows["n_masked"].sum() >= 200 else 5
    counts = rows[column].to_numpy(np.float64)
    counts = np.append(counts, np.zeros(-len(counts) % every)).reshape(-1, every).sum(axis=1)
    low = rows["bin_low"].to_numpy(np.float64)
    step = float(low[1] - low[0]) * every
    shares: FloatArray = np.asarray(counts / max(counts.sum(), 1.0), np.float64)
    return shares, np.asarray(step * np.arange(len(counts) + 1), np.float64)


def _draw_means(ax: Axes, rows: pd.DataFrame) -> None:
    if rows.empty or not rows["entropy_masked"].notna().any():
        state(ax, "No correction masks a token whose entropy is known.")
        return
    y = np.arange(len(rows))
    for name, colour, marker, face, words in (
        ("entropy_kept", GREY, "s", "white", "kept"),
        ("entropy_masked", MOE_COLOURS[0], "o", MOE_COLOURS[0], "masked"),
    ):
        low, high = rows[f"{name}_ci_low"], rows[f"{name}_ci_high"]
        ax.hlines(y, low.fillna(rows[name]), high.fillna(rows[name]), color=colour, linewidth=1.2)
        ax.plot(rows[name], y, linestyle="none", marker=marker, markersize=4, color=colour, markerfacecolor=face,
                label=words)  # fmt: skip
    ax.set_yticks(y, [figure_text(name, name_width(figure_width(ax)) - 4) for name in rows["correction"]])
    ax.set_ylim(-0.7, len(rows) - 0.3)
    # Room on both sides: a dot at the edge would be cut in half.
    ends = ["entropy_masked", "entropy_masked_ci_high", "entropy_kept", "entropy_kept_ci_high"]
    reach = float(np.nanmax(rows[ends].to_numpy(np.float64)))
    ax.set_xlim(-0.04 * reach, 1.06 * reach or 1.0)
    ax.set_title("Means by correction")
    ax.set_xlabel("mean next-token entropy [nat]")
    legend_below(ax, *ax.get_legend_handles_labels(), columns=2)
