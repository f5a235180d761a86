"""Whole responses: log(pi_train / pi_infer) of the product over a response, against its length.

Where nearly all responses are of one length, there is no drift to see, and their distribution is drawn instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moediag.figures.registry import NO_DIFFERENCE, NOT_SCORED, Frames, Panel, figure
from moediag.figures.style import (
    GREY,
    INK,
    RunStyle,
    add_words,
    figure_text,
    label_outer,
    legend_below,
    panel_grid,
    state,
)
from moediag.numbers import count, sig

MIN_SEQUENCES: Final = 5
"""A mean is drawn, and compared in the title, for bins of at least that many responses."""

_LOG_RATIO: Final = "log(pi_train / pi_infer) [nat]"
_MANY: Final = 2000
_ONE_LENGTH: Final = 0.8
"""Share of responses of one length, within a twentieth, from which on lengths do not vary."""


def _no_sequences(frames: Frames) -> str:
    rows = frames["sequences"]
    drawn = rows.loc[rows["n_tokens"] > 0, "log_ratio_sum"]
    if not drawn.notna().any():
        return NOT_SCORED
    return "" if (drawn != 0).any() else NO_DIFFERENCE


@figure(
    "sequence_drift", "sequences", "drift_by_length",
    title="Log-ratio of whole responses against their length",
    caption="log(pi_train / pi_infer) of the product over a response's tokens: one point per response, bars are means "
    "per bin; where lengths hardly vary, responses by log-ratio.",
    section="drift",
    floor_of="abs_log_ratio_mean",
    absent=_no_sequences,
)  # fmt: skip
def plot_sequence_drift(
    sequences: Mapping[str, pd.DataFrame],
    by_length: Mapping[str, pd.DataFrame] | None = None,
    *,
    panel: Panel,
) -> Figure:
    """Draw the log-ratio of every response over its length, with means per bin of lengths.

    Args:
        sequences: label -> ``sequences`` frame.
        by_length: label -> ``drift_by_length`` frame; means and intervals are read from it.
        panel: floor of the mean abs(log-ratio) of a response [nat]; drawn on both sides of 0.
    """
    bins = {label: (by_length or {}).get(label, pd.DataFrame()) for label in sequences}
    scored = {label: _scored(frame) for label, frame in sequences.items()}
    by_ratio = all(one_length(rows) for rows in scored.values() if len(rows)) and any(map(len, scored.values()))
    figure, panels = panel_grid(len(sequences), panel.width, 2.4 if by_ratio else 3.0, sharex=True, sharey=True)
    reach = _reach(scored)
    for ax, (label, rows) in zip(panels, scored.items(), strict=False):
        ax.set_title(f"{figure_text(label)}: {count(len(rows), 'response')}")
        if rows.empty:
            state(ax, "No token was scored by both arms.")
        elif by_ratio:
            _draw_ratios(ax, rows, bins[label], panel.styles[label], reach)
            _draw_floor_band(ax.axvspan, panel.floor_value(label))
        else:
            _draw_sequences(ax, rows, bins[label], panel.styles[label])
            _draw_floor_band(ax.axhspan, panel.floor_value(label))
    _dress(panels, scored, reach, by_ratio)
    floored = panel.floor_words("the mean abs(log-ratio)", sequences)
    if any(panel.floor_value(label) is not None for label in sequences):
        floored += " It is the grey band about 0."
    note = f"Means of bins of at least {MIN_SEQUENCES} responses; pale: 95 %, clustered by prompt, where there is one."
    if by_ratio:
        note = "Right of 0 train finds the response likelier than infer did."
    add_words(figure, sequence_finding(sequences, bins), panel.caption, floored, note)
    return figure


def _scored(frame: pd.DataFrame) -> pd.DataFrame:
    rows: pd.DataFrame = frame[np.isfinite(frame["log_ratio_sum"]) & (frame["n_tokens"] > 0)]
    return rows


def one_length(rows: pd.DataFrame) -> tuple[int, int] | None:
    """The length [token] that nearly all of several responses have, and how many have it; None where lengths vary."""
    lengths = rows["n_tokens"].to_numpy()
    if len(lengths) < MIN_SEQUENCES:
        return None
    usual = int(np.median(lengths))
    n_there = int((np.abs(lengths - usual) <= usual / 20).sum())
    return (usual, n_there) if n_there >= _ONE_LENGTH * len(lengths) else None


def sequence_finding(sequences: Mapping[str, pd.DataFrame], bins: Mapping[str, pd.DataFrame]) -> str:
    """The title: mean absolute log-ratio of the shortest and of the longest bin that hold enough responses.

    Where nearly all are of one length it says so, and the mean of all.
    """
    parts = []
    for label in sequences:
        rows, name = bins[label], figure_text(label)
        scored = _scored(sequences[label])
        if usual := one_length(scored):
            name += f": {usual[1]} of {count(len(scored), 'response')} have {usual[0]:,} tokens, no drift can be seen"
        full = rows[rows["n_sequences"] >= MIN_SEQUENCES] if len(rows) else rows
        full = full[full["abs_log_ratio_mean"].notna()] if len(full) else full
        if not len(full):
            parts.append(f"{name}: too few responses for a mean by length")
            continue
        words = [
            f"{sig(row['abs_log_ratio_mean'])} nat at {_lengths(row)} tokens"
            for _, row in full.iloc[[0, -1]].iterrows()
        ]
        parts.append(f"{name}: mean abs(log-ratio) of a response {', '.join(dict.fromkeys(words))}")
    return "\n".join(parts) or "No run"


def _lengths(row: pd.Series) -> str:
    """The ends of a bin of lengths."""
    return f"{row['length_low']:.0f}–{row['length_high']:.0f}"


def _draw_sequences(ax: Axes, rows: pd.DataFrame, bins: pd.DataFrame, style: RunStyle) -> None:
    dots = ax.plot(rows["n_tokens"], rows["log_ratio_sum"], "o", color=style.colour, markersize=3, alpha=0.5,
                   markeredgewidth=0, label="response")  # fmt: skip
    dots[0].set_rasterized(len(rows) > _MANY)
    held = bins[bins["n_sequences"] >= MIN_SEQUENCES] if len(bins) else bins
    for nth, (_, row) in enumerate(held.iterrows()):
        ends, mean = [row["length_low"], row["length_high"]], row["log_ratio_mean"]
        ax.plot(ends, [mean, mean], color=INK, linewidth=2.0, label="mean per bin" if nth == 0 else None)
        low, high = ([row[f"log_ratio_mean_ci_{end}"]] * 2 for end in ("low", "high"))
        ax.fill_between(ends, low, high, color=INK, alpha=0.18, linewidth=0)
        for sign in (-1, 1):
            name = "mean absolute value" if nth == 0 and sign > 0 else None
            ax.plot(ends, [sign * row["abs_log_ratio_mean"]] * 2, color=INK, linewidth=1.0, linestyle=(0, (4, 2)),
                    label=name)  # fmt: skip


def _draw_ratios(ax: Axes, rows: pd.DataFrame, bins: pd.DataFrame, style: RunStyle, reach: float) -> None:
    """Responses by log-ratio, with the mean of the fullest bin of lengths."""
    values = rows["log_ratio_sum"].to_numpy(np.float64)
    edges = np.linspace(-reach, reach, 2 * min(20, 4 + round(math.sqrt(len(values)))) + 1)
    ax.stairs(np.histogram(values, edges)[0], edges, fill=True, color=style.colour, alpha=0.55)
    ax.plot(values, np.full(len(values), -0.035), "|", color=style.colour, markersize=6, markeredgewidth=0.6,
            transform=ax.get_xaxis_transform(), clip_on=False)  # fmt: skip
    if len(bins):
        row = bins.sort_values("n_sequences", kind="stable").iloc[-1]
        ax.axvspan(row["log_ratio_mean_ci_low"], row["log_ratio_mean_ci_high"], color=INK, alpha=0.15, linewidth=0)
        ax.axvline(row["log_ratio_mean"], color=INK, linewidth=1.4, linestyle=(0, (4, 2)),
                   label=f"mean at {_lengths(row)} tokens, 95 %")  # fmt: skip


def _draw_floor_band(span: Callable[..., object], value: float | None) -> None:
    if value is not None:
        span(-value, value, color=GREY, alpha=0.3, linewidth=0)


def _left_end(sequences: Mapping[str, pd.DataFrame]) -> float:
    """0, unless all responses are about as long: they would stand in a corner."""
    lengths = np.concatenate([frame["n_tokens"].to_numpy(np.float64) for frame in sequences.values()])
    lengths = lengths[lengths > 0]
    is_wide = not len(lengths) or lengths.min() < 0.5 * lengths.max() or lengths.max() < 40
    return 0.0 if is_wide else math.floor(0.8 * lengths.min())


def _reach(scored: Mapping[str, pd.DataFrame]) -> float:
    """The largest log-ratio [nat] and some room: axes are symmetric, for a drift to one side must look like one."""
    sizes = [float(rows["log_ratio_sum"].abs().max()) for rows in scored.values() if len(rows)]
    return 1.1 * max(sizes, default=1.0) or 1.0


def _dress(panels: list[Axes], scored: Mapping[str, pd.DataFrame], reach: float, by_ratio: bool) -> None:
    longest = max((int(rows["n_tokens"].max()) for rows in scored.values() if len(rows)), default=1)
    for ax in panels:
        if not ax.lines:
            continue
        line, limits = (ax.axvline, ax.set_xlim) if by_ratio else (ax.axhline, ax.set_ylim)
        if by_ratio:
            ax.set_xlabel(_LOG_RATIO)
            ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        else:
            left = _left_end(scored)
            ax.set_xlim(left, longest + 0.04 * (longest - left) + 0.5)
            ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            ax.set_xlabel("length of the response [token]")
        limits(-reach, reach)
        line(0, color=GREY, linewidth=0.8)
        for product, name in ((0.5, ""), (2, "ratio 0.5 or 2")) if math.log(2) < reach else ():
            line(math.log(product), color=GREY, linewidth=0.8, linestyle=(0, (1, 2)), label=name or None)
    label_outer([ax for ax in panels if ax.lines], "responses per bin" if by_ratio else _LOG_RATIO)
    named = next((ax for ax in panels if ax.lines), None)
    if named is not None:
        handles, names = named.get_legend_handles_labels()
        legend_below(named, handles, names, columns=3 if len(panels) == 1 else 2)
