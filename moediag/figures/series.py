"""The mismatch over training steps: small multiples per metric, published marks, and the fitted recurrence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moediag.analysis.series import KNOWN, MARKS, Mark, metric_rows
from moediag.figures.style import (
    FULL_WIDTH,
    GREY,
    INK,
    add_words,
    figure_text,
    house_style,
    is_column,
    panel_grid,
    state,
    wrapped,
)
from moediag.figures.ticks import log_axis
from moediag.hygiene.findings import Finding
from moediag.hygiene.rules import NOTE
from moediag.numbers import count, sig, times
from moediag.statistics.intervals import Interval
from moediag.statistics.recurrence import Recurrence

COLOUR: Final = "#D55E00"
BOUNDARY_COLOUR: Final = "#0072B2"
MOST_PANELS: Final = 8
"""More metrics than this are named in the caption, not drawn."""
MARK_REACH: Final = 30.0
"""A mark farther than this factor from the data is named in the caption: on the axis it would flatten the data."""

_BESIDE_PANEL: Final = 0.75
"""Of a panel's width, what its axis takes on the left of the title, with room [inch]."""
_PANEL_TITLE_SIZE: Final = 8.5

LOG_FROM: Final = 5.0
"""A column that is no metric of ours gets a log axis from this ratio of largest to smallest on."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Label:
    """Words beside the right end of an axis, at a value."""

    value: float
    words: str
    colour: str


@house_style
def plot_trend(
    trend: pd.DataFrame,
    recurrence: Recurrence | None = None,
    delta: str | None = None,
    *,
    is_kl: bool = True,
    marks: Sequence[Mark] = MARKS,
    findings: Sequence[Finding] = (),
    caption: str = "",
    width: float = FULL_WIDTH,
) -> Figure:
    """Draw every metric by step with its interval; in the panel of delta the fit and delta_c, where it could tell.

    Args:
        trend: frame ``trend_by_step``.
        recurrence: what the series says of compounding.
        delta: the metric it was fitted to.
        is_kl: False where the text was not freely sampled: k1 and k3 are then called statistics.
        marks: published numbers, named lines, or bands where a range was published, where they are near the data.
        findings: what is wrong with the tokens or the steps; those above a note come first in the caption.
        caption: said under the axes first.
        width: of the figure [inch].
    """
    metrics = [name for name in dict.fromkeys(trend["metric"]) if metric_rows(trend, name)["value"].notna().any()]
    metrics = sorted(metrics, key=lambda name: name != delta)
    figure, axes = panel_grid(min(len(metrics), MOST_PANELS), width, 2.5)
    panel_width = width if is_column(width) or len(axes) == 1 else width / 2
    if not metrics:
        state(axes[0], "No metric has a value at any step.")
    off_axis: list[Mark] = []
    for ax, metric in zip(axes, metrics, strict=False):
        found = recurrence if metric == delta else None
        off_axis += _draw_metric(ax, metric_rows(trend, metric), found, [m for m in marks if m.metric == metric])
        ax.set_title(wrapped(title_of(metric, is_kl), panel_width - _BESIDE_PANEL, _PANEL_TITLE_SIZE))
    notes = [
        *(f"{one.level.capitalize()}: {one.where}: {one.message}." for one in findings if one.level != NOTE),
        caption,
        _counts(trend),
        _band_note(trend),
        *_mark_notes(trend, marks, off_axis),
    ]
    notes += [_fit_note(recurrence), _left_out(metrics[MOST_PANELS:])]
    add_words(figure, trend_finding(trend, recurrence, delta, is_kl), " ".join(filter(None, notes)))
    return figure


def title_of(metric: str, is_kl: bool = True) -> str:
    """A metric in words.

    Example:
        >>> title_of("kl_infer_train_k3", is_kl=False), title_of("reward")
        ('k3 statistic (no KL)', 'reward')
    """
    if not is_kl and metric in ("kl_infer_train_k1", "kl_infer_train_k3"):
        return f"{metric[-2:]} statistic (no KL)"
    return KNOWN[metric].label if metric in KNOWN else figure_text(metric, 40)


def trend_finding(trend: pd.DataFrame, recurrence: Recurrence | None, delta: str | None, is_kl: bool = True) -> str:
    """The title: first and last step of delta, and how it grows."""
    shown = delta or next(iter(trend["metric"]), None)
    rows = metric_rows(trend, str(shown)).dropna(subset=["value"])
    if rows.empty:
        return "No metric has a value"
    first, last = rows.iloc[0], rows.iloc[-1]
    unit = f" {first['unit']}" if first["unit"] == "nat" else ""
    words = f"{title_of(str(shown), is_kl)}: {sig(first['value'])}{unit} at step {first['step']}"
    if len(rows) > 1:
        rise = f" ({times(last['value'], first['value'])})" if math.isfinite(last["value"]) else ""
        words += f", {sig(last['value'])} at step {last['step']}{rise}"
    return f"{words}\n{_growth(recurrence)}" if recurrence is not None else words


def _growth(recurrence: Recurrence) -> str:
    boundary = recurrence.boundary
    if recurrence.outcome == "grows" and boundary is not None:
        words = "Faster than a straight line; if it compounds, "
        if boundary.low <= 0:
            return f"{words}delta_c is none or at most {_bound(boundary.high)} (95 %)"
        return f"{words}delta_c {sig(boundary.value, 2)}, 95 %: {_bound(boundary.low)} to {_bound(boundary.high)}"
    if recurrence.outcome == "does not grow":
        return "It does not compound: steps are pulled to a level, so there is no boundary"
    return "Whether it compounds, these steps cannot tell"


def _bound(value: float) -> str:
    return sig(value, 2) if math.isfinite(value) else "unbounded"


def _draw_metric(ax: Axes, rows: pd.DataFrame, fit: Recurrence | None, marks: Sequence[Mark]) -> list[Mark]:
    """One panel; returns the marks that lie off its axis."""
    step_N, value_N = rows["step"].to_numpy(np.float64), rows["value"].to_numpy(np.float64)
    low_N, high_N = (
        np.where(_is_none(rows), np.nan, rows[f"value_ci_{end}"].to_numpy(np.float64)) for end in ("low", "high")
    )
    is_log = _asks_for_log(str(rows["metric"].iloc[0]), value_N)
    near = [mark for mark in marks if is_log and (_is_near(mark.value, value_N) or _is_near(mark.highest, value_N))]
    boundary = fit.boundary if fit is not None and fit.outcome == "grows" else None
    lines = [end for mark in near for end in (mark.value, mark.highest)]
    lines += [boundary.value] if boundary is not None and _is_near(boundary.value, value_N) else []
    _scale(ax, value_N, low_N, high_N, lines, is_log)
    bottom, is_none = ax.get_ylim()[0], _is_none(rows)
    ax.fill_between(step_N, np.maximum(low_N, bottom), high_N, color=COLOUR, alpha=0.22, linewidth=0)
    ax.plot(step_N, value_N, color=COLOUR, marker="o" if len(rows) <= 60 else "", markersize=3)
    if is_none.any():  # an empty line that is not clipped has its marker in the figure's corner
        ax.plot(step_N[is_none], value_N[is_none], color=COLOUR, marker="o", markersize=3.5, markerfacecolor="white",
                linestyle="none", clip_on=False)  # fmt: skip
    if len(step_I := step_N[np.isinf(value_N)]):
        ax.plot(step_I, np.ones(len(step_I)), color=COLOUR, marker="^", markersize=7, linestyle="none", clip_on=False,
                transform=ax.get_xaxis_transform())  # fmt: skip
    labels = [_Label(math.sqrt(mark.value * mark.highest), f"{mark.name}\n{mark.text}", GREY) for mark in near]
    for mark in near:
        if mark.high is not None:
            ax.axhspan(mark.value, mark.high, color=GREY, alpha=0.18, linewidth=0)
            continue
        ax.axhline(mark.value, color=GREY, linewidth=1.0, linestyle=(0, (1, 2)))
    if fit is not None and fit.growth is not None and boundary is not None:
        labels += _draw_fit(ax, step_N, fit, boundary)
    _write_labels(ax, labels)
    ax.set_xlabel("training step")
    ax.set_ylabel(_unit(str(rows["unit"].iloc[0])) + (", log axis" if is_log else ""))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return [mark for mark in marks if mark not in near]


def _asks_for_log(metric: str, value_N: Float64) -> bool:
    """Growth is exponential, so mismatch stands on a log axis; a table's other columns only where they span much."""
    known = value_N[np.isfinite(value_N)]
    return bool(len(known) and (known > 0).all()) and (metric in KNOWN or known.max() > LOG_FROM * known.min())


