"""Flips explained and forecast: how many choices flip by one side's scores and a noise that was measured.

:func:`predict_flips` does all of it for a run: it measures the noise of infer~train and of every arm that repeats or
perturbs its own engine, explains the flips of infer~train, forecasts them for the noise of the others, and
:func:`flip_headlines` picks the few numbers that a summary holds.

Invariants:
    - *explained* means that noise and flips come from the same pair, cross-fit by prompt: a prompt's flips are
      predicted from its own scores on one side and from the noise of prompts of other folds;
    - *forecast* means that of the pair only one arm's scores are read; the noise is of another, named pair, and every
      row holds which, what the pair really showed, what the pair of the noise showed, and what is assumed. Cross-fit
      by prompt, too, where both pairs are of one run;
    - observed and predicted are rates of the same choices: a choice without a prediction is in neither;
    - a forecast has no interval: the noise is an estimate, too, and prompts resampled under a noise taken as known give
      bounds that miss the rate found most of the time;
    - only noise that was measured: scaled noise is left out, since a flip makes the noise of later layers louder and
      no factor is known, and so is rounding of recorded scores, since a router in another precision is not
      its result rounded. Those are arms to capture (``train-router-fp8``, ``train-router-fp32``);
    - a pair is read once for its noise and once for all predictions from it, in bounded memory; large captures are
      thinned by whole tokens, evenly, and ``n_choices`` is the number of choices left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.declarations import EXPLAINED_FLIPS, FLIP_CALIBRATION, FORECAST_FLIPS, SCORE_NOISE
from moediag.analysis.flips.calibration import PredictionTotals, curve_records, rate_records
from moediag.analysis.flips.noise import (
    MEASURE_OF,
    Method,
    PairNoise,
    measure_noise,
    noise_records,
    view_block,
)
from moediag.analysis.flips.predictor import FlipPredictor
from moediag.frames import FrameSpec
from moediag.notation import INFER, POOLED, TRAIN
from moediag.run.reader import Run

Float64 = NDArray[np.float64]

MAX_CELLS: Final = 4_000_000
"""Scores (choices times E) that predictions from logits are made for; more are thinned."""
BORDER_ONLY: Final = "flips by any pair of experts but the border's are missing, the more of them the more choices flip"
"""Of the flips of synthetic engines (16 experts, 4 chosen) it explains .90 at a flip rate of 4 %, .77 at 18 % and .68
at 31 % from the border pair's logits, .87, .72 and .62 from margins; every pair of experts .99 to 1.02."""
_ONE_FOLD: Final = "prompts of one fold only: no other prompts to take the noise from"
_NO_BIAS: Final = "the router's correction bias is not known: only the margins can be used"
_GROUPS: Final = "experts in groups: margins hold one group's border only; capture router logits"
_ASSUMED: Final = (
    "{pair} has the noise of {noise}; noise independent of the gap, given layer and upstream gaps; symmetric; "
    "other prompts behave alike"
)
_NOISE: Final = ("repeat", "path", "perturbation")
"""Changes that are a repetition of an engine, or rounding. Not other precisions: what one changes against its own
engine is no forecast of infer~train *with* it and reads as one. On the demo 1.77 % by the noise of train-router-fp32
(infer~train 2.60 %); infer~train-router-fp32 shows 2.66 %."""
METHOD_WORDS: Final = {
    "all_pairs": "every pair of experts",
    "border_pair": "the border pair",
    "simulated": "simulated choices",
    "margin_change": "margins alone",
}
"""The methods of frame ``explained_flips`` in words, best first."""
_CALIBRATION: Final = ("calibration_error", "calibration_error_expected", "calibration_slope")


