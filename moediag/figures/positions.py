"""Drift by position: does the mismatch grow along the response?

Small multiples, one column per run on a shared log axis; under each the tokens behind every bin, since
late bins hold only the sequences that got that far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moediag.figures.floors import draw_floor
from moediag.figures.registry import NO_DIFFERENCE, NOT_SCORED, Frames, Panel, figure
from moediag.figures.style import (
    GREY,
    RunStyle,
    add_words,
    figure_text,
    is_column,
    legend_below,
    new_figure,
    state,
)
from moediag.figures.ticks import log_axis
from moediag.numbers import count, sig, times

DECADES: Final = 5
"""The log axis shows at most this many; a median of 1e-9 nat would press the rest into a line."""

BOUND_REACH: Final = 2.0
"""The log axis reaches at most this factor above the largest value for the sake of an interval."""

_LINES: Final = (("p50", (0, (1, 1.2))), ("p90", (0, (4, 1.5))), ("p99", (0, (7, 1.5, 1, 1.5))))


def _no_drift(frames: Frames) -> str:
    mean = frames["drift_by_position"]["abs_logp_diff_mean"]
    if not mean.notna().any():
        return NOT_SCORED
    return "" if mean.max() > 0 else NO_DIFFERENCE


@figure(
    "position_drift", "drift_by_position",
    title="Difference by position in the response",
    caption="Mean with its 95 % interval, median, p90 and p99 per bin of positions; below, the tokens behind every "
    "bin.",
    section="drift",
    floor_of="abs_logp_diff.mean",
    absent=_no_drift,
)  # fmt: skip
def plot_position_drift(
    frames: Mapping[str, pd.DataFrame],
    *,
    training_window: int | None = None,
    prompt_length: int | None = None,
    panel: Panel,
) -> Figure:
    """Draw abs(logp_diff) by position in the response: mean with interval, p50, p90, p99, and n.

    Args:
        frames: label -> ``drift_by_position`` frame.
        training_window: context length the model was trained on [token, prompt + response]; drawn as a
            line at the response position where it ends.
        prompt_length: longest prompt [token], taken off the window; 0 if not known.
        panel: floor of the mean abs(logp_diff) [nat].
    """
    figure, panels = _panel_pairs(max(len(frames), 1), panel.width)
    limits = drift_limits(frames, [value for label in frames if (value := panel.floor_value(label)) is not None])
    for (top, bottom), (label, frame) in zip(panels, frames.items(), strict=False):
        draw_drift(top, frame, panel.styles[label], limits)
        top.set_title(figure_text(label))
        draw_bin_counts(bottom, frame, panel.styles[label])
        if training_window is not None:
            _mark_window(top, frame, training_window - (prompt_length or 0))
    _dress(panels, frames, limits)
    banded = any(frame["abs_logp_diff_mean_ci_low"].notna().any() for frame in frames.values())
    band = "Band: 95 % interval of the mean, clustered by prompt." if banded else "No interval could be given."
    for (top, _), label in zip(panels, frames, strict=False):
        draw_floor(top, panel.floor_value(label))
    notes = [panel.caption, panel.floor_words("the mean", frames), band, _clip_note(frames, limits)]
    notes.append(_thin_note(frames))
    notes.append(_window_note(frames, training_window, prompt_length))
    add_words(figure, drift_finding(frames), *notes)
    return figure


def _panel_pairs(n_runs: int, width: float) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Drift above, counts below, for every run; at most two runs beside each other."""
    columns = 1 if is_column(width) else min(n_runs, 2)
    blocks = -(-n_runs // columns)
    figure = new_figure(width, 3.4 * blocks)
    axes = figure.subplots(2 * blocks, columns, squeeze=False, height_ratios=(3.2, 1) * blocks)
    pairs = [(axes[2 * (n // columns)][n % columns], axes[2 * (n // columns) + 1][n % columns]) for n in range(n_runs)]
    for ax in set(axes.ravel()) - {ax for pair in pairs for ax in pair}:
        ax.remove()
    for top, bottom in pairs:
        bottom.sharex(top)
        top.tick_params(labelbottom=False)
    return figure, pairs


def drift_finding(frames: Mapping[str, pd.DataFrame]) -> str:
    """The title: mean in the first and in the last well-filled bin, per run."""
    parts = []
    for label, frame in frames.items():
        rows = frame[frame["abs_logp_diff_mean"].notna()]
        if rows.empty:
            parts.append(f"{figure_text(label)}: no token scored by both arms")
        elif rows["abs_logp_diff_mean"].max() == 0:
            parts.append(f"{figure_text(label)}: no difference at any position")
        else:
            # The last bins hold a few survivors: the title compares bins that hold at least a fifth of the fullest.
            rows = rows[rows["n_tokens"] >= 0.2 * rows["n_tokens"].max()]
            first, last = rows.iloc[0], rows.iloc[-1]
            a, b = float(first["abs_logp_diff_mean"]), float(last["abs_logp_diff_mean"])
            span = f"{sig(a)} nat at {_span(first)}"
            if len(rows) > 1:
                span += f", {sig(b)} at {_span(last)} ({times(b, a)})"
            parts.append(f"{figure_text(label)}: {span}")
    return "\n".join(f"Mean by position, {part}" for part in parts) or "No run"


def _span(row: pd.Series) -> str:
    low, high = int(row["position_low"]), int(row["position_high"])
    return f"{low}" if low == high else f"{low}–{high}"


def drift_limits(frames: Mapping[str, pd.DataFrame], floors: Sequence[float] = ()) -> tuple[float, float] | None:
    """Lower and upper end [nat] of the shared log axis, floors included; None when no value is above 0."""
    names = [f"abs_logp_diff_{k}" for k in ("mean", "p50", "p90", "p99")]
    values = [frame[names].to_numpy(np.float64).ravel() for frame in frames.values()]
    bounds = [float(frame["abs_logp_diff_mean_ci_high"].max()) for frame in frames.values()]
    drawn = np.concatenate(values) if values else np.empty(0)
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    if not len(drawn):
        return None
    lowest = min([float(drawn.min()), *(0.8 * floor for floor in floors)])
    # One bin of a few loud tokens has a bound far above all values: the axis does not follow it.
    top = max([float(drawn.max()), *(min(bound, BOUND_REACH * drawn.max()) for bound in bounds if np.isfinite(bound))])
    low = max(10 ** np.floor(np.log10(lowest)), 1.5 * top / 10**DECADES)
    return float(low), 1.5 * top


def _middle(frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    return ((frame["position_low"] + frame["position_high"] + 1) / 2).to_numpy(np.float64)


def draw_drift(ax: Axes, frame: pd.DataFrame, style: RunStyle, limits: tuple[float, float] | None) -> None:
    """Mean (thick, with its band) and quantiles (thin) at the middle of each bin."""
    if limits is None or not (frame["abs_logp_diff_p99"].max() > 0 or frame["abs_logp_diff_mean"].max() > 0):
        ax.text(0.5, 0.5, "No value above 0.", transform=ax.transAxes, ha="center", color=GREY)
        return
    x = _middle(frame)
    low, high = frame["abs_logp_diff_mean_ci_low"], frame["abs_logp_diff_mean_ci_high"]
    ax.fill_between(x, low.clip(lower=limits[0] / 10), high, color=style.colour, alpha=0.25, linewidth=0)
    marker = "o" if len(frame) <= 40 else ""
    ax.plot(x, _positive(frame["abs_logp_diff_mean"]), color=style.colour, linewidth=2, marker=marker, markersize=3.5,
            label="mean")  # fmt: skip
    for name, line in _LINES:
        values = _positive(frame[f"abs_logp_diff_{name}"])
        ax.plot(x, values, color=style.colour, linestyle=line, linewidth=1.0, label=name,
                marker="_" if len(frame) == 1 else "")  # fmt: skip


def _positive(values: pd.Series[float]) -> npt.NDArray[np.float64]:
    """0 has no place on a log axis: it leaves a gap, which the caption explains."""
    array = values.to_numpy(np.float64)
    return np.where(array > 0, array, np.nan)


def draw_bin_counts(ax: Axes, frame: pd.DataFrame, style: RunStyle) -> None:
    """Tokens behind each bin, as wide as the bin."""
    width = frame["position_high"] - frame["position_low"] + 1
    ax.bar(frame["position_low"], frame["n_tokens"], width, align="edge", color=style.colour, alpha=0.5,
           edgecolor="white", linewidth=0.5)  # fmt: skip
    ax.set_xlabel("position in the response [token]")
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    if frame.empty:
        state(ax, "no bins")


def _dress(
    panels: list[tuple[Axes, Axes]], frames: Mapping[str, pd.DataFrame], limits: tuple[float, float] | None
) -> None:
    for (top, bottom), frame in zip(panels, frames.values(), strict=False):
        if limits is None:
            top.set_yticks([])
        else:
            log_axis(top, "y", *limits)
        if top.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            top.set_ylabel("abs(logp_train − logp_infer)\n[nat]" + ("" if limits is None else ", log axis"))
            bottom.set_ylabel("tokens\nper bin")
        if len(frame):
            top.set_xlim(0, float(frame["position_high"].max()) + 1)
    named = next((pair for pair in panels if pair[0].get_legend_handles_labels()[0]), None)
    if named is not None:
        legend_below(named[1], *named[0].get_legend_handles_labels(), columns=4 if len(panels) == 1 else 2)


def _clip_note(frames: Mapping[str, pd.DataFrame], limits: tuple[float, float] | None) -> str:
    names = [f"abs_logp_diff_{k}" for k in ("mean", "p50", "p90", "p99")]
    if limits is None:
        return ""
    hidden = any(bool((frame[names] < limits[0]).any(axis=None)) for frame in frames.values())
    words = f"Values below {sig(limits[0], 1)} nat (zeros too) are not shown." if hidden else ""
    is_beyond = any(frame["abs_logp_diff_mean_ci_high"].max() > limits[1] for frame in frames.values())
    return words + " A band that leaves the axis at the top is wider than it." * is_beyond


def _thin_note(frames: Mapping[str, pd.DataFrame]) -> str:
    thin = any(bool((frame["n_tokens"] < 100).any()) for frame in frames.values())
    return "In bins of fewer than 100 tokens p99 is the largest value or close to it." if thin else ""


def _mark_window(ax: Axes, frame: pd.DataFrame, end: int) -> None:
    if len(frame) and 0 < end <= frame["position_high"].max():
        ax.axvline(end, color=GREY, linewidth=1.2)
        ax.text(end, 0.02, " window ends", transform=ax.get_xaxis_transform(), fontsize=8, color=GREY, va="bottom")


def _window_note(frames: Mapping[str, pd.DataFrame], window: int | None, prompt_length: int | None) -> str:
    if window is None:
        return ""
    off = "prompt length not given, 0 assumed" if prompt_length is None else f"longest prompt {prompt_length:,}"
    inside = all(f["position_high"].max() < window - (prompt_length or 0) for f in frames.values() if len(f))
    where = " All positions shown lie inside it." if inside else ""
    return f"Training window: {count(window, 'token')}, prompt included ({off}).{where}"
