"""Does the mismatch of a training run grow as if it compounded? delta' = (1 + a) delta - b, fitted or refused.

The theorem (Ring-1T, appendix) is an inequality, delta' >= (1 + eta mu) delta - kappa mu. What is fitted is the
*equality* model with a = eta mu, b = kappa mu, process noise, and a delta that is measured with a known error at every
step; its boundary delta_c = 2 b / a is an estimate under :data:`ASSUMPTIONS`, and nothing here shows that training will
be stable.

Invariants:
    - a series that cannot tell is refused in a sentence with its numbers: an infinite value, too few steps, errors not
      known, no change beyond the errors, an interval of a that holds 0, or another shape that fits better;
    - growth faster than a straight line is never called compounding: the recurrence is one explanation of it, and
      others that fit as well are named (:mod:`moediag.statistics.recurrence_likelihood`);
    - intervals are those values that a likelihood ratio does not reject, with its own distribution simulated at each
      value tried (grid bootstrap): a ratio has no symmetric interval, near a = 0 no ratio is chi-squared, and 30 steps
      do not tell process noise from none. They may be unbounded, and then say so;
    - the same series gives the same result, bit for bit.

Source: theorem: Ring-1T (arXiv 2510.18855), appendix; grid bootstrap: Hansen, Review of Economics and Statistics 81
(1999); errors in variables: Fuller, Measurement Error Models (1987).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from moediag.errors import FrameError
from moediag.statistics.intervals import Interval
from moediag.statistics.recurrence_likelihood import STRONG, Likelihood, Series, Shape, other_shapes
from moediag.statistics.resampling import LEVEL

Float64 = NDArray[np.float64]
Outcome = Literal["grows", "cannot tell", "does not grow"]

MIN_STEPS: Final = 8
"""Fewest steps: four unknowns (a, b, the start, the process noise) leave four of them to tell noise from growth.
Coverage was measured from 8 steps on (``benchmarks/recurrence_coverage.py``)."""

MOST_STEPS: Final = 128
"""More are thinned, evenly: the map is composed over gaps, so fewer steps bring no bias. The time of a fit grows with
the steps, since 199 series are simulated at every bound tried: about 20 s at 128 on one core."""

ASSUMPTIONS: Final = (
    "equality where the theorem has an inequality",
    "a and b constant over the steps fitted: no change of learning rate, data or optimiser state matters",
    "Gaussian process noise, independent from step to step, constant or proportional to delta",
    "Gaussian measurement errors, independent between steps, of the standard errors given",
    "the metric fitted is the KL of the theorem, or proportional to it",
)
"""What the fit takes for granted; printed wherever its numbers are."""


@dataclass(frozen=True)
class Recurrence:
    """What a series says about growth.

    Args:
        outcome: ``grows`` (faster than a straight line), or why not: ``does not grow`` (a below 0) or ``cannot tell``.
        reason: the outcome in one sentence with its numbers.
        n_steps: steps with a standard error that were used.
        growth: a [1/step]; None where nothing was fitted.
        drain: b [unit of delta / step], and boundary: delta_c = 2 b / a [unit of delta]; None unless it grows.
        start: fitted delta at the first step.
        noise_sd: process noise per step at the series' geometric mean [unit of delta].
    """

    outcome: Outcome
    reason: str
    n_steps: int
    first_step: float
    last_step: float
    growth: Interval | None = None
    drain: Interval | None = None
    boundary: Interval | None = None
    start: float = np.nan
    noise_sd: float = np.nan

    def mean_at(self, step_N: ArrayLike) -> Float64:
        """The fitted map without noise, from the first step on [unit of delta]; NaN where nothing was fitted."""
        steps = np.asarray(step_N, dtype=np.float64) - self.first_step
        if self.growth is None or self.drain is None:
            return np.full(len(steps), np.nan)
        fixed = self.drain.value / self.growth.value
        return np.asarray(fixed + (self.start - fixed) * np.exp(np.log1p(self.growth.value) * steps))

    def record(self) -> dict[str, Any]:
        """Strict JSON: numbers or null, intervals as [low, high], an infinite bound as null with a note."""
        entries: dict[str, Any] = {}
        for name in ("growth", "drain", "boundary"):
            interval: Interval | None = getattr(self, name)
            if interval is not None:
                bounds = [bound if np.isfinite(bound) else None for bound in (interval.low, interval.high)]
                entries[name] = {"value": interval.value, "ci": bounds, "note": interval.note}
        numbers = {name: float(getattr(self, name)) for name in ("first_step", "last_step", "start", "noise_sd")}
        numbers_or_null = {name: value if np.isfinite(value) else None for name, value in numbers.items()}
        return {"outcome": self.outcome, "reason": self.reason, "n_steps": self.n_steps, **numbers_or_null, **entries}


def fit_recurrence(
    step_N: ArrayLike, delta_N: ArrayLike, se_N: ArrayLike, on_progress: Callable[[int, int], None] | None = None
) -> Recurrence:
    """Fit the recurrence to a measured series, or say why the series cannot tell.

    Not least squares of each delta on the one before: measurement error in the regressor pulls that slope down, and the
    more so the shorter the steps.

    Args:
        step_N: training step of every measurement, strictly ascending; gaps may differ.
        delta_N: the measured mismatch, any unit; NaN = not measured. An infinite one ends the fit.
        se_N: standard error of each; steps whose error is not known (NaN or 0) are left out.
        on_progress: called with (bounds done, bounds in all).

    Returns:
        The outcome with a, b and delta_c and their 95 % intervals, per unit of step.

    Raises:
        FrameError: steps do not ascend, or an error is negative.
    """
    series, n_without = _usable(step_N, delta_N, se_N)
    ends = (float(series.step_N[0]), float(series.step_N[-1])) if len(series) else (np.nan, np.nan)
    if reason := _infinite(step_N, delta_N) or why_not_fitted(series, n_without):
        return Recurrence("cannot tell", reason, len(series), *ends)
    series, of_steps = thinned(series)
    likelihood = Likelihood.of(series)
    tell = on_progress or (lambda done, total: None)
    growth = likelihood.interval("a", lambda done: tell(done, 6))
    if not growth.low > 0:
        outcome, reason = _not_growing(series, growth)
        return Recurrence(outcome, reason + of_steps, len(series), *ends, growth)
    shapes = other_shapes(series, likelihood.found.growth_R)
    if shapes[0].advantage >= STRONG:
        return Recurrence("cannot tell", _another_shape(growth, shapes[0]) + of_steps, len(series), *ends, growth)
    drain = likelihood.interval("b", lambda done: tell(2 + done, 6))
    boundary = likelihood.interval("delta_c", lambda done: tell(4 + done, 6))
    reason = _grows(growth, boundary, shapes) + of_steps
    return Recurrence("grows", reason, len(series), *ends, growth, drain, boundary, *likelihood.start_and_noise())


def thinned(series: Series) -> tuple[Series, str]:
    """At most :data:`MOST_STEPS` of the steps, first and last among them, and words that say so."""
    if len(series) <= MOST_STEPS:
        return series, ""
    kept = np.linspace(0, len(series) - 1, MOST_STEPS).round().astype(int)
    fewer = Series(series.step_N[kept], series.delta_N[kept], series.se_N[kept])
    return fewer, f"; fitted to {MOST_STEPS} of {len(series):,} steps, evenly spaced, for the time a fit takes"


def _infinite(step_N: ArrayLike, delta_N: ArrayLike) -> str:
    """Why a series with an infinite value is not fitted; empty where all are finite."""
    steps, deltas = (np.asarray(values, dtype=np.float64) for values in (step_N, delta_N))
    wrong = np.flatnonzero(np.isinf(deltas))
    if not len(wrong):
        return ""
    return (
        f"the value is infinite at {len(wrong)} of {len(deltas)} steps, first at step {steps[wrong[0]]:g}; no finite "
        "noise gives that, and leaving it out would leave out the worst: find the tokens behind it"
    )


def _usable(step_N: ArrayLike, delta_N: ArrayLike, se_N: ArrayLike) -> tuple[Series, int]:
    """The steps with a value and a standard error, and how many values have none."""
    steps, deltas, errors = (np.asarray(values, dtype=np.float64) for values in (step_N, delta_N, se_N))
    if not (len(steps) == len(deltas) == len(errors)):
        raise FrameError(f"a series wants as many steps, values and errors, found {len(steps)}, {len(deltas)}, "
                         f"{len(errors)}")  # fmt: skip
    if not np.isfinite(steps).all() or (np.diff(steps) <= 0).any():
        raise FrameError("a series wants steps that ascend, each once; sort them and drop what is there twice")
    if (errors < 0).any():
        raise FrameError(f"a standard error is at least 0, found {np.nanmin(errors):g}; check the column")
    is_known = np.isfinite(deltas) & np.isfinite(errors) & (errors > 0)
    return Series(steps[is_known], deltas[is_known], errors[is_known]), int((np.isfinite(deltas) & ~is_known).sum())


def why_not_fitted(series: Series, n_without: int = 0) -> str:
    """Why nothing is fitted; empty when there is something to fit.

    Args:
        series: the steps whose error is known.
        n_without: how many more have a value, but no error.
    """
    if len(series) < MIN_STEPS:
        lacking = f" ({n_without} more have no standard error)" if n_without else ""
        return (
            f"{len(series)} steps with a known standard error{lacking}; a fit of four unknowns (a, b, the start, the "
            f"process noise) needs {MIN_STEPS}"
        )
    weight_N = 1 / np.square(series.se_N)
    mean = float((weight_N * series.delta_N).sum() / weight_N.sum())
    spread = float((weight_N * np.square(series.delta_N - mean)).sum())
    limit = 2 * float(special.gammaincinv((len(series) - 1) / 2, LEVEL))  # of chi-squared
    if spread <= limit:
        return (
            f"all {len(series)} steps with a known error agree with one value, {mean:.3g}, within these errors "
            f"(chi-squared {spread:.1f}, 95 % limit {limit:.1f} at {len(series) - 1} degrees of freedom)"
        )
    return ""


def _not_growing(series: Series, growth: Interval) -> tuple[Outcome, str]:
    """Outcome and reason where a is not above 0 for certain."""
    bounds = f"a = {growth.value:.3g} per step, 95 % interval {_bounds(growth)}"
    if growth.high < 0:
        return "does not grow", f"{bounds}, lies below 0: steps are pulled to a level, so there is no boundary"
    return "cannot tell", (
        f"{bounds}, holds 0: over steps {series.step_N[0]:g} to {series.step_N[-1]:g} growth that compounds cannot be "
        "told from a straight line with noise, so delta_c = 2 b / a is unbounded"
    )


def _grows(growth: Interval, boundary: Interval, shapes: list[Shape]) -> str:
    words = f"{_faster(growth)}; a recurrence that compounds is one explanation. {_compared(shapes)}. If it compounds, "
    words += f"delta_c = 2 b / a = {boundary.value:.3g}, 95 % interval {_bounds(boundary)}"
    if boundary.low > 0:
        return f"{words}; the map grows from half of that on"
    return f"{words}, which {'holds 0' if boundary.high > 0 else 'lies below 0'}: no boundary above 0 can be told"


def _faster(growth: Interval) -> str:
    return f"delta grows faster than a straight line: a = {growth.value:.3g} per step, 95 % interval {_bounds(growth)}"


def _compared(shapes: list[Shape]) -> str:
    """Which other shapes fit as well, which do not."""
    as_well = [shape.words for shape in shapes if shape.advantage > -STRONG]
    worse = [shape.words for shape in shapes if shape.advantage <= -STRONG]
    said = [f"{' and '.join(as_well)} cannot be told from it"] if as_well else []
    said += [f"{' and '.join(worse)} {'fit' if len(worse) > 1 else 'fits'} worse"] if worse else []
    words = "; ".join(said)
    return (
        f"{words[0].upper()}{words[1:]}, {STRONG:.0f} being strong evidence (Kass and Raftery 1995); a schedule or a "
        "change of data is not among them"
    )


def _another_shape(growth: Interval, shape: Shape) -> str:
    return (
        f"{_faster(growth)}, but {shape.words} fits better than a recurrence, {STRONG:.0f} being strong evidence "
        "(Kass and Raftery 1995): no compounding is to be read from it, and no delta_c"
    )


def _bounds(interval: Interval) -> str:
    low = f"{interval.low:.3g}" if np.isfinite(interval.low) else "unbounded"
    high = f"{interval.high:.3g}" if np.isfinite(interval.high) else "unbounded"
    return f"[{low}, {high}]"
