"""Flips forecast: how often a pair of arms would flip if its noise were that of another pair.

Invariants:
    - *forecast* means that of the pair only one arm's scores are read; the noise is of another, named pair, and every
      row says which, what the pair really showed, what the pair of the noise showed, and what must hold;
    - noise of the same prompt is never used, here neither: a forecast for arms of one run is cross-fit by prompt;
    - no interval: the noise is an estimate, too, and prompts resampled under a noise taken as known give bounds that
      miss the rate found most of the time;
    - only noise that was measured: scaled noise is left out, since a flip makes the noise of later layers louder and
      no factor tells by how much, and so is rounding of recorded scores, since a router in another precision is not
      its result rounded. Those are arms to capture (``train-router-fp8``, ``train-router-fp32``), not to forecast.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.calibration import PredictionTotals
from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.declarations import FORECAST_FLIPS
from moediag.analysis.explain import (
    PairNoise,
    frame_of,
    layer_records,
    measure_noise,
    predict_pair,
    thinned_views,
    what_to_know,
)
from moediag.analysis.flip_predictor import MEASURE_OF, FlipPredictor
from moediag.analysis.margin_counts import Side
from moediag.run.align import Pair

Float64 = NDArray[np.float64]

_ASSUMED: Final = (
    "{pair} has the noise of {noise}; noise independent of the gap, given layer and upstream gaps; symmetric; "
    "other prompts behave alike"
)


def forecast_flips(
    target: Pair, noise: Pair, rule: RoutingRule, side: Side = "infer", bias_LE: Float64 | None = None
) -> pd.DataFrame:
    """Flip rate that a pair would have under the noise of another pair, from the scores of one of its arms.

    Args:
        target: the pair that the forecast is of, e.g. infer~train; its own noise plays no part.
        noise: the pair that the noise is measured on, e.g. ``run.pair("train-perturbed", "train", with_logits=True)``.
        rule: of the routers.
        side: whose scores of ``target`` predict.
        bias_LE: the routers' correction bias of that side by layer, where the rule has one.

    Returns:
        Frame ``forecast_flips``: share of choices that would flip, pooled and by layer, beside the flips that both
        pairs show; low is good. Empty without margins on either side.

    Source: ours; assumptions stand in the column ``assumption``.
    """
    return forecast_from(measure_noise(target, rule, side), measure_noise(noise, rule), bias_LE)


def forecast_from(target: PairNoise, noise: PairNoise, bias_LE: Float64 | None = None) -> pd.DataFrame:
    """:func:`forecast_flips` of pairs whose noise has been measured, so that one measurement serves several targets."""
    methods = noise.methods(bias_LE is not None)
    if not target.has_target_logits:
        methods = [method for method in methods if MEASURE_OF[method] == "margins"]
    if not methods:
        return frame_of(FORECAST_FLIPS, [])
    method = methods[0]
    predictor = FlipPredictor(noise.counts[MEASURE_OF[method]], noise.rule, method, bias_LE)
    assumed = _ASSUMED.format(pair=target.pair.name, noise=noise.pair.name)
    known = what_to_know(noise, method, bias_LE is not None)
    head = {
        "pair": target.pair.name, "side": target.side, "noise_from": noise.pair.name, "method": method,
        "assumption": "; ".join(words for words in (known, assumed) if words),
    }  # fmt: skip
    of_noise = {row["layer"]: row for row in layer_records(noise.pair, _flips(noise), "forecast")}
    records = [
        {**head, **row, **_renamed(of_noise[row["layer"]])}
        for row in layer_records(target.pair, predict_pair(target, predictor), "forecast")
    ]
    return frame_of(FORECAST_FLIPS, records)


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """The observed rate of the pair of the noise, under the names that stand beside the forecast's own."""
    return {
        f"noise_{name}": value
        for name, value in row.items()
        if name in ("observed", "observed_ci_low", "observed_ci_high")
    }


def _flips(pair: PairNoise) -> PredictionTotals:
    """What a pair showed, predicting nothing."""
    shape = 0, pair.pair.n_layers
    parts = [PredictionTotals.of_block(np.zeros(0, np.int64), np.zeros(shape), np.zeros(shape, bool))]
    for view in thinned_views(pair, "margins"):
        zero_TL = np.where(view.is_known_TL, 0.0, np.nan)
        parts.append(PredictionTotals.of_block(view.prompt_id_T, zero_TL, view.is_flip_TL))
    return PredictionTotals.merge(parts)
