"""Floors of the numbers that two figures show: the size of a response's log-ratio, and the share that a mask takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic import make_block, make_pair
from test_analysis_floors import own_of

from moediag.analysis.floors import floors, metric_value
from moediag.analysis.sequences import abs_log_ratio_mean
from moediag.figures import FIGURES, Floor, summary_floors
from moediag.results.pair_analysis import analyze_pair
from moediag.results.pair_summary import pair_summary

MAIN, TRAIN_FLOOR, INFER_FLOOR = "infer~train", "train-repeat~train", "infer-repeat~infer"


@pytest.fixture(scope="module")
def analyses():
    scales = {MAIN: 0.9, TRAIN_FLOOR: 0.5, INFER_FLOOR: 0.3}
    return {name: analyze_pair(make_pair(make_block(n_prompts=24, diff_scale=scale))) for name, scale in scales.items()}


def test_the_size_of_a_response_is_that_of_a_plain_loop(analyses):
    tokens = analyses[MAIN].frames()["tokens"]
    sums: dict[int, float] = {}
    for row in tokens.itertuples():
        if math.isfinite(row.logp_train) and math.isfinite(row.logp_infer):
            sums[row.seq_id] = sums.get(row.seq_id, 0.0) + float(row.logp_train) - float(row.logp_infer)
    found = abs_log_ratio_mean(analyses[MAIN].sequences)
    assert found.value == pytest.approx(np.mean([abs(value) for value in sums.values()]))
    assert found.low < found.value < found.high


def test_the_mean_of_responses_is_summed_and_the_masked_share_is_the_larger_side(analyses):
    pairs = {name: pair_summary(analysis) for name, analysis in analyses.items()}
    found = floors(pairs, MAIN, own_of())["metrics"]
    sizes = [pairs[name]["length"]["abs_log_ratio_mean"] for name in (TRAIN_FLOOR, INFER_FLOOR)]
    assert found["abs_log_ratio_mean"]["floor"] == sum(sizes)
    shares = [pairs[name]["corrections"]["icepop_0.5_5.0"]["masked_share"] for name in (TRAIN_FLOOR, INFER_FLOOR)]
    assert max(shares) > 0
    assert found["masked_share"]["floor"] == max(shares)
    assert found["masked_share"]["ratio"] == pytest.approx(metric_value(pairs[MAIN], "masked_share") / max(shares))


def test_every_figure_has_the_floor_of_its_statistic(analyses):
    """Two captions said that no floor was measured, because summary.json had none for their statistic."""
    pairs = {name: pair_summary(analysis) for name, analysis in analyses.items()}
    found = summary_floors(floors(pairs, MAIN, own_of()))
    assert {kind.floor_of for kind in FIGURES.values() if kind.floor_of} <= found.keys()
    assert all(isinstance(floor, Floor) for floor in found.values())