def _is_none(rows: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Shares that no token showed: their upper bound counts prompts, and as a band it would hide the series."""
    return ((rows["unit"] == "1") & (rows["value"] == 0)).to_numpy()


def _draw_fit(ax: Axes, step_N: Float64, fit: Recurrence, boundary: Interval) -> list[_Label]:
    """The map without noise, and delta_c with its interval."""
    steps = np.linspace(step_N[0], step_N[-1], 200)
    mean = fit.mean_at(steps)
    bottom, top = ax.get_ylim()
    ax.plot(steps, np.where(mean > 0, mean, np.nan), color=INK, linestyle=(0, (4, 2)), linewidth=1.1)
    low, high = (min(max(end, bottom), top) for end in (boundary.low, boundary.high))
    ax.axhspan(low, high, color=BOUNDARY_COLOUR, alpha=0.12, linewidth=0)
    if bottom < boundary.value < top:
        ax.axhline(boundary.value, color=BOUNDARY_COLOUR, linewidth=1.2)
    ax.set_ylim(bottom, top)
    value = min(max(boundary.value, bottom), top)
    beyond = "" if value == boundary.value else ", off axis"
    return [_Label(value, f"delta_c\n{sig(boundary.value, 2)}{beyond}", BOUNDARY_COLOUR)]


def _is_near(value: float, value_N: Float64) -> bool:
    known = value_N[np.isfinite(value_N) & (value_N > 0)]
    return bool(len(known) and value > 0 and known.min() / MARK_REACH <= value <= known.max() * MARK_REACH)


def _scale(ax: Axes, value_N: Float64, low_N: Float64, high_N: Float64, lines: list[float], is_log: bool) -> None:
    """Room for data, intervals and lines; a lower bound near 0 does not decide a log axis."""
    value_N = np.where(np.isfinite(value_N), value_N, np.nan)
    known = np.concatenate([value_N, high_N, lines])
    known = known[np.isfinite(known)]
    if not is_log:
        span = np.concatenate([known, low_N[np.isfinite(low_N)], [0.0]])
        pad = 0.06 * (span.max() - span.min() or 1.0)
        ax.set_ylim(span.min() - (pad if span.min() < 0 else 0), span.max() + pad)
        return
    floor = float(np.nanmin(np.append(value_N, lines)))
    lows = low_N[np.isfinite(low_N) & (low_N > floor / 10)]
    bottom, top = min([floor, *lows]), float(known.max())
    log_axis(ax, "y", bottom / 1.25, top * 1.25, most=5)


def _write_labels(ax: Axes, labels: Sequence[_Label]) -> None:
    """Names of lines beside the right end of the axes, apart from each other and off the data."""
    placed: list[float] = []
    to_axes = ax.transData + ax.transAxes.inverted()
    for label in sorted(labels, key=lambda label: label.value):
        height = float(to_axes.transform((0.0, label.value))[1])
        placed.append(max(height, placed[-1] + 0.16) if placed else height)
        ax.annotate(label.words, (1.0, height), (1.02, placed[-1]), xycoords="axes fraction",
                    textcoords="axes fraction", va="center", ha="left", fontsize=7, color=label.colour,
                    annotation_clip=False)  # fmt: skip


def _unit(unit: str) -> str:
    return {"1": "share of tokens", "as given": "unit as given"}.get(unit, f"[{unit}]")


def _counts(trend: pd.DataFrame) -> str:
    steps = f"{count(trend['step'].nunique(), 'step')}"
    tokens = trend["n_tokens"].dropna()
    if tokens.empty:
        return f"{steps}; the table does not say how many tokens."
    prompts = trend["n_prompts"].dropna()
    of = f" of {_span(prompts)} prompts" if len(prompts) else ""
    return f"{steps} of {_span(tokens)} tokens{of} each."


def _span(numbers: pd.Series) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _band_note(trend: pd.DataFrame) -> str:
    words = "Bands: 95 % intervals." if trend["value_ci_low"].notna().any() else "No interval could be given."
    if np.isinf(trend["value"]).any():
        words += " Triangles at the top: infinite there."
    highest = trend.loc[_is_none(trend), "value_ci_high"].max()
    if math.isnan(highest):
        return words
    return f"{words} Open circles: no such token at that step; up to {sig(highest, 2)} is not ruled out there."


def _mark_notes(trend: pd.DataFrame, marks: Sequence[Mark], off_axis: Sequence[Mark]) -> list[str]:
    """Where each mark is from; marks of metrics that are not there are left out."""
    there = [mark for mark in marks if mark.metric in set(trend["metric"])]
    if not there:
        return []
    words = [f"{mark.text} {mark.source}{' (off the axis)' if mark in off_axis else ''}" for mark in there]
    return [
        f"Dotted or grey bands: numbers and ranges others published, other stacks, no thresholds: {'; '.join(words)}."
    ]


def _fit_note(recurrence: Recurrence | None) -> str:
    if recurrence is None or recurrence.outcome != "grows":
        return ""
    return (
        "Dashed: fitted map delta' = (1 + a) delta − b without noise; blue: delta_c = 2 b / a with its 95 % interval. "
        "An equality model of a theorem that is an inequality; no offline number shows that training will be stable."
    )


def _left_out(metrics: Sequence[str]) -> str:
    return f"Not drawn: {', '.join(figure_text(name) for name in metrics)}." if metrics else ""
