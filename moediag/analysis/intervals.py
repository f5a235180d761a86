"""95 % intervals clustered by prompt, for means, rates, slopes (ratios of sums) and quantiles.

Invariants:
    - the prompt is the unit of resampling: everything a prompt gave is drawn together or not at all;
    - the same input gives the same interval, bit for bit (fixed seed, no global random state);
    - an interval is never narrower than the data allow: fewer than 8 prompts, no variation at all, or no
      data give NaN bounds and a ``note`` that says why, never a zero-width interval.

Measured coverage of the nominal 0.95 (``benchmarks/interval_coverage.py --sets 1000``, standard error
below 0.011; prompts with log-normal scale and length, Student t tails with 3 degrees of freedom):

    =============== ========== ========== ===========
    statistic       16 prompts 64 prompts 256 prompts
    =============== ========== ========== ===========
    mean abs diff   0.929      0.935      0.939
    k2              0.870      0.904      0.924
    k3              0.858      0.895      0.914
    k1 (signed)     0.956      0.960      0.943
    mean ratio      0.934      0.939      0.939
    rate of 0.1     0.943      0.938      0.956
    rate of 0.002   0.985      0.963      0.952
    position slope  0.924      0.934      0.940
    p50             0.949      0.937      0.948
    p90             0.916      0.939      0.942
    p99             0.869      0.910      0.922
    p99.9           no value   no value   0.927
    =============== ========== ========== ===========

k2, k3 and p99 fall short with few prompts: squares of such tails have no finite variance, so the tail that
matters is often not in the sample (Student's t on k3 covers 0.775, 0.858, 0.868). Maxima get no interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Float64 = NDArray[np.float64]
Kind = Literal["signed", "positive", "rate"]

LEVEL: Final = 0.95
MIN_CLUSTERS: Final = 8
"""Fewer prompts than this give no interval: no method tried covers, whatever its width."""
N_DRAWS: Final = 2000
SEED: Final = 20250
_TAIL: Final = (1 - LEVEL) / 2
_CELLS_PER_CHUNK: Final = 2_000_000
_NO_SPREAD: Final = 1e-12
"""Relative standard error below which the spread is float64 rounding, not data."""

TAIL_MIN_EXCEEDANCES: Final = 20
TAIL_MIN_CLUSTERS: Final = 10


@dataclass(frozen=True)
class Interval:
    """One value and its 95 % interval; NaN bounds come with the reason in ``note``."""

    value: float
    low: float
    high: float
    n_clusters: int
    note: str = ""


@dataclass(frozen=True)
class Intervals:
    """Values and intervals of M columns; ``low_M``/``high_M`` are NaN where ``note_M`` says why."""

    value_M: Float64
    low_M: Float64
    high_M: Float64
    n_clusters_M: NDArray[np.int64]
    note_M: tuple[str, ...]

    def one(self, column: int = 0) -> Interval:
        """The interval of one column as scalars."""
        return Interval(
            float(self.value_M[column]),
            float(self.low_M[column]),
            float(self.high_M[column]),
            int(self.n_clusters_M[column]),
            self.note_M[column],
        )


def cluster_sums(values_T: ArrayLike, cluster_T: NDArray[Any]) -> Float64:
    """Sum token rows by cluster, in float64; clusters in ascending order of their id.

    Args:
        values_T: (T,) or (T, M) values without NaN.
        cluster_T: cluster (prompt) of every row.

    Returns:
        (C,) or (C, M) sums.
    """
    values = np.asarray(values_T, dtype=np.float64)
    if not len(cluster_T):
        return np.zeros((0, *values.shape[1:]))
    order = np.argsort(cluster_T, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(cluster_T[order]) != 0])
    return np.asarray(np.add.reduceat(values[order], starts, axis=0), dtype=np.float64)


def ratio_mean_interval(sum_C: ArrayLike, n_C: ArrayLike, kind: Kind = "signed", n_draws: int = N_DRAWS) -> Intervals:
    """Interval of sum(sum_C) / sum(n_C): means, rates and slopes over clusters of unequal size.

    Studentised (bootstrap-t) and not percentile: token diffs are heavy-tailed, and the percentile interval
    of their mean covers 0.885 where it says 0.95 with 16 prompts. Positive skewed means are studentised on
    the log scale; signed ones get the outer of the bootstrap-t and Student-t bounds. Rates use Korn and
    Graubard's interval, which stays honest at few events: a bootstrap cannot draw an event that no prompt
    showed. A rate of exactly 0 or 1 counts every *prompt* as one trial (the rule of three on clusters):
    [0, 1 - 0.025^(1/C)]. That is wide on purpose: without one event nothing tells how events cluster.

    Args:
        sum_C: (C,) or (C, M) per-cluster sums.
        n_C: per-cluster denominators, same shape or (C,); clusters with 0 carry no data.
        kind: ``signed`` (k1, mean ratio, slope), ``positive`` (mean abs diff, k3), ``rate`` (0 to 1).
        n_draws: bootstrap draws.

    Returns:
        Value and bounds of every column, in the unit of sum / n.

    Source: Efron and Tibshirani (1993) chapter 12.5; Korn and Graubard, Survey Methodology 24 (1998).
    """
    sum_CM = _columns(sum_C)
    n_CM = np.broadcast_to(_columns(n_C), sum_CM.shape)
    total_M = n_CM.sum(axis=0)
    n_clusters_M = (n_CM > 0).sum(axis=0).astype(np.int64)
    value_M = _divide(sum_CM.sum(axis=0), total_M)
    residual_CM = sum_CM - np.where(np.isfinite(value_M), value_M, 0.0) * n_CM
    se_M = _standard_error(residual_CM, total_M)
    note_M = [_why_none(c, v, se, kind) for c, v, se in zip(n_clusters_M, value_M, se_M, strict=True)]
    usable_M = np.array([not note for note in note_M], dtype=bool)
    low_M, high_M = np.full_like(value_M, np.nan), np.full_like(value_M, np.nan)
    if usable_M.any():
        part = np.flatnonzero(usable_M)
        if kind == "rate":
            bounds = _rate_bounds(value_M[part], se_M[part], total_M[part], n_clusters_M[part])
        else:
            bounds = _studentised_bounds(residual_CM[:, part], n_CM[:, part], value_M[part], se_M[part], kind, n_draws)
        low_M[part], high_M[part] = bounds
    return Intervals(value_M, low_M, high_M, n_clusters_M, tuple(note_M))


def mean_interval(values_T: ArrayLike, cluster_T: NDArray[Any], kind: Kind = "signed") -> Interval:
    """Interval of the mean over token rows; see :func:`ratio_mean_interval`."""
    values = np.asarray(values_T, dtype=np.float64)
    return ratio_mean_interval(
        cluster_sums(values, cluster_T), cluster_sums(np.ones(len(values)), cluster_T), kind
    ).one()


def quantile_interval(values_T: ArrayLike, cluster_T: NDArray[Any], q: float) -> Interval:
    """Interval of a quantile: the clustered interval of the CDF at the estimate, inverted (Woodruff).

    Quantiles beyond p99 are not estimated (NaN) unless at least 20 tokens from at least 10 prompts lie
    above: fewer make them a report of a handful of tokens.

    Args:
        values_T: token values without NaN, any unit.
        cluster_T: cluster (prompt) of every token.
        q: probability, 0 < q < 1.

    Returns:
        The quantile (linear interpolation, as ``numpy.quantile``) and bounds in the unit of the values.

    Source: Woodruff, JASA 47 (1952) 635-646, with Korn and Graubard's interval for the CDF.
    """
    values = np.asarray(values_T, dtype=np.float64)
    n_clusters = len(np.unique(cluster_T))
    if not len(values):
        return Interval(np.nan, np.nan, np.nan, 0, "no data")
    value = float(np.quantile(values, q))
    if reason := _too_thin_a_tail(values, cluster_T, value, q):
        return Interval(np.nan, np.nan, np.nan, n_clusters, reason)
    if n_clusters < MIN_CLUSTERS:
        return Interval(value, np.nan, np.nan, n_clusters, _too_few(n_clusters))
    if values.min() == values.max():
        return Interval(value, np.nan, np.nan, n_clusters, "all values are equal")
    low, high = _cdf_bounds(values, value, cluster_T, q, n_clusters)
    # a bound of the CDF beyond the outermost order statistics would be invented, not measured
    if min(low, 1 - high) * len(values) < 1:
        return Interval(value, np.nan, np.nan, n_clusters, "too few tokens beyond the quantile to bound it")
    bounds = np.quantile(values, [low, high])
    return Interval(value, float(bounds[0]), float(bounds[1]), n_clusters)


def _too_thin_a_tail(values_T: Float64, cluster_T: NDArray[Any], value: float, q: float) -> str:
    """Reason not to estimate a quantile beyond p99; empty when enough tokens lie above."""
    above_T = values_T > value
    n_above, n_clusters = int(above_T.sum()), len(np.unique(cluster_T[above_T]))
    if q <= 0.99 or (n_above >= TAIL_MIN_EXCEEDANCES and n_clusters >= TAIL_MIN_CLUSTERS):
        return ""
    wanted = f"the tail needs {TAIL_MIN_EXCEEDANCES} tokens from {TAIL_MIN_CLUSTERS} prompts"
    return f"{n_above} tokens from {n_clusters} prompts lie above; {wanted}"


def _cdf_bounds(
    values_T: Float64, value: float, cluster_T: NDArray[Any], q: float, n_clusters: int
) -> tuple[float, float]:
    below_C = cluster_sums(values_T <= value, cluster_T)
    n_C = cluster_sums(np.ones(len(values_T)), cluster_T)
    share = below_C.sum() / n_C.sum()
    se = _standard_error((below_C - share * n_C)[:, None], np.array([n_C.sum()]))
    low, high = _rate_bounds(np.array([q]), se, np.array([n_C.sum()]), np.array([n_clusters]))
    return float(low[0]), float(high[0])


def _columns(values: ArrayLike) -> Float64:
    array = np.asarray(values, dtype=np.float64)
    return array[:, None] if array.ndim == 1 else array


def _divide(numerator: Float64, denominator: Float64) -> Float64:
    """Elementwise quotient, NaN where the denominator is 0: a mean over nothing is NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray(numerator / np.where(denominator == 0, np.nan, denominator), dtype=np.float64)


