"""The mismatch over training steps, from sources to results on disk: frame, summary, figure, pages."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from moediag.analysis.series import KL_METRICS, MARKS, delta_metric, trend_recurrence
from moediag.figures.series import plot_trend, plot_trends, title_of, trend_finding
from moediag.figures.style import formats, save_figure
from moediag.folder import SUMMARY, records, result_folder, write_frames
from moediag.hygiene.findings import Finding, by_level, headline
from moediag.hygiene.rules import NOTE
from moediag.hygiene.series import Schedule, check_series
from moediag.importers.rollouts import Options
from moediag.notation import SCHEMA_VERSION
from moediag.numbers import sig
from moediag.report.trend_page import of_runs, trend_page, trends_page
from moediag.results.report import write_pages
from moediag.results.trend_sources import TrendSource, read_trend
from moediag.run.files import write_sealed
from moediag.statistics.recurrence import ASSUMPTIONS, Recurrence

KIND: Final = "moediag trend"
RUNS_KIND: Final = "moediag trend of several runs"
MOST_FIGURES: Final = 16
"""Metrics of several runs that are drawn; the others stand in the table."""

LIMITS: Final = (
    "The theorem is an inequality (Ring-1T, arXiv 2510.18855, appendix); what is fitted is an equality model, "
    "delta' = (1 + a) delta - b + noise, with a = eta mu and b = kappa mu.",
    "delta_c = 2 b / a is an estimate under the assumptions listed, all of which may fail.",
    "No offline number shows that training will be stable: neither a small delta nor a refused fit does.",
    "k3 of forced text is a statistic and no KL; nor are k1 and k3 of tokens sampled with truncation or another "
    "temperature.",
    "Published numbers are named marks of other stacks, often of one run, and no thresholds.",
)


@dataclass(frozen=True)
class Given:
    """What the caller knows of the training, instead of the table's columns.

    Args:
        lr: learning rate of every step.
        restarts: steps that are the first after a restart of the rollout engine.
    """

    lr: float | None = None
    restarts: frozenset[int] | None = None

    def over(self, schedule: Schedule, steps: Iterable[int]) -> Schedule:
        """A schedule with what is given in its place."""
        rates = schedule.learning_rates if self.lr is None else dict.fromkeys(steps, self.lr)
        return Schedule(rates, schedule.restarts if self.restarts is None else self.restarts)


OnStage = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Trend:
    """A series, the metric that is delta in it, how it grows, and what is wrong with its tokens or its steps."""

    source: TrendSource
    delta: str | None
    recurrence: Recurrence
    findings: tuple[Finding, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Strict JSON: steps by metric, the fit, how it was read, and what it cannot show."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "step_origin": self.source.step_origin,
            "notes": list(self.source.notes),
            "findings": [found.record() for found in self.findings],
            "is_kl": self.source.is_kl,
            "metrics": {
                metric: records(rows.drop(columns="metric"))
                for metric, rows in self.source.trend.groupby("metric", sort=False)
            },
            "recurrence": {"metric": self.delta, **self.recurrence.record()},
            "marks": [vars(mark) for mark in MARKS if mark.metric in set(self.source.trend["metric"])],
            "assumptions": list(ASSUMPTIONS),
            "limits": list(LIMITS),
        }


def measure_trend(
    targets: Sequence[Path],
    steps: Sequence[int] | None,
    metric: str | None,
    on_stage: OnStage = lambda *done: None,
    options: Options | None = None,
    given: Given = Given(),
) -> Trend:
    """Read the series and fit the recurrence, or say why it cannot tell.

    Args:
        targets: run directories, one per step, or one table.
        steps: of the runs, in order; None = from the folders' names.
        metric: the one that is delta; None = the best KL there is.
        on_stage: called with (done, of how much, unit).
        options: what is to be known of a framework's dump.
        given: the training's schedule, where the table does not have it.

    Raises:
        DumpError: the table or --steps cannot be used, or there is no such metric.
        RunError: a run cannot be read.
    """
    source = read_trend(targets, steps, on_stage, options)
    trend = source.trend
    if metric is None and not source.is_kl:  # k1 and k3 of forced text are no KL: only an exact one may be delta
        trend = trend[~trend["metric"].isin(KL_METRICS[1:])]
    delta = delta_metric(trend, metric)
    recurrence = trend_recurrence(trend, delta, lambda done, total: on_stage(done, total, "bounds"))
    schedule = given.over(source.schedule, map(int, trend["step"].unique()))
    found = by_level([*source.findings, *check_series(source.trend, schedule)])
    return Trend(source, delta, recurrence, tuple(found))


def trend_request(
    targets: Sequence[Path],
    steps: Sequence[int] | None,
    metric: str | None,
    output: Path,
    given: Given = Given(),
) -> dict[str, Any]:
    """What a trend in the folder answers, and must have answered to be replaced by this one without ``force``."""
    there = [os.path.relpath(target.resolve(), output.resolve()) for target in targets]
    names = ", ".join(target.resolve().name for target in targets)
    more: dict[str, Any] = {} if given.lr is None else {"lr": given.lr}
    more |= {} if given.restarts is None else {"restarts": sorted(given.restarts)}
    return {"of": names, "targets": there, "steps": None if steps is None else list(steps), "metric": metric, **more}


def write_trend(
    trend: Trend,
    output: Path,
    request: Mapping[str, Any],
    force: bool = False,
    pdf: bool = False,
    regenerate: Sequence[str] = (),
) -> list[Path]:
    """Write the folder, whole; returns report.html, report.md, summary.json and the figure's PNG.

    Args:
        regenerate: commands that make it again, for the page.
        request, force: as for :func:`~moediag.folder.refuse_other`.
        pdf: the figure as PDF, too.

    Raises:
        RunError: ``output`` holds something else, or a trend of another request and not ``force``.
    """
    source = trend.source
    sentences = " ".join(f"{note[0].upper()}{note[1:]}." for note in source.notes if len(note) < 200)
    caption = f"Steps: {source.step_origin}. {sentences}"
    with result_folder(output, KIND, request, force) as made:
        figure = plot_trend(
            source.trend, trend.recurrence, trend.delta, is_kl=source.is_kl, findings=trend.findings, caption=caption
        )
        figures = save_figure(figure, made / "figures", "trend", formats(pdf))
        write_pages(made, trend_page(trend.summary(), source.trend, trend.findings, figures, regenerate))
        frames = write_frames(made, {"trend_by_step": source.trend})
        write_sealed(made / SUMMARY, {**trend.summary(), "request": dict(request), "frames": frames})
    return [output / "report.html", output / "report.md", output / SUMMARY, output / "figures" / "trend.png"]


def measure_trends(
    targets: Mapping[str, Path],
    metric: str | None,
    on_stage: OnStage = lambda *done: None,
    options: Options | None = None,
    given: Given = Given(),
) -> dict[str, Trend]:
    """Several trainings, each a series of its own; arguments and errors as for :func:`measure_trend`."""
    return {label: measure_trend([path], None, metric, on_stage, options, given) for label, path in targets.items()}


def write_trends(
    trends: Mapping[str, Trend],
    output: Path,
    request: Mapping[str, Any],
    force: bool = False,
    pdf: bool = False,
    regenerate: Sequence[str] = (),
) -> list[Path]:
    """Write runs side by side: a page, a figure per metric, one frame whose ``source`` is the run's name.

    Returns report.html, report.md and summary.json; arguments and errors as for :func:`write_trend`.
    """
    is_kl = all(trend.source.is_kl for trend in trends.values())
    frames = {label: trend.source.trend.assign(source=label) for label, trend in trends.items()}
    every = pd.concat(list(frames.values()), ignore_index=True)
    metrics = _compared(every, [trend.delta for trend in trends.values()])
    with result_folder(output, RUNS_KIND, request, force) as made:
        figures = {}
        for metric in metrics[:MOST_FIGURES]:
            name = re.sub(r"[^a-z0-9]+", "-", f"{metrics.index(metric) + 1}-{metric.lower()}")[:60].strip("-")
            figure = plot_trends(frames, metric, is_kl=is_kl)
            figures[metric] = save_figure(figure, made / "figures", name, formats(pdf))[0]
        content = {
            "schema_version": SCHEMA_VERSION,
            "kind": RUNS_KIND,
            "is_kl": is_kl,
            "runs": {label: trend.summary() for label, trend in trends.items()},
        }
        verdicts = {label: verdict_line(trend) for label, trend in trends.items()}
        found = {label: trend.findings for label, trend in trends.items()}
        write_pages(made, trends_page(content, every, verdicts, found, figures, metrics, regenerate))
        written = write_frames(made, {"trend_by_step": every})
        write_sealed(made / SUMMARY, {**content, "request": dict(request), "frames": written})
    return [output / "report.html", output / "report.md", output / SUMMARY]


def _compared(every: pd.DataFrame, deltas: Sequence[str | None]) -> list[str]:
    """Metrics in the order of the page: delta, those published, the tail, flips, what corrections mask, the others.

    One that is the same at every step of every run is left out.
    """
    known = every.dropna(subset=["value"])
    metrics = [str(name) for name, rows in known.groupby("metric", sort=False) if rows["value"].nunique() > 1]
    first = {*(mark.metric for mark in MARKS), "abs_logp_diff.p99", "abs_logp_diff.max", "flip_rate"}

    def place(metric: str) -> int:
        is_of = (metric in deltas, metric in first, metric.startswith("masked_share."),
                 metric.startswith("masked_entropy."))  # fmt: skip
        return is_of.index(True) if True in is_of else len(is_of)

    return sorted(metrics, key=place)


def verdict_line(trend: Trend) -> str:
    """One run in a line: from where to where its delta went, and whether it compounds."""
    return ". ".join(trend_finding(trend.source.trend, trend.recurrence, trend.delta, trend.source.is_kl).split("\n"))


def trends_lines(trends: Mapping[str, Trend]) -> list[str]:
    """What the command prints of several runs: a verdict line per run, then its worst finding and its notes."""
    lines = [f"{label}: {verdict_line(trend)}" for label, trend in trends.items()]
    for label, trend in trends.items():
        lines += [f"{label}: {words}" for words in headline([one for one in trend.findings if one.level != NOTE])]
    remarks = [(label, note) for label, trend in trends.items() for note in trend.source.notes]
    lines += [f"Note: {words}" for words in of_runs(remarks, len(trends))]
    return [*lines, "", "What this cannot show:", *(f"- {limit}" for limit in LIMITS)]


def outcome_lines(trend: Trend) -> list[str]:
    """What the command prints: the worst finding, a line per metric, then the outcome and what it rests on."""
    worst = headline(trend.findings)
    lines = [*worst, *[""] * bool(worst)]
    for metric, rows in trend.source.trend.groupby("metric", sort=False):
        known = rows.dropna(subset=["value"])
        if len(known):
            lines.append(_line(title_of(str(metric), trend.source.is_kl), known))
    lines += [f"Note: {note}" for note in trend.source.notes]
    name = title_of(trend.delta, trend.source.is_kl) if trend.delta else "no metric"
    lines += ["", f"{trend.recurrence.outcome} ({name}): {trend.recurrence.reason}", ""]
    lines += ["The fit assumes:", *(f"- {assumption}" for assumption in ASSUMPTIONS), "What this cannot show:"]
    return [*lines, *(f"- {limit}" for limit in LIMITS)]


def _line(name: str, known: pd.DataFrame) -> str:
    ends = [known.iloc[0], known.iloc[-1]][: len(known)]
    unit = "" if str(ends[0]["unit"]) == "1" else f" {ends[0]['unit']}"
    return f"{name:<36} " + "  ->  ".join(f"{_value(row)}{unit} at step {row['step']}" for row in ends)


def _value(row: pd.Series) -> str:
    low, high = float(row["value_ci_low"]), float(row["value_ci_high"])
    bounds = f" [{sig(low)}, {sig(high)}]" if math.isfinite(low) and math.isfinite(high) else ""
    n = "" if pd.isna(row["n_tokens"]) else f" (n = {row['n_tokens']:,})"
    return f"{sig(float(row['value']))}{bounds}{n}"
