"""Flips forecast: what one engine's scores alone would flip under noise that was measured elsewhere, or assumed.

Invariants:
    - *forecast* means that of the target only one arm's scores are read; the noise is of a named pair of arms or a
      named rounding, and every row says which, and what must hold for it;
    - noise of the same prompt is never used, here neither: a forecast for arms of one run is cross-fit by prompt;
    - a rounding row knows of one layer's router at a time: what a flip changes in the layers after it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.calibration import PredictionTotals
from moediag.analysis.choice_scores import RoutingRule, chosen_experts, compared_scores, score_slopes
from moediag.analysis.explain import (
    MAX_CELLS,
    PairNoise,
    frame_of,
    layer_records,
    measure_noise,
    predict_targets,
    thinned_views,
    why_no_prediction,
)
from moediag.analysis.flip_declarations import FORECAST_FLIPS
from moediag.analysis.flip_predictor import MEASURE_OF, FlipPredictor
from moediag.analysis.flip_probability import set_flip_probability
from moediag.analysis.margin_counts import Side
from moediag.run.align import Pair

Float64 = NDArray[np.float64]
Format = Literal["bf16", "fp8"]

MULTIPLIERS: Final = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
CURVE_CELLS: Final = 200_000
"""Scores that a whole curve of multipliers is made from: loud noise leaves no choice safe, so each costs more."""
_FP8_MAX: Final = 448.0  # largest finite float8 e4m3
_FP8_STEPS: Final = 8  # per octave: 3 mantissa bits
_FP8_LEAST: Final = -6  # exponent of the smallest normal number
_BF16_STEPS: Final = 128

_SAME: Final = "noise independent of the gap, given layer and upstream gaps; symmetric; other prompts behave alike"
_ELSEWHERE: Final = f"{_SAME}; the target has the noise of the other pair, and that pair's own scores play no part"
_SCALED: Final = "; every layer's noise grows by the same factor, amplification through depth included"
_ROUNDED: Final = (
    "each layer's logits rounded once to {format}, all before them unchanged: leaves out noise from other operations "
    "and what a flip does to later layers"
)
_ON_LATTICE: Final = "the logits recorded are {format} numbers already: rounding them again changes nothing"
_UNROUNDED: Final = (
    "logits before their rounding to bf16 lie evenly around the recorded ones: what a router in float32 would choose "
    "otherwise, all before it unchanged; leaves out what a flip does to later layers"
)


def forecast_flips(
    target: Pair,
    noise: Pair,
    spec_record: dict[str, Any],
    target_arm: str = "",
    multipliers: Sequence[float] = MULTIPLIERS,
    bias_LE: Float64 | None = None,
) -> pd.DataFrame:
    """Flip rate that one arm's scores would show under the noise of a pair of arms, louder and softer.

    Args:
        target: a pair with the arm whose scores count; of the other arm only its prompts are read, unless the
            target *is* the noise pair, where its flips give the calibration.
        noise: the pair that the noise is measured on, e.g. ``run.pair("train-perturbed", "train", with_logits=True)``.
        spec_record: ``model.routing`` of run.json.
        target_arm: the arm of ``target`` whose scores count; default its subtrahend.
        multipliers: factors on the noise.
        bias_LE: the routers' correction bias by layer, where the rule has one.

    Returns:
        Frame ``forecast_flips``: share of choices that would flip, pooled and by layer; low is good. Empty without
        margins on either side.

    Source: ours; assumptions stand in the column ``assumption``.
    """
    rule = RoutingRule.from_record(spec_record)
    side: Side = "train" if target_arm == target.minuend else "infer"
    measured = measure_noise(noise, rule)
    scores = measured if (noise.name, side) == (target.name, "infer") else measure_noise(target, rule, side)
    return forecast_from(scores, measured, multipliers, bias_LE)


def forecast_from(
    target: PairNoise, noise: PairNoise, multipliers: Sequence[float] = MULTIPLIERS, bias_LE: Float64 | None = None
) -> pd.DataFrame:
    """:func:`forecast_flips` of pairs whose noise has been measured, so that one measurement serves several targets."""
    methods = noise.methods(bias_LE is not None)
    if not target.has_target_logits:
        methods = [method for method in methods if MEASURE_OF[method] == "margins"]
    if not methods:
        return frame_of(FORECAST_FLIPS, [])
    method, is_own = methods[0], target is noise
    factors = tuple(multipliers) if 1.0 in multipliers else (1.0, *multipliers)
    predictor = FlipPredictor(noise.counts[MEASURE_OF[method]], noise.rule, method, factors, bias_LE)
    why_none = why_no_prediction(noise, method, bias_LE is not None)
    records = []
    max_cells = CURVE_CELLS if len(factors) > 1 else MAX_CELLS
    for factor, totals in zip(factors, predict_targets(target, predictor, max_cells), strict=True):
        assumption = why_none or (_SAME if is_own else _ELSEWHERE) + (_SCALED if factor != 1 else "")
        head = {
            "noise_from": noise.pair.name, "target": arm_of(target), "method": method, "multiplier": factor,
            "assumption": assumption,
        }  # fmt: skip
        rows = layer_records(target.pair, totals, "forecast")
        records += [{**row, **head} if is_own and factor == 1 else {**_without_flips(row), **head} for row in rows]
    if not is_own:
        _add_observed(records, noise)
    return frame_of(FORECAST_FLIPS, records)


def rounding_forecast(target: PairNoise, bias_LE: Float64 | None = None) -> pd.DataFrame:
    """Flips by the rounding of router logits alone: to bf16 and fp8 where they are finer, and back from bf16.

    Rounding the recorded logits is honest for the rounding of the *result*. It is not what a router computed in that
    format gives (inputs and weights are rounded, too, and sums run in another order): for that, capture the arm.

    Args:
        target: a pair measured by :func:`~moediag.analysis.explain.measure_noise`, whose reference side has logits.

    Returns:
        Frame ``forecast_flips``, with ``noise_from`` ``rounding to bf16``, ``rounding to fp8`` or ``bf16 undone``;
        empty without logits, or where a bias is needed and not known.
    """
    rule = target.rule
    if not target.has_target_logits or (rule.has_correction_bias and bias_LE is None):
        return frame_of(FORECAST_FLIPS, [])
    is_bf16, records = _is_on_lattice(target), []
    kinds: list[tuple[str, str, str, _Flips]] = [
        (
            "rounding to fp8",
            "rounded",
            _ROUNDED.format(format="fp8 (e4m3, scaled by the token's largest)"),
            _rounded("fp8"),
        )
    ]
    assumption = (_ON_LATTICE if is_bf16 else _ROUNDED).format(format="bf16")
    kinds.append(("rounding to bf16", "rounded", assumption, _rounded("bf16")))
    if is_bf16 and not rule.is_grouped:
        kinds.append(("bf16 undone", "unrounded", _UNROUNDED, _unrounded))
    for name, method, assumption, flips in kinds:
        totals = _predict_rounding(target, flips, bias_LE)
        head = {"noise_from": name, "target": arm_of(target), "method": method, "multiplier": 1.0}
        rows = layer_records(target.pair, totals, "forecast")
        records += [{**_without_flips(row), **head, "assumption": assumption} for row in rows]
    return frame_of(FORECAST_FLIPS, records)


def arm_of(target: PairNoise) -> str:
    """Name of the arm whose scores predict."""
    return target.pair.subtrahend if target.side == "infer" else target.pair.minuend


def rounded_to_bf16(values: NDArray[Any]) -> NDArray[np.float32]:
    """Nearest bfloat16 numbers, ties to even, as float32; finite values only.

    Example:
        >>> rounded_to_bf16(np.array([1.0, 1.003, 1.005])).tolist()
        [1.0, 1.0, 1.0078125]
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    even = bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
    return np.asarray((even & np.uint64(0xFFFF0000)).astype(np.uint32).view(np.float32), dtype=np.float32)