def _standard_error(residual_CM: Float64, total_M: Float64) -> Float64:
    """Linearised standard error of a ratio of sums over clusters drawn independently."""
    n_clusters = max(len(residual_CM), 2)
    with np.errstate(invalid="ignore", over="ignore"):
        spread_M = np.sqrt(n_clusters / (n_clusters - 1) * np.square(residual_CM).sum(axis=0))
    return _divide(spread_M, total_M)


def _too_few(n_clusters: int) -> str:
    return f"{n_clusters} prompts; an interval needs {MIN_CLUSTERS}"


def _why_none(n_clusters: int, value: float, se: float, kind: Kind) -> str:
    """Reason to give no interval; empty when one can be given."""
    if n_clusters == 0:
        return "no data"
    if not (np.isfinite(value) and np.isfinite(se)):
        return "the value is not finite"
    if n_clusters < MIN_CLUSTERS:
        return _too_few(n_clusters)
    if kind != "rate" and se <= _NO_SPREAD * abs(value):
        return "no variation between prompts"
    return ""


def _rate_bounds(
    value_M: Float64, se_M: Float64, total_M: Float64, n_clusters_M: NDArray[np.int64]
) -> tuple[Float64, Float64]:
    """Clopper-Pearson bounds at the effective sample size; at a rate of 0 or 1 that size is the clusters."""
    variance_M = np.square(se_M)
    t_M = special.stdtrit(n_clusters_M - 1.0, 1 - _TAIL)
    shrink_M = np.square(special.ndtri(1 - _TAIL) / t_M)
    spread_M = value_M * (1 - value_M)
    size_M = np.where(variance_M > 0, spread_M / np.where(variance_M > 0, variance_M, 1.0) * shrink_M, total_M)
    size_M = np.where(spread_M > 0, np.minimum(size_M, total_M), n_clusters_M)
    hits_M = value_M * size_M
    low_M = special.betaincinv(np.maximum(hits_M, 1e-300), size_M - hits_M + 1, _TAIL)
    high_M = special.betaincinv(hits_M + 1, np.maximum(size_M - hits_M, 1e-300), 1 - _TAIL)
    return np.where(value_M <= 0, 0.0, low_M), np.where(value_M >= 1, 1.0, high_M)


