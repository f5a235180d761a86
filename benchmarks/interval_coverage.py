"""Measured coverage of moediag's 95 % intervals on synthetic clustered tokens with known truth.

One simulated data set: C prompts, each with its own scale (log-normal, sigma 0.5) and length (log-normal,
about 40 to 400 tokens); logp_diff is scale times a Student t with 3 degrees of freedom, clipped to +-3 so
that exp() has moments; a beta-distributed flip probability per prompt. Truth: the same generator, 200 000 prompts.

Usage: python benchmarks/interval_coverage.py [--sets N] [--clusters 16 64 256] [--seed S]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moediag.analysis.intervals import Interval, cluster_sums, mean_interval, quantile_interval, ratio_mean_interval
from moediag.analysis.positions import within_sequence

Array = NDArray[np.float64]
Statistic = tuple[Callable[["Tokens"], float], Callable[["Tokens"], Interval]]


class Tokens:
    """One synthetic data set: token rows with the prompt each belongs to."""

    def __init__(self, rng: np.random.Generator, n_clusters: int, scale: float = 0.02) -> None:
        length_C = np.clip(np.exp(rng.normal(4.8, 0.6, n_clusters)), 10, 1000).astype(int)
        self.cluster_T = np.repeat(np.arange(n_clusters), length_C)
        scale_C = scale * np.exp(rng.normal(0.0, 0.5, n_clusters))
        self.d_T = np.clip(scale_C[self.cluster_T] * rng.standard_t(3, len(self.cluster_T)), -3, 3)
        flip_C = rng.beta(2.0, 18.0, n_clusters)
        self.position_T = np.concatenate([np.arange(n, dtype=float) for n in length_C])
        rare_C = rng.beta(1.0, 499.0, n_clusters)
        self.flip_T = rng.random(len(self.cluster_T)) < flip_C[self.cluster_T]
        self.rare_T = rng.random(len(self.cluster_T)) < rare_C[self.cluster_T]


def _mean(kind: str, of: Callable[[Tokens], Array]) -> Statistic:
    return (lambda x: float(of(x).mean())), (lambda x: mean_interval(of(x), x.cluster_T, kind))  # type: ignore[arg-type]


def _quantile(q: float) -> Statistic:
    return (
        lambda x: float(np.quantile(np.abs(x.d_T), q)),
        lambda x: quantile_interval(np.abs(x.d_T), x.cluster_T, q),
    )


def _slope(x: Tokens) -> Interval:
    """Within-sequence slope of abs(d), one sequence per prompt; the truth is 0."""
    centred = {
        name: within_sequence(values, x.cluster_T) for name, values in (("x", x.position_T), ("y", np.abs(x.d_T)))
    }
    cross_C = cluster_sums(centred["x"] * centred["y"], x.cluster_T)
    return ratio_mean_interval(cross_C, cluster_sums(centred["x"] ** 2, x.cluster_T), "signed").one()


STATISTICS: dict[str, Statistic] = {
    "mean abs diff": _mean("positive", lambda x: np.abs(x.d_T)),
    "k2": _mean("positive", lambda x: x.d_T**2 / 2),
    "k3": _mean("positive", lambda x: np.expm1(x.d_T) - x.d_T),
    "k1 (signed)": _mean("signed", lambda x: -x.d_T),
    "mean ratio": _mean("signed", lambda x: np.exp(x.d_T)),
    "rate 0.1": _mean("rate", lambda x: x.flip_T.astype(float)),
    "rate 0.002": _mean("rate", lambda x: x.rare_T.astype(float)),
    "position slope": (lambda x: 0.0, lambda x: _slope(x)),
    "p50": _quantile(0.5),
    "p90": _quantile(0.9),
    "p99": _quantile(0.99),
    "p99.9": _quantile(0.999),
}


def measure(n_clusters: int, n_sets: int, seed: int, truth: dict[str, float]) -> dict[str, tuple[float, float]]:
    """(coverage, share of sets with an interval) by statistic; sets without one do not count as covered or not."""
    rng = np.random.default_rng(seed)
    hit = dict.fromkeys(STATISTICS, 0)
    given = dict.fromkeys(STATISTICS, 0)
    for _ in range(n_sets):
        data = Tokens(rng, n_clusters)
        for name, (_, interval_of) in STATISTICS.items():
            interval = interval_of(data)
            if np.isfinite(interval.low) and np.isfinite(interval.high):
                given[name] += 1
                hit[name] += interval.low <= truth[name] <= interval.high
    return {name: (hit[name] / max(given[name], 1), given[name] / n_sets) for name in STATISTICS}


def _cell(coverage: float, share: float) -> str:
    return f"{coverage:8.3f} ({share:4.0%})" if share else f"{'none':>15}"


def main() -> int:
    """Print one row per statistic: measured coverage by number of clusters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=200, help="simulated data sets per cluster count")
    parser.add_argument("--clusters", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.perf_counter()
    population = Tokens(np.random.default_rng(999), 200_000)
    truth = {name: value_of(population) for name, (value_of, _) in STATISTICS.items()}
    columns = [measure(c, args.sets, args.seed + c, truth) for c in args.clusters]
    print("statistic       " + "".join(f"{c:>8} prompts" for c in args.clusters))
    for name in STATISTICS:
        cells = (column[name] for column in columns)
        print(f"{name:<16}" + "".join(_cell(*cell) for cell in cells))
    print(f"{args.sets} data sets per column, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