def rounded_to_fp8(values: NDArray[Any]) -> NDArray[np.float32]:
    """Nearest float8 (e4m3) numbers, every row scaled by its largest value, as float32; finite values only."""
    largest = np.abs(values).max(axis=-1, keepdims=True).astype(np.float64)
    scale = np.where(largest > 0, largest, 1.0) / _FP8_MAX
    scaled = np.asarray(values, dtype=np.float64) / scale
    # below the smallest normal number steps stay as they are there
    exponent = np.maximum(np.frexp(scaled)[1] - 1, _FP8_LEAST)
    step = np.ldexp(1.0, exponent) / _FP8_STEPS
    return np.asarray(np.round(scaled / step) * step * scale, dtype=np.float32)


_Flips = Callable[[NDArray[Any], RoutingRule, "Float64 | None"], Float64]


def _rounded(format_: Format) -> _Flips:
    to = rounded_to_bf16 if format_ == "bf16" else rounded_to_fp8

    def flips(logits_NE: NDArray[Any], rule: RoutingRule, bias_E: Float64 | None) -> Float64:
        before, after = (np.sort(chosen_experts(x, rule, bias_E), axis=1) for x in (logits_NE, to(logits_NE)))
        return np.asarray((before != after).any(axis=1), dtype=np.float64)

    return flips


