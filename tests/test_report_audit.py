"""What the gradient audit says in words."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from test_gradients_figures import METHODS, inner_products

from moediag.analysis.gradients import audit_frames
from moediag.report.audit_section import audit_words

NAN = math.nan


def frames(**changes: object) -> dict[str, pd.DataFrame]:
    """Frames of a made audit with some columns of its corrections set."""
    found = audit_frames(*inner_products(exact=True))
    is_corrected = found["gradient_audit"]["method"] != "none"
    for column, value in changes.items():
        found["gradient_audit"].loc[is_corrected, column] = value
    return found


def test_what_a_reference_can_carry_stands_beside_it() -> None:
    """Sequence weighting was called the unbiased answer whatever its effective sample size and its signal."""
    sequence, exact = audit_words(frames())
    assert "against sequence-level importance weighting (16 prompts, effective sample size" in sequence
    assert "of 32 sequences, signal to noise" in sequence
    assert "above its own noise" not in sequence
    assert "against the expected one-token gradient over infer's prefixes, summed (16 prompts, signal to noise" in exact


def test_corrections_are_named_under_their_verdict() -> None:
    words = audit_words(frames(cosine_change=0.05, cosine_change_ci_low=0.01, cosine_change_ci_high=0.09))[0]
    assert "nearer than that: icepop:alpha=0.5,beta=5 +0.05 (95 %: +0.01 to +0.09), tis_sequence" in words
    words = audit_words(frames(verdict="rounding", cosine_change=1e-4))[0]
    assert "no change beyond rounding (0.0002): icepop" in words


def test_a_reference_within_its_noise_tells_nothing_and_says_what_noise_gives() -> None:
    """Shuffled weights read as "changed by tis_sequence +0.059 [+0.01, +0.23]", of a reference without a signal."""
    record, arrays = inner_products()
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(arrays["prompt_B"]), 400))
    arrays["gram_lm_head_BB"] = vectors @ vectors.T
    found = audit_frames(record, arrays)
    (words,) = audit_words(found)
    assert "no direction above its own noise" in words
    row = found["gradient_audit"].set_index(["reference", "method"]).loc[("sequence_is", METHODS[2])]
    alone, batch = f"{row['noise_cosine']:.3f}", f"{row['batch_cosine']:.3f}"
    assert "where noise alone gives" in words
    assert "cannot tell whether nearer or farther than that: icepop" in words
    assert f"{METHODS[2]} (this batch {batch}, noise alone {alone})" in words
    assert "95 %" not in words


def test_a_change_without_an_interval_is_not_called_no_difference() -> None:
    """Against the exact reference no change had an interval, and the page said that none is distinguished."""
    words = audit_words(frames(verdict="no interval", cosine_change_ci_low=NAN, cosine_change_ci_high=NAN))[1]
    assert "; no interval: icepop" in words
    assert "on these very prefixes +" in words
    assert "distinguished" not in words


def test_a_cosine_near_one_shows_what_is_missing_and_not_a_rounded_one() -> None:
    found = frames()
    found["gradient_audit"]["cosine"] = 1 - 2.7e-5
    assert "cosine 1 - 2.7e-05" in audit_words(found)[1]


def test_nothing_is_said_without_an_audit_or_without_its_base_line() -> None:
    assert audit_words({}) == []
    found = frames()
    found["gradient_audit"] = found["gradient_audit"].query("method != 'none'")
    assert audit_words(found) == []
