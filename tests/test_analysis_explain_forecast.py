"""Forecasts: noise from one pair, scores from another; roundings against torch; what a run's arms allow."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from synthetic_flips import Truth, block_of, make_flips, pair_of, without_logits
from test_results import make_run
from test_run_directory import capture_of, tokens_of

from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.explain import explained_flips, measure_noise
from moediag.analysis.forecast import forecast_flips, rounded_to_bf16, rounded_to_fp8, rounding_forecast
from moediag.analysis.prediction import noise_arms, predict_flips
from moediag.run.create import create_run, split_into_shards
from moediag.run.directory import Run, open_run

TRUTH = Truth(n_prompts=16, tokens=120, n_layers=2, scale=0.01)


def arm_pair(seed: int = 9, truth: Truth = TRUTH):
    """train~train-perturbed of other tokens and another checkpoint, with noise of the same kind."""
    return pair_of(block_of(make_flips(truth, seed=seed)), rule=truth.rule, name="train~train-perturbed")


def test_noise_from_elsewhere_forecasts_the_flips() -> None:
    target = make_flips(TRUTH, seed=1)
    flips = explained_flips(target, TRUTH.record).set_index(["method", "layer"])["observed"]["all_pairs"]
    frame = forecast_flips(target, arm_pair(), TRUTH.record, multipliers=(1.0,)).set_index("layer")
    assert set(frame["method"]) == {"all_pairs"}
    assert set(frame["noise_from"]) == {"train~train-perturbed"}
    assert set(frame["target"]) == {"infer"}
    np.testing.assert_allclose(frame["forecast"], flips[frame.index], rtol=0.15)
    assert frame["calibration_error"].isna().all()
    assert frame["observed"].notna().all()


def test_an_arm_forecasts_its_own_flips_calibrated() -> None:
    noise = arm_pair()
    row = forecast_flips(noise, noise, TRUTH.record, multipliers=(1.0,)).iloc[0]
    assert row["layer"] == -1
    assert row["target"] == "train"
    assert row["forecast"] == pytest.approx(row["observed"], rel=0.1)
    assert row["calibration_error"] < 2 * row["calibration_error_expected"]


def test_louder_noise_is_forecast_to_flip_as_louder_engines_do() -> None:
    """Twice the noise, forecast, against engines that really are twice as loud."""
    truth = replace(TRUTH, after_flip=1.0)
    louder = replace(truth, scale=2 * truth.scale)
    target = make_flips(truth, seed=1)
    frame = forecast_flips(target, arm_pair(truth=truth), truth.record, multipliers=(0.5, 2.0, 4.0))
    pooled = frame[frame["layer"] == -1].set_index("multiplier")["forecast"]
    assert pooled.index.tolist() == [1.0, 0.5, 2.0, 4.0]
    assert pooled.sort_index().is_monotonic_increasing
    flips = explained_flips(make_flips(louder, seed=1), louder.record).iloc[0]["observed"]
    assert pooled[2.0] == pytest.approx(flips, rel=0.15)
    assert frame.loc[frame["multiplier"] != 1, "assumption"].str.contains("same factor").all()


def test_margins_alone_forecast_too() -> None:
    quiet = replace(TRUTH, scale=0.003, loud=4.0, n_prompts=32)
    target = pair_of(without_logits(block_of(make_flips(quiet, seed=1))), rule=quiet.rule)
    frame = forecast_flips(target, arm_pair(truth=quiet), quiet.record, multipliers=(1.0, 2.0))
    assert set(frame["method"]) == {"margin_change"}
    flips = explained_flips(target, quiet.record).iloc[0]["observed"]
    assert frame.iloc[0]["forecast"] == pytest.approx(flips, rel=0.25)


def test_roundings_are_those_of_torch() -> None:
    values = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32) * np.float32(3)
    tensor = torch.from_numpy(values)
    np.testing.assert_array_equal(rounded_to_bf16(values), tensor.bfloat16().float().numpy())
    scale = tensor.abs().amax(dim=-1, keepdim=True).double() / 448
    wanted = (tensor.double() / scale).float().to(torch.float8_e4m3fn).double() * scale
    np.testing.assert_allclose(rounded_to_fp8(values), wanted.numpy(), rtol=1e-6, atol=1e-7)
    assert not rounded_to_fp8(np.zeros((2, 3))).any()


def test_rounding_flips_are_counted_directly_and_not_twice() -> None:
    truth = replace(TRUTH, n_prompts=64, tokens=300)
    fine = measure_noise(make_flips(truth), truth.rule)
    frame = rounding_forecast(fine).set_index(["noise_from", "layer"])["forecast"]
    assert 0 < frame["rounding to bf16", -1] < frame["rounding to fp8", -1]
    block = block_of(make_flips(truth))
    on_lattice = replace(block, router_logits_infer_TLE=rounded_to_bf16(block.router_logits_infer_TLE))
    coarse = rounding_forecast(measure_noise(pair_of(on_lattice, rule=TRUTH.rule), TRUTH.rule))
    rows = coarse[coarse["noise_from"] == "rounding to bf16"]
    assert (rows["forecast"] == 0).all()
    assert rows["assumption"].str.contains("already").all()
    undone = coarse.set_index(["noise_from", "layer"])["forecast"]["bf16 undone", -1]
    assert undone == pytest.approx(frame["rounding to bf16", -1], rel=0.25)


def test_a_run_without_the_rule_or_without_arms_predicts_nothing(tmp_path: Path) -> None:
    """make_run's manifest names E and K and no score function: no rule, no prediction."""
    assert predict_flips(make_run(tmp_path / "moe")) == {}
    assert predict_flips(make_run(tmp_path / "dense", is_moe=False)) == {}


