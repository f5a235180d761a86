"""The mismatch over training steps: small multiples per metric, published marks, and the fitted recurrence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moediag.analysis.series import KNOWN, MARKS, Mark, metric_of, metric_rows
from moediag.figures.registry import TREND_FIGURES, Panel, figure
from moediag.figures.style import (
    GREY,
    INK,
    add_words,
    figure_text,
    is_column,
    legend_below,
    new_figure,
    panel_grid,
    series_styles,
    state,
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

BOUND_REACH: Final = 10.0
"""An upper bound farther than this factor above all values runs off the axis, which it would flatten, too."""

_HEIGHT: Final = 2.5
"""Of a panel [inch]."""
_VALUES: Final = ("value", "value_ci_low", "value_ci_high")
_FEW: Final = 12
"""Steps up to which intervals of runs side by side are bars, too."""
_MANY: Final = 60
"""Steps from which on intervals are a band, not bars, and points have no markers."""

LOG_FROM: Final = 5.0
"""A column that is no metric of ours gets a log axis from this ratio of largest to smallest on."""

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Label:
    """Words beside the right end of an axis, at a value."""

    value: float
    words: str
    colour: str


@figure(
    "trend", "trend_by_step",
    title="Every metric by training step",
    caption="Bars and bands are 95 % intervals; dotted lines and grey bands are numbers others published, of other "
    "stacks, and no thresholds.",
    into=TREND_FIGURES,
)  # fmt: skip
def plot_trend(
    trend: pd.DataFrame,
    recurrence: Recurrence | None = None,
    delta: str | None = None,
    *,
    is_kl: bool = True,
    marks: Sequence[Mark] = MARKS,
    findings: Sequence[Finding] = (),
    panel: Panel,
) -> Figure:
    """Draw every metric by step with its interval; in the panel of delta the fit and delta_c, where it could tell.

    A metric of one value at every step is named in the caption, with it.

    Args:
        trend: frame ``trend_by_step``.
        recurrence: what the series says of compounding.
        delta: the metric it was fitted to.
        is_kl: False where the text was not freely sampled: k1 and k3 are then called statistics.
        marks: published numbers, named lines, or bands where a range was published, where they are near the data.
        findings: what is wrong with the tokens or the steps; those above a note come first in the caption.
    """
    metrics = [name for name in dict.fromkeys(trend["metric"]) if metric_rows(trend, name)["value"].notna().any()]
    metrics = sorted(metrics, key=lambda name: name != delta)
    still = [name for name in metrics if name != delta and _is_still(metric_rows(trend, name))]
    metrics = [name for name in metrics if name not in still] or [still.pop(0) for _ in still[:1]]
    figure, axes = _panels(min(len(metrics), MOST_PANELS), panel.width)
    if not metrics:
        state(axes[0], "No metric has a value at any step.")
    off_axis: list[Mark] = []
    for ax, metric in zip(axes, metrics, strict=False):
        found = recurrence if metric == delta else None
        rows, there = metric_rows(trend, metric), [mark for mark in marks if mark.metric == metric]
        off_axis += _draw_metric(ax, rows, found, there, is_wide=ax is axes[0])
        ax.set_title(title_of(metric, is_kl))
    notes = [
        *(f"{one.level.capitalize()}: {one.where}: {one.message}." for one in findings if one.level != NOTE),
        panel.caption,
        _counts(trend),
        _interval_note(trend, metrics[:MOST_PANELS], is_kl),
        *_mark_notes([mark for mark in marks if mark.metric in metrics], off_axis),
    ]
    notes += [_fit_note(recurrence), _still_note(trend, still, is_kl), _left_out(metrics[MOST_PANELS:])]
    add_words(figure, trend_finding(trend, recurrence, delta, is_kl), " ".join(filter(None, notes)))
    return figure


@figure(
    "trends", "trend_by_step",
    title="Runs side by side",
    caption="Bands and bars are 95 % intervals of each run alone; dotted lines and grey bands are numbers others "
    "published, of other stacks, and no thresholds.",
    into=TREND_FIGURES,
)  # fmt: skip
def plot_trends(
    trends: Mapping[str, pd.DataFrame],
    metric: str,
    *,
    is_kl: bool = True,
    marks: Sequence[Mark] = MARKS,
    panel: Panel,
) -> Figure:
    """Draw one metric of several runs by training step, a line per run, each with its intervals.

    Args:
        trends: label -> frame ``trend_by_step``; a run that has not the metric has no line.
        metric: its name.
        is_kl, marks: as for :func:`plot_trend`.
    """
    styles = series_styles(list(trends))
    parts = {label: metric_rows(trend, metric) for label, trend in trends.items()}
    parts = {label: rows for label, rows in parts.items() if rows["value"].notna().any()}
    columns = 1 if is_column(panel.width) else min(len(parts), 4) or 1
    figure = new_figure(panel.width, _HEIGHT + 0.5 + 0.17 * math.ceil(len(parts) / columns))
    ax = figure.subplots()
    if not parts:
        state(ax, "No run has a value at any step.")
        add_words(figure, title_of(metric, is_kl), panel.caption)
        return figure
    every = pd.concat(parts.values())
    near, off_axis = _scaled(ax, every, [mark for mark in marks if mark.metric == metric])
    handles = []
    for label, rows in parts.items():
        style, step_N = styles[label], rows["step"].to_numpy(np.float64)
        value_N, low_N, high_N = (rows[name].to_numpy(np.float64) for name in _VALUES)
        bottom, top = ax.get_ylim()
        low_N, high_N = np.maximum(low_N, bottom), np.minimum(high_N, 2 * top)
        ax.fill_between(step_N, low_N, high_N, color=style.colour, alpha=0.13, linewidth=0)
        if len(rows) <= _FEW:
            is_known = np.isfinite(low_N) & np.isfinite(high_N)
            ax.vlines(step_N[is_known], low_N[is_known], high_N[is_known], color=style.colour, alpha=0.4, linewidth=1.6)
        handles += ax.plot(step_N, value_N, color=style.colour, linestyle=style.line, clip_on=False,
                           marker=style.marker if len(rows) <= _MANY else "", markersize=3.5)  # fmt: skip
    _write_labels(ax, [_draw_mark(ax, mark, f"{mark.name}\n{mark.text}") for mark in near])
    _label_axes(ax, every)
    legend_below(ax, handles, [figure_text(label, 24) for label in parts], columns=columns)
    absent = [figure_text(label) for label in trends if label not in parts]
    ends = [f"{figure_text(label)}: {_ends(rows)}" for label, rows in parts.items()]
    add_words(
        figure,
        "\n".join([title_of(metric, is_kl), *ends]),
        panel.caption,
        " ".join(f"{figure_text(label)}: {_counts(rows)}" for label, rows in parts.items()),
        f"Without this metric: {', '.join(absent)}." if absent else "",
        "No interval could be given." if every["value_ci_low"].isna().all() else "",
        *_mark_notes([*near, *off_axis], off_axis),
    )
    return figure


def _ends(rows: pd.DataFrame) -> str:
    """First and last value of a metric."""
    known = rows.dropna(subset=["value"])
    first, last = known.iloc[0], known.iloc[-1]
    unit = f" {first['unit']}" if first["unit"] == "nat" else ""
    words = f"{sig(first['value'])}{unit} at step {first['step']}"
    return f"{words}, {sig(last['value'])}{unit} at step {last['step']}" if len(known) > 1 else words


def _panels(n_panels: int, width: float) -> tuple[Figure, list[Axes]]:
    """The first metric, which the title is about, across the figure; the others in two columns below."""
    if is_column(width) or n_panels < 2:
        return panel_grid(n_panels, width, _HEIGHT)
    rows = 1 + math.ceil((n_panels - 1) / 2)
    figure = new_figure(width, _HEIGHT * rows)
    grid = figure.add_gridspec(rows, 2)
    cells = [grid[0, :], *(grid[1 + nth // 2, nth % 2] for nth in range(n_panels - 1))]
    return figure, [figure.add_subplot(cell) for cell in cells]


def _is_still(rows: pd.DataFrame) -> bool:
    known = rows["value"].dropna()
    return len(known) > 1 and known.nunique() == 1


def title_of(metric: str, is_kl: bool = True) -> str:
    """A metric in words.

    Example:
        >>> title_of("kl_infer_train_k3", is_kl=False), title_of("reward")
        ('k3 statistic (no KL)', 'reward')
    """
    if not is_kl and metric in ("kl_infer_train_k1", "kl_infer_train_k3"):
        return f"{metric[-2:]} statistic (no KL)"
    known = metric_of(metric)
    return known.label if known and known.label else figure_text(metric, 28)


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


def _draw_metric(
    ax: Axes, rows: pd.DataFrame, fit: Recurrence | None, marks: Sequence[Mark], *, is_wide: bool
) -> list[Mark]:
    """One panel; returns the marks that lie off its axis."""
    step_N, value_N, low_N, high_N = (rows[name].to_numpy(np.float64) for name in ("step", *_VALUES))
    boundary = fit.boundary if fit is not None and fit.outcome == "grows" else None
    near, off_axis = _scaled(ax, rows, marks, boundary)
    (bottom, top), is_none = ax.get_ylim(), _is_none(rows)
    ends = np.maximum(low_N, bottom), np.minimum(high_N, 2 * top)
    if len(rows) > _MANY:
        ax.fill_between(step_N, *ends, color=COLOUR, alpha=0.22, linewidth=0)
    else:  # bars: a band needs two neighbours that both have an interval
        is_known = np.isfinite(ends[0]) & np.isfinite(ends[1])
        ax.vlines(step_N[is_known], *(end[is_known] for end in ends), color=COLOUR, alpha=0.45, linewidth=2.5)
    ax.plot(step_N, value_N, color=COLOUR, marker="o" if len(rows) <= _MANY else "", markersize=3, clip_on=False)
    if is_none.any():  # an empty line that is not clipped has its marker in the figure's corner
        ax.plot(step_N[is_none], value_N[is_none], color=COLOUR, marker="o", markersize=3.5, markerfacecolor="white",
                linestyle="none", clip_on=False)  # fmt: skip
    if len(step_I := step_N[np.isinf(value_N)]):
        ax.plot(step_I, np.ones(len(step_I)), color=COLOUR, marker="^", markersize=7, linestyle="none", clip_on=False,
                transform=ax.get_xaxis_transform())  # fmt: skip
    names = [f"{mark.name}\n{mark.text}" if is_wide else mark.text.replace(" to ", " to\n") for mark in near]
    labels = [_draw_mark(ax, mark, words) for mark, words in zip(near, names, strict=True)]
    if fit is not None and fit.growth is not None and boundary is not None:
        labels += _draw_fit(ax, step_N, fit, boundary)
    _write_labels(ax, labels)
    _label_axes(ax, rows)
    return off_axis


def _scaled(
    ax: Axes, rows: pd.DataFrame, marks: Sequence[Mark], boundary: Interval | None = None
) -> tuple[list[Mark], list[Mark]]:
    """Scale the axis of a metric to values, intervals and what is near them; returns the marks on it and off it."""
    value_N, low_N, high_N = (rows[name].to_numpy(np.float64) for name in _VALUES)
    is_log = _asks_for_log(str(rows["metric"].iloc[0]), value_N)
    seen_N = value_N if is_log else np.append(value_N, high_N)
    near = [mark for mark in marks if any(_is_near(end, seen_N, is_log) for end in (mark.value, mark.highest))]
    lines = [end for mark in near for end in (mark.value, mark.highest)]
    lines += [boundary.value] if boundary is not None and _is_near(boundary.value, value_N) else []
    _scale(ax, value_N, low_N, high_N, lines, is_log)
    return near, [mark for mark in marks if mark not in near]


def _draw_mark(ax: Axes, mark: Mark, words: str) -> _Label:
    if mark.high is None:
        ax.axhline(mark.value, color=GREY, linewidth=1.0, linestyle=(0, (1, 2)))
    else:
        ax.axhspan(mark.value, mark.high, color=GREY, alpha=0.18, linewidth=0)
    return _Label(math.sqrt(mark.value * mark.highest), words, GREY)


def _label_axes(ax: Axes, rows: pd.DataFrame) -> None:
    first, last = rows["step"].min(), rows["step"].max()
    if first == last:
        ax.set_xlim(first - 1, first + 1)
    ax.set_xlabel("training step")
    ax.set_ylabel(_unit(str(rows["unit"].iloc[0])) + (", log axis" if ax.get_yscale() == "log" else ""))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.grid(axis="x", visible=False)


def _asks_for_log(metric: str, value_N: Float64) -> bool:
    """Growth is exponential, so mismatch stands on a log axis; a table's other columns only where they span much."""
    known = value_N[np.isfinite(value_N)]
    return bool(len(known) and (known > 0).all()) and (metric in KNOWN or known.max() > LOG_FROM * known.min())