def _studentised_bounds(
    residual_CM: Float64, n_CM: Float64, value_M: Float64, se_M: Float64, kind: Kind, n_draws: int
) -> tuple[Float64, Float64]:
    """Bootstrap-t bounds; ``positive`` columns are studentised on the log scale."""
    is_log = kind == "positive"
    t_BM = _studentised_draws(residual_CM, n_CM, value_M, is_log, n_draws)
    t_low_M, t_high_M = np.nanquantile(t_BM, [_TAIL, 1 - _TAIL], axis=0)
    if is_log:
        with np.errstate(over="ignore"):
            return value_M * np.exp(-t_high_M * se_M / value_M), value_M * np.exp(-t_low_M * se_M / value_M)
    # symmetric heavy tails fool the draws and skewed ones fool Student's t: take the outer bound of the two
    t = float(special.stdtrit(len(residual_CM) - 1.0, 1 - _TAIL))
    return value_M - np.maximum(t_high_M, t) * se_M, value_M - np.minimum(t_low_M, -t) * se_M


def _studentised_draws(residual_CM: Float64, n_CM: Float64, value_M: Float64, is_log: bool, n_draws: int) -> Float64:
    """(draws, M) studentised deviations, made chunk by chunk so that memory stays bounded.

    Works on residuals about the estimate: the difference of raw moments would cancel in float64.
    """
    n_clusters = len(residual_CM)
    small_sample = n_clusters / max(n_clusters - 1, 1)
    rr, rn, nn = np.square(residual_CM), residual_CM * n_CM, np.square(n_CM)
    rng = np.random.default_rng(SEED)
    draws = []
    for first in range(0, n_draws, step := max(1, _CELLS_PER_CHUNK // n_clusters)):
        weights_BC = _draw_weights(rng, min(step, n_draws - first), n_clusters)
        total_BM = weights_BC @ n_CM
        shift_BM = _divide(weights_BC @ residual_CM, total_BM)
        square_BM = weights_BC @ rr - 2 * shift_BM * (weights_BC @ rn) + np.square(shift_BM) * (weights_BC @ nn)
        se_BM = _divide(np.sqrt(np.maximum(square_BM, 0.0) * small_sample), total_BM)
        deviation_BM = shift_BM
        if is_log:
            drawn_BM = np.maximum(value_M + shift_BM, value_M * 1e-12)
            deviation_BM, se_BM = np.log(drawn_BM / value_M), se_BM / drawn_BM
        draws.append(_divide(deviation_BM, se_BM))
    return np.concatenate(draws)


def _draw_weights(rng: np.random.Generator, n_draws: int, n_clusters: int) -> Float64:
    """(draws, clusters) how often each cluster is drawn."""
    picked = rng.integers(0, n_clusters, size=(n_draws, n_clusters))
    picked += np.arange(n_draws)[:, None] * n_clusters
    counts = np.bincount(picked.ravel(), minlength=n_draws * n_clusters)
    return counts.reshape(n_draws, n_clusters).astype(np.float64)
