"""Intervals of the recurrence's a, b and delta_c = 2 b / a: likelihood ratios with a simulated distribution.

Invariants:
    - the process noise is averaged over, not estimated: its most likely value is 0 in most short series, and intervals
      that believe it cover 0.77 where they say 0.95 (30 steps);
    - at every bound tried, series are simulated with that value, with noise drawn from what the data leave possible,
      and the bound stands where the data's ratio is the 95 % point of theirs (never less than chi-squared's 3.84);
    - a's interval is equal-tailed, 2.5 % on either side: of random walks nearly every estimate of a lies below 0, and
      a two-sided point would spend its 5 % there. Its upper bound also holds against series without drift, where an
      estimate lies lowest; the drift fitted to a walk is never 0;
    - a bound that no value reaches is infinite, and the note says so; random numbers are seeded here.

Measured coverage of the nominal 0.95, and the shares told to grow and said to be pulled to a level, "falls"
(``benchmarks/recurrence_coverage.py --sets 60``; truths there; standard error 0.03 at 0.95, 0.02 at 0.025):

    ========= ===== ===== ===== ======== ========== ===== =====
    truth     steps     a     b  delta_c where told grows falls
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
decides and the few series that are told are the lucky ones: there delta_c's interval holds the truth 0.8 of the time.

Source: Hansen, "The grid bootstrap and the autoregressive model", Review of Economics and Statistics 81 (1999).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from moediag.analysis.intervals import Interval
from moediag.analysis.recurrence_filter import Filtered, Noises, Series, filter_series, powers
from moediag.analysis.resampling import LEVEL, SEED, TAIL

Float64 = NDArray[np.float64]
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
