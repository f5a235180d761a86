"""Flips explained: how much of a pair's flip rate follows from one side's scores and the noise of other prompts.

Invariants:
    - *explained* means that noise and flips come from the same pair, cross-fit by prompt: a prompt's flips are
      predicted from its own scores on one side and from the noise of prompts of other folds;
    - observed and explained are rates of the same choices: a choice without a prediction is in neither;
    - two passes over the pair (noise, then flips) in bounded memory; large captures are thinned by whole tokens,
      evenly, and ``n_choices`` says how many choices were left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.calibration import POOLED, PredictionTotals, calibration_errors, curve_rows, rate_intervals
from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.declarations import EXPLAINED_FLIPS, FLIP_CALIBRATION, SCORE_NOISE
from moediag.analysis.flip_predictor import MEASURE_OF, FlipPredictor, Method
from moediag.analysis.intervals import divide
from moediag.analysis.margin_counts import Side
from moediag.analysis.noise import CELL_SCALE, BlockView, Measure, NoiseCounts, view_block
from moediag.frames import FrameSpec
from moediag.run.align import Pair

Float64 = NDArray[np.float64]

MAX_CELLS: Final = 4_000_000
"""Scores (choices times E) that predictions from logits are made for; more are thinned."""
BORDER_ONLY: Final = "flips by any pair of experts but the border's are missing, the more of them the more choices flip"
"""Of the flips of synthetic engines (16 experts, 4 chosen) it explains .90 at a flip rate of 4 %, .77 at 18 % and .68
at 31 % from the border pair's logits, .87, .72 and .62 from margins; every pair of experts .99 to 1.02."""
_ONE_FOLD: Final = "prompts of one fold only: no other prompts to take the noise from"
_NO_BIAS: Final = "the router's correction bias is not known: only the margins can be used"
_GROUPS: Final = "experts in groups: margins hold one group's border only; capture router logits"
_QUANTILES: Final = {"sigma_p10": 0.1, "sigma_p50": 0.5, "sigma_p90": 0.9, "sigma_p99": 0.99}


@dataclass(frozen=True)
class PairNoise:
    """The noise of one pair, measured in every way that its arms allow.

    Args:
        counts: by way to measure.
        tie_L, gap_L: exact ties and gaps of the reference side, by layer.
        has_target_logits: the reference side kept its router logits.
    """

    pair: Pair
    rule: RoutingRule
    side: Side
    counts: dict[Measure, NoiseCounts]
    tie_L: Float64
    gap_L: Float64
    has_target_logits: bool

    def methods(self, has_bias: bool) -> list[Method]:
        """Methods that can be tried, best first."""
        by_logits: list[Method] = ["all_pairs", "border_pair"]
        if self.rule.is_grouped:
            by_logits = ["simulated"]
        if "logits" not in self.counts or (self.rule.has_correction_bias and not has_bias):
            by_logits = []
        by_margins: list[Method] = ["margin_change"] if "margins" in self.counts else []
        return by_logits + by_margins


def frame_of(spec: FrameSpec, records: list[dict[str, Any]]) -> pd.DataFrame:
    """Records as a validated frame, also when there is none; keys that the frame does not declare are left out."""
    return spec.validate(pd.DataFrame.from_records(records, columns=[column.name for column in spec.columns]))


@dataclass(frozen=True)
class Explanation:
    """The three frames that one pair gives."""

    score_noise: pd.DataFrame
    explained_flips: pd.DataFrame
    flip_calibration: pd.DataFrame


def explain_pair(pair: Pair, rule: RoutingRule, side: Side = "infer", bias_LE: Float64 | None = None) -> Explanation:
    """Explain the flips of a pair, in every way that its captures allow.

    With full router logits on both sides all K (E - K) pairs enter; with margins alone, the border pair. Both are
    given where both exist, since the first checks the second.

    Args:
        pair: two arms; give a pair with logits (``Run.pair(..., with_logits=True)``) for the better methods.
        rule: of the routers.
        side: whose scores predict; the other side only says what happened.
        bias_LE: the routers' correction bias by layer, where the rule has one; without it only margins can be used.

    Returns:
        Frames ``score_noise``, ``explained_flips`` and ``flip_calibration``; empty without margins or expert ids.

    Source: ours; a flip needs a gap below the noise (TRM), the noise being a scale mixture over tokens.
    """
    return explain_measured(measure_noise(pair, rule, side), bias_LE)


