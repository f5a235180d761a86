"""Drift by position: bins against a loop, and a slope that survivors do not bias."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic import make_block, make_pair

from moediag.analysis.positions import drift_by_position, position_slope
from moediag.analysis.tokens import token_frame


def test_bins_equal_a_plain_loop() -> None:
    block = make_block(length=70, diff_scale=0.5)
    block.logp_train_T[5] = np.nan
    tokens = token_frame(make_pair(block))
    frame = drift_by_position(tokens, n_layers=3, bin_width=16)
    diff = np.abs(block.logp_train_T.astype(float) - block.logp_infer_T.astype(float))
    for _, row in frame.iterrows():
        inside = (block.position_T >= row["position_low"]) & (block.position_T <= row["position_high"])
        inside &= np.isfinite(diff)
        assert row["n_tokens"] == inside.sum()
        assert row["n_sequences"] == len(set(block.seq_id_T[inside]))
        assert row["abs_logp_diff_mean"] == pytest.approx(diff[inside].mean())
        assert row["abs_logp_diff_p90"] == pytest.approx(np.quantile(diff[inside], 0.9))
        assert row["extreme_share_2"] == pytest.approx((diff[inside] > np.log(2)).mean())
        assert row["flip_rate"] == pytest.approx(tokens["n_flipped_layers"].to_numpy()[inside].mean() / 3)


@pytest.mark.parametrize(("length", "width"), [(1, 1), (16, 1), (17, 2), (256, 16), (5000, 512)])
def test_default_bins_adapt_to_the_longest_response(length: int, width: int) -> None:
    block = make_block(n_prompts=1, samples=1, length=length, n_layers=1)
    block.position_T[:] = np.arange(len(block)) + length - len(block)
    frame = drift_by_position(token_frame(make_pair(block)))
    assert (frame["position_high"] - frame["position_low"] + 1 == width).all()
    assert len(frame) <= 16


def test_dense_has_no_flip_rate() -> None:
    assert drift_by_position(token_frame(make_pair(make_block(dense=True))))["flip_rate"].isna().all()


def test_slope_finds_the_truth_although_long_responses_differ() -> None:
    """Longer responses start lower: a slope through pooled tokens would have the wrong sign."""
    block = make_block(n_prompts=40, length=200)
    longest = np.bincount(block.seq_id_T)[block.seq_id_T]
    diff = 0.5 + 1e-4 * block.position_T - 0.002 * longest + 0.002 * np.sin(np.arange(len(block)))
    tokens = token_frame(make_pair(replace(block, logp_train_T=(block.logp_infer_T + diff).astype(np.float32))))
    slope = position_slope(tokens)
    assert slope.low < 0.1 < slope.high
    assert slope.value == pytest.approx(0.1, abs=0.02)
    assert np.polyfit(block.position_T, diff, 1)[0] < 0
    assert (slope.n_sequences, slope.n_tokens) == (80, len(block))


def test_slope_equals_dummy_variable_least_squares() -> None:
    block = make_block(diff_scale=0.3)
    diff = np.abs(block.logp_train_T.astype(float) - block.logp_infer_T.astype(float))
    dummies = (block.seq_id_T[:, None] == np.unique(block.seq_id_T)).astype(float)
    design = np.column_stack([block.position_T, dummies])
    expected = np.linalg.lstsq(design, diff, rcond=None)[0][0]
    assert position_slope(token_frame(make_pair(block))).value == pytest.approx(1000 * expected)


def test_responses_of_one_token_have_no_slope() -> None:
    slope = position_slope(token_frame(make_pair(make_block(length=1))))
    assert np.isnan(slope.value)
    assert (slope.n_tokens, slope.n_sequences, slope.note) == (0, 0, "no data")