def _is_none(rows: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Shares that no token showed: an open circle, below the upper bound that is not ruled out."""
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


def _is_near(value: float, value_N: Float64, is_log: bool = True) -> bool:
    """Whether a line at ``value`` is told from the axis and leaves the data their room."""
    known = value_N[np.isfinite(value_N) & (value_N > 0)]
    if not len(known) or value <= 0:
        return False
    if not is_log:
        return bool(known.max() / 20 <= value <= 1.5 * known.max())
    return bool(known.min() / MARK_REACH <= value <= known.max() * MARK_REACH)


def _scale(ax: Axes, value_N: Float64, low_N: Float64, high_N: Float64, lines: list[float], is_log: bool) -> None:
    """Room for data, intervals and lines; a lower bound near 0 does not decide a log axis."""
    value_N = np.where(np.isfinite(value_N), value_N, np.nan)
    known = np.append(value_N, lines)
    known = known[np.isfinite(known)]
    within = high_N[np.isfinite(high_N)]
    if is_log and len(known):
        within = np.minimum(within, BOUND_REACH * known.max())
    known = np.append(known, within)
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
                    textcoords="axes fraction", va="center", ha="left", color=label.colour,
                    annotation_clip=False)  # fmt: skip


def _unit(unit: str) -> str:
    return {"1": "share of tokens", "as given": "as given"}.get(unit, f"[{unit}]")


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


def _interval_note(trend: pd.DataFrame, metrics: Sequence[str], is_kl: bool) -> str:
    """Which metrics have an interval, and why the others have none."""
    without = {name: metric_rows(trend, name) for name in metrics}
    without = {name: rows for name, rows in without.items() if rows["value_ci_low"].isna().all()}
    words = "Bars or bands: 95 % intervals." if len(without) < len(metrics) else "No interval could be given."
    if without and len(without) < len(metrics):
        words += f" No interval: {', '.join(' '.join(title_of(name, is_kl).split()) for name in without)}."
    if np.isinf(trend["value"]).any():
        words += " Triangles at the top: infinite there."
    highest = trend.loc[_is_none(trend), "value_ci_high"].max()
    if math.isnan(highest):
        return words
    return f"{words} Open circles: no such token at that step; up to {sig(highest, 2)} is not ruled out."


def _mark_notes(marks: Sequence[Mark], off_axis: Sequence[Mark]) -> list[str]:
    """Where each mark is from; a number that several metrics share is named once."""
    if not marks:
        return []
    off = {(mark.text, mark.source): mark in off_axis for mark in sorted(marks, key=lambda mark: mark not in off_axis)}
    words = [f"{text} {source}{' (off the axis)' if is_off else ''}" for (text, source), is_off in off.items()]
    return [f"Dotted lines and grey bands: published by others, of other stacks, no thresholds: {'; '.join(words)}."]


def _fit_note(recurrence: Recurrence | None) -> str:
    if recurrence is None or recurrence.outcome != "grows":
        return ""
    return (
        "Dashed: fitted map delta' = (1 + a) delta − b without noise; blue: delta_c = 2 b / a with its 95 % interval. "
        "An equality model of a theorem that is an inequality; no offline number shows that training will be stable."
    )


def _still_note(trend: pd.DataFrame, metrics: Sequence[str], is_kl: bool) -> str:
    """Metrics of one value at every step, with it."""
    words = []
    for name in metrics:
        rows = metric_rows(trend, name)
        words.append(f"{' '.join(title_of(name, is_kl).split())} ({sig(rows['value'].dropna().iloc[0])})")
    return f"The same at every step, not drawn: {', '.join(words)}." if words else ""


def _left_out(metrics: Sequence[str]) -> str:
    return f"Not drawn: {', '.join(figure_text(name) for name in metrics)}." if metrics else ""
