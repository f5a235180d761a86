"""The page of a trend, as blocks: the outcome and the picture first, then every metric, the assumptions and the limits.

Invariant: the page says what the fit assumes and what no offline number can show.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from moediag.figures.series import title_of
from moediag.hygiene.findings import Finding, headline
from moediag.hygiene.rules import NOTE
from moediag.numbers import NONE, count
from moediag.report.blocks import Block, Bullets, Page, Picture, Shell, Table, interval, number, section, table
from moediag.report.section_words import STABLE
from moediag.report.text import Markdown, plain


def trend_page(
    summary: Mapping[str, Any],
    steps: pd.DataFrame,
    findings: Sequence[Finding],
    figures: Sequence[Path],
    regenerate: Sequence[str] = (),
) -> Page:
    """The page of a series.

    Args:
        summary: :meth:`moediag.results.trend.Trend.summary`.
        steps: frame ``trend_by_step``.
        findings: what is wrong with the tokens or the steps.
        figures: files drawn for it; the page stands beside their folder.
        regenerate: the commands that make this page again.
    """
    fit = summary["recurrence"]
    name = title_of(fit["metric"] or "delta", summary["is_kl"])
    known = steps.dropna(subset=["value"])
    n_steps = count(steps["step"].nunique(), "step")
    lead: list[Block] = [
        *map(_prose, headline(findings)),
        Markdown(f"**{plain(name)}: {plain(fit['outcome'])}**"),
        Markdown(f"{_prose(fit['reason'][:1].upper() + fit['reason'][1:])}."),
        _ends_table(known, summary["is_kl"]),
    ]
    notes = [f"Steps: {summary['step_origin']}", *summary["notes"]]
    sections = [
        section("steps", "Every step", _steps_table(known, summary["is_kl"]),
                finding=f"{n_steps}, {count(known['metric'].nunique(), 'metric')}"),
        section("assumptions", "What the fit assumes", Bullets(tuple(map(_prose, summary["assumptions"]))),
                finding=count(len(summary["assumptions"]), "assumption")),
        section("limits", "What this cannot show", Bullets(tuple(map(_prose, summary["limits"]))), finding=STABLE),
        section("regenerate", "How to make this page again", Shell(tuple(regenerate)) if regenerate else None,
                finding="the command"),
    ]  # fmt: skip
    return Page(
        "Mismatch over training steps",
        (),
        next((Picture(path, *_PICTURE) for path in figures if path.suffix == ".png"), None),
        (Bullets(tuple(map(_prose, notes))),),
        tuple(part for part in sections if part is not None),
        tuple(lead),
        "What was read",
        plain(f"{n_steps}; {summary['step_origin']}"),
    )


def trends_page(
    summary: Mapping[str, Any],
    steps: pd.DataFrame,
    verdicts: Mapping[str, str],
    findings: Mapping[str, Sequence[Finding]],
    figures: Mapping[str, Path],
    metrics: Sequence[str],
    regenerate: Sequence[str] = (),
) -> Page:
    """The page of several runs side by side: a verdict line per run, then a figure per metric.

    Args:
        summary: as :func:`moediag.results.trend.write_trends` seals it.
        steps: frame ``trend_by_step`` of all of them; ``source`` is the run.
        verdicts, findings: of every run, by its name.
        figures: metric -> its PNG; the page stands beside their folder.
        metrics: in their order, those without a figure, too.
        regenerate: the commands that make this page again.
    """
    is_kl, runs = summary["is_kl"], summary["runs"]
    known = steps.dropna(subset=["value"])
    above = {label: [one for one in some if one.level != NOTE] for label, some in findings.items()}
    lead: list[Block] = [
        *(Markdown(f"**{plain(label)}**: {_prose(words)}") for label, words in verdicts.items()),
        *(Markdown(f"{plain(label)}: {_prose(line)}") for label, some in above.items() for line in headline(some)),
        _runs_table(known, metrics[:1], list(runs), is_kl),
    ]
    pictures = {metric: Picture(path, title_of(metric, is_kl), _RUNS_PICTURE) for metric, path in figures.items()}
    remarks = [(label, f"steps: {one['step_origin']}") for label, one in runs.items()]
    remarks += [(label, note) for label, one in runs.items() for note in one["notes"]]
    remarks += [
        (label, f"{one.where}: {one.message}") for label, some in findings.items() for one in some if one.level == NOTE
    ]
    notes = of_runs(remarks, len(runs))
    rest = list(pictures)[1:]
    limits = dict.fromkeys(limit for one in runs.values() for limit in one["limits"])
    reasons = [f"{label}: {one['recurrence']['outcome']}: {one['recurrence']['reason']}" for label, one in runs.items()]
    sections = [
        *(section(f"metric-{nth}", title_of(metric, is_kl), pictures[metric],
                  finding=_runs_finding(known[known["metric"] == metric], list(runs)))
          for nth, metric in enumerate(rest, 2)),
        section("steps", "First and last step of every metric", _runs_table(known, metrics, list(runs), is_kl),
                finding=count(len(metrics), "metric")),
        section("compounds", "Does it compound?", Bullets(tuple(map(_prose, reasons))),
                finding="; ".join(f"{label}: {one['recurrence']['outcome']}" for label, one in runs.items())),
        section("limits", "What this cannot show", Bullets(tuple(map(_prose, limits))), finding=STABLE),
        section("regenerate", "How to make this page again", Shell(tuple(regenerate)) if regenerate else None,
                finding="the command"),
    ]  # fmt: skip
    return Page(
        "Mismatch over training steps, runs side by side",
        (),
        next(iter(pictures.values()), None),
        (Bullets(tuple(map(_prose, notes))),),
        tuple(part for part in sections if part is not None),
        tuple(lead),
        "What was read",
        plain("; ".join(f"{label}: {count(known.loc[known['source'] == label, 'step'].nunique(), 'step')}"
                        for label in runs)),
    )  # fmt: skip


def of_runs(remarks: Sequence[tuple[str, str]], n_runs: int) -> list[str]:
    """What is to be noted of runs, each once with the runs that it is about; what all share, without names.

    Example:
        >>> of_runs([("a", "x"), ("b", "x"), ("b", "y")], 2)
        ['x', 'b: y']
    """
    labels: dict[str, list[str]] = {}
    for label, words in remarks:
        labels.setdefault(words, []).append(label)
    return [words if len(some) == n_runs else f"{', '.join(some)}: {words}" for words, some in labels.items()]


def _runs_table(known: pd.DataFrame, metrics: Sequence[str], labels: Sequence[str], is_kl: bool) -> Table:
    """First and last step of metrics in every run, each with n and interval."""
    rows = []
    skipped = int(len(metrics) == 1)  # then it stands in the caption
    name = f"{title_of(metrics[0], is_kl)}, " if skipped else ""
    for metric in metrics:
        for label in labels:
            part = known[(known["metric"] == metric) & (known["source"] == label)]
            rows += [[label, *_row(row, is_kl)[skipped:5]] for _, row in part.iloc[[0, -1][: len(part)]].iterrows()]
    good = ", ".join(dict.fromkeys(known.loc[known["metric"].isin(metrics), "direction"]))
    return table(("run", *_HEADER[skipped:5]), rows, range(2 - skipped, 6), f"{name}first and last step ({good})",
                 is_list=len(rows) > 12, n_markdown=24)  # fmt: skip


def _runs_finding(rows: pd.DataFrame, labels: Sequence[str]) -> str:
    """The last value of a metric in every run."""
    unit = str(rows["unit"].iloc[0])
    last = {label: rows[rows["source"] == label].iloc[-1:] for label in labels}
    words = [f"{label} {number(row['value'].iloc[0], unit)}" for label, row in last.items() if len(row)]
    return f"at its last step: {', '.join(words)}"


_RUNS_PICTURE = "A line per run with its 95 % interval where one is known; dotted: published marks of other stacks."


def _prose(text: str) -> Markdown:
    """Sentences of any length as literal text: a line of user text would be cut."""
    return Markdown(" ".join(plain(part) for part in textwrap.wrap(text, 200)))


_PICTURE = (
    "Every metric by training step",
    "A panel per metric with its 95 % interval where one is known; dashed: published marks of other stacks.",
)
_HEADER = ("metric", "step", "value", "95 %", "tokens", "good end")


def _ends_table(known: pd.DataFrame, is_kl: bool) -> Table:
    """First and last step of every metric with n and interval."""
    ends = [part.iloc[[0, -1][: len(part)]] for _, part in known.groupby("metric", sort=False)]
    rows = [_row(row, is_kl)[:5] for part in ends for _, row in part.iterrows()]
    good = ", ".join(known["direction"].unique())
    return table(_HEADER[:5], rows, (1, 2, 3, 4), f"First and last step ({good})")


def _steps_table(known: pd.DataFrame, is_kl: bool) -> Table:
    """Every metric at every step."""
    rows = [_row(row, is_kl) for _, row in known.iterrows()]
    return table(_HEADER, rows, (1, 2, 3, 4), "Every metric at every step", is_list=len(rows) > 12, n_markdown=24)


def _row(row: pd.Series[Any], is_kl: bool) -> list[object]:
    unit = str(row["unit"])
    n = NONE if pd.isna(row["n_tokens"]) else f"{row['n_tokens']:,}"
    bounds = interval(row["value_ci_low"], row["value_ci_high"], unit)
    name = title_of(str(row["metric"]), is_kl) + ("" if unit == "1" else f" [{unit}]")
    return [name, str(row["step"]), number(row["value"], unit), bounds, n, row["direction"]]  # fmt: skip