def predict_flips(run: Run) -> dict[str, pd.DataFrame]:
    """Explained and forecast flips of infer~train, by frame name; empty for a dense model, or without arms or rule.

    Picks by what was captured: router logits on both sides, else margins.

    Args:
        run: a run with complete arms infer and train. Where the rule has a correction bias, infer's scores are read
            with the bias that its engine had; captured without it they are read by their margins.

    Returns:
        Frames ``score_noise``, ``explained_flips``, ``flip_calibration`` (of infer~train, from infer's scores) and
        ``forecast_flips``: of infer~train, if it had the noise of a repeat arm or of train-perturbed against its own
        engine.
    """
    return {**explained_flips_of(run), **forecast_flips_of(run)}


def explained_flips_of(run: Run) -> dict[str, pd.DataFrame]:
    """The part of :func:`predict_flips` that reads infer and train alone."""
    rule = _common_rule(run)
    return {} if rule is None else explain_flips(_main_noise(run, rule), _bias(run))


def forecast_flips_of(run: Run) -> dict[str, pd.DataFrame]:
    """The part of :func:`predict_flips` that reads :func:`noise_arms`, too."""
    rule = _common_rule(run)
    if rule is None:
        return {}
    others = [_noise_of(run, rule, *names) for names in noise_arms(run)]
    return {"forecast_flips": forecast_flips(_main_noise(run, rule), others, _bias(run))}


def _common_rule(run: Run) -> RoutingRule | None:
    """How both engines choose; None: no rule, no prediction: a guess would look like a finding."""
    both = run.reference(INFER), run.reference(TRAIN)
    if not all(arm in run.arms() and run.is_complete(arm) and run.is_routed(arm) for arm in both):
        return None
    rule, other = (RoutingRule.of_routers(run.arm(arm).routers) for arm in both)
    return rule if rule == other else None


def _main_noise(run: Run, rule: RoutingRule) -> PairNoise:
    return _noise_of(run, rule, run.reference(TRAIN), run.reference(INFER))


def _noise_of(run: Run, rule: RoutingRule, arm: str, reference: str) -> PairNoise:
    pair = run.pair(arm, reference, with_logits=True)
    return measure_noise(pair, rule, "infer" if pair.subtrahend == reference else "train")


def _bias(run: Run) -> Float64 | None:
    stored_LE = run.correction_bias(run.reference(INFER))
    return None if stored_LE is None else stored_LE.astype(np.float64)


def noise_arms(run: Run) -> list[tuple[str, str]]:
    """Complete, routed arms that repeat their own engine or perturb it by rounding, each with the arm it repeats."""
    records = [run.arm(arm) for arm in run.arms() if run.is_complete(arm)]
    routed = {record.name: record for record in records if record.is_routed}
    return [
        (name, record.variant_of)
        for name, record in routed.items()
        if record.change in _NOISE and record.variant_of in routed
    ]


def explain_flips(noise: PairNoise, bias_LE: Float64 | None = None) -> dict[str, pd.DataFrame]:
    """Explain the flips of a pair, in every way that its captures allow.

    With full router logits on both sides all K (E - K) pairs enter; with margins alone, the border pair. Both are
    given where both exist, since the first checks the second.

    Args:
        noise: of the pair; ``noise.side`` is whose scores predict, the other side only shows what happened.
        bias_LE: the routers' correction bias by layer, where the rule has one; without it only margins can be used.

    Returns:
        Frames ``score_noise``, ``explained_flips`` and ``flip_calibration``; empty without margins or expert ids.

    Source: ours; a flip needs a gap below the noise (TRM), the noise being a scale mixture over tokens.
    """
    sigmas = {measure: noise_records(noise, measure) for measure in noise.counts}
    records: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    methods = noise.methods(bias_LE is not None)
    predictors = [FlipPredictor(noise.counts[MEASURE_OF[method]], noise.rule, method, bias_LE) for method in methods]
    for method, totals in zip(methods, predict_pair(noise, predictors), strict=True):
        measure = MEASURE_OF[method]
        head = {"method": method, "side": noise.side, "note": _note(noise, method, bias_LE is not None)}
        for record in rate_records(totals, noise.pair.decoder_layer_L, "explained"):
            of_layer = {} if record["layer"] == POOLED else sigmas[measure][record["layer"]]
            records.append(
                {**head, **record, **{name: of_layer.get(name, np.nan) for name in ("sigma_p50", "sigma_p90")}}
            )
        curves += [{"method": method, **row} for row in curve_records(totals)]
    return {
        "score_noise": _frame(SCORE_NOISE, [row for rows in sigmas.values() for row in rows]),
        "explained_flips": _frame(EXPLAINED_FLIPS, records),
        "flip_calibration": _frame(FLIP_CALIBRATION, curves),
    }


