"""Floors: sums for means, the larger side for tails, bit-exact floors without a ratio; and the verdict's words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_block, make_pair, self_block

from moediag.analysis.floors import LARGER, SUMMED, floors, metric_value, own_side_pairs, verdict
from moediag.analysis.pair_analysis import analyze_pair
from moediag.analysis.summary import pair_summary

MAIN, TRAIN_FLOOR, INFER_FLOOR = "infer~train", "train-repeat~train", "infer-repeat~infer"


def summary_of(scale: float, noise: float, dense: bool = False) -> dict[str, Any]:
    block = make_block(n_prompts=24, diff_scale=scale, flip_noise=noise, dense=dense)
    return pair_summary(analyze_pair(make_pair(block)))


@pytest.fixture(scope="module")
def pairs() -> dict[str, dict[str, Any]]:
    exact = pair_summary(analyze_pair(make_pair(self_block(make_block(n_prompts=24)))))
    return {MAIN: summary_of(0.05, 0.1), TRAIN_FLOOR: summary_of(0.004, 0.01), INFER_FLOOR: exact,
            "infer-redecode~infer": summary_of(0.001, 0.0), "infer-rescore~infer": summary_of(0.002, 0.001),
            "train-perturbed~train": summary_of(0.03, 0.05)}  # fmt: skip


def test_means_are_summed_and_tails_take_the_larger_side(pairs: dict[str, Any]) -> None:
    found = floors(pairs, is_prefilled=False)
    assert found is not None
    for metric, line in found["metrics"].items():
        parts = [metric_value(pairs[name], metric) for name in (TRAIN_FLOOR, INFER_FLOOR)]
        assert line["rule"] == ("sum" if metric in SUMMED else "larger")
        assert line["floor"] == (sum(parts) if metric in SUMMED else max(parts))
        assert (line["train"], line["infer"], line["note"]) == (*parts, "")
        best = 1.0 if metric == "prob_mult_error" else 0.0
        if line["floor"] != best:
            value = metric_value(pairs[MAIN], metric)
            assert line["ratio"] == pytest.approx((value - best) / (line["floor"] - best))
    assert found["infer"]["arm"] == "infer-repeat"  # other batches say more than the same again
    assert found["infer"]["is_bit_exact"]
    assert not found["train"]["is_bit_exact"]
    assert found["decode_vs_prefill"]["pair"] == "infer-rescore~infer"
    assert [line["arm"] for line in found["noise"]] == ["train-perturbed"]
    assert set(found["metrics"]) == {*SUMMED, *LARGER}


def test_a_floor_of_zero_is_bit_exact_and_gives_no_ratio(pairs: dict[str, Any]) -> None:
    exact = {MAIN: pairs[MAIN], TRAIN_FLOOR: pairs[INFER_FLOOR], INFER_FLOOR: pairs[INFER_FLOOR]}
    found = floors(exact, is_prefilled=False)
    assert found is not None
    for line in found["metrics"].values():
        assert line["is_bit_exact"]
        assert line["ratio"] is None
    words = verdict(pairs[MAIN], found, 0, None)
    assert words["word"] == "above floor"


def test_a_side_that_was_not_measured_makes_no_floor_of_zero(pairs: dict[str, Any]) -> None:
    half = {MAIN: pairs[MAIN], INFER_FLOOR: pairs[INFER_FLOOR]}
    found = floors(half, is_prefilled=False)
    assert found is not None
    line = found["metrics"]["abs_logp_diff.mean"]
    assert line["note"] == "train side not measured"
    assert not line["is_bit_exact"]
    assert verdict(pairs[MAIN], found, 0, None)["word"] == "cannot tell"
    assert floors({MAIN: pairs[MAIN]}, is_prefilled=False) is None
    assert "no noise floor" in verdict(pairs[MAIN], None, 0, None)["reason"]


def test_prefilling_again_is_the_floor_of_a_prefilled_arm(pairs: dict[str, Any]) -> None:
    given = {name: pairs[name] for name in (MAIN, TRAIN_FLOOR, "infer-rescore~infer")}
    found = floors(given, is_prefilled=True)
    assert found is not None
    assert found["infer"]["arm"] == "infer-rescore"
    assert found["decode_vs_prefill"] is None


def test_the_verdict_says_what_the_interval_can_tell(pairs: dict[str, Any]) -> None:
    found = floors(pairs, is_prefilled=False)
    assert verdict(pairs[MAIN], found, 0, None)["word"] == "above floor"
    same = floors({**pairs, MAIN: pairs[TRAIN_FLOOR], TRAIN_FLOOR: pairs[MAIN]}, is_prefilled=False)
    assert verdict(pairs[TRAIN_FLOOR], same, 0, None)["word"] == "at floor"
    assert "errors" in verdict(pairs[MAIN], found, 3, None)["reason"]
    inside = replace_floor(found, pairs[MAIN]["logp"]["abs_logp_diff"]["mean"])
    assert "contains the floor" in verdict(pairs[MAIN], inside, 0, None)["reason"]
    evidence = verdict(pairs[MAIN], found, 0, {"removed_share": 0.6})["evidence"]
    assert any("D23" in line for line in evidence)


def replace_floor(found: Any, floor: float) -> Any:
    metrics = {**found["metrics"], "abs_logp_diff.mean": {**found["metrics"]["abs_logp_diff.mean"], "floor": floor}}
    return {**found, "metrics": metrics}


def test_dense_and_empty_pairs_have_floors_without_flips() -> None:
    dense = summary_of(0.05, 0.0, dense=True)
    found = floors({MAIN: dense, TRAIN_FLOOR: dense, INFER_FLOOR: dense}, is_prefilled=False)
    assert found is not None
    assert found["metrics"]["flip_rate"]["floor"] is None
    block = make_block(n_prompts=2)
    unscored = replace(block, logp_train_T=block.logp_train_T * float("nan"))
    empty = pair_summary(analyze_pair(make_pair(unscored)))
    assert floors({MAIN: empty, TRAIN_FLOOR: empty}, is_prefilled=False) is None
    assert verdict(empty, None, 0, None)["reason"] == "no token was scored by both engines"


@given(st.sets(st.sampled_from(["infer", "train", "train-repeat", "infer-repeat", "train-fp32", "train-replay"])))
def test_every_further_arm_is_paired_with_its_own_engine(arms: set[str]) -> None:
    for main, arm in own_side_pairs(sorted(arms)):
        assert main in arms
        assert arm.startswith(main)
        assert arm != "train-replay"  # another routing is not the engine against itself
