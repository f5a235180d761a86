"""95 % intervals of quantiles over tokens, clustered by prompt.

Invariants:
    - the value is numpy's linear quantile of all tokens; the interval comes from counts per prompt only;
    - no interval where it would be invented: bounds beyond the outermost tokens, fewer than 8 prompts (64 for p99 and
      beyond), and no *value* beyond p99 unless 20 tokens from 10 prompts lie above.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moediag.numbers import count
from moediag.statistics.intervals import MIN_CLUSTERS, Interval, effective_freedom, rate_bounds, too_few
from moediag.statistics.resampling import positive_bounds, standard_error

Float64 = NDArray[np.float64]

TAIL_MIN_EXCEEDANCES: Final = 20
TAIL_MIN_CLUSTERS: Final = 10
FAR_MIN_CLUSTERS: Final = 64
"""Prompts that an interval of p99 needs: with 32, where prompts differ much, those that make the tail are often not
in the sample, and the interval covers 0.82."""
_FAR: Final = 0.99
_TAIL_FROM: Final = 0.9


def quantile_interval(values_T: ArrayLike, cluster_T: NDArray[Any], q: float) -> Interval:
    """Interval of a quantile from the clustered interval of the share of tokens above it.

    Below p90 the interval of the CDF at the estimate is inverted (Woodruff). From p90 on the share above is small and
    skewed between prompts, and Woodruff's bound ends too low (p99 at 64 prompts: 0.89): there the bounds are those
    shares that an estimate as large as this one would not contradict, on a ratio scale and with the tail of
    :func:`~moediag.statistics.resampling.positive_bounds`. Quantiles beyond p99 are not estimated (NaN) unless at
    least 20 tokens from at least 10 prompts lie above: fewer make them a report of a handful of tokens.

    Args:
        values_T: token values without NaN, any unit.
        cluster_T: cluster (prompt) of every token.
        q: probability, 0 < q < 1.

    Returns:
        The quantile (linear interpolation, as ``numpy.quantile``) and bounds in the unit of the values.

    Source: Woodruff, JASA 47 (1952) 635-646; Francisco and Fuller, Annals of Statistics 19 (1991), for the
    inversion; Korn and Graubard (1998) for the share.
    """
    clusters, row_T = np.unique(cluster_T, return_inverse=True)
    return quantile_of_rows(np.asarray(values_T, dtype=np.float64), row_T, len(clusters), q)


def quantile_of_rows(values_T: Float64, row_T: NDArray[np.intp], n_rows: int, q: float) -> Interval:
    """:func:`quantile_interval` for clusters numbered 0 .. n_rows - 1, some of them perhaps without a token."""
    if not len(values_T):
        return Interval(np.nan, np.nan, np.nan, 0, "no data")
    n_C = np.bincount(row_T, minlength=n_rows).astype(np.float64)
    n_clusters = int((n_C > 0).sum())
    value = float(np.quantile(values_T, q))
    above_C = np.bincount(row_T[values_T > value], minlength=n_rows).astype(np.float64)[n_C > 0]
    if reason := _too_thin_a_tail(above_C, q):
        return Interval(np.nan, np.nan, np.nan, n_clusters, reason)
    if reason := _why_none(values_T, n_clusters, q):
        return Interval(value, np.nan, np.nan, n_clusters, reason)
    share_low, share_high = _shares_above(above_C, n_C[n_C > 0], 1 - q)
    # a bound of the share beyond the outermost order statistics would be invented, not measured
    if not min(share_low, 1 - share_high) * len(values_T) >= 1:
        return Interval(value, np.nan, np.nan, n_clusters, "too few tokens beyond the quantile to bound it")
    bounds = np.quantile(values_T, [1 - share_high, 1 - share_low])
    return Interval(value, float(bounds[0]), float(bounds[1]), n_clusters)


def _too_thin_a_tail(above_C: Float64, q: float) -> str:
    """Reason not to estimate a quantile beyond p99; empty when enough tokens lie above."""
    n_above, n_clusters = int(above_C.sum()), int((above_C > 0).sum())
    if q <= _FAR or (n_above >= TAIL_MIN_EXCEEDANCES and n_clusters >= TAIL_MIN_CLUSTERS):
        return ""
    needed = f"the tail needs {TAIL_MIN_EXCEEDANCES} tokens from {TAIL_MIN_CLUSTERS} prompts"
    return f"{count(n_above, 'token')} from {count(n_clusters, 'prompt')} above it; {needed}"


def _why_none(values_T: Float64, n_clusters: int, q: float) -> str:
    if n_clusters < MIN_CLUSTERS:
        return too_few(n_clusters)
    if values_T.min() == values_T.max():
        return "all values are equal"
    if q >= _FAR and n_clusters < FAR_MIN_CLUSTERS:
        return too_few(n_clusters, FAR_MIN_CLUSTERS)
    return ""


def _shares_above(above_C: Float64, n_C: Float64, above: float) -> tuple[float, float]:
    """Shares of tokens above that the quantile's bounds have, low and high, around ``above`` = 1 - q."""
    total = np.array([n_C.sum()])
    share = float(above_C.sum() / total[0])
    residual_C1 = (above_C - share * n_C)[:, None]
    if 1 - above < _TAIL_FROM or share <= 0:
        low, high = rate_bounds(residual_C1, n_C[:, None], np.array([above]))
        return float(low[0]), float(high[0])
    low, high = rate_bounds(residual_C1, n_C[:, None], np.array([share]))
    freedom = effective_freedom(residual_C1)
    se = standard_error(residual_C1, total, np.array([len(n_C)]))
    lower, upper = positive_bounds(residual_C1, n_C[:, None], np.array([share]), se, freedom)
    return above * share / float(np.fmax(high, upper)[0]), above * share / float(np.fmin(low, lower)[0])
