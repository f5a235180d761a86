"""Statistics of corrections against plain loops; masks by kind of token; what masks share; parts and chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from plain_corrections import clamped_exp, k3, plain_weights
from synthetic import make_block, make_pair

from moediag.analysis.tokens import Tokens, token_frame
from moediag.corrections import (
    METHODS,
    PRESETS,
    Terms,
    compare_corrections,
    distinct_corrections,
    masked_shares,
    parse_correction,
    sweep_by_band,
    weights,
)
from moediag.errors import MoediagError

ONE_EACH = {name: parse_correction(name) for name in METHODS}


def make_tokens(seed: int = 0, n_sequences: int = 30, unscored: bool = True, scale: float = 0.4) -> pd.DataFrame:
    """Sequences of unequal length, two per prompt, heavy-tailed log-ratios, everything known."""
    rng = np.random.default_rng(seed)
    length_S = rng.integers(1, 15, n_sequences)
    row_T = np.repeat(np.arange(n_sequences), length_S)
    n_tokens = len(row_T)
    infer_T = -rng.exponential(0.7, n_tokens)
    train_T = np.minimum(infer_T + scale * rng.standard_t(2, n_tokens), 0.0)
    if unscored:
        train_T[::13], infer_T[5::17], train_T[7::29] = np.nan, np.nan, -np.inf
    return pd.DataFrame(
        {
            "logp_train": train_T,
            "logp_infer": infer_T,
            "seq_id": row_T,
            "prompt_id": row_T // 2,
            "position": np.concatenate([np.arange(n) for n in length_S]),
            "advantage": rng.normal(size=n_sequences)[row_T],
            "entropy_infer": np.where(rng.random(n_tokens) < 0.1, np.nan, rng.exponential(0.5, n_tokens)),
            "logp_train_new": np.where(
                np.isnan(train_T), np.nan, np.nan_to_num(train_T) + 0.3 * rng.normal(size=n_tokens)
            ),
            "n_flipped_layers": rng.integers(-1, 5, n_tokens),
        }
    )


def weights_of(tokens: pd.DataFrame, name: str, **parameters: float) -> np.ndarray:
    """Weight of every row, from the arrays."""
    columns = (tokens[column] for column in ("logp_train", "logp_infer", "seq_id"))
    return weights(name, *columns, advantage=tokens["advantage"], **parameters)


def plain_statistics(tokens: pd.DataFrame, name: str, eps: float = 0.2) -> dict[str, float]:
    """Every statistic of one correction, token by token."""
    columns = {column: tokens[column].tolist() for column in tokens}
    train, infer, row, prompt, advantages = (
        columns[column] for column in ("logp_train", "logp_infer", "seq_id", "prompt_id", "advantage")
    )
    weight = plain_weights(name, train, infer, row, advantages, **METHODS[name].parameters)
    scored = [t for t in range(len(tokens)) if math.isfinite(train[t]) and math.isfinite(infer[t])]
    kept, masked = [t for t in scored if weight[t] > 0], [t for t in scored if weight[t] == 0]
    sequences = sorted({row[t] for t in scored})
    of = {s: [t for t in scored if row[t] == s] for s in sequences}

    def mean(values):
        values = list(values)
        return math.fsum(values) / len(values) if values else math.nan

    def effective(values):
        return math.fsum(values) ** 2 / (len(values) * math.fsum(w * w for w in values)) if any(values) else math.nan

    def surrogate(t):
        advantage, ratio = advantages[t], clamped_exp(columns["logp_train_new"][t] - train[t])
        return min(ratio * advantage, max(1 - eps, min(1 + eps, ratio)) * advantage)

    def is_clipped(t):
        advantage, ratio = advantages[t], clamped_exp(columns["logp_train_new"][t] - train[t])
        return (advantage > 0 and ratio > 1 + eps) or (advantage < 0 and ratio < 1 - eps)

    flips, entropy = columns["n_flipped_layers"], columns["entropy_infer"]
    flipped, routed = [t for t in scored if flips[t] > 0], [t for t in scored if flips[t] >= 0]
    w = [weight[t] for t in scored]
    return {
        "n_tokens": len(scored),
        "n_sequences": len(sequences),
        "n_prompts": len({prompt[t] for t in scored}),
        "masked_share": len(masked) / len(scored),
        "masked_sequence_share": mean(all(weight[t] == 0 for t in of[s]) for s in sequences),
        "kept_probability_mass": sum(math.exp(infer[t]) for t in kept) / sum(math.exp(infer[t]) for t in scored),
        "weight_mean": mean(w),
        "weight_variance": mean((x - mean(w)) ** 2 for x in w),
        "ess_token": effective(w),
        "ess_sequence": effective([mean(weight[t] for t in of[s]) for s in sequences]),
        "kept_k3": mean(k3(train[t] - infer[t]) for t in kept),
        "clip_share": mean(is_clipped(t) for t in kept),
        "objective": mean(mean(weight[t] * surrogate(t) for t in of[s]) for s in sequences),
        "n_entropy_masked": sum(not math.isnan(entropy[t]) for t in masked),
        "entropy_masked": mean(entropy[t] for t in masked if not math.isnan(entropy[t])),
        "entropy_kept": mean(entropy[t] for t in kept if not math.isnan(entropy[t])),
        "n_routed": len(routed),
        "n_flipped": len(flipped),
        "n_masked_routed": sum(flips[t] >= 0 for t in masked),
        "flipped_share": len(flipped) / len(routed),
        "precision": mean(flips[t] > 0 for t in masked if flips[t] >= 0),
        "recall": mean(weight[t] == 0 for t in flipped),
    }


@pytest.mark.parametrize("seed", range(3))
def test_statistics_equal_plain_loops(seed: int) -> None:
    tokens = make_tokens(seed)
    frame = compare_corrections(tokens, ONE_EACH)["correction_statistics"].set_index("correction")
    for name in METHODS:
        for column, value in plain_statistics(tokens, name).items():
            assert frame.loc[name, column] == pytest.approx(value, rel=1e-10, abs=1e-12, nan_ok=True), (name, column)
    assert 0 < frame.loc["icepop", "masked_share"] < 1


def test_sides_and_truncation_are_counted_where_there_are_some() -> None:
    tokens = make_tokens()
    frame = compare_corrections(tokens, ONE_EACH)["correction_statistics"].set_index("correction")
    diff_T = Tokens(tokens).diff_T
    assert frame.loc["icepop", "below_share"] == pytest.approx((diff_T < np.log(0.5)).mean())
    assert frame.loc["icepop", "above_share"] == pytest.approx((diff_T > np.log(5)).mean())
    assert frame.loc["tis_token", "truncated_share"] == pytest.approx((diff_T > np.log(2)).mean())
    beyond = ((diff_T < np.log(0.5)) | (diff_T > np.log(5))).mean()
    assert frame.loc["clamp_token", "truncated_share"] == pytest.approx(beyond)
    assert frame["below_share"].isna().tolist() == [METHODS[name].side in ("", "none") for name in METHODS]
    assert frame["truncated_share"].notna().tolist() == [method.truncates for method in METHODS.values()]
    sided = frame.loc[frame["below_share"].notna()].drop(index=["sequence_band", "geometric_band", "mis_sequence"])
    assert (sided["below_share"] + sided["above_share"]).tolist() == pytest.approx(sided["masked_share"].tolist())


def test_intervals_hold_their_values_and_truncation_promises_none() -> None:
    frame = compare_corrections(make_tokens(n_sequences=80), ONE_EACH)["correction_statistics"]
    for name in ("masked_share", "kept_k3", "weight_mean", "objective", "entropy_kept", "precision", "recall"):
        known = frame[f"{name}_ci_low"].notna()
        assert known.any()
        rows = frame[known]
        assert ((rows[f"{name}_ci_low"] <= rows[name]) & (rows[name] <= rows[f"{name}_ci_high"])).all()
        assert (rows[f"{name}_ci_low"] < rows[f"{name}_ci_high"]).all()
    tis = frame[frame["correction"].isin(["none", "tis_token", "tis_sequence"])]
    assert tis[["masked_share_ci_low", "recall_ci_high", "masked_sequence_share_ci_high"]].isna().all(axis=None)


def test_the_mean_weight_of_a_mask_is_bounded_like_the_rate_it_is() -> None:
    """Bug: few sequences vetoed out of many gave their mean weight a lower bound of minus hundreds of thousands."""
    tokens = make_tokens(n_sequences=200, unscored=False, scale=0.02)
    tokens.loc[tokens["seq_id"] == 7, "logp_train"] = -30.0
    found = compare_corrections(tokens, ONE_EACH)["correction_statistics"]
    masks = found[[parse_correction(words).is_mask for words in found["words"]]].set_index("correction")
    assert {"veto", "icepop_hard", "trm_max"} <= set(masks.index)
    row = masks.loc["veto"]
    assert 0 < row["weight_mean_ci_low"] < row["weight_mean"] < row["weight_mean_ci_high"] < 1
    assert (masks["weight_mean"] == 1 - masks["masked_share"]).all()


def test_strata_equal_direct_counts() -> None:
    tokens = make_tokens(unscored=True)
    frame = compare_corrections(tokens, {"icepop": ONE_EACH["icepop"]})["masked_by_stratum"]
    is_scored_T = Tokens(tokens).is_scored_N
    weight_T = weights_of(tokens, "icepop")
    values = {
        "entropy": tokens["entropy_infer"],
        "p_infer": np.exp(tokens["logp_infer"]),
        "position": tokens["position"],
        "response_length": np.bincount(tokens["seq_id"])[tokens["seq_id"]],
        "advantage_sign": np.sign(tokens["advantage"]),
        "n_flipped_layers": tokens["n_flipped_layers"],
    }
    assert set(frame["stratifier"]) == set(values)
    for _, row in frame.iterrows():
        value_T, exclusive = values[row["stratifier"]], row["stratifier"] in ("entropy", "p_infer")
        below_T = value_T < row["stratum_high"] if exclusive else value_T <= row["stratum_high"]
        inside_T = is_scored_T & (value_T >= row["stratum_low"]) & below_T
        assert row["n_tokens"] == inside_T.sum()
        assert row["masked_share"] == pytest.approx((weight_T[inside_T] == 0).mean())
        assert row["n_prompts"] == tokens.loc[inside_T, "prompt_id"].nunique()


def test_overlap_equals_direct_counts() -> None:
    tokens = make_tokens()
    frame = compare_corrections(tokens, ONE_EACH)["overlap"].set_index(["correction", "other"])
    masked = {name: (weights_of(tokens, name) == 0) & Tokens(tokens).is_scored_N for name in METHODS}
    for a in METHODS:
        for b in METHODS:
            row, both, either = frame.loc[(a, b)], (masked[a] & masked[b]).sum(), (masked[a] | masked[b]).sum()
            assert (row["n_masked"], row["n_both"]) == (masked[a].sum(), both)
            assert row["jaccard"] == pytest.approx(both / either if either else np.nan, nan_ok=True)
            share = both / masked[a].sum() if masked[a].any() else np.nan
            assert row["share_masked_by_other"] == pytest.approx(share, nan_ok=True)


def test_chunks_are_whole_sequences_and_change_nothing() -> None:
    tokens = make_tokens(n_sequences=40, unscored=False, scale=0.1)
    parts = [part.frame for part in Tokens(tokens).chunks(20)]
    pd.testing.assert_frame_equal(pd.concat(parts), tokens)
    assert sum(part["seq_id"].nunique() for part in parts) == tokens["seq_id"].nunique()
    assert len(parts) > 5
    corrections, seen = distinct_corrections(), []
    whole = compare_corrections(tokens, corrections)
    chunked = compare_corrections(tokens, corrections, lambda *event: seen.append(event), chunk_tokens=20)
    assert seen[-1] == (len(tokens), len(tokens), "tokens")
    assert len(seen) == len(parts)
    for name, frame in whole.items():
        numbers = frame.select_dtypes("number")
        bounds = [
            column for column in numbers if "_ci_" in column
        ]  # quantiles of draws: a rounding moves them by a draw
        for columns, rtol in ((numbers.columns.difference(bounds), 1e-9), (bounds, 1e-3)):
            np.testing.assert_allclose(chunked[name][columns], numbers[columns], rtol=rtol, atol=1e-12)


def test_weights_of_a_chunk_are_those_of_the_whole_bit_for_bit() -> None:
    tokens = make_tokens(n_sequences=40)
    for name, correction in ONE_EACH.items():
        parts = [part.at_rows(correction.of_terms(part)) for part in Terms(tokens).chunks(15)]
        np.testing.assert_array_equal(np.concatenate(parts), weights_of(tokens, name))


def test_many_prompts_are_pooled_without_changing_a_value() -> None:
    tokens = make_tokens(n_sequences=1300).assign(prompt_id=lambda frame: frame["seq_id"])
    frame = compare_corrections(tokens, {"icepop": ONE_EACH["icepop"]})["correction_statistics"].iloc[0]
    assert frame["n_prompts"] > 1200
    weight_T = weights_of(tokens, "icepop")[Tokens(tokens).is_scored_N]
    assert frame["masked_share"] == pytest.approx((weight_T == 0).mean())
    assert frame["masked_share_ci_low"] < frame["masked_share"] < frame["masked_share_ci_high"]


def test_what_is_not_known_is_nan_and_said() -> None:
    tokens = make_tokens()
    bare = tokens.drop(columns=["advantage", "entropy_infer", "logp_train_new", "n_flipped_layers"])
    row = compare_corrections(bare, {"icepop": ONE_EACH["icepop"]})["correction_statistics"].iloc[0]
    for name in ("objective", "clip_share", "entropy_masked", "entropy_kept", "precision", "recall", "flipped_share"):
        assert math.isnan(row[name])
    assert row["note"] == (
        "no objective and no clip share: advantages are not known; no entropies; routing is not known"
    )
    with pytest.raises(MoediagError, match="dppo_tv, dppo_kl looks at the sign of the advantage"):
        compare_corrections(bare, ONE_EACH)
    with pytest.raises(MoediagError, match="scored tokens have an advantage that is not a number"):
        compare_corrections(tokens.assign(advantage=np.nan), ONE_EACH)
    with pytest.raises(MoediagError, match="logp_train_new needs a number"):
        compare_corrections(tokens.assign(logp_train_new=np.nan), ONE_EACH)


def test_nothing_scored_and_no_tokens() -> None:
    tokens = make_tokens()
    for some in (tokens.assign(logp_train=np.nan), tokens.iloc[:0]):
        frame = compare_corrections(some, ONE_EACH)["correction_statistics"]
        assert (frame["n_tokens"] == 0).all()
        assert (frame["n_prompts"] == 0).all()
        assert frame[["masked_share", "weight_mean", "kept_k3", "ess_token"]].isna().all(axis=None)
    assert compare_corrections(tokens, {})["correction_statistics"].empty


@pytest.mark.parametrize("measure", [sweep_by_band, lambda tokens: compare_corrections(tokens, ONE_EACH)])
def test_tokens_whose_sequences_are_not_in_order_are_refused(measure: Callable[[pd.DataFrame], object]) -> None:
    with pytest.raises(MoediagError, match="sort the frame by seq_id and position"):
        measure(make_tokens().iloc[::-1])


def test_the_run_table_holds_the_bands_in_use() -> None:
    block = make_block(diff_scale=1.0)
    block.logp_infer_T[::11] = np.nan
    tokens = token_frame(make_pair(block))
    scored = Tokens(tokens).rows
    frame = masked_shares(tokens)
    assert frame["method"].tolist() == ["icepop_0.5_5.0", "icepop_0.5_2.0", "icepop_0.2_5.0"]
    for band, (_, row) in zip(((0.5, 5), (0.5, 2), (0.2, 5)), frame.iterrows(), strict=True):
        logps = (scored[f"logp_{side}"].to_numpy() for side in ("train", "infer"))
        weight_T = weights("icepop", *logps, scored["seq_id"], alpha=band[0], beta=band[1])
        assert row["n_tokens"] == len(scored)
        assert row["masked_share"] == pytest.approx(np.mean(weight_T == 0))
        assert row["masked_share"] == pytest.approx(row["below_share"] + row["above_share"])
        assert row["masked_share_ci_low"] < row["masked_share"] < row["masked_share_ci_high"]
    assert "verl-icepop" in frame["source"].iloc[0]
    with pytest.raises(MoediagError, match="one IcePop band"):
        masked_shares(tokens, (PRESETS["slime-tis"],))


def test_the_run_table_of_nothing_scored_is_nan_and_of_no_preset_is_empty() -> None:
    block = make_block()
    block.logp_train_T[:] = np.nan
    tokens = token_frame(make_pair(block))
    frame = masked_shares(tokens)
    assert frame["masked_share"].isna().all()
    assert (frame["n_tokens"] == 0).all()
    assert masked_shares(tokens, ()).empty
