"""95 % intervals of smooth functions of per-prompt sums (correlation, ESS, standard deviation, ratios of rates).

Invariants:
    - the function sees sums over prompts only, so tokens need not be at hand and parts can be merged first;
    - deterministic: nothing is drawn;
    - fewer than 8 prompts, no variation, or a value that is not finite give NaN bounds and a reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.intervals import (
    MIN_CLUSTERS,
    Interval,
    effective_freedom,
    student_t,
    too_few,
)

Float64 = NDArray[np.float64]
Scale = Literal["linear", "log", "fisher"]

_NO_SPREAD: Final = 1e-12
_TO: Final[dict[Scale, Callable[[Any], Any]]] = {"linear": np.positive, "log": np.log, "fisher": np.arctanh}
_FROM: Final[dict[Scale, Callable[[Any], Any]]] = {"linear": np.positive, "log": np.exp, "fisher": np.tanh}


def jackknife_interval(
    sums_CM: Float64, of: Callable[[Float64], Float64], scale: Scale, min_clusters: int = MIN_CLUSTERS
) -> Interval:
    """Interval of ``of(total sums)`` by leaving out one prompt at a time, on a scale where it is nearly symmetric.

    Not a bootstrap: the functions here have a delta-method variance that the jackknife gives from C evaluations,
    and Student's t takes its freedom from the kurtosis of the prompts' influence, so that one prompt that
    decides everything widens the interval instead of going unnoticed.

    Args:
        sums_CM: per-prompt sums, any M.
        of: maps (..., M) sums to (...) values; need not guard against dividing by 0.
        scale: ``log`` for positive values, ``fisher`` for correlations, else ``linear``.
        min_clusters: prompts from which on this statistic was measured to cover.

    Returns:
        Value and bounds in the unit of ``of``.

    Source: Efron and Tibshirani (1993) chapter 11; freedom as in Satterthwaite (1946).
    """
    sums_CM = sums_CM[np.any(sums_CM != 0, axis=1)]
    n_clusters = len(sums_CM)
    if not n_clusters:
        return Interval(np.nan, np.nan, np.nan, 0, "no data")
    total_M = sums_CM.sum(axis=0)
    with np.errstate(all="ignore"):  # a value that is not finite is reported as such below
        value = float(of(total_M))
        centre = float(_TO[scale](np.float64(value)))
        left_out_C = np.asarray(_TO[scale](of(total_M - sums_CM)), dtype=np.float64)
    if reason := _why_none(n_clusters, min_clusters, value, centre, left_out_C):
        return Interval(value if np.isfinite(value) else np.nan, np.nan, np.nan, n_clusters, reason)
    influence_C = left_out_C - left_out_C.mean()
    se = np.sqrt((n_clusters - 1) / n_clusters * np.square(influence_C).sum())
    half = student_t(effective_freedom(influence_C)) * se
    low, high = (float(_FROM[scale](np.float64(bound))) for bound in (centre - half, centre + half))
    return Interval(value, low, high, n_clusters)


def _why_none(n_clusters: int, min_clusters: int, value: float, centre: float, left_out_C: Float64) -> str:
    if not np.isfinite(value):
        return "the value is not finite"
    if n_clusters < min_clusters:
        return too_few(n_clusters, min_clusters)
    if not (np.isfinite(centre) and np.isfinite(left_out_C).all()):
        return "one prompt decides whether there is a value"
    if np.ptp(left_out_C) <= _NO_SPREAD * max(1.0, abs(centre)):
        return "no variation between prompts"
    return ""
