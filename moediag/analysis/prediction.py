"""What a run's arms allow to be said about why choices flip, and what would flip under noise measured elsewhere.

Picks by what was captured: router logits on both sides, else margins; every complete repeat arm and train-perturbed as
a source of noise. Nothing here reads a file but through the run.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.declarations import FORECAST_FLIPS
from moediag.analysis.explain import PairNoise, explain_measured, frame_of, measure_noise
from moediag.analysis.forecast import forecast_from
from moediag.notation import INFER, TRAIN
from moediag.run.reader import Run

Float64 = NDArray[np.float64]

_NOISE: Final = ("repeat", "path", "perturbation")
"""Changes that are a repetition of an engine, or rounding. Not other precisions: what one changes against its own
engine is no forecast of infer~train *with* it and reads as one. On the demo 1.77 % by the noise of train-router-fp32
(infer~train 2.60 %); infer~train-router-fp32 shows 2.66 %."""


def predict_flips(run: Run) -> dict[str, pd.DataFrame]:
    """Explained and forecast flips of infer~train, by frame name; empty for a dense model, or without arms or rule.

    Args:
        run: a run with complete arms infer and train. Where the rule has a correction bias, infer's scores are read
            with the bias that its engine had; captured without it they are read by their margins.

    Returns:
        Frames ``score_noise``, ``explained_flips``, ``flip_calibration`` (of infer~train, from infer's scores) and
        ``forecast_flips``: of infer~train, if it had the noise of a repeat arm or of train-perturbed against its own
        engine.
    """
    infer, train = run.reference(INFER), run.reference(TRAIN)
    if not all(arm in run.arms() and run.is_complete(arm) and run.is_routed(arm) for arm in (infer, train)):
        return {}
    rules = [RoutingRule.of_routers(run.arm(arm).routers) for arm in (infer, train)]
    if rules[0] is None or rules[0] != rules[1]:  # no rule, no prediction: a guess would look like a finding
        return {}
    rule = rules[0]
    main = _measured(run, train, infer, rule)
    bias_LE = _bias(run, infer)
    explanation = explain_measured(main, bias_LE)
    forecasts = [
        forecast_from(main, _measured(run, arm, reference, rule), bias_LE) for arm, reference in noise_arms(run)
    ]
    some = [frame for frame in forecasts if len(frame)]
    return {
        "score_noise": explanation.score_noise,
        "explained_flips": explanation.explained_flips,
        "flip_calibration": explanation.flip_calibration,
        "forecast_flips": pd.concat(some, ignore_index=True) if some else frame_of(FORECAST_FLIPS, []),
    }


def noise_arms(run: Run) -> list[tuple[str, str]]:
    """Complete, routed arms that repeat their own engine or perturb it by rounding, each with the arm it repeats."""
    records = [run.arm(arm) for arm in run.arms() if run.is_complete(arm)]
    routed = {record.name: record for record in records if record.is_routed}
    return [
        (name, record.variant_of)
        for name, record in routed.items()
        if record.change in _NOISE and record.variant_of in routed
    ]


def _bias(run: Run, arm: str) -> Float64 | None:
    bias_LE = run.correction_bias(arm)
    return None if bias_LE is None else bias_LE.astype(np.float64)


def _measured(run: Run, arm: str, reference: str, rule: RoutingRule) -> PairNoise:
    """Noise of an arm, with the reference arm's scores as those that predict."""
    pair = run.pair(arm, reference, with_logits=True)
    return measure_noise(pair, rule, "infer" if pair.subtrahend == reference else "train")
