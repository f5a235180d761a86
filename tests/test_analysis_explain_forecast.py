"""Forecasts: noise from one pair, scores from another; what a run's arms allow."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from records import arm_of, checkpoint_of, new_run
from synthetic_flips import Truth, block_of, make_flips, pair_of, without_logits
from test_results import make_run
from test_run_directory import capture_of, tokens_of

from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.declarations import EXPLAINED_FLIPS, FORECAST_FLIPS
from moediag.analysis.flips.explained import BORDER_ONLY, explain_flips, forecast_flips, noise_arms, predict_flips
from moediag.analysis.flips.noise import measure_noise
from moediag.run.capture import arrays_of
from moediag.run.reader import Run, open_run
from moediag.run.records import RouterSpec
from moediag.run.writer import RunWriter

TRUTH = Truth(n_prompts=16, tokens=120, n_layers=2, scale=0.01)


def arm_pair(seed: int = 9, truth: Truth = TRUTH):
    """train~train-perturbed of other tokens and another checkpoint, with noise of the same kind."""
    return pair_of(block_of(make_flips(truth, seed=seed)), rule=truth.rule, name="train~train-perturbed")


def forecast(target, noise, rule: RoutingRule) -> pd.DataFrame:
    return forecast_flips(measure_noise(target, rule), [measure_noise(noise, rule)])


def explained(pair, rule: RoutingRule) -> pd.DataFrame:
    return explain_flips(measure_noise(pair, rule))["explained_flips"]


@pytest.mark.parametrize("after_flip", [1.0, 6.0])
def test_noise_from_elsewhere_forecasts_the_flips_of_the_pair(after_flip: float) -> None:
    """Also where flips make the noise below them louder: that noise was measured with its amplification in it."""
    truth = replace(TRUTH, after_flip=after_flip, n_layers=4)
    target = make_flips(truth, seed=1)
    frame = forecast(target, arm_pair(truth=truth), truth.rule).set_index("layer")
    assert set(frame["method"]) == {"all_pairs"}
    assert set(zip(frame["pair"], frame["noise_from"], strict=True)) == {("infer~train", "train~train-perturbed")}
    np.testing.assert_allclose(frame["forecast"], frame["observed"], rtol=0.2)
    ids_TLK = [np.sort(getattr(block_of(target), f"expert_ids_{side}_TLK")) for side in ("infer", "train")]
    assert frame.loc[-1, "observed"] == pytest.approx((ids_TLK[0] != ids_TLK[1]).any(axis=-1).mean())


def test_a_forecast_is_of_the_noise_and_not_of_the_pair_s_own() -> None:
    """Forecasts stood beside the flips of infer~train without the pair that they were of.

    Quiet noise makes a loud pair's scores flip as the quiet pair does; what each pair shows stands in its own column.
    """
    quiet = replace(TRUTH, scale=TRUTH.scale / 4)
    target, noise = make_flips(TRUTH, seed=1), arm_pair(truth=quiet)
    row = forecast(target, noise, TRUTH.rule).iloc[0]
    ids_TLK = [np.sort(getattr(block_of(noise), f"expert_ids_{side}_TLK")) for side in ("infer", "train")]
    assert row["layer"] == -1
    assert row["noise_observed"] == pytest.approx((ids_TLK[0] != ids_TLK[1]).any(axis=-1).mean())
    assert row["forecast"] == pytest.approx(row["noise_observed"], rel=0.2)
    assert row["observed"] > 2 * row["forecast"]
    assert row["assumption"].startswith("infer~train has the noise of train~train-perturbed")


def test_forecasts_give_no_interval() -> None:
    """Prompts resampled under a noise taken as known gave "95 %" that held the rate found .06 to .69 of the time."""
    frame = forecast(make_flips(TRUTH, seed=1), arm_pair(), TRUTH.rule)
    assert not [name for name in frame if name.startswith(("forecast_", "explained_"))]
    assert "no interval" in next(c.meaning for c in FORECAST_FLIPS.columns if c.name == "forecast")
    assert not [c.name for c in EXPLAINED_FLIPS.columns if c.name.startswith("explained_")]


def test_an_arm_explains_its_own_flips_calibrated() -> None:
    row = explained(arm_pair(), TRUTH.rule).iloc[0]
    assert row["layer"] == -1
    assert row["explained"] == pytest.approx(row["observed"], rel=0.1)
    assert row["calibration_error"] < 2 * row["calibration_error_expected"]


def test_margins_alone_forecast_too() -> None:
    quiet = replace(TRUTH, scale=0.003, loud=4.0, n_prompts=32)
    target = pair_of(without_logits(block_of(make_flips(quiet, seed=1))), rule=quiet.rule)
    frame = forecast(target, arm_pair(truth=quiet), quiet.rule)
    assert set(frame["method"]) == {"margin_change"}
    assert frame["assumption"].str.startswith(BORDER_ONLY).all()
    flips = explained(target, quiet.rule).iloc[0]["observed"]
    assert frame.iloc[0]["forecast"] == pytest.approx(flips, rel=0.25)


def test_a_run_without_the_rule_or_without_arms_predicts_nothing(tmp_path: Path) -> None:
    """make_run's records name E and K and no score function: no rule, no prediction."""
    assert predict_flips(make_run(tmp_path / "moe")) == {}
    assert predict_flips(make_run(tmp_path / "dense", is_moe=False)) == {}


