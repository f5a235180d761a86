"""A gate: conditions held against a run's summary and findings, each met or not, with the numbers behind it.

Invariants: a number that was not measured meets no condition; error findings and tokens that were not scored fail every
gate unless they are allowed by name and by share.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from scipy import special

from moediag.analysis.metrics import METRICS, ONE, ZERO, Metric
from moediag.diagnosis.conditions import (
    COMPARISONS,
    ROUNDING_SCALE,
    SKIPPED,
    Comparison,
    Condition,
    Name,
    NoFindings,
    NotWorse,
    VerdictIn,
    evaluate,
    nameable,
    names_of,
    nearest,
    needs_baseline,
    parse,
    skipped_share,
)
from moediag.errors import RunError
from moediag.hygiene.findings import Finding
from moediag.hygiene.rules import RULES
from moediag.numbers import NONE, count, in_unit, percent, sig

Summary = Mapping[str, Any]

NO_ERRORS: Final = "no errors"
_ONE_SIDED: Final = 0.025
"""Chance that "significantly worse" is a false alarm: the share of a 95 % interval beyond one of its ends."""


@dataclass(frozen=True)
class Subject:
    """A run as a gate sees it.

    Args:
        label: what the run is called.
        summary: its summary.json.
        findings: what the rules of ``validate`` found in the arms of the summary, and the diagnosis in its pair.
    """

    label: str
    summary: Summary
    findings: Sequence[Finding] = ()

    @property
    def pair(self) -> Summary:
        """Summary of the main pair."""
        found: Summary = self.summary["pairs"][self.summary["main_pair"]]
        return found


@dataclass(frozen=True)
class Outcome:
    """One condition, met or not.

    Args:
        condition: as it was given.
        value: what was found, with its interval, in words.
        n: how many that is of; empty where nothing is counted.
        limit: what it was held against, and where that comes from.
        note: why it is not met where no number says so, or what to know beside it.
    """

    condition: str
    is_met: bool
    value: str
    n: str = ""
    limit: str = ""
    note: str = ""

    @property
    def line(self) -> str:
        """The outcome as one line."""
        limit = f"limit {self.limit}" if self.limit else ""
        words = "; ".join(filter(None, (", ".join(filter(None, (self.value, self.n))), limit, self.note)))
        return f"{'pass' if self.is_met else 'FAIL'}: {self.condition}: {words}"


@dataclass(frozen=True)
class Gate:
    """What a gate found."""

    label: str
    baseline: str | None
    verdict: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> list[Outcome]:
        """Conditions that are not met."""
        return [outcome for outcome in self.outcomes if not outcome.is_met]

    @property
    def is_passed(self) -> bool:
        """Whether every condition is met."""
        return not self.failed

    @property
    def line(self) -> str:
        """The result as one line."""
        n = count(len(self.outcomes), "condition")
        words = f"all {n} met" if self.is_passed else f"{len(self.failed)} of {n} not met"
        return f"{self.label}: {words}; verdict: {self.verdict['word']}"

    def record(self) -> dict[str, Any]:
        """The result as JSON has it."""
        return {
            "run": self.label,
            "baseline": self.baseline,
            "is_passed": self.is_passed,
            "verdict": self.verdict["word"],
            "conditions": [vars(outcome) for outcome in self.outcomes],
        }


def parse_conditions(texts: Iterable[str], allowed: Collection[str], *, has_baseline: bool) -> list[Condition]:
    """The conditions of a gate, ``no errors`` first.

    Raises:
        ConditionError: a condition cannot be read.
        RunError: one needs a baseline and there is none, or an allowed rule does not exist.
    """
    for rule in allowed:
        if rule not in RULES:
            raise RunError(
                f"--allow {rule}: expected the name of a rule (moediag validate --list-rules){nearest(rule, RULES)}"
            )
    conditions = [parse(text) for text in dict.fromkeys([NO_ERRORS, *texts])]
    for condition in conditions:
        if needs_baseline(condition) and not has_baseline:
            raise RunError(f"{condition.text!r} needs a baseline, found none; give --baseline RUN")
    return conditions


def judge(
    run: Subject,
    conditions: Iterable[Condition],
    baseline: Subject | None = None,
    *,
    allowed: Collection[str] = (),
    max_skipped: float = 0.0,
) -> Gate:
    """Hold conditions against a run.

    Args:
        baseline: the run that conditions call ``baseline``.
        allowed: rules whose findings do not count.
        max_skipped: share of response tokens [0..1] that may be without a log-probability of one side.
    """
    outcomes = [_skipped(run, max_skipped)]
    for condition in conditions:
        if isinstance(condition, Comparison):
            outcomes.append(_compared(condition, run, baseline))
        elif isinstance(condition, NoFindings):
            outcomes.append(_without_findings(condition, run, allowed))
        elif isinstance(condition, VerdictIn):
            outcomes.append(_of_verdict(condition, run))
        else:
            assert baseline is not None
            outcomes.append(_not_worse(condition, run, baseline))
    return Gate(run.label, None if baseline is None else baseline.label, run.summary["verdict"], tuple(outcomes))


def _skipped(run: Subject, max_skipped: float) -> Outcome:
    share, pair = skipped_share(run.pair), run.pair
    n = f"n = {count(pair['n_tokens'] + pair['n_unscored'], 'response token')}"
    limit = f"{percent(max_skipped)} ({'--max-skipped' if max_skipped else 'default; --max-skipped allows more'})"
    if share is None:
        return Outcome(f"{SKIPPED} <= {max_skipped:g}", False, NONE, n, limit, "no response token was compared")
    value = f"{percent(share)} ({count(pair['n_unscored'], 'token')} without a log-probability)"
    return Outcome(f"{SKIPPED} <= {max_skipped:g}", share <= max_skipped, value, n, limit)


def _without_findings(condition: NoFindings, run: Subject, allowed: Collection[str]) -> Outcome:
    found = [one for one in run.findings if one.level in condition.levels]
    counted = [one for one in found if one.rule not in allowed]
    left = sorted({one.rule for one in found if one.rule in allowed})
    note = f"allowed: {', '.join(left)}" if left else ""
    words = "; ".join(one.line() for one in counted)
    value = f"{count(len(counted), 'finding')}{f': {words}' if counted else ''}"
    return Outcome(condition.text, not counted, value, "", "0 findings", note)


def _of_verdict(condition: VerdictIn, run: Subject) -> Outcome:
    verdict = run.summary["verdict"]
    is_met = (verdict["word"] in condition.words) == condition.is_inside
    limit = f"{'' if condition.is_inside else 'none of: '}{', '.join(condition.words)}"
    reason = "" if is_met else f" ({verdict['reason']})"
    return Outcome(condition.text, is_met, f"{verdict['word']}{reason}", "", limit)


def _compared(condition: Comparison, run: Subject, baseline: Subject | None) -> Outcome:
    def value_of(name: Name) -> float:
        subject = baseline if name.is_baseline else run
        assert subject is not None
        found = name.of.value(subject.summary, name.part)
        return math.nan if found is None else found

    value, limit = (evaluate(side, value_of) for side in (condition.value, condition.limit))
    is_known = not math.isnan(value) and not math.isnan(limit)
    missing = [name for name in condition.names if math.isnan(value_of(name))]
    notes = [_why_missing(name, baseline if name.is_baseline else run) for name in missing]
    if not is_known and not missing:
        notes.append("no number: a division by zero, or infinity less infinity")
    alone = condition.value if isinstance(condition.value, Name) else None
    unit = alone.of.unit if alone else ""
    n, words = "", _value_words(value, unit)
    if alone is None:
        words += _named_values(names_of(condition.value), value_of)
    elif alone.of.metric is not None and not alone.part:
        subject = baseline if alone.is_baseline and baseline else run
        bounds = alone.of.metric.bounds(subject.pair)
        words += f" [{in_unit(bounds[0], unit)}, {in_unit(bounds[1], unit)}]" if bounds else " (no interval)"
        n = f"n = {_n_words(alone.of.metric, subject)}"
        if is_known and bounds and bounds[0] <= limit <= bounds[1]:
            notes.append("the interval contains the limit")
    limit_names = names_of(condition.limit)
    source = f"{condition.limit_text}{_named_values(limit_names, value_of)}" if limit_names else "given"
    limit_words = f"{_value_words(limit, unit)} ({source})"
    is_met = is_known and COMPARISONS[condition.sign](value, limit)
    return Outcome(condition.text, is_met, words, n, limit_words, "; ".join(notes))


def _value_words(value: float, unit: str) -> str:
    return f"{in_unit(value, unit) if unit else sig(value)}{f' {unit}' if unit not in ('', '1', 'share') else ''}"


def _named_values(names: Sequence[Name], value_of: Any) -> str:
    """``, where NAME = VALUE UNIT, ...``; what a name stands for where that is no metric's own."""
    found = []
    for name in names:
        meaning = f" ({name.of.meaning})" if name.of.name == ROUNDING_SCALE else ""
        found.append(f"{name.text} = {_value_words(value_of(name), name.of.unit)}{meaning}")
    return f", where {', '.join(found)}" if found else ""


