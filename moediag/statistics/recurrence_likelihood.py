"""Likelihood of the recurrence delta' = (1 + a) delta - b + noise for a series measured with error, and what follows.

Three steps: the filter (:func:`filter_series`), intervals of a, b and delta_c = 2 b / a (:class:`Likelihood`), and
other shapes that grow, a parabola and one jump (:func:`other_shapes`): a schedule, a warm-up or a change of data bends
a series as well as compounding does, and what fits as well cannot be told from it.

Filter:
    - exact for Gaussian noise: a Kalman filter of one state, whose map is composed over every gap between the steps
      measured, so gaps may be unequal; a and b are per unit of step;
    - delta at the first step and b are solved for in closed form at every (a, noise); nothing is known of either
      beforehand. The variances of the filter do not depend on the data, so many series are filtered at once;
    - process noise has a standard deviation that is either the same at every step or proportional to the delta measured
      before it: a grown series has grown noise, and nobody knows which. Both are on the grid, as nuisance.

Intervals (likelihood ratios with a simulated distribution):
    - the process noise is averaged over, not estimated: its most likely value is 0 in most short series, and intervals
      that believe it cover 0.77 where they say 0.95 (30 steps);
    - at every bound tried, series are simulated with that value, with noise drawn from what the data leave possible,
      and the bound stands where the data's ratio is the 95 % point of theirs (never less than chi-squared's 3.84);
    - a's interval is equal-tailed, 2.5 % on either side: of random walks nearly every estimate of a lies below 0, and
      a two-sided point would spend its 5 % there. Its upper bound also holds against series without drift, where an
      estimate lies lowest; the drift fitted to a walk is never 0;
    - a bound that no value reaches is infinite, and the note says so; random numbers are seeded here.

Measured coverage of the nominal 0.95, and the shares found to grow, and found to be pulled to
a level, "falls"
(``benchmarks/recurrence_coverage.py --sets 60``; truths there; standard error 0.03 at 0.95, 0.02 at 0.025):

    ========= ===== ===== ===== ======== ========== ===== =====
    truth     steps     a     b  delta_c where found grows falls
    ========= ===== ===== ===== ======== ========== ===== =====
    clean         8  1.00  1.00     1.00       1.00  1.00  0.00
    clean        16  1.00   .98     1.00       1.00  1.00  0.00
    slow          8  1.00   .98      .98       1.00   .88  0.00
    slow         16  1.00   .92      .95        .96   .80  0.00
    noisy        16   .95   .92      .90        .76   .35  0.00
    tokens        8  1.00  1.00     1.00       1.00   .38  0.00
    tokens       16  1.00  1.00     1.00       1.00   .90  0.00
    flat         16  1.00   .98       --         --  0.00  0.00
    walk          8  1.00  1.00       --         --  0.00  0.00
    walk         16   .98   .92       --         --  0.00   .02
    precise      16   .98   .90       --         --  0.00   .02
    parabola     16    --    --       --         --  0.00  0.00
    jump         16    --    --       --         --  0.00  0.00
    ========= ===== ===== ===== ======== ========== ===== =====

Too wide where errors are all there is (the process noise cannot be known to be none). Too short where process noise
decides and the few series found to grow are the lucky ones: there delta_c's interval holds the truth 0.8 of the time.

Shapes have three unknowns each (start, slope, curvature; or level, jump, its place), as the recurrence's start, a and
b, and the filter's likelihood up to the same constant.

Source: Kalman filter with regressors: de Jong, Annals of Statistics 19 (1991), and Durbin and Koopman (2012);
intervals: Hansen, "The grid bootstrap and the autoregressive model", Review of Economics and Statistics 81 (1999);
shapes: maxima of as many unknowns differ by half of what BIC differs, and a ratio of 20 is strong evidence: Kass and
Raftery, Journal of the American Statistical Association 90 (1995).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize, special

from moediag.statistics.intervals import Interval
from moediag.statistics.resampling import LEVEL, SEED, TAIL

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


Parameter = Literal["a", "b", "delta_c"]

N_DRAWS: Final = 199
"""Series simulated per bound tried: the 95 % point is then the 190th."""
_N_GROWTHS: Final = 33
_LEAST_REACH, _MOST_REACH = 12.0, 200.0
"""Total growth tried is a factor of e^12 either way, or the square of the data's own range where that is more. A bound
beyond it counts as none. Squares of e^200 are within float64."""
_REACH: Final = 14.0
"""Growth rates and noises whose likelihood ratio is below this are on the grid: the 95 % points lie at 3.8 to 8."""
_CLOSINGS: Final = 8
"""Times that the grid closes in: each narrows it up to sixteenfold, and the widest is e^200 against errors of 1 %."""
_ROUNDS: Final = 2
"""A bound moves, its 95 % point is simulated anew, the bound moves again: it hardly moves after the second round."""
_TAIL_OF_WALKS: Final = 0.01
"""Share of series without growth or pull that may be said to be pulled to a level. At the nominal 0.025 it was 0.026 of
1,620 walks of 16 steps, since their noise is estimated, not known; at 0.01 it was 0.007 of 1,800 of 16 and 32."""
_CHI_SQUARED: Final = 2 * float(special.gammaincinv(0.5, LEVEL))
"""95 % point of chi-squared at one degree of freedom: what a ratio has in long series."""


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of one series on a grid of growth rates and noises around its maximum."""

    series: Series
    found: Filtered

    @staticmethod
    def of(series: Series) -> Likelihood:
        """Close in on the region that the data leave possible, and lay the grid over it."""
        fastest = _fastest(series)
        low, high = -fastest, fastest
        most_noise = float(np.ptp(series.delta_N)) / math.sqrt(series.span)
        for _ in range(_CLOSINGS):
            found = filter_series(series, Noises.up_to(most_noise), np.linspace(low, high, _N_GROWTHS))
            ratio_RQ = 2 * (found.log_RQB.max() - found.log_RQB[..., 0])
            rows, columns = (np.flatnonzero((ratio_RQ < _REACH).any(axis=axis)) for axis in (1, 0))
            step = (high - low) / (_N_GROWTHS - 1)
            low = max(found.growth_R[rows[0]] - step, -fastest)
            high = min(found.growth_R[rows[-1]] + step, fastest)
            noise_Q = found.noises.sd_Q
            most_noise = float(min(noise_Q[columns].max() * 1.3 + noise_Q[1] / 2, most_noise))
        return Likelihood(series, found)

    def ratio(self, parameter: Parameter, value: float, delta_NB: Float64 | None = None) -> Float64:
        """(B,) likelihood ratio against ``value``, of simulated series or of the data."""
        found = self.found if delta_NB is None else self._filtered(self.found.growth_R, delta_NB)
        top_B = found.over_noise().max(axis=0)
        if parameter == "a":
            held_B = self._filtered(np.array([math.log1p(value)]), delta_NB).over_noise()[0]
        else:
            held_B = found.at_b(self._b(parameter, value)).max(axis=0)
        return np.asarray(2 * (np.maximum(top_B, held_B) - held_B))

    def critical(self, parameter: Parameter, value: float, side: int, tail: float = TAIL) -> float:
        """95 % point of the ratio against ``value`` among series that have it.

        Args:
            parameter: of a, the point that ``tail`` of them exceed on the same side of their estimate.
            value: the bound tried.
            side: 1 where it lies above the estimate, -1 below.
        """
        if parameter != "a":
            ratio_B = np.sort(self.ratio(parameter, value, self._simulated(parameter, value)))
            return max(float(ratio_B[math.ceil(LEVEL * (N_DRAWS + 1)) - 1]), _CHI_SQUARED)
        roots = []
        for drifts in (True, False)[: 1 + (side > 0)]:
            root_B = np.sort(-side * self._root(value, self._simulated("a", value, drifts)))
            roots.append(float(root_B[math.ceil((1 - tail) * (N_DRAWS + 1)) - 1]))
        return max(max(*roots, 0.0) ** 2, _CHI_SQUARED)

    def accepts(self, parameter: Parameter, value: float) -> bool:
        """Whether the data do not reject ``value`` at 5 %."""
        side = 1 if value > self.estimate(parameter) else -1
        return bool(self.ratio(parameter, value)[0] <= self.critical(parameter, value, side))

    def _root(self, value: float, delta_NB: Float64) -> Float64:
        """(B,) signed root of a's ratio: above 0 where a series' own estimate lies above ``value``."""
        log_RB, growth = self._filtered(self.found.growth_R, delta_NB).over_noise(), math.log1p(value)
        held_B = self._filtered(np.array([growth]), delta_NB).over_noise()[0]
        ratio_B = 2 * np.maximum(log_RB.max(axis=0) - held_B, 0.0)
        return np.asarray(np.sign(self.found.growth_R[log_RB.argmax(axis=0)] - growth) * np.sqrt(ratio_B))

    def interval(self, parameter: Parameter, on_bound: Callable[[int], None] = lambda done: None) -> Interval:
        """Estimate and 95 % interval.

        Bounds are closed in on in rounds, each with the point of the last; 0 decides what is said of a, so it is tried
        itself, and from above with more room than the interval's 2.5 %.
        """
        centre, bounds = self.estimate(parameter), []
        for done, side in enumerate((-1, 1), start=1):
            bounds.append(self._bound(parameter, centre, side))
            on_bound(done)
        if parameter == "a" and not bounds[0] <= 0 <= bounds[1]:
            is_below = bounds[1] < 0
            critical = self.critical("a", 0.0, 1, _TAIL_OF_WALKS) if is_below else self.critical("a", 0.0, -1)
            if self.ratio("a", 0.0)[0] <= critical:
                bounds[is_below] = 0.0
        sides = [word for word, bound in zip(("below", "above"), bounds, strict=True) if math.isinf(bound)]
        note = f"unbounded {' and '.join(sides)}" if sides else ""
        return Interval(centre, bounds[0], bounds[1], len(self.series), note)

    def estimate(self, parameter: Parameter) -> float:
        """Most likely value, the noise averaged over."""
        rate, b = self._most_likely()
        return {"a": rate, "b": b, "delta_c": 2 * b / rate if rate else math.nan}[parameter]

    def start_and_noise(self) -> tuple[float, float]:
        """Fitted delta at the first step at the most likely a and b, and the mean of the noise per step."""
        rate, b = self._most_likely()
        weight_Q, start_Q, _ = self._noise_at(math.log1p(rate), b)
        return float(weight_Q @ start_Q), float(weight_Q @ self.found.noises.sd_Q)

    def _most_likely(self) -> tuple[float, float]:
        log_R, growth_R = self.found.over_noise()[:, 0], self.found.growth_R
        best = int(log_R.argmax())
        ends = growth_R[max(best - 1, 0)], growth_R[min(best + 1, len(growth_R) - 1)]
        growth = float(
            optimize.minimize_scalar(
                lambda r: -float(self._filtered(np.array([r])).over_noise()[0, 0]), bounds=ends, method="bounded",
                options={"xatol": 1e-4 * (ends[1] - ends[0])},
            ).x
        )  # fmt: skip
        row = self._filtered(np.array([growth]))
        weight_Q = row.noises.weight_Q * np.exp(row.log_RQB[0, :, 0] - row.log_RQB.max())
        return math.expm1(growth), float(weight_Q @ row.b_RQB[0, :, 0] / weight_Q.sum())

    def _bound(self, parameter: Parameter, centre: float, side: int) -> float:
        critical = _CHI_SQUARED
        bound = math.inf
        for _ in range(_ROUNDS):
            bound = self._crossing(parameter, centre, side, critical)
            if math.isinf(bound):
                break
            critical = self.critical(parameter, bound, side)
        return self._crossing(parameter, centre, side, critical)

    def _crossing(self, parameter: Parameter, centre: float, side: int, critical: float) -> float:
        """Where the data's ratio rises to ``critical`` on that side of ``centre``; infinite where it never does."""

        def above(value: float) -> float:
            return float(self.ratio(parameter, value)[0]) - critical

        inside, step = centre, self._step(parameter, centre)
        for _ in range(40):
            outside = inside + side * step
            if parameter == "a" and (outside <= -1 or abs(math.log1p(outside)) > _fastest(self.series)):
                return side * math.inf
            if above(outside) > 0:
                low, high = sorted((inside, outside))
                return float(optimize.brentq(above, low, high, rtol=1e-6)) if above(inside) < 0 else inside
            inside, step = outside, 1.7 * step
        return side * math.inf

    def _step(self, parameter: Parameter, centre: float) -> float:
        """A first stride on the way out: a part of what the data leave possible."""
        growth_R, rate = self.found.growth_R, abs(self.estimate("a"))
        width = float(growth_R[-1] - growth_R[0]) / 16
        best = np.unravel_index(int(self.found.log_RQB[..., 0].argmax()), self.found.b_variance_RQ.shape)
        b_width = math.sqrt(float(self.found.b_variance_RQ[best])) + width * abs(float(self.series.delta_N.mean())) / 4
        return {"a": width, "b": b_width / 2, "delta_c": max(b_width / max(rate, width), 1e-9 * abs(centre))}[parameter]

    def _b(self, parameter: Parameter, value: float) -> Float64:
        """(R,) b that ``value`` means at every growth rate."""
        growth_R = self.found.growth_R
        return np.full(len(growth_R), value) if parameter == "b" else np.expm1(growth_R) * value / 2

    def _filtered(self, growth_R: Float64, delta_NB: Float64 | None = None) -> Filtered:
        return filter_series(self.series, self.found.noises, growth_R, delta_NB)

    def _noise_at(self, growth: float, b: float | None) -> tuple[Float64, Float64, Float64]:
        """(Q,) how likely every noise is at that growth and b, with the start and the b that go with it."""
        row = self._filtered(np.array([growth]))
        log_Q, start_Q, b_Q = (cube[0, :, 0] for cube in (row.log_RQB, row.start_RQB, row.b_RQB))
        if b is not None:
            log_Q = log_Q - np.square(b_Q - b) / row.b_variance_RQ[0] / 2
            start_Q = start_Q + row.b_start_RQ[0] / row.b_variance_RQ[0] * (b - b_Q)
            b_Q = np.full_like(b_Q, b)
        weight_Q = row.noises.weight_Q * np.exp(log_Q - log_Q.max())
        return weight_Q / weight_Q.sum(), start_Q, b_Q

    def _simulated(self, parameter: Parameter, value: float, drifts: bool = True) -> Float64:
        """(N, draws) series that have ``value``, and for the rest what is most likely with it.

        Args:
            parameter: that has ``value``.
            drifts: False, of a only: the mean stays where it starts.
        """
        growth, b = math.log1p(value) if parameter == "a" else math.nan, None
        if parameter != "a":
            b_R = self._b(parameter, value)
            best = int(self.found.at_b(b_R)[:, 0].argmax())
            growth, b = float(self.found.growth_R[best]), float(b_R[best])
        weight_Q, start_Q, b_Q = self._noise_at(growth, b)
        rng = np.random.default_rng(SEED)
        drawn_B = rng.choice(len(weight_Q), size=N_DRAWS, p=weight_Q)
        variance_BN = self.found.noises.by_gap(self.series)[drawn_B]
        b_B = b_Q[drawn_B] if drifts else value * start_Q[drawn_B]
        return simulate(rng, self.series, growth, b_B, start_Q[drawn_B], variance_BN)


