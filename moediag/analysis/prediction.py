"""What a run's arms allow to be said about why choices flip, and what would flip under noise measured elsewhere.

Picks by what was captured: router logits on both sides, else margins; every complete repeat arm and train-perturbed as
a source of noise. Engines are told apart by :mod:`moediag.notation`; nothing here reads a file but through the run.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.explain import PairNoise, explain_measured, frame_of, measure_noise
from moediag.analysis.flip_declarations import FORECAST_FLIPS
from moediag.analysis.forecast import forecast_from
from moediag.notation import INFER, TRAIN, TRAIN_REPLAY, engine_side
from moediag.run.directory import Run

Float64 = NDArray[np.float64]

_NOT_NOISE: Final = (INFER, TRAIN, TRAIN_REPLAY, "train-fp32", "train-router-fp32", "train-router-fp8")
"""Arms that are no repetition of their engine: the two compared, the one with forced experts, and other precisions.

What a precision changes against its own engine is no forecast of infer~train *with* that precision and reads as one:
on the demo 1.77 % by the noise of train-router-fp32 (infer~train 2.60 %); infer~train-router-fp32 shows 2.66 %."""


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
    routing = run.model["routing"] or {}
    is_captured = all(arm in run.arms() and run.is_complete(arm) and run.is_routed(arm) for arm in (INFER, TRAIN))
    if not is_captured or "score_function" not in routing:  # no rule, no prediction: a guess would look like a finding
        return {}
    rule = RoutingRule.from_record(routing)
    main = _measured(run, TRAIN, INFER, rule)
    bias_LE = _bias(run, INFER)
    explanation = explain_measured(main, bias_LE)
    forecasts = [forecast_from(main, _measured(run, arm, engine_side(arm), rule), bias_LE) for arm in noise_arms(run)]
    some = [frame for frame in forecasts if len(frame)]
    return {
        "score_noise": explanation.score_noise,
        "explained_flips": explanation.explained_flips,
        "flip_calibration": explanation.flip_calibration,
        "forecast_flips": pd.concat(some, ignore_index=True) if some else frame_of(FORECAST_FLIPS, []),
    }


def noise_arms(run: Run) -> list[str]:
    """Complete, routed arms that repeat their own engine or perturb it by rounding."""
    return [arm for arm in run.arms() if arm not in _NOT_NOISE and run.is_complete(arm) and run.is_routed(arm)]


def _bias(run: Run, arm: str) -> Float64 | None:
    bias_LE = run.correction_bias(arm)
    return None if bias_LE is None else bias_LE.astype(np.float64)


def _measured(run: Run, arm: str, reference: str, rule: RoutingRule) -> PairNoise:
    """Noise of an arm, with the reference arm's scores as those that predict."""
    pair = run.pair(arm, reference, with_logits=True)
    return measure_noise(pair, rule, "infer" if pair.subtrahend == reference else "train")
