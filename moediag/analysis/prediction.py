"""What a run's arms allow to be said about why choices flip, and what would flip under other noise.

Picks by what was captured: router logits on both sides, else margins; every complete perturbation or repeat arm as a
source of noise. Engines are told apart by :mod:`moediag.notation`; nothing here reads a file but through the run.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.choice_scores import RoutingRule
from moediag.analysis.explain import PairNoise, explain_measured, frame_of, measure_noise
from moediag.analysis.flip_declarations import FORECAST_FLIPS
from moediag.analysis.forecast import forecast_from, rounding_forecast
from moediag.notation import INFER, TRAIN, TRAIN_REPLAY, engine_side
from moediag.run.directory import Run

Float64 = NDArray[np.float64]

_NOT_NOISE: Final = (INFER, TRAIN, TRAIN_REPLAY)
"""Arms that are no repetition of their engine: the two compared, and the one with forced experts."""


def predict_flips(run: Run) -> dict[str, pd.DataFrame]:
    """Explained and forecast flips of infer~train, by frame name; empty for a dense model, or without arms or rule.

    Args:
        run: a run with complete arms infer and train. Where the rule has a correction bias, each arm's scores are
            read with the bias that its own engine had; an arm captured without it is read by its margins.

    Returns:
        Frames ``score_noise``, ``explained_flips``, ``flip_calibration`` (of infer~train, from infer's scores) and
        ``forecast_flips``: infer's scores under the noise of every perturbation or repeat arm against its own engine,
        the same noise on that engine's own scores with its calibration, and the rounding of logits.
    """
    routing = run.model["routing"] or {}
    is_captured = all(arm in run.arms() and run.is_complete(arm) and run.is_routed(arm) for arm in (INFER, TRAIN))
    if not is_captured or "score_function" not in routing:  # no rule, no prediction: a guess would look like a finding
        return {}
    rule = RoutingRule.from_record(routing)
    main = _measured(run, TRAIN, INFER, rule)
    bias_LE = {side: _bias(run, side) for side in (INFER, TRAIN)}
    explanation = explain_measured(main, bias_LE[INFER])
    forecasts = [rounding_forecast(main, bias_LE[INFER])]
    for arm in noise_arms(run):
        side = engine_side(arm)
        noise = _measured(run, arm, side, rule)
        forecasts += [
            forecast_from(main, noise, bias_LE=bias_LE[INFER]),
            forecast_from(noise, noise, (1.0,), bias_LE[side]),
        ]
    some = [frame for frame in forecasts if len(frame)]
    return {
        "score_noise": explanation.score_noise,
        "explained_flips": explanation.explained_flips,
        "flip_calibration": explanation.flip_calibration,
        "forecast_flips": pd.concat(some, ignore_index=True) if some else frame_of(FORECAST_FLIPS, []),
    }


def noise_arms(run: Run) -> list[str]:
    """Complete, routed arms that repeat or perturb their own engine."""
    return [arm for arm in run.arms() if arm not in _NOT_NOISE and run.is_complete(arm) and run.is_routed(arm)]


def _bias(run: Run, arm: str) -> Float64 | None:
    bias_LE = run.correction_bias(arm)
    return None if bias_LE is None else bias_LE.astype(np.float64)


def _measured(run: Run, arm: str, reference: str, rule: RoutingRule) -> PairNoise:
    """Noise of an arm, with the reference arm's scores as those that predict."""
    pair = run.pair(arm, reference, with_logits=True)
    return measure_noise(pair, rule, "infer" if pair.subtrahend == reference else "train")