def _fastest(series: Series) -> float:
    """Largest log(1 + a) tried, per step."""
    size_N = series.scale_N
    most = 2 * math.log(float(size_N.max() / size_N.min()))
    return min(max(most, _LEAST_REACH), _MOST_REACH) / series.span


def simulate(
    rng: np.random.Generator, series: Series, growth: float, b_B: Float64, start_B: Float64, variance_BN: Float64
) -> Float64:
    """(N, B) series measured at the steps and with the errors of ``series``.

    Args:
        growth: log(1 + a) per step.
        variance_BN: process noise per step in the gap after every step.
    """
    delta_B, measured = start_B, []
    rate = np.array(growth)
    for i, se in enumerate(series.se_N):
        if i:
            gap = float(series.step_N[i] - series.step_N[i - 1])
            noise_B = np.sqrt(variance_BN[:, i - 1] * powers(2 * rate, gap)) * rng.standard_normal(len(b_B))
            delta_B = math.exp(growth * gap) * delta_B - b_B * powers(rate, gap) + noise_B
        measured.append(delta_B + se * rng.standard_normal(len(b_B)))
    return np.stack(measured)


STRONG: Final = math.log(20)
"""Difference of log-likelihoods from which one shape can be told from another: 20 to 1."""
_N_SHAPE_NOISES: Final = 16
_SPAN_OF_NOISES: Final = 1e3
"""Standard deviations of the process noise tried, besides 0: even in the logarithm over this factor."""