def ruled_run(
    path: Path,
    arms: tuple[str, ...],
    rule: RoutingRule = RoutingRule(8, 2, "softmax"),  # noqa: B008 - frozen
    bias_by_arm: dict[str, list[list[float]]] | None = None,
) -> Run:
    """Ten prompts, one of each arm's captures in two shards; the manifest names the whole rule."""
    sink = io.BytesIO()
    pd.DataFrame({"prompt_token_ids": [[1, 2]] * 10}).to_parquet(sink)
    facts = dict.fromkeys(("revision", "architecture", "model_type", "n_decoder_layers"))
    routing = {**asdict(rule), "decoder_layers": [1, 3]}
    run = create_run(path, {
        "configuration": {}, "completions": False, "moediag_version": "0",
        "model": {"name": "tiny", "routing": routing, **facts},
        "sampling": {}, "prompts": {"n": 10, "source": "p.jsonl", "source_sha256": "p"},
        "shards": [vars(shard) for shard in split_into_shards(10, 6)],
    }, sink.getvalue())  # fmt: skip
    for shard in run.shards:
        run.write_tokens(shard, tokens_of(shard.first_sequence, [(2, 6)] * shard.n_sequences))
    for number, arm in enumerate(arms):
        run.begin_arm(arm, {"configuration": {}, "engine": arm}, (bias_by_arm or {}).get(arm))
        for shard in run.shards:
            tokens = run.tokens(shard)
            logits = np.random.default_rng(number).normal(size=(len(tokens), 2, 8)).astype(np.float32)
            capture = capture_of(tokens, seed=number, last_row=arm != "infer")
            run.write_capture(arm, shard, tokens, replace(capture, router_logits_TLE=logits), {}, {})
    return open_run(path)


def test_a_run_is_predicted_by_every_arm_that_it_has(tmp_path: Path) -> None:
    run = ruled_run(tmp_path / "run", ("infer", "train", "train-replay", "train-perturbed", "infer-repeat"))
    assert noise_arms(run) == ["infer-repeat", "train-perturbed"]
    frames = predict_flips(run)
    assert frames.keys() == {"score_noise", "explained_flips", "flip_calibration", "forecast_flips"}
    assert set(frames["explained_flips"]["layer"]) == {-1, 0, 1}
    assert set(frames["explained_flips"]["decoder_layer"]) == {-1, 1, 3}
    forecast = frames["forecast_flips"]
    sources = set(zip(forecast["noise_from"], forecast["target"], strict=True))
    assert {("train~train-perturbed", "infer"), ("train~train-perturbed", "train")} <= sources
    assert {("infer~infer-repeat", "infer")} <= sources
    assert (forecast["assumption"] != "").all()


def test_ordinary_analysis_does_not_copy_router_logits(tmp_path: Path) -> None:
    run = ruled_run(tmp_path / "run", ("infer", "train"))
    (block, *_), (full, *_) = (
        list(run.pair("train", "infer", **flag).blocks()) for flag in ({}, {"with_logits": True})
    )
    assert block.router_logits_infer_TLE is None
    capture, tokens = run.capture("train", run.shards[0]), run.tokens(run.shards[0])
    rows = np.flatnonzero(tokens.is_response_T) - 1
    np.testing.assert_array_equal(full.router_logits_train_TLE, capture.router_logits_TLE[rows])
