"""Token frame, metrics and tail curve against plain loops; unscored tokens are excluded and counted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import make_block, make_pair

from moediag.analysis import Tokens, logp_metrics, tail_curve, token_frame
from moediag.statistics.intervals import LARGE_SHARE


def _value(metrics: pd.DataFrame, name: str) -> float:
    return float(metrics.set_index("metric").loc[name, "value"])


def test_token_frame_equals_a_loop_over_tokens() -> None:
    block = make_block(n_layers=4)
    tokens = token_frame(make_pair(block))
    assert len(tokens) == len(block)
    for t in range(0, len(block), 7):
        flips = [
            layer
            for layer in range(4)
            if set(block.expert_ids_train_TLK[t, layer]) != set(block.expert_ids_infer_TLK[t, layer])
        ]
        row = tokens.iloc[t]
        assert row["n_flipped_layers"] == len(flips)
        assert row["first_flipped_layer"] == (flips[0] if flips else -1)
        assert row["logp_train"] == block.logp_train_T[t]


def test_token_frame_of_dense_and_of_partly_routed_rows() -> None:
    assert (token_frame(make_pair(make_block(dense=True)))["n_flipped_layers"] == -1).all()
    block = make_block()
    block.expert_ids_infer_TLK[3, 1] = -1
    row = token_frame(make_pair(block)).iloc[3]
    assert (row["n_flipped_layers"], row["first_flipped_layer"]) == (-1, -1)


def test_metrics_equal_a_plain_loop() -> None:
    block = make_block(diff_scale=0.4)
    metrics = logp_metrics(token_frame(make_pair(block)))
    pairs = [(float(a), float(b)) for a, b in zip(block.logp_train_T, block.logp_infer_T, strict=True)]
    diffs = [a - b for a, b in pairs]
    n = len(diffs)
    probs = [abs(math.exp(a) - math.exp(b)) for a, b in pairs]
    expected = {
        "abs_logp_diff.mean": sum(map(abs, diffs)) / n,
        "abs_logp_diff.p90": np.quantile(np.abs(diffs), 0.9),
        "abs_logp_diff.max": max(map(abs, diffs)),
        "abs_prob_diff.mean": sum(probs) / n,
        "abs_prob_diff.max": max(probs),
        "abs_prob_diff.std": pd.Series(probs).std(),
        "kl_infer_train_k1": -sum(diffs) / n,
        "kl_infer_train_k2": sum(d * d / 2 for d in diffs) / n,
        "kl_infer_train_k3": sum(math.exp(d) - 1 - d for d in diffs) / n,
        "mean_ratio": sum(map(math.exp, diffs)) / n,
        "extreme_share_2": sum(max(math.exp(d), math.exp(-d)) > 2 for d in diffs) / n,
        "prob_mult_error": sum(math.exp(abs(d)) for d in diffs) / n,
        "pearson_p": np.corrcoef(np.exp(pairs).T)[0, 1],
        "ess_token": sum(map(math.exp, diffs)) ** 2 / (n * sum(math.exp(2 * d) for d in diffs)),
        "chi2_token": sum(math.exp(2 * d) for d in diffs) / n - 1,
    }
    sequences = [[d for d, s in zip(diffs, block.seq_id_T, strict=True) if s == q] for q in sorted(set(block.seq_id_T))]
    expected["log_ppl_gap"] = np.mean([-np.mean(s) for s in sequences])
    expected["log_ppl_abs_gap"] = np.mean([abs(np.mean(s)) for s in sequences])
    expected["chi2_sequence"] = np.mean([math.exp(2 * sum(s)) - 1 for s in sequences])
    for name, value in expected.items():
        assert _value(metrics, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_k3_of_tiny_diffs_is_not_rounding_noise() -> None:
    """exp(d) - 1 - d at d = 1e-6 loses every digit; expm1 keeps k3 = d^2 / 2."""
    block = make_block()
    infer_T = np.full(len(block), -(2.0**-20), np.float32)
    block = replace(block, logp_infer_T=infer_T, logp_train_T=infer_T * 2)
    assert _value(logp_metrics(token_frame(make_pair(block))), "kl_infer_train_k3") == pytest.approx(2.0**-41, rel=1e-4)


@pytest.mark.parametrize("absent", [np.nan, -np.inf])
def test_unscored_tokens_are_excluded_and_counted(absent: float) -> None:
    block = make_block()
    block.logp_train_T[::3] = absent
    block.logp_infer_T[1] = np.nan
    tokens = token_frame(make_pair(block))
    kept = Tokens(tokens).rows
    metrics = logp_metrics(tokens)
    assert (metrics["n_tokens"] == len(kept)).all()
    assert _value(metrics, "abs_logp_diff.mean") == pytest.approx(
        np.mean(np.abs(kept["logp_train"].astype(float) - kept["logp_infer"].astype(float)))
    )
    pd.testing.assert_frame_equal(metrics, logp_metrics(kept))


def test_all_unscored_is_nan_with_n_0_and_a_reason() -> None:
    block = make_block()
    block.logp_train_T[:] = np.nan
    metrics = logp_metrics(token_frame(make_pair(block)))
    assert metrics["value"].isna().all()
    assert (metrics["n_tokens"] == 0).all()
    assert metrics["note"].str.len().min() > 0
    curve = tail_curve(token_frame(make_pair(block)))
    assert curve["share_above"].isna().all()


def test_max_has_no_interval_and_says_so() -> None:
    row = logp_metrics(token_frame(make_pair(make_block()))).set_index("metric").loc["abs_logp_diff.max"]
    assert np.isnan(row["ci_low"])
    assert "maximum" in row["note"]


def test_tail_curve_counts_strictly_above() -> None:
    block = make_block(diff_scale=0.3)
    tokens = token_frame(make_pair(block))
    abs_diff = np.abs(block.logp_train_T.astype(float) - block.logp_infer_T.astype(float))
    thresholds = np.sort([0.0, abs_diff[5], 0.1, math.log(2), 50.0])
    curve = tail_curve(tokens, thresholds)
    assert curve["n_above"].tolist() == [sum(d > t for d in abs_diff) for t in thresholds]
    headline = tail_curve(tokens).set_index("threshold").loc[math.log(2), "share_above"]
    assert headline == _value(logp_metrics(tokens), "extreme_share_2")


def test_absurd_diffs_give_infinity_not_a_warning() -> None:
    block = make_block()
    block.logp_infer_T[0] = -2000.0
    metrics = logp_metrics(token_frame(make_pair(block)))
    assert _value(metrics, "mean_ratio") == math.inf
    assert np.isfinite(_value(metrics, "ess_token"))


def test_the_largest_prompts_share_is_that_of_a_plain_loop() -> None:
    """Of every mean over tokens, k1 by size and the mean ratio by what it is off 1; of no rate and no quantile."""
    block = make_block(n_prompts=12)
    logp_train_T = block.logp_train_T.copy()
    is_first_T = block.prompt_id_T == block.prompt_id_T[0]
    logp_train_T[is_first_T] -= np.float32(0.5)
    tokens = token_frame(make_pair(replace(block, logp_train_T=logp_train_T)))
    found = logp_metrics(tokens).set_index("metric")["largest_prompt_share"]
    of = {
        "kl_infer_train_k1": lambda d: -d,
        "kl_infer_train_k3": lambda d: math.exp(d) - 1 - d,
        "mean_ratio": lambda d: math.exp(d) - 1,
    }
    for metric, value in of.items():
        sums: dict[int, float] = {}
        for row in Tokens(tokens).rows.itertuples():
            d = float(row.logp_train) - float(row.logp_infer)
            sums[row.prompt_id] = sums.get(row.prompt_id, 0.0) + value(d)
        sizes = [abs(one) for one in sums.values()]
        assert found[metric] == pytest.approx(max(sizes) / sum(sizes))
        assert found[metric] > LARGE_SHARE
    assert found[["extreme_share_2", "abs_logp_diff.p99", "abs_logp_diff.max"]].isna().all()