@dataclass(frozen=True)
class Shape:
    """Another shape of the series.

    Args:
        name: in words.
        advantage: its log-likelihood above the recurrence's, each at its best; below 0 where it fits worse.
    """

    name: str
    advantage: float

    @property
    def words(self) -> str:
        """Name and numbers."""
        return f"{self.name} (log-likelihood {abs(self.advantage):.1f} {'higher' if self.advantage > 0 else 'lower'})"


def other_shapes(series: Series, growth_R: Float64) -> list[Shape]:
    """A parabola and one jump, best first.

    Args:
        series: at least four steps.
        growth_R: growth rates log(1 + a) per step at which the recurrence is tried.
    """
    noises = _shape_noises(series)
    recurrence = float(filter_series(series, noises, growth_R).log_RQB.max())
    time_N = (series.step_N - series.step_N[0]) / series.span
    parabola_N3 = np.stack([np.ones_like(time_N), time_N, np.square(time_N)], axis=1)
    is_after_MN = np.arange(len(series)) > np.arange(len(series) - 1)[:, None]
    jumps_MN2 = np.stack([np.ones_like(is_after_MN), is_after_MN], axis=2).astype(np.float64)
    curved = log_likelihood(series, noises, parabola_N3[None]).max()
    jumped_M = log_likelihood(series, noises, jumps_MN2).max(axis=0)
    at = int(jumped_M.argmax())
    place = f"one jump between steps {series.step_N[at]:g} and {series.step_N[at + 1]:g}"
    shapes = [Shape("a parabola", float(curved) - recurrence), Shape(place, float(jumped_M[at]) - recurrence)]
    return sorted(shapes, key=lambda shape: -shape.advantage)