def _n_words(metric: Metric, subject: Subject) -> str:
    noun = {"choice": "(token, layer) pair"}.get(metric.counts, metric.counts)
    return f"{count(metric.n(subject.pair), noun)} of {count(subject.pair['n_prompts'], 'prompt')}"


def _why_missing(name: Name, subject: Subject | None) -> str:
    assert subject is not None
    of = f"{name.text} of {subject.label}"
    metric, pair = name.of.metric, subject.pair
    if metric is None or name.part in ("floor", "rounding"):
        return f"{of} was not measured (moediag profile and capture train-perturbed measure floors and rounding)"
    if name.part:
        return f"{of} is not known: {metric.note or 'no interval, too few prompts or none that covers'}"
    group = metric.path[0]
    reason = (pair.get("left_out") or {}).get(group) or (
        "" if metric.is_measured(pair) else f"{group} was not captured"
    )
    return f"{of} was not measured{f': {reason}' if reason else ''}"


def _not_worse(condition: NotWorse, run: Subject, baseline: Subject) -> Outcome:
    """Of one metric, or of every headline metric with a floor of which the baseline has an interval."""
    headlines = [metric for metric in METRICS.values() if metric.is_headline and metric.floor]
    known = [metric for metric in headlines if metric.bounds(baseline.pair)]
    chosen = [condition.metric] if condition.metric else known
    shared = f", level shared by {count(len(chosen), 'metric')}" if len(chosen) > 1 else ""
    limit = f"{baseline.label} (95 % intervals of both runs, one-sided{shared})"
    found = [_against(metric, run, baseline, len(chosen)) for metric in chosen]
    is_met = bool(found) and all(is_fine for is_fine, _ in found)
    shown = [words for is_fine, words in found if is_fine == is_met]
    unknown = [".".join(metric.path) for metric in headlines if metric not in chosen and metric.value(baseline.pair)]
    notes = (
        [f"not compared, the baseline has no interval: {', '.join(unknown)}"]
        if not condition.metric and unknown
        else []
    )
    prompts = [(one.summary["provenance"].get("prompts") or {}).get("data_sha256") for one in (run, baseline)]
    if prompts[0] != prompts[1]:
        notes.append("other prompts than the baseline's: the metrics differ for that, too")
    value, n = "; ".join(shown) or "no metric to compare", f"n = {_n_of(run)} against {_n_of(baseline)}"
    return Outcome(condition.text, is_met, value, n, limit, "; ".join(notes))