def ruled_run(
    path: Path,
    arms: tuple[str, ...],
    rule: RoutingRule = RoutingRule(8, 2, "softmax"),  # noqa: B008 - frozen
    bias_by_arm: dict[str, list[list[float]]] | None = None,
) -> Run:
    """Ten prompts, one of each arm's captures in two shards; the arms' records name the whole rule."""
    sink = io.BytesIO()
    pd.DataFrame({"prompt_token_ids": [[1, 2]] * 10}).to_parquet(sink)
    spec = RouterSpec(
        family="tiny", score_function=rule.score_function, has_correction_bias=rule.has_correction_bias,
        n_group=rule.n_group, topk_group=rule.topk_group, gate="scores", renormalize=False, scaling_factor=1.0,
        n_shared_experts=0,
    )  # fmt: skip
    checkpoint = checkpoint_of((1, 3), rule.n_experts, rule.top_k, spec)
    run = new_run(path, sink.getvalue(), 10, 6, checkpoint, level="full")
    writer = RunWriter(run)
    for shard in run.shards:
        writer.write_tokens(shard, tokens_of(shard.first_sequence, [(2, 6)] * shard.n_sequences))
    for number, arm in enumerate(arms):
        record = arm_of(run, arm, arrays=arrays_of("full", is_routed=True))
        writer.begin_arm(record, (bias_by_arm or {}).get(arm))
        for shard in run.shards:
            tokens = run.tokens(shard)
            logits = np.random.default_rng(number).normal(size=(len(tokens), 2, 8)).astype(np.float32)
            capture = capture_of(tokens, seed=number, last_row=arm != "infer")
            writer.write_capture(arm, shard, tokens, replace(capture, router_logits_TLE=logits), {}, {})
    return open_run(path)


def test_a_run_is_predicted_by_every_arm_that_it_has(tmp_path: Path) -> None:
    """A router in float32 is no noise of infer~train: its own change stood there as if it were a cure."""
    arms = ("infer", "train", "train-replay", "train-perturbed", "infer-repeat", "train-router-fp32")
    run = ruled_run(tmp_path / "run", arms)
    assert noise_arms(run) == [("infer-repeat", "infer"), ("train-perturbed", "train")]
    frames = predict_flips(run)
    assert frames.keys() == {"score_noise", "explained_flips", "flip_calibration", "forecast_flips"}
    assert set(frames["explained_flips"]["layer"]) == {-1, 0, 1}
    assert set(frames["explained_flips"]["decoder_layer"]) == {-1, 1, 3}
    forecasts = frames["forecast_flips"]
    assert set(forecasts["noise_from"]) == {"train~train-perturbed", "infer~infer-repeat"}
    assert set(zip(forecasts["pair"], forecasts["side"], strict=True)) == {("infer~train", "infer")}
    assert (forecasts["assumption"] != "").all()


def test_ordinary_analysis_does_not_copy_router_logits(tmp_path: Path) -> None:
    run = ruled_run(tmp_path / "run", ("infer", "train"))
    (block, *_), (full, *_) = (
        list(run.pair("train", "infer", **flag).blocks()) for flag in ({}, {"with_logits": True})
    )
    assert block.router_logits_infer_TLE is None
    capture, tokens = run.capture("train", run.shards[0]), run.tokens(run.shards[0])
    rows = np.flatnonzero(tokens.is_response_T) - 1
    np.testing.assert_array_equal(full.router_logits_train_TLE, capture.router_logits_TLE[rows])
