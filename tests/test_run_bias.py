"""The routers' correction bias: kept beside an arm, held against it when read, and used where flips are predicted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_analysis_explain_forecast import ruled_run

from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.flips.explained import explain_flips, predict_flips
from moediag.analysis.flips.noise import measure_noise
from moediag.errors import CorruptRunError
from moediag.hygiene import check_run
from moediag.run.files import write_sealed
from moediag.run.reader import Run

BIASED = RoutingRule(8, 2, "sigmoid", has_correction_bias=True)
GROUPED = RoutingRule(8, 2, "sigmoid", has_correction_bias=True, n_group=4, topk_group=2)
BIAS = np.random.default_rng(5).normal(0, 0.2, (2, 8)).astype(np.float32)
ARMS = ("infer", "train", "train-perturbed", "infer-repeat")


def biased_run(path: Path, rule: RoutingRule = BIASED, bias: np.ndarray | None = BIAS) -> Run:
    return ruled_run(path, ARMS, rule, None if bias is None else dict.fromkeys(ARMS, bias.tolist()))


def damaged(run: Run) -> list[str]:
    return [found.where for found in check_run(run) if found.rule == "damaged"]


def test_a_bias_comes_back_bit_for_bit(tmp_path: Path) -> None:
    run = biased_run(tmp_path / "run")
    for arm in ARMS:
        found = run.correction_bias(arm)
        assert found is not None
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, BIAS)
    assert damaged(run) == []
    assert biased_run(tmp_path / "old", bias=None).correction_bias("infer") is None


def test_a_bias_that_is_not_the_arms_is_refused(tmp_path: Path) -> None:
    run = biased_run(tmp_path / "run")
    path = run.path / "arms" / "train" / "correction-bias.json"
    good = path.read_bytes()
    other = json.loads(good)
    other["bias_LE"][0][0] += 1
    for spoil, words in (
        (lambda: path.unlink(), "is missing"),
        (lambda: path.write_bytes(good.replace(b"0.", b"1.", 1)), "was changed after it was written"),
        (lambda: write_sealed(path, other), "is not the bias that arm.json tells of"),
    ):
        spoil()
        with pytest.raises(CorruptRunError, match=words):
            run.correction_bias("train")
        assert "train arm.json" in damaged(run)
        path.write_bytes(good)
    assert damaged(run) == []


def test_a_bias_of_another_shape_is_refused(tmp_path: Path) -> None:
    run = biased_run(tmp_path / "run", bias=BIAS[:, :7])
    with pytest.raises(CorruptRunError, match="does not hold"):
        run.correction_bias("infer")


@pytest.mark.parametrize("rule", [BIASED, GROUPED], ids=["bias", "bias and groups"])
def test_flips_are_predicted_from_logits_with_the_stored_bias(tmp_path: Path, rule: RoutingRule) -> None:
    run = biased_run(tmp_path / "run", rule)
    frames = predict_flips(run)
    methods = {"simulated"} if rule.is_grouped else {"all_pairs", "border_pair"}
    explained = frames["explained_flips"]
    assert methods <= set(explained["method"])
    assert explained.loc[explained["method"].isin(methods), "explained"].between(0, 1).all()
    noise = measure_noise(run.pair("train", "infer", with_logits=True), rule)
    given = explain_flips(noise, BIAS.astype(float))
    assert explained.equals(given["explained_flips"])
    zero = explain_flips(noise, 0.0 * BIAS)
    assert not explained.equals(zero["explained_flips"])
    forecast = frames["forecast_flips"]
    assert set(forecast["noise_from"]) == {"train~train-perturbed", "infer~infer-repeat"}
    assert set(forecast["pair"]) == {"infer~train"}


def test_without_a_stored_bias_only_margins_are_used_and_it_is_said(tmp_path: Path) -> None:
    frames = predict_flips(biased_run(tmp_path / "run", bias=None))
    explained = frames["explained_flips"]
    assert set(explained["method"]) == {"margin_change"}
    assert explained["note"].str.startswith("the router's correction bias is not known: only the margins").all()
    assert set(frames["forecast_flips"]["method"]) == {"margin_change"}
    assert frames["forecast_flips"]["assumption"].str.contains("bias is not known").all()


def test_scores_are_read_with_the_bias_of_their_own_engine(tmp_path: Path) -> None:
    """An engine that rounds its bias to bf16 chooses by the rounded one; the other engine's plays no part."""
    same = biased_run(tmp_path / "same")
    plain = predict_flips(same)
    for side, is_read in (("train", False), ("infer", True)):
        bias = {arm: (BIAS[:, ::-1] if arm.startswith(side) else BIAS).tolist() for arm in ARMS}
        found = predict_flips(ruled_run(tmp_path / side, ARMS, BIASED, bias))
        assert found["forecast_flips"].equals(plain["forecast_flips"]) != is_read
        assert found["explained_flips"].equals(plain["explained_flips"]) != is_read
    train_bias = same.correction_bias("train").astype(float)
    pair = same.pair("train-perturbed", "train", with_logits=True)
    own, other = (explain_flips(measure_noise(pair, BIASED), b) for b in (train_bias, train_bias[:, ::-1]))
    assert not own["explained_flips"].equals(other["explained_flips"])
