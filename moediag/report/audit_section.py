"""The gradient audit on a simulation's page and in its sentences: which correction points the update the right way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pandas as pd

from moediag.analysis.gradients import CANNOT_TELL, EXACT, HEADLINE, IS_ROUNDING, NO_INTERVAL, ROUNDING, SAME
from moediag.numbers import count, is_number, sig
from moediag.report.blocks import Block, Picture, Section, section
from moediag.report.tables import frame_table, records

Row = Mapping[str, Any]

_REFERENCES: Final = {
    "sequence_is": "sequence-level importance weighting",
    EXACT: "the expected one-token gradient over infer's prefixes, summed",
}


def audit_section(frames: Mapping[str, pd.DataFrame], pictures: Mapping[str, Picture]) -> Section | None:
    """Figures and tables of the audit; None where none was made."""
    if "gradient_audit" not in frames:
        return None
    shown: list[Block] = [picture for name, picture in pictures.items() if name.startswith("gradient")]
    shown.append(frame_table("gradient_audit", frames["gradient_audit"][list(HEADLINE)]))
    shown.append(frame_table("gradient_references", frames["gradient_references"]))
    title = "Which correction points the update the right way?"
    return section("gradients", title, *shown, finding=next(iter(audit_words(frames)), ""))


def audit_words(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    """Per parameter group and reference: what the reference can carry, the cosine without correction, the verdicts."""
    if "gradient_audit" not in frames:
        return []
    lines = []
    references = {(row["group"], row["reference"]): row for row in records(frames["gradient_references"])}
    for key, part in frames["gradient_audit"].groupby(["group", "reference"], sort=False):
        group, reference = map(str, key)
        uncorrected = records(part[part["method"] == "none"])
        if reference not in _REFERENCES or not uncorrected:
            continue
        lines.append(
            f"Gradient audit of {group} against {_REFERENCES[reference]} "
            f"({_carries(references[group, reference])}): {_cosine_words(uncorrected[0])} without correction; "
            f"{_verdict_words(part, uncorrected[0])}."
        )
    return lines


def _carries(row: Row) -> str:
    """What stands behind a reference: prompts, signal to noise, and effective sequences where weights take them."""
    signal = f"signal to noise {sig(row['signal_to_noise'], 2)}"
    ess = f"effective sample size {sig(row['ess'], 3)} of {count(row['n_sequences'], 'sequence')}"
    facts = [count(row["n_prompts"], "prompt"), *([ess] if is_number(row["ess"]) else []), signal]
    if not is_number(row["norm"]):
        facts.append("no direction above its own noise")
    return ", ".join(facts)


def _cosine_words(row: Row) -> str:
    if is_number(row["cosine"]):
        own = f" and {_near_one(row['batch_cosine'])} on these very prefixes" if row["reference"] == EXACT else ""
        return f"cosine {_near_one(row['cosine'])}{_bounds(row, 'cosine', _near_one)}, noise removed,{own}"
    if not is_number(row["batch_cosine"]):
        return f"no cosine ({row['note']})"
    return (
        f"cosine of this batch {_near_one(row['batch_cosine'])}, where noise alone gives "
        f"{_near_one(row['noise_cosine'])},"
    )


def _verdict_words(part: pd.DataFrame, uncorrected: Row) -> str:
    """Every correction under its verdict, with the change or, below the noise, what noise alone gives."""
    found: dict[str, list[str]] = {}
    for row in records(part[part["method"] != "none"]):
        found.setdefault(row["verdict"], []).append(f"{row['method']}{_evidence(row, uncorrected)}")
    title = {
        CANNOT_TELL: "cannot tell whether nearer or farther than that",
        IS_ROUNDING: f"no change beyond rounding ({ROUNDING:g})",
        SAME: "the same direction as that",
        NO_INTERVAL: "no interval",
    }
    lines = [f"{title.get(verdict, f'{verdict} than that')}: {', '.join(each)}" for verdict, each in found.items()]
    return "; ".join(lines) or "no other correction was audited"


def _evidence(row: Row, uncorrected: Row) -> str:
    """The change; with the one-token reference, which samples no token, also the exact one on these very prefixes."""
    if row["verdict"] == SAME:
        return ""
    if is_number(row["cosine_change"]):
        own = row["batch_cosine"] - uncorrected["batch_cosine"]
        words = f", on these very prefixes {own:+.2g}" if row["reference"] == EXACT else ""
        return f" {row['cosine_change']:+.2g}{_bounds(row, 'cosine_change', '{:+.2g}'.format)}{words}"
    if not is_number(row["batch_cosine"]):
        return ""
    return f" (this batch {_near_one(row['batch_cosine'])}, noise alone {_near_one(row['noise_cosine'])})"


def _bounds(row: Row, name: str, words: Any) -> str:
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    return f" (95 %: {words(low)} to {words(high)})" if is_number(low) and is_number(high) else ""


def _near_one(cosine: float) -> str:
    """Three digits; of a cosine that would round to 1, two digits of what is missing."""
    missing = 1 - cosine
    return f"1 - {missing:.2g}" if 1e-12 < missing < 5e-4 else f"{cosine:.3f}"