def explain_measured(noise: PairNoise, bias_LE: Float64 | None = None) -> Explanation:
    """:func:`explain_pair` of a pair whose noise has been measured."""
    pair, rule, side = noise.pair, noise.rule, noise.side
    sigmas = {measure: noise_rows(noise, measure) for measure in noise.counts}
    records: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for method in noise.methods(bias_LE is not None):
        predictor = FlipPredictor(noise.counts[MEASURE_OF[method]], rule, method, bias_LE=bias_LE)
        totals = predict_pair(noise, predictor)
        head = {"method": method, "side": side, "note": what_to_know(noise, method, bias_LE is not None)}
        records += [{**head, **row} for row in _explained_rows(pair, totals, sigmas[MEASURE_OF[method]])]
        curves += [{"method": method, **row} for row in curve_rows(totals)]
    return Explanation(
        frame_of(SCORE_NOISE, [row for rows in sigmas.values() for row in rows]),
        frame_of(EXPLAINED_FLIPS, records),
        frame_of(FLIP_CALIBRATION, curves),
    )


def explained_flips(
    pair: Pair, rule: RoutingRule, side: Side = "infer", bias_LE: Float64 | None = None
) -> pd.DataFrame:
    """Frame ``explained_flips`` of :func:`explain_pair`."""
    return explain_pair(pair, rule, side, bias_LE).explained_flips


def measure_noise(pair: Pair, rule: RoutingRule, side: Side = "infer") -> PairNoise:
    """The noise between the two arms of a pair, in one pass over its blocks."""
    counts: dict[Measure, NoiseCounts] = {}
    tie_L, gap_L, has_logits = np.zeros(pair.n_layers), np.zeros(pair.n_layers), False
    for block in pair.blocks():
        view = view_block(block, rule, side)
        if view is None:
            continue
        tie_L += (view.is_known_TL & (view.gap_TL == 0)).sum(axis=0)
        gap_L += view.is_known_TL.sum(axis=0)
        has_logits |= view.logits_TLE is not None
        for measure in _measures(view):
            counts.setdefault(measure, NoiseCounts.empty(pair.n_layers)).add_block(view, rule, measure)
    return PairNoise(pair, rule, side, counts, tie_L, gap_L, has_logits)


def predict_pair(target: PairNoise, predictor: FlipPredictor) -> PredictionTotals:
    """Predictions from the scores of a pair's reference side, beside the flips of that pair.

    Args:
        target: whose scores; its own noise is not read.
        predictor: made from the noise of this or another pair.
    """
    n_layers = target.pair.n_layers
    shape = 0, n_layers
    parts = [PredictionTotals.of_block(np.zeros(0, np.int64), np.zeros(shape), np.zeros(shape, bool))]
    for view in thinned_views(target, MEASURE_OF[predictor.method]):
        predicted_TL = np.stack([predictor.layer_probability(view, layer) for layer in range(n_layers)], axis=1)
        parts.append(PredictionTotals.of_block(view.prompt_id_T, predicted_TL, view.is_flip_TL))
    return PredictionTotals.merge(parts)


def thinned_views(target: PairNoise, measure: Measure) -> Iterator[BlockView]:
    """Views of the blocks; from logits, every n-th token where all would be too many. Margins are cheap: all."""
    n_cells = float(target.gap_L.sum()) * target.rule.n_experts
    stride = max(1, math.ceil(n_cells / MAX_CELLS)) if measure == "logits" else 1
    for block in target.pair.blocks():
        view = view_block(block, target.rule, target.side)
        if view is not None and (measure == "margins" or view.logits_TLE is not None):
            yield view.every(stride)