def forecast_flips(target: PairNoise, noises: Sequence[PairNoise], bias_LE: Float64 | None = None) -> pd.DataFrame:
    """Flip rate that a pair would have under the noise of other pairs, from the scores of one of its arms.

    Args:
        target: the pair that the forecast is of, e.g. infer~train; its own noise plays no part.
        noises: the pairs whose noise is taken, e.g. of ``run.pair("train-perturbed", "train", with_logits=True)``.
        bias_LE: the routers' correction bias of ``target.side`` by layer, where the rule has one.

    Returns:
        Frame ``forecast_flips``: share of choices that would flip, pooled and by layer, beside the flips that both
        pairs show; low is good. Sources without margins on either side are left out.

    Source: ours; the assumptions are in the column ``assumption``.
    """
    sources: list[tuple[PairNoise, FlipPredictor]] = []
    for noise in noises:
        methods = noise.methods(bias_LE is not None)
        usable = [method for method in methods if target.has_target_logits or MEASURE_OF[method] == "margins"]
        if usable:
            counts = noise.counts[MEASURE_OF[usable[0]]]
            sources.append((noise, FlipPredictor(counts, noise.rule, usable[0], bias_LE)))
    records: list[dict[str, Any]] = []
    totals = predict_pair(target, [predictor for _, predictor in sources])
    for (noise, predictor), of_target in zip(sources, totals, strict=True):
        assumed = _ASSUMED.format(pair=target.pair.name, noise=noise.pair.name)
        note = _note(noise, predictor.method, bias_LE is not None)
        head = {
            "pair": target.pair.name, "side": target.side, "noise_from": noise.pair.name, "method": predictor.method,
            "assumption": "; ".join(filter(None, [note, assumed])),
        }  # fmt: skip
        shown = {row["layer"]: row for row in rate_records(noise.flips, noise.pair.decoder_layer_L, "forecast")}
        for row in rate_records(of_target, target.pair.decoder_layer_L, "forecast"):
            columns = ("observed", "observed_ci_low", "observed_ci_high")
            records.append({**head, **row, **{f"noise_{name}": shown[row["layer"]][name] for name in columns}})
    return _frame(FORECAST_FLIPS, records)


def predict_pair(target: PairNoise, predictors: Sequence[FlipPredictor]) -> list[PredictionTotals]:
    """Predictions from the scores of a pair's reference side, beside the flips of that pair, in one pass.

    Margins are cheap: every token. From logits every n-th token where all would be too many.

    Args:
        target: whose scores; its own noise is not read.
        predictors: made from the noise of this or other pairs.
    """
    n_layers = target.pair.n_layers
    parts = [[PredictionTotals.empty(n_layers)] for _ in predictors]
    stride = max(1, math.ceil(float(target.gap_L.sum()) * target.rule.n_experts / MAX_CELLS))
    for block in target.pair.blocks() if predictors else ():
        every = view_block(block, target.rule, target.side)
        if every is None:
            continue
        thinned = every.every(stride)
        for predictor, of_predictor in zip(predictors, parts, strict=True):
            needs_logits = MEASURE_OF[predictor.method] == "logits"
            if needs_logits and every.logits_TLE is None:
                continue
            view = thinned if needs_logits else every
            predicted_TL = np.stack([predictor.layer_probability(view, layer) for layer in range(n_layers)], axis=1)
            of_predictor.append(PredictionTotals.of_block(view.prompt_id_T, predicted_TL, view.is_flip_TL))
    return list(map(PredictionTotals.merge, parts))