def _unrounded(logits_NE: NDArray[Any], rule: RoutingRule, bias_E: Float64 | None) -> Float64:
    """P(flip) when each logit is off by up to half a bf16 step: a uniform error, taken as a Gaussian of its size."""
    score_NE = compared_scores(logits_NE, rule, bias_E)
    exponent_NE = np.frexp(np.asarray(logits_NE, dtype=np.float64))[1] - 1
    sigma_NE = np.ldexp(1.0, exponent_NE) / _BF16_STEPS / np.sqrt(12) * score_slopes(logits_NE, rule)
    order_NE = np.argsort(-score_NE, axis=1, kind="stable")
    score_NE, sigma_NE = (np.take_along_axis(array, order_NE, axis=1) for array in (score_NE, sigma_NE))
    return set_flip_probability(score_NE, np.maximum(sigma_NE, 1e-300), rule.top_k)


def _predict_rounding(target: PairNoise, flips: _Flips, bias_LE: Float64 | None) -> PredictionTotals:
    n_layers = target.pair.n_layers
    shape = 0, n_layers
    parts = [PredictionTotals.of_block(np.zeros(0, np.int64), np.zeros(shape), np.zeros(shape, bool))]
    for view in thinned_views(target, "logits"):
        predicted_TL = np.full(view.gap_TL.shape, np.nan)
        for layer in range(n_layers):
            rows = np.flatnonzero(view.usable_rows(layer))
            bias_E = None if bias_LE is None else bias_LE[layer]
            predicted_TL[rows, layer] = flips(view.logits_TLE[rows, layer], target.rule, bias_E)
        parts.append(PredictionTotals.of_block(view.prompt_id_T, predicted_TL, view.is_flip_TL))
    return PredictionTotals.merge(parts)


def _is_on_lattice(target: PairNoise) -> bool:
    """The recorded logits are bf16 numbers, every one of the first block with any."""
    view = next(iter(thinned_views(target, "logits")), None)
    if view is None:
        return False
    logits = view.logits_TLE[np.isfinite(view.logits_TLE)]
    return bool((rounded_to_bf16(logits) == logits).all())


def _without_flips(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what compares forecasts with flips: the flips of the target's pair have another cause."""
    compared = ("observed", "calibration")
    return {name: np.nan if name.startswith(compared) else value for name, value in row.items()}


def _add_observed(records: list[dict[str, Any]], noise: PairNoise) -> None:
    """Flip rate of the pair the noise is from, beside the forecast at multiplier 1."""
    flips = _observed(noise)
    observed = {row["layer"]: row for row in layer_records(noise.pair, flips, "forecast")}
    for record in records:
        if record["multiplier"] == 1:
            of_layer = observed[record["layer"]]
            record |= {name: value for name, value in of_layer.items() if name.startswith("observed")}


def _observed(noise: PairNoise) -> PredictionTotals:
    shape = 0, noise.pair.n_layers
    parts = [PredictionTotals.of_block(np.zeros(0, np.int64), np.zeros(shape), np.zeros(shape, bool))]
    for view in thinned_views(noise, "margins"):
        zero_TL = np.where(view.is_known_TL, 0.0, np.nan)
        parts.append(PredictionTotals.of_block(view.prompt_id_T, zero_TL, view.is_flip_TL))
    return PredictionTotals.merge(parts)