def noise_rows(noise: PairNoise, measure: Measure) -> list[dict[str, Any]]:
    """Distribution of the noise by layer, its growth with depth, and the ties it meets."""
    counts = noise.counts[measure]
    n_LH, zero_L = counts.n_FLRH.sum(axis=(0, 2)), counts.zero_FLR.sum(axis=(0, 2))
    n_L = n_LH.sum(axis=1) + zero_L
    # a difference of two scores, each with the token's scale; a margin's change is such a difference already
    sigma_H = CELL_SCALE * (np.sqrt(2) if measure == "logits" else 1.0)
    quantile_L = {name: _quantile(n_LH, zero_L, sigma_H, q) for name, q in _QUANTILES.items()}
    columns = {
        **quantile_L,
        "sigma_mean": divide((n_LH * sigma_H).sum(axis=1), n_L),
        "sigma_rms": np.sqrt(divide((n_LH * np.square(sigma_H)).sum(axis=1), n_L)),
        "growth": divide(quantile_L["sigma_p50"], np.broadcast_to(quantile_L["sigma_p50"][:1], n_L.shape)),
        "no_noise_share": divide(zero_L, n_L),
        "tie_share": divide(noise.tie_L, noise.gap_L),
    }
    return [
        {
            "layer": layer, "decoder_layer": decoder, "measure": measure, "space": noise.rule.space,
            "n_choices": int(n_L[layer]), **{name: column[layer] for name, column in columns.items()},
        }
        for layer, decoder in enumerate(noise.pair.decoder_layer_L)
    ]  # fmt: skip


def layer_records(pair: Pair, totals: PredictionTotals, name: str) -> list[dict[str, Any]]:
    """Observed and predicted rates and their gap, one record per layer and, first, all layers pooled.

    Args:
        name: what the predicted rate is called.
    """
    rates, errors = rate_intervals(totals), calibration_errors(totals)
    n_L = totals.n_CLB.sum(axis=(0, 2))
    records = []
    for layer in (POOLED, *range(pair.n_layers)):
        record: dict[str, Any] = {
            "layer": layer,
            "decoder_layer": POOLED if layer == POOLED else pair.decoder_layer_L[layer],
            "n_choices": int(n_L.sum() if layer == POOLED else n_L[layer]),
        }
        for column, intervals in (("observed", rates.observed), ("gap", rates.gap)):
            one = intervals.one(layer)
            record |= {column: one.value, f"{column}_ci_low": one.low, f"{column}_ci_high": one.high}
        record[name] = float(rates.predicted_M[layer])
        records.append({**record, **{error: values[layer] for error, values in errors.items()}})
    return records


def _explained_rows(pair: Pair, totals: PredictionTotals, noise: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in layer_records(pair, totals, "explained"):
        of_layer = {} if record["layer"] == POOLED else noise[record["layer"]]
        yield {**record, **{name: of_layer.get(name, np.nan) for name in ("sigma_p50", "sigma_p90")}}


def what_to_know(noise: PairNoise, method: Method, has_bias: bool) -> str:
    """Why a method could not predict, or what its prediction leaves out and why it was the one taken; mostly empty."""
    if method == "margin_change" and noise.rule.is_grouped:
        return _GROUPS
    folds = (noise.counts[MEASURE_OF[method]].n_FL.sum(axis=1) > 0).sum()
    if folds < 2:
        return _ONE_FOLD
    is_without_bias = "logits" in noise.counts and noise.rule.has_correction_bias and not has_bias
    is_border = method in ("border_pair", "margin_change")
    return "; ".join([*([_NO_BIAS] if is_without_bias else []), *([BORDER_ONLY] if is_border else [])])


def _measures(view: BlockView) -> list[Measure]:
    measures: list[Measure] = ["logits"] if view.has_logits else []
    return [*measures, "margins"] if np.isfinite(view.change_TL).any() else measures


def _quantile(n_LH: Float64, zero_L: Float64, sigma_H: Float64, q: float) -> Float64:
    """Quantile of a distribution given by cells and exact zeros; NaN of nothing."""
    upto_LH = np.concatenate([zero_L[:, None], n_LH], axis=1).cumsum(axis=1)
    total_L = upto_LH[:, -1]
    cell_L = (upto_LH < q * total_L[:, None]).sum(axis=1)
    value_L = np.r_[0.0, sigma_H][np.minimum(cell_L, len(sigma_H))]
    return np.where(total_L > 0, value_L, np.nan)
