"""What the gradient audit says in words."""

from __future__ import annotations

import pandas as pd

from moediag.report.audit_section import audit_words


def audit(reference: str, **by_method: tuple[float, float, float, float]) -> pd.DataFrame:
    """Method -> (cosine, change, its bounds)."""
    return pd.DataFrame(
        [
            {
                "group": "lm_head", "reference": reference, "method": method, "n_prompts": 8, "batch_cosine": cosine,
                "batch_cosine_ci_low": cosine - 0.1, "batch_cosine_ci_high": cosine + 1e-5,
                "batch_cosine_change": change, "batch_cosine_change_ci_low": low, "batch_cosine_change_ci_high": high,
            }
            for method, (cosine, change, low, high) in by_method.items()
        ]
    )  # fmt: skip


def test_only_corrections_told_apart_from_none_are_named() -> None:
    nan = float("nan")
    frame = audit(
        "sequence_is",
        none=(0.9, 0.0, nan, nan), icepop=(0.95, 0.05, 0.01, 0.09), tis_token=(0.9, 0.0, -0.01, 0.01),
    )  # fmt: skip
    (words,) = audit_words(frame)
    assert "8 prompts: cosine 0.900 (95 %: 0.800 to 0.900) without correction" in words
    assert words.endswith("changed by icepop +0.05 (95 %: +0.01 to +0.09).")
    assert "no correction is told apart" in audit_words(frame[frame["method"] != "icepop"])[0]


def test_a_cosine_near_one_shows_what_is_missing_and_not_a_rounded_one() -> None:
    nan = float("nan")
    (words,) = audit_words(audit("exact", none=(1 - 2.7e-5, 0.0, nan, nan)))
    assert "cosine 1 - 2.7e-05" in words


def test_nothing_is_said_without_an_audit_or_without_its_base_line() -> None:
    assert audit_words(None) == []
    assert audit_words(audit("exact", icepop=(1.0, 0.0, -0.1, 0.1))) == []
