"""Explained flips: calibrated on engines whose noise is known, blind to the flips they predict, NaN where blind."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from synthetic import take
from synthetic_flips import RULES, Truth, block_of, make_flips, pair_of, without_logits

from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.flips.calibration import PredictionTotals, calibration_errors
from moediag.analysis.flips.explained import BORDER_ONLY, explain_flips, predict_pair
from moediag.analysis.flips.noise import (
    CELL_SCALE,
    N_CELLS,
    NoiseCounts,
    cell_of,
    measure_noise,
    view_block,
    without_estimation_error,
)
from moediag.analysis.flips.predictor import FlipPredictor

SMALL = Truth(n_prompts=16, tokens=80, n_layers=2)
MEDIUM = Truth(n_prompts=24, tokens=160, n_layers=2)


def explained(pair, rule: RoutingRule, bias_LE=None) -> dict[str, pd.DataFrame]:
    return explain_flips(measure_noise(pair, rule), bias_LE)


@pytest.mark.parametrize("name", ["softmax", "sigmoid + bias"])
def test_explained_flips_of_a_known_mixture_are_calibrated(name: str) -> None:
    """Heterogeneous, growing with depth, louder after flips, Zipf popularity: the error is that of chance."""
    truth = replace(MEDIUM, rule=RULES[name])
    frame = explained(make_flips(truth, seed=3), truth.rule, truth.bias_LE)["explained_flips"]
    rows = frame[frame["method"] == "all_pairs"].set_index("layer")
    assert (np.abs(rows["gap"]) < 0.07 * rows["observed"]).all()
    assert (rows["calibration_error"] < 1.6 * rows["calibration_error_expected"]).all()
    assert np.allclose(rows["calibration_slope"], 1, atol=0.08)
    pooled = rows.loc[-1]
    assert pooled["gap_ci_low"] < 0 < pooled["gap_ci_high"]


def test_group_limited_rules_are_simulated_as_a_whole() -> None:
    truth = replace(SMALL, rule=RULES["groups"])
    frame = explained(make_flips(truth, seed=3), truth.rule, truth.bias_LE)["explained_flips"].set_index(
        ["method", "layer"]
    )
    row = frame.loc[("simulated", -1)]
    assert row["explained"] == pytest.approx(row["observed"], rel=0.1)
    assert np.isnan(frame.loc[("margin_change", -1), "explained"])
    assert "groups" in frame.loc[("margin_change", -1), "note"]


def test_the_border_pair_alone_explains_less_than_all_pairs() -> None:
    frame = explained(make_flips(SMALL), SMALL.rule)["explained_flips"].set_index(["layer", "method"])["explained"]
    for layer in (-1, 0, 1):
        assert frame[layer, "border_pair"] < frame[layer, "all_pairs"]


def test_margins_alone_explain_rare_flips() -> None:
    """With noise small against the gaps between scores, pairs beyond the border hardly matter."""
    quiet = replace(MEDIUM, scale=0.004, loud=4.0, after_flip=1.0)
    frame = explained(make_flips(quiet, seed=2, keep_logits=False), quiet.rule)["explained_flips"]
    assert set(frame["method"]) == {"margin_change"}
    row = frame[frame["layer"] == -1].iloc[0]
    assert row["explained"] == pytest.approx(row["observed"], rel=0.12)


@pytest.mark.parametrize(("scale", "shares"), [(0.01, (0.98, 0.82)), (0.1, (0.75, 0.5))])
def test_the_border_pair_falls_short_as_flips_rise_and_says_why(scale: float, shares: tuple[float, float]) -> None:
    """Margins alone explained less and less of the flips as these rose, and no cause stood beside the gap."""
    truth = replace(SMALL, scale=scale, loud=4.0, after_flip=1.0)
    rows = explained(make_flips(truth, seed=1), truth.rule)["explained_flips"]
    rows = rows[rows["layer"] == -1].set_index("method")
    most, least = shares
    for method in ("border_pair", "margin_change"):
        assert least < rows.loc[method, "explained"] / rows.loc[method, "observed"] < most
        assert rows.loc[method, "note"] == BORDER_ONLY
    assert rows.loc["all_pairs", "explained"] == pytest.approx(rows.loc["all_pairs", "observed"], rel=0.06)
    assert rows.loc["all_pairs", "note"] == ""


def test_a_prompt_is_not_predicted_from_its_own_noise() -> None:
    """Whatever train did with a prompt, flips included, leaves the predictions for that prompt as they were."""
    block = block_of(make_flips(SMALL, seed=4))
    is_first_T = block.prompt_id_T == 0
    other = block.router_logits_train_TLE + 3 * np.random.default_rng(0).normal(
        size=block.router_logits_train_TLE.shape
    )
    changed = replace(
        block,
        router_logits_train_TLE=np.where(is_first_T[:, None, None], other, block.router_logits_train_TLE).astype(
            np.float32
        ),
        margin_train_TL=np.where(is_first_T[:, None], 7.0, block.margin_train_TL),
        logit_margin_train_TL=np.where(is_first_T[:, None], 7.0, block.logit_margin_train_TL),
    )
    for method in ("all_pairs", "border_pair", "margin_change"):
        predicted = [_predictions(b, SMALL.rule, method) for b in (block, changed)]
        same_fold_T = block.prompt_id_T % 8 == 0
        # sums of the other folds are totals less one's own: equal to the last bits of float64
        np.testing.assert_allclose(predicted[0][is_first_T], predicted[1][is_first_T], rtol=1e-12)
        assert not np.allclose(predicted[0][~same_fold_T], predicted[1][~same_fold_T], rtol=1e-6)


def _predictions(block, rule: RoutingRule, method: str) -> np.ndarray:
    noise = measure_noise(pair_of(block, rule=rule), rule)
    predictor = FlipPredictor(noise.counts["margins" if method == "margin_change" else "logits"], rule, method)
    view = view_block(block, rule)
    return np.stack([predictor.layer_probability(view, layer) for layer in range(2)], axis=1)


def test_an_engine_against_itself_has_no_noise_and_explains_none() -> None:
    block = block_of(make_flips(SMALL))
    same = {name: getattr(block, name.replace("train", "infer")) for name in vars(block) if "_train_" in name}
    found = explained(pair_of(replace(block, **same), rule=SMALL.rule), SMALL.rule)
    assert (found["explained_flips"][["observed", "explained", "calibration_error"]] == 0).all(axis=None)
    assert (found["score_noise"]["no_noise_share"] == 1).all()
    assert (found["score_noise"]["sigma_p99"] == 0).all()


def test_one_prompt_cannot_be_cross_fit_and_says_so() -> None:
    one = replace(SMALL, n_prompts=1)
    frame = explained(make_flips(one), one.rule)["explained_flips"]
    assert frame[["observed", "explained"]].isna().all(axis=None)
    assert (frame["n_choices"] == 0).all()
    assert frame["note"].str.contains("other prompts").all()


def test_a_bias_that_is_not_known_leaves_the_margins() -> None:
    truth = replace(SMALL, rule=RULES["sigmoid + bias"])
    frame = explained(make_flips(truth), truth.rule)["explained_flips"]
    assert set(frame["method"]) == {"margin_change"}
    assert frame["note"].str.contains("bias").all()
    assert frame["explained"].notna().all()


def test_nan_logits_and_unrouted_choices_are_left_out() -> None:
    block = block_of(make_flips(SMALL))
    logits, ids = block.router_logits_infer_TLE.copy(), block.expert_ids_train_TLK.copy()
    logits[:30, 0] = np.nan
    ids[30:50, 0] = -1
    broken = replace(block, router_logits_infer_TLE=logits, expert_ids_train_TLK=ids)
    rows = explained(pair_of(broken, rule=SMALL.rule), SMALL.rule)["explained_flips"].set_index(["method", "layer"])
    assert rows.loc[("all_pairs", 0), "n_choices"] == len(block) - 50
    assert rows.loc[("margin_change", 0), "n_choices"] == len(block) - 20
    assert rows.loc[("all_pairs", 1), "n_choices"] == len(block)


def test_where_nothing_competes_nothing_flips() -> None:
    """K = E: infinite margins, no change, a prediction of exactly 0."""
    truth = replace(SMALL, rule=RoutingRule(4, 4, "softmax"))
    frame = explained(make_flips(truth), truth.rule)["explained_flips"]
    assert len(frame)
    assert (frame[["observed", "explained"]] == 0).all(axis=None)


def test_blocks_together_equal_the_whole() -> None:
    block = block_of(make_flips(SMALL))
    parts = [take(block, slice(0, 333)), take(block, slice(333, None))]
    whole, split = (explained(pair_of(*b, rule=SMALL.rule), SMALL.rule) for b in ([block], parts))
    for name in ("score_noise", "explained_flips", "flip_calibration"):
        a, b = (found[name].select_dtypes("number").to_numpy() for found in (whole, split))
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_noise_counts_merge() -> None:
    block = block_of(make_flips(SMALL))
    counts = []
    for rows in (slice(None), slice(0, 500), slice(500, None)):
        counts.append(NoiseCounts.empty(2))
        counts[-1].add_block(view_block(take(block, rows), SMALL.rule), SMALL.rule, "logits")
    merged = NoiseCounts.merge(counts[1:])
    np.testing.assert_array_equal(merged.n_FLRH, counts[0].n_FLRH)
    np.testing.assert_allclose(merged.square_FLZ, counts[0].square_FLZ)


def test_calibration_slope_is_the_least_squares_slope_also_after_merging_with_nothing() -> None:
    """Bug: merged with a part without choices, sums of predictions were cut to whole numbers."""
    rng = np.random.default_rng(5)
    predicted_TL = rng.uniform(size=(300, 2))
    is_flip_TL = rng.uniform(size=(300, 2)) < predicted_TL
    prompt_T = np.repeat(np.arange(3), 100)
    part = PredictionTotals.of_block(prompt_T, predicted_TL, is_flip_TL)
    merged = PredictionTotals.merge([PredictionTotals.empty(2), part])
    for field in fields(part):
        np.testing.assert_array_equal(getattr(merged, field.name), getattr(part, field.name))
    slopes = [np.polyfit(predicted_TL[:, layer], is_flip_TL[:, layer], 1)[0] for layer in range(2)]
    pooled = np.polyfit(predicted_TL.ravel(), is_flip_TL.ravel(), 1)[0]
    np.testing.assert_allclose(calibration_errors(merged)["calibration_slope"], [*slopes, pooled], rtol=1e-9)


def test_noise_frame_knows_the_growth_and_the_mixture() -> None:
    """Growth 1.5 a layer without louder flips; sigma of a difference is sqrt 2 of a logit's."""
    truth = replace(MEDIUM, growth=1.5, after_flip=1.0, loud_share=0.0, spread=0.5, scale=0.01)
    rows = explained(make_flips(truth), truth.rule)["score_noise"]
    logits = rows[rows["measure"] == "logits"]
    assert logits["growth"].tolist() == pytest.approx([1, 1.5], rel=0.06)
    assert logits["sigma_p50"].iloc[0] == pytest.approx(0.01 * np.sqrt(2), rel=0.06)
    assert logits["sigma_rms"].iloc[0] == pytest.approx(0.01 * np.sqrt(2) * np.exp(0.5**2), rel=0.08)


