"""A run held against conditions: its summary as it was analysed, its diagnosis, and ``validate`` on its files now."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from moediag.diagnosis.gate import Gate, Subject, judge, parse_conditions
from moediag.errors import RunError
from moediag.hygiene import Finding, check_run
from moediag.report.gate_pages import gate_junit, gate_markdown
from moediag.results.load import load_summary
from moediag.results.report import label_of
from moediag.run.files import write_atomic
from moediag.run.reader import Run, open_run


def gate_run(
    run: Path,
    conditions: Iterable[str],
    baseline: Path | None = None,
    *,
    allowed: Collection[str] = (),
    max_skipped: float = 0.0,
    markdown: Path | None = None,
    junit: Path | None = None,
) -> Gate:
    """Hold conditions (:mod:`moediag.diagnosis.conditions`) against an analysed run.

    Args:
        baseline: an analysed run that conditions may name.
        allowed: rules whose findings do not count.
        max_skipped: share of response tokens [0..1] that may be without a log-probability.
        markdown, junit: files to write.

    Raises:
        ConditionError: a condition cannot be read.
        RunError: a run is not analysed, or cannot be read; a share outside [0, 1].
    """
    if not 0 <= max_skipped <= 1:
        raise RunError(f"--max-skipped {max_skipped:g}: expected a share in [0, 1]")
    parsed = parse_conditions(conditions, allowed, has_baseline=baseline is not None)
    opened = open_run(run)
    summary = load_summary(opened)
    other = None if baseline is None else _baseline(open_run(baseline))
    found = check_run(opened, arms=list(summary["arms"]))
    known = {(one.rule, one.where) for one in found}
    found += [one for one in _diagnosed(summary) if (one.rule, one.where) not in known]
    gate = judge(Subject(label_of(opened), summary, found), parsed, other, allowed=allowed, max_skipped=max_skipped)
    if markdown is not None:
        write_atomic(markdown, gate_markdown(gate).encode())
    if junit is not None:
        write_atomic(junit, gate_junit(gate))
    return gate


def _diagnosed(summary: dict[str, Any]) -> list[Finding]:
    """What the diagnosis found when the run was analysed."""
    causes = (summary.get("verdict") or {}).get("causes") or ()
    facts = ("level", "rule", "where", "message", "n", "n_of")
    return [Finding(**{name: one[name] for name in facts}) for one in causes]


def _baseline(run: Run) -> Subject:
    """The baseline's numbers; whether its data hold was for its own gate to find."""
    return Subject(label_of(run), load_summary(run))
