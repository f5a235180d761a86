"""The gradient audit on a simulation's page and in its sentences: which correction points the update the right way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pandas as pd

from moediag.analysis.gradients import HEADLINE
from moediag.figures.numbers import count, is_number
from moediag.report.blocks import Block, Picture, Section, section
from moediag.report.tables import declared_table, records

Row = Mapping[str, Any]

_REFERENCES: Final = {
    "sequence_is": "sequence-level importance weighting",
    "exact": "the exact gradient under both engines' full distributions",
}


def audit_section(frames: Mapping[str, pd.DataFrame], pictures: Mapping[str, Picture]) -> Section | None:
    """Figures and tables of the audit; None where none was made."""
    if "gradient_audit" not in frames:
        return None
    shown: list[Block] = [picture for name, picture in pictures.items() if name.startswith("gradient")]
    shown.append(declared_table("gradient_audit", frames["gradient_audit"][list(HEADLINE)]))
    shown.append(declared_table("gradient_references", frames["gradient_references"]))
    return section("gradients", "Which correction points the update the right way?", *shown)


def audit_words(audit: pd.DataFrame | None) -> list[str]:
    """Per parameter group and reference: the cosine of no correction, and which corrections are told apart from it."""
    if audit is None:
        return []
    said = []
    for (group, reference), part in audit.groupby(["group", "reference"], sort=False):
        uncorrected = records(part[part["method"] == "none"])
        if reference not in _REFERENCES or not uncorrected:
            continue
        row = uncorrected[0]
        cosine = _near_one(row["batch_cosine"]) + _bounds(row, "batch_cosine", _near_one)
        said.append(
            f"Gradient audit of {group} against {_REFERENCES[reference]}, {count(int(row['n_prompts']), 'prompt')}: "
            f"cosine {cosine} without correction; {_told_apart(part)}."
        )
    return said


def _told_apart(part: pd.DataFrame) -> str:
    low, high = part["batch_cosine_change_ci_low"], part["batch_cosine_change_ci_high"]
    some = part[((low > 0) | (high < 0)) & (part["method"] != "none")]
    if some.empty:
        return "no correction is told apart from that"
    each = [
        f"{row['method']} {_signed(row['batch_cosine_change'])}{_bounds(row, 'batch_cosine_change', _signed)}"
        for row in records(some)
    ]
    return f"changed by {', '.join(each)}"


def _bounds(row: Row, name: str, words: Any) -> str:
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    return f" (95 %: {words(low)} to {words(high)})" if is_number(low) and is_number(high) else ""


def _signed(change: float) -> str:
    return f"{change:+.2g}"


def _near_one(cosine: float) -> str:
    """Three digits; of a cosine that would round to 1, three digits of what is missing."""
    missing = 1 - cosine
    return f"1 - {missing:.2g}" if 0 < missing < 5e-4 else f"{cosine:.3f}"