def test_exact_ties_are_counted_and_predicted_as_a_coin() -> None:
    truth = replace(SMALL, step=2.0**-3)
    found = explained(make_flips(truth), truth.rule)
    assert (found["score_noise"]["tie_share"] > 0.03).all()
    block = block_of(make_flips(truth))
    is_tie_T = (block.logit_margin_infer_TL[:, 0] == 0) & (block.logit_margin_train_TL[:, 0] != 0)
    border = _predictions(block, truth.rule, "border_pair")[is_tie_T, 0]
    assert 0 < border.max() <= 0.5


def test_the_scatter_of_a_measured_scale_is_taken_out() -> None:
    """One true scale, measured from three numbers each: without the correction a third of the mass is off by 2."""
    rng = np.random.default_rng(0)
    measured = np.sqrt(rng.chisquare(3, 200_000) / 3)
    share = np.bincount(cell_of(measured), minlength=N_CELLS) / len(measured)
    true = without_estimation_error(share[None], 3)[0]
    assert true.sum() == pytest.approx(1)
    mean = (true * np.log(CELL_SCALE)).sum()
    assert mean == pytest.approx(0, abs=0.02)
    assert np.sqrt((true * np.square(np.log(CELL_SCALE) - mean)).sum()) < 0.08


def test_predictions_and_flips_count_the_same_choices() -> None:
    pair = make_flips(SMALL)
    noise = measure_noise(pair, SMALL.rule)
    (totals,) = predict_pair(noise, [FlipPredictor(noise.counts["logits"], SMALL.rule, "border_pair")])
    assert totals.n_CLB.sum() == len(block_of(pair)) * 2
    assert totals.flips_CLB.sum() == view_block(block_of(pair), SMALL.rule).is_flip_TL.sum()


def test_pairs_without_margins_or_ids_give_empty_frames() -> None:
    block = without_logits(block_of(make_flips(SMALL)))
    bare = replace(block, margin_infer_TL=None, logit_margin_infer_TL=None)
    for broken in (bare, replace(block, expert_ids_train_TLK=None)):
        assert not len(
            explained(pair_of(broken, rule=SMALL.rule) if broken is bare else _pair(broken), SMALL.rule)[
                "explained_flips"
            ]
        )


def _pair(block):
    return replace(pair_of(block_of(make_flips(SMALL)), rule=SMALL.rule), read_blocks=lambda: iter([block]))