def log_likelihood(series: Series, noises: Noises, columns_MNK: Float64) -> Float64:
    """(Q, M) log-likelihood of means that are linear in K columns, at its maximum over their coefficients.

    Args:
        series: N steps.
        noises: Q kinds of process noise, which add up from step to step as at a = 0.
        columns_MNK: M such means.
    """
    gap_N = np.append(np.diff(series.step_N), 0.0)
    n_means, n_steps, n_columns = columns_MNK.shape
    beside = columns_MNK.transpose(1, 0, 2).reshape(n_steps, -1)
    rows = []
    for variance_N in noises.by_gap(series) * gap_N:
        walked_N = np.append(0.0, np.cumsum(variance_N[:-1]))
        root = linalg.cholesky(np.minimum.outer(walked_N, walked_N) + np.diag(np.square(series.se_N)), lower=True)
        white = linalg.solve_triangular(root, np.column_stack([series.delta_N, beside]), lower=True)
        basis_MNK = np.linalg.qr(white[:, 1:].reshape(n_steps, n_means, n_columns).transpose(1, 0, 2)).Q
        fitted_M = np.square(np.einsum("mnk,n->mk", basis_MNK, white[:, 0])).sum(axis=1)
        rows.append(-np.log(np.diag(root)).sum() - (white[:, 0] @ white[:, 0] - fitted_M) / 2)
    return np.stack(rows)


def _shape_noises(series: Series) -> Noises:
    """No noise, and noises of both scalings up to the range of the data."""
    most = float(np.ptp(series.delta_N)) / math.sqrt(series.span)
    sds = np.geomspace(most / _SPAN_OF_NOISES, most, _N_SHAPE_NOISES)
    sd_Q = np.r_[0.0, sds, sds]
    return Noises(sd_Q, np.arange(len(sd_Q)) > _N_SHAPE_NOISES, np.full(len(sd_Q), 1 / len(sd_Q)))