def _note(noise: PairNoise, method: Method, has_bias: bool) -> str:
    """Why a method could not predict, or what its prediction leaves out and why it was the one taken; mostly empty."""
    if method == "margin_change" and noise.rule.is_grouped:
        return _GROUPS
    if (noise.counts[MEASURE_OF[method]].n_FL.sum(axis=1) > 0).sum() < 2:
        return _ONE_FOLD
    is_without_bias = "logits" in noise.counts and noise.rule.has_correction_bias and not has_bias
    is_border = method in ("border_pair", "margin_change")
    return "; ".join([*([_NO_BIAS] if is_without_bias else []), *([BORDER_ONLY] if is_border else [])])


def _frame(spec: FrameSpec, records: list[dict[str, Any]]) -> pd.DataFrame:
    """Records as a validated frame, also when there is none; keys that the frame does not declare are left out."""
    return spec.validate(pd.DataFrame.from_records(records, columns=[column.name for column in spec.columns]))


def source_words(noise_from: object) -> str:
    """A source of noise in words: the arm of an A/A pair that is not the engine's main one.

    Example:
        >>> source_words("train~train-repeat")
        'noise of train-repeat'
    """
    first, _, second = str(noise_from).partition("~")
    return f"noise of {first if len(first) > len(second) else second}"


def best_method(explained: pd.DataFrame) -> str | None:
    """The first method of frame ``explained_flips`` (its order is best first) with a prediction; None = none has."""
    given = explained.loc[explained["explained"].notna(), "method"]
    return str(given.iloc[0]) if len(given) else None


def flip_headlines(frames: Mapping[str, pd.DataFrame]) -> dict[str, Any] | None:
    """Entry ``predicted_flips`` of summary.json; None for a dense model, or where nothing could be predicted.

    One method only, the best that gave a prediction, so that no reader picks the one that fits.

    Args:
        frames: ``explained_flips`` and ``forecast_flips``, as :func:`predict_flips` gives them.

    Returns:
        ``explained``: observed and explained flip rate over all layers, their gap and the calibration, by the best
        method, and what it leaves out; ``forecast``: one entry per source of noise. Rates in [0, 1]; a gap of 0 is
        best.
    """
    explained, forecasts = frames.get("explained_flips"), frames.get("forecast_flips")
    method = None if explained is None else best_method(explained)
    found: dict[str, Any] = {"explained": None, "forecast": []}
    if explained is not None and method is not None:
        row = explained[(explained["method"] == method) & (explained["layer"] == POOLED)].iloc[0]
        found["explained"] = {
            "method": method,
            "side": str(row["side"]),
            "note": str(row["note"]),
            "n_choices": int(row["n_choices"]),
            **_with_bounds(row, "observed", "gap"),
            **{name: _number(row[name]) for name in ("explained", *_CALIBRATION)},
        }
    if forecasts is not None:
        found["forecast"] = [
            {
                **{name: str(row[name]) for name in ("pair", "side", "noise_from", "method")},
                "n_choices": int(row["n_choices"]),
                "forecast": _number(row["forecast"]),
                **_with_bounds(row, "observed", "noise_observed"),
                "assumption": str(row["assumption"]),
            }
            for _, row in forecasts[forecasts["layer"] == POOLED].iterrows()
        ]
    return found if any(found.values()) else None


def _with_bounds(row: pd.Series[Any], *names: str) -> dict[str, Any]:
    """Each value with its interval, as everywhere in summary.json."""
    found: dict[str, Any] = {}
    for name in names:
        bounds = [_number(row[f"{name}_ci_{end}"]) for end in ("low", "high")]
        found |= {name: _number(row[name]), f"{name}_ci": None if None in bounds else bounds}
    return found


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
