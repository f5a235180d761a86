"""Measured coverage of the 95 % intervals of a, b and delta_c, and how often each outcome is told.

Series with known parameters, measured every 10 steps, delta 1e-3 at the first, delta_c = 1e-3 (so b / a is half of it):

- ``clean``: grows tenfold, errors 5 % of delta, no process noise;
- ``coarse``: tenfold, errors 10 %, process noise 1 % of the first delta per step;
- ``slow``: fourfold, errors 5 %, the same noise;
- ``noisy``: fourfold, errors 2 %, process noise 5 % per step: the noise decides;
- ``growing``: tenfold, errors 5 %, process noise 1 % of the *current* delta per step;
- ``gaps``: as ``clean`` with gaps of 1 to 30 steps;
- ``tokens``: tenfold; delta is the k3 of heavy-tailed tokens of 64 prompts, its error the interval that moediag gives;
- ``flat``: a = b = 0, errors 5 %; ``walk``: the same with process noise of 3 % per step; ``precise``: the same walk
  with errors of 1 %;
- ``parabola``, ``jump``: grow tenfold as (step / span)^2 and after 70 % of the steps, errors 3 %: no recurrence, so
  nothing is covered, and ``grows`` is an error unless the shape is named as one that cannot be told from it.

a's interval is the one that is given; b and delta_c count as covered where their truth is not rejected, which is what
their intervals are made of. delta_c is counted twice: in all series, and in those told to grow. ``falls`` is the
share told not to grow, nominally at most 0.025 of walks.

Usage: python benchmarks/recurrence_coverage.py [--sets N] [--steps 8 16 32] [--truths clean ...] [--seed S]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.series import standard_error_of
from moediag.statistics.intervals import ratio_mean_interval
from moediag.statistics.recurrence import MIN_STEPS, fit_recurrence, why_not_fitted
from moediag.statistics.recurrence_likelihood import STRONG, Likelihood, Series, other_shapes

Array = NDArray[np.float64]
START: Final = 1e-3
BOUNDARY: Final = 1e-3
GAP: Final = 10.0


@dataclass(frozen=True)
class Truth:
    """How a series comes about: growth factor, relative error, process noise per step relative to start or delta."""

    factor: float
    error: float
    noise: float = 0.0
    noise_grows: bool = False
    has_gaps: bool = False
    from_tokens: bool = False
    shape: Literal["recurrence", "parabola", "jump"] = "recurrence"

    def rates(self, span: float) -> tuple[float, float]:
        """(a, b) per step; the part of delta above b / a grows so that delta reaches the factor."""
        if self.factor == 1:
            return 0.0, 0.0
        fixed = BOUNDARY / 2
        a = float(np.expm1(np.log((self.factor * START - fixed) / (START - fixed)) / span))
        return a, a * fixed


TRUTHS: Final = {
    "clean": Truth(10, 0.05),
    "coarse": Truth(10, 0.10, 0.01),
    "slow": Truth(4, 0.05, 0.01),
    "noisy": Truth(4, 0.02, 0.05),
    "growing": Truth(10, 0.05, 0.01, noise_grows=True),
    "gaps": Truth(10, 0.05, has_gaps=True),
    "tokens": Truth(10, 0.0, from_tokens=True),
    "flat": Truth(1, 0.05),
    "walk": Truth(1, 0.05, 0.03),
    "precise": Truth(1, 0.01, 0.03),
    "parabola": Truth(10, 0.03, shape="parabola"),
    "jump": Truth(10, 0.03, shape="jump"),
}


def make_series(rng: np.random.Generator, truth: Truth, n_steps: int) -> tuple[Series, float, float]:
    """A measured series with its a and b."""
    gaps = rng.integers(1, 31, n_steps - 1).astype(float) if truth.has_gaps else np.full(n_steps - 1, GAP)
    step_N = np.r_[0.0, np.cumsum(gaps)]
    a, b = truth.rates(float(step_N[-1]))
    if truth.shape != "recurrence":
        time_N = step_N / step_N[-1]
        risen_N = np.square(time_N) if truth.shape == "parabola" else time_N > 0.7
        path_N = START * (1 + (truth.factor - 1) * risen_N)
        se_N = truth.error * path_N
        return Series(step_N, path_N + se_N * rng.standard_normal(n_steps), se_N), np.nan, np.nan
    delta, path = START, [START]
    for gap in gaps:
        for _ in range(int(gap)):  # step by step, not by the composed map that the filter uses
            noise = truth.noise * (delta if truth.noise_grows else START)
            delta = (1 + a) * delta - b + noise * rng.standard_normal()
        path.append(delta)
    path_N = np.array(path)
    if truth.from_tokens:
        measured = np.array([_measured_k3(rng, delta) for delta in path_N])
        return Series(step_N, measured[:, 0], measured[:, 1]), a, b
    se_N = truth.error * np.abs(path_N)
    return Series(step_N, path_N + se_N * rng.standard_normal(n_steps), se_N), a, b


def _measured_k3(rng: np.random.Generator, delta: float, n_prompts: int = 64) -> tuple[float, float]:
    """(k3, its standard error) of tokens whose expected k3 is ``delta``: Laplace diffs, prompts of uneven scale."""
    prompt_T = np.repeat(np.arange(n_prompts), np.clip(np.exp(rng.normal(4.8, 0.6, n_prompts)), 10, 1000).astype(int))
    scale_C = np.exp(rng.normal(0.0, 0.4, n_prompts) - 0.16)
    # E(exp(d) - 1 - d) of a Laplace of scale s is s^2 / (1 - s^2)
    scale_T = np.sqrt(delta) * scale_C[prompt_T]
    diff_T = rng.laplace(size=len(prompt_T)) * np.minimum(scale_T, 0.5)
    sums, n = (np.bincount(prompt_T, weights=w, minlength=n_prompts) for w in (np.expm1(diff_T) - diff_T, None))
    found = ratio_mean_interval(sums, n.astype(float), "positive").one()
    return found.value, standard_error_of(found.low, found.high)


def measure(truth: Truth, n_steps: int, n_sets: int, seed: int) -> dict[str, Array]:
    """By series: is a, b, delta_c covered (NaN where there is none), is it told that delta grows, or does not."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n_sets):
        series, a, b = make_series(rng, truth, n_steps)
        if n_steps < MIN_STEPS:
            found = fit_recurrence(series.step_N, series.delta_N, series.se_N)
            rows.append((np.nan, np.nan, np.nan, found.outcome == "grows", found.outcome == "does not grow"))
            continue
        likelihood = Likelihood.of(series)
        growth = likelihood.interval("a")
        varies = not why_not_fitted(series)
        told = varies and growth.low > 0 and other_shapes(series, likelihood.found.growth_R)[0].advantage < STRONG
        covered = (np.nan, np.nan, np.nan)
        if truth.shape == "recurrence":
            boundary = likelihood.accepts("delta_c", 2 * b / a) if a else np.nan
            covered = (growth.low <= a <= growth.high, likelihood.accepts("b", b), boundary)
        rows.append((*covered, told, varies and growth.high < 0))
    columns = np.array(rows, dtype=float).T
    return dict(zip(("a", "b", "delta_c", "told", "falls"), columns, strict=True))


def _share(values: Array) -> str:
    known = values[np.isfinite(values)]
    return f"{known.mean():9.3f}" if len(known) else f"{'--':>9}"


def main() -> int:
    """Print one row per truth and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=100, help="series per truth and number of steps")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 8, 16, 32])
    parser.add_argument("--truths", nargs="+", default=list(TRUTHS), choices=list(TRUTHS))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.perf_counter()
    print(f"{'truth':<9}{'steps':>6}{'a':>9}{'b':>9}{'delta_c':>9}{'where told':>11}{'grows':>9}{'falls':>9}")
    for name in args.truths:
        for n_steps in args.steps:
            found = measure(TRUTHS[name], n_steps, args.sets, args.seed + n_steps)
            told = found["told"] > 0
            cells = "".join(_share(found[key]) for key in ("a", "b", "delta_c"))
            outcomes = f"{_share(found['told'])}{_share(found['falls'])}"
            print(f"{name:<9}{n_steps:>6}{cells}  {_share(found['delta_c'][told])}{outcomes}", flush=True)
    print(f"{args.sets} series per row, standard error up to {0.5 / args.sets**0.5:.3f} (0.022 at 0.95 and 100); "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
