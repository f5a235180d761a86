"""Likelihood of the recurrence delta' = (1 + a) delta - b + noise for a series that is measured with error.

Invariants:
    - exact for Gaussian noise: a Kalman filter of one state, whose map is composed over every gap between the steps
      measured, so gaps may be unequal; a and b are per unit of step;
    - delta at the first step and b are solved for in closed form at every (a, noise); nothing is known of either
      beforehand. The variances of the filter do not depend on the data, so many series are filtered at once;
    - every measured step enters with the variance of its own measurement.

Process noise has a standard deviation that is either the same at every step or proportional to the delta measured
before it: a grown series has grown noise, and nobody knows which. Both stand on the grid, as nuisance.

Source: Kalman filter with regressors: de Jong, Annals of Statistics 19 (1991); for the rest, Durbin and Koopman (2012).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

N_NOISES: Final = 6
"""Standard deviations of the process noise above 0, for each of the two ways in which it may scale."""


@dataclass(frozen=True)
class Series:
    """Steps in ascending order, the delta measured at each, and the standard error of that measurement."""

    step_N: Float64
    delta_N: Float64
    se_N: Float64

    def __len__(self) -> int:
        return len(self.step_N)

    @property
    def span(self) -> float:
        """Steps from the first to the last."""
        return float(self.step_N[-1] - self.step_N[0])

    @property
    def scale_N(self) -> Float64:  # noqa: N802 - the legend suffix
        """Relative size of the measured deltas, geometric mean 1; a delta below its error counts as the error."""
        size_N = np.maximum(self.delta_N, self.se_N)
        return np.asarray(size_N / np.exp(np.log(size_N).mean()))


@dataclass(frozen=True)
class Noises:
    """Q kinds of process noise with their prior weights: proportional to the standard deviation, even over scalings.

    Args:
        sd_Q: standard deviation per step, in the unit of delta.
        grows_Q: whether it is proportional to delta.
        weight_Q: sums to 1.
    """

    sd_Q: Float64
    grows_Q: NDArray[np.bool_]
    weight_Q: Float64

    @staticmethod
    def up_to(largest: float) -> Noises:
        """A grid from 0 to ``largest``, even in the standard deviation.

        The weight is that of a gamma prior of shape 2 and no rate: where the data say nothing of the noise, the most
        likely noise is 0, and intervals that believe it cover too little. Exactly 0 gets what lies within half a
        stride of it.

        Source: Chung, Rabe-Hesketh, Dorie, Gelman and Liu, Psychometrika 78 (2013).
        """
        sds = np.linspace(0.0, largest, N_NOISES + 1)
        sd_Q = np.r_[sds, sds[1:]]
        grows_Q = np.arange(len(sd_Q)) > N_NOISES
        weight_Q = np.r_[0.25, sd_Q[1:] / sds[1]]  # the integral of sd over a stride about each, in strides squared
        return Noises(sd_Q, grows_Q, weight_Q / weight_Q.sum())

    def by_gap(self, series: Series) -> Float64:
        """(Q, N) variance per step in the gap after every measured step."""
        scale_QN = np.where(self.grows_Q[:, None], np.square(series.scale_N)[None, :], 1.0)
        return np.asarray(np.square(self.sd_Q)[:, None] * scale_QN)


@dataclass(frozen=True)
class Filtered:
    """Log-likelihood of B series over R growth rates and Q noises, with the linear parameters solved for.

    Args:
        growth_R: log(1 + a) per step.
        log_RQB: log-likelihood at its maximum over b and delta at the first step, up to a constant.
        b_RQB, start_RQB: where that maximum lies.
        b_variance_RQ, b_start_RQ: variance of b, covariance of b and start, given a and the noise.
    """

    growth_R: Float64
    noises: Noises
    log_RQB: Float64
    b_RQB: Float64
    start_RQB: Float64
    b_variance_RQ: Float64
    b_start_RQ: Float64

    def over_noise(self) -> Float64:
        """(R, B) log-likelihood of every growth rate, averaged over the noises."""
        return self._average(self.log_RQB)

    def at_b(self, b_R: Float64) -> Float64:
        """(R, B) the same with b held at a value for every growth rate."""
        distance_RQB = np.square(self.b_RQB - b_R[:, None, None]) / self.b_variance_RQ[..., None]
        return self._average(self.log_RQB - distance_RQB / 2)

    def _average(self, log_RQB: Float64) -> Float64:
        top_RB = log_RQB.max(axis=1)
        weighed_RQB = np.exp(log_RQB - top_RB[:, None, :]) * self.noises.weight_Q[:, None]
        return np.asarray(top_RB + np.log(weighed_RQB.sum(axis=1)))


def filter_series(series: Series, noises: Noises, growth_R: Float64, delta_NB: Float64 | None = None) -> Filtered:
    """Filter one series, or many that share its steps and errors, at every growth rate and noise.

    The mean is start + slope * sum of (1 + a)^k: two regressors that stay apart at a = 0, where a line is the limit.

    Args:
        series: gives steps, errors, and the scale of noise that grows.
        noises: Q kinds of process noise.
        growth_R: log(1 + a) per step.
        delta_NB: measured series; None = the series' own.
    """
    measured_NB = series.delta_N[:, None] if delta_NB is None else delta_NB
    n_noises, n_series = len(noises.sd_Q), measured_NB.shape[1]
    growth_P = np.repeat(growth_R, n_noises)
    noise_NP = np.tile(noises.by_gap(series), (len(growth_R), 1)).T
    sums = _Sums(len(growth_P), n_series)
    level_P, ramp_P, variance_P = np.ones_like(growth_P), np.zeros_like(growth_P), np.zeros_like(growth_P)
    mean_PB = np.zeros((len(growth_P), n_series))
    for i, se in enumerate(series.se_N):
        if i:
            gap = float(series.step_N[i] - series.step_N[i - 1])
            grown_P = np.exp(growth_P * gap)
            mean_PB *= grown_P[:, None]
            level_P = grown_P * level_P - np.expm1(growth_P * gap)
            ramp_P = grown_P * ramp_P + powers(growth_P, gap)
            variance_P = np.square(grown_P) * variance_P + noise_NP[i - 1] * powers(2 * growth_P, gap)
        total_P = variance_P + se * se
        error_PB = measured_NB[i] - mean_PB
        sums.add(error_PB, level_P, ramp_P, total_P)
        gain_P = variance_P / total_P
        mean_PB += gain_P[:, None] * error_PB
        level_P, ramp_P, variance_P = (part_P * (1 - gain_P) for part_P in (level_P, ramp_P, variance_P))
    return sums.solved(growth_R, noises)


def powers(growth: Float64, gap: float) -> Float64:
    """Sum of (1 + a)^k over the ``gap`` steps k = 0 .. gap - 1, with growth = log(1 + a); gap where a = 0.

    Example:
        >>> powers(np.log([1.0, 2.0, 1.5]), 3.0).round(9).tolist()
        [3.0, 7.0, 4.75]
    """
    rate = np.expm1(growth)
    is_flat = np.abs(growth) < 1e-12
    return np.asarray(np.where(is_flat, gap, np.expm1(growth * gap) / np.where(is_flat, 1.0, rate)))


class _Sums:
    """Weighted sums of products of the innovations of level, ramp and data: what least squares needs."""

    def __init__(self, n_points: int, n_series: int) -> None:
        self.ll, self.lr, self.rr, self.log = (np.zeros(n_points) for _ in range(4))
        self.ly, self.ry, self.yy = (np.zeros((n_points, n_series)) for _ in range(3))

    def add(self, error_PB: Float64, level_P: Float64, ramp_P: Float64, total_P: Float64) -> None:
        """Add one measured step."""
        level_w, ramp_w = level_P / total_P, ramp_P / total_P
        self.ll += level_w * level_P
        self.lr += level_w * ramp_P
        self.rr += ramp_w * ramp_P
        self.ly += level_w[:, None] * error_PB
        self.ry += ramp_w[:, None] * error_PB
        self.yy += np.square(error_PB) / total_P[:, None]
        self.log += np.log(total_P)

    def solved(self, growth_R: Float64, noises: Noises) -> Filtered:
        """Least squares at every point; b = a start - slope."""
        shape = (len(growth_R), len(noises.sd_Q))
        rate_P = np.repeat(np.expm1(growth_R), shape[1])
        det_P = self.ll * self.rr - np.square(self.lr)
        start_PB = (self.rr[:, None] * self.ly - self.lr[:, None] * self.ry) / det_P[:, None]
        slope_PB = (self.ll[:, None] * self.ry - self.lr[:, None] * self.ly) / det_P[:, None]
        log_PB = -(self.log[:, None] + self.yy - start_PB * self.ly - slope_PB * self.ry) / 2
        b_PB = rate_P[:, None] * start_PB - slope_PB
        b_variance_P = (np.square(rate_P) * self.rr + 2 * rate_P * self.lr + self.ll) / det_P
        b_start_P = (rate_P * self.rr + self.lr) / det_P
        log_RQB, b_RQB, start_RQB = (array.reshape(*shape, -1) for array in (log_PB, b_PB, start_PB))
        variances = b_variance_P.reshape(shape), b_start_P.reshape(shape)
        return Filtered(growth_R, noises, log_RQB, b_RQB, start_RQB, *variances)