def _n_of(subject: Subject) -> str:
    return f"{count(subject.pair['n_tokens'], 'token')} of {count(subject.pair['n_prompts'], 'prompt')}"


def _against(metric: Metric, run: Subject, baseline: Subject, n_metrics: int) -> tuple[bool, str]:
    """Whether the run's metric is not worse, and both values in words."""
    name, unit = ".".join(metric.path), metric.shown_unit
    both = [(one, metric.value(one.pair), metric.bounds(one.pair)) for one in (run, baseline)]
    for subject, value, bounds in both:
        if value is None or bounds is None:
            why = _why_missing(Name(name, nameable()[name], "" if value is None else "low"), subject)
            return False, f"{why}: whether it is worse cannot be decided"
    words = " against ".join(
        f"{in_unit(value, unit)} [{', '.join(in_unit(end, unit) for end in bounds or ())}]" for _, value, bounds in both
    )
    distances = [_from_best(metric, float(value or 0), bounds or [0, 0]) for _, value, bounds in both]
    is_worse = worse_by(*distances, n_metrics=n_metrics) > 0
    return not is_worse, f"{name} {_value_unit(words, unit)}{': significantly worse' if is_worse else ''}"


def _value_unit(words: str, unit: str) -> str:
    return words if unit in ("1", "share") else f"{words} {unit}"


def _from_best(metric: Metric, value: float, bounds: Sequence[float]) -> tuple[float, float, float]:
    """Value and interval of the distance from the best value; a metric whose good end is low is one itself."""
    if metric.direction not in (ZERO, ONE):
        return value, bounds[0], bounds[1]
    best = 1.0 if metric.direction == ONE else 0.0
    low, high = sorted(abs(end - best) for end in bounds)
    return abs(value - best), 0.0 if bounds[0] <= best <= bounds[1] else low, high


def worse_by(run: tuple[float, float, float], baseline: tuple[float, float, float], *, n_metrics: int = 1) -> float:
    """Lower end of the interval of run - baseline, larger being worse; above 0 = significantly worse.

    Not the bare difference, and not whether two intervals overlap, which would miss differences of 1.4 standard errors
    more than a test does. Both runs are taken as independent; on the same prompts they agree more than that, and false
    alarms are fewer.

    Args:
        run, baseline: value, lower and upper end of its 95 % interval.
        n_metrics: metrics looked at together, which share the level (Bonferroni, normal quantiles).

    Source: Zou and Donner, Construction of confidence limits about effect measures (Stat. Med. 27, 2008), eq. 2: the
    limits of a difference from those of both values.

    Example:
        >>> round(worse_by((0.30, 0.27, 0.33), (0.20, 0.18, 0.22)), 4)
        0.0639
    """
    stretch = float(special.ndtri(1 - _ONE_SIDED / n_metrics) / special.ndtri(1 - _ONE_SIDED))
    below, above = run[0] - run[1], baseline[2] - baseline[0]
    return run[0] - baseline[0] - stretch * math.hypot(below, above)
