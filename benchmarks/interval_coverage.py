"""Measured coverage of moediag's 95 % intervals on synthetic clustered tokens with known truth.

Four truths, all clustered by prompt; logp_diff is clipped to +-3 nat so that exp() has moments:

- ``t3``: log-normal prompt scale (sigma 0.5) and length (about 40 to 400 tokens), Student t tails with 3 degrees;
- ``mixture``: like real captures: an eighth of the diffs exactly 0, sizes log-normal (sigma 1.5), times 2.5 where the
  token flips, responses about 50 to 500 tokens; a diff of 1 nat in a few of ten thousand tokens;
- ``uneven``: prompts differ by a factor of e either way (log-normal, sigma 1), Laplace tails, equal lengths;
- ``carried``: one prompt in thirty carries the mean: Laplace diffs of 0.01 nat, of 0.3 nat around -0.3 in such a one.

Each token also has a flip (beta-binomial by prompt, mean 0.1, of four layers), a rare event (0.002) and a p_infer.
Truth: the same generator, 100 000 prompts.

Two more tables are of sums over prompts alone, 4,000 and 500 sets a cell:

- ``rare``: the interval of a rate of which 0.5 to 64 events are expected, tokens independent or clustered in five ways;
- ``shares``: means over prompts that are log-normal (sigma 0.5 to 3), beside the median over sets of the share of the
  sum that lies in its largest prompt.

Usage: python benchmarks/interval_coverage.py [--sets N] [--clusters 16 32 64 128 256] [--truths t3 ...] [--seed S]
       [--statistics k1 k3 ...] [--tables tokens rare shares]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.logprobs import pearson_interval, std_interval
from moediag.analysis.measures import TOKEN_MEASURES, abs_diff, prompt_sums
from moediag.analysis.positions import within_sequence
from moediag.analysis.routing import clustering_ratio_interval, flip_dispersion_interval
from moediag.analysis.tokens import Tokens
from moediag.statistics.intervals import Interval, ratio_mean_interval
from moediag.statistics.quantiles import quantile_of_rows

Array = NDArray[np.float64]
N_LAYERS = 4


class DataSet:
    """One synthetic data set: token rows with the prompt each belongs to."""

    def __init__(self, rng: np.random.Generator, n_clusters: int, truth: str) -> None:
        length_C, diff = _TRUTHS[truth](rng, n_clusters)
        row_T = np.repeat(np.arange(n_clusters), length_C)
        flip_C = rng.beta(2.0, 18.0, n_clusters)
        # half of the flips strike two layers at once: flips cluster in tokens
        flips_TL = rng.random((len(row_T), N_LAYERS)) < flip_C[row_T, None]
        flips_TL[:, 1] |= flips_TL[:, 0] & (rng.random(len(row_T)) < 0.5)
        self.flips_TL = flips_TL
        self.rare_T = rng.random(len(row_T)) < rng.beta(1.0, 499.0, n_clusters)[row_T]
        d_T = np.clip(diff(rng, row_T, flips_TL[:, 0]), -3, 3)
        infer_T = np.minimum(-rng.exponential(0.7, len(row_T)), -np.maximum(d_T, 0))  # both sides stay at p <= 1
        frame = pd.DataFrame({"logp_train": infer_T + d_T, "logp_infer": infer_T, "prompt_id": row_T})
        self.scored = Tokens(frame)
        self.position_T = np.concatenate([np.arange(n, dtype=float) for n in length_C])

    def mean(self, values_T: Array, kind: str) -> Interval:
        sums_C = self.scored.by_prompt(values_T)
        return ratio_mean_interval(sums_C, self.scored.n_by_prompt, kind).one()  # type: ignore[arg-type]

    @cached_property
    def clustering(self) -> Array:
        """Per-prompt sums as RoutingTotals gives them."""
        n_T = self.flips_TL.sum(axis=1)
        columns = [np.ones(len(n_T)), n_T > 0, n_T, n_T**2, *self.flips_TL.T, *[np.ones(len(n_T))] * N_LAYERS]
        return np.stack([self.scored.by_prompt(column) for column in columns], axis=1)


def _t3(rng: np.random.Generator, n: int) -> tuple[Array, Callable[..., Array]]:
    length_C = np.clip(np.exp(rng.normal(4.8, 0.6, n)), 10, 1000).astype(int)
    scale_C = 0.02 * np.exp(rng.normal(0.0, 0.5, n))
    return length_C, lambda rng, row_T, flip_T: scale_C[row_T] * rng.standard_t(3, len(row_T))


def _mixture(rng: np.random.Generator, n: int) -> tuple[Array, Callable[..., Array]]:
    length_C = np.clip(np.exp(rng.normal(5.0, 0.5, n)), 10, 2000).astype(int)
    scale_C = 0.004 * np.exp(rng.normal(0.0, 0.3, n))

    def diff(rng: np.random.Generator, row_T: Array, flip_T: Array) -> Array:
        size_T = scale_C[row_T] * np.exp(rng.normal(0.0, 1.5, len(row_T))) * np.where(flip_T, 2.5, 1.0)
        size_T[rng.random(len(row_T)) < 0.125] = 0.0
        return size_T * rng.choice([-1.0, 1.0], len(row_T))

    return length_C, diff


def _uneven(rng: np.random.Generator, n: int) -> tuple[Array, Callable[..., Array]]:
    scale_C = 0.01 * np.exp(rng.normal(0.0, 1.0, n))
    return np.full(n, 128), lambda rng, row_T, flip_T: scale_C[row_T] * rng.laplace(size=len(row_T))


def _carried(rng: np.random.Generator, n: int) -> tuple[Array, Callable[..., Array]]:
    carries_C = rng.random(n) < 1 / 30

    def diff(rng: np.random.Generator, row_T: Array, flip_T: Array) -> Array:
        is_big_T = carries_C[row_T]
        return np.where(is_big_T, 0.3, 0.01) * rng.laplace(size=len(row_T)) - np.where(is_big_T, 0.3, 0.0)

    return np.full(n, 128), diff


_TRUTHS = {"t3": _t3, "mixture": _mixture, "uneven": _uneven, "carried": _carried}


def _slope(x: DataSet) -> Interval:
    """Within-sequence slope of abs(d), one sequence per prompt; the truth is 0."""
    row_T = x.scored.prompt_row_T
    position_T, size_T = within_sequence(x.position_T, row_T), within_sequence(abs_diff(x.scored), row_T)
    sums = x.scored.by_prompt(position_T * size_T), x.scored.by_prompt(position_T**2)
    return ratio_mean_interval(*sums, "signed").one()


def _measure(name: str) -> Callable[[DataSet], Interval]:
    measure = next(m for m in TOKEN_MEASURES if m.name == name)
    return lambda x: measure.intervals(prompt_sums(x.scored, [measure]), x.scored.n_by_prompt).one()


def _quantile(q: float) -> Callable[[DataSet], Interval]:
    return lambda x: quantile_of_rows(abs_diff(x.scored), x.scored.prompt_row_T, x.scored.n_prompts, q)


STATISTICS: dict[str, Callable[[DataSet], Interval]] = {
    "mean abs diff": _measure("abs_logp_diff.mean"),
    "mean abs prob diff": _measure("abs_prob_diff.mean"),
    "k1": _measure("kl_infer_train_k1"),
    "k2": _measure("kl_infer_train_k2"),
    "k3": _measure("kl_infer_train_k3"),
    "mean ratio": _measure("mean_ratio"),
    "prob mult error": _measure("prob_mult_error"),
    "binary KL": _measure("binary_kl_infer_train"),
    "share above 0.1 nat": lambda x: x.mean((abs_diff(x.scored) > 0.1).astype(float), "rate"),
    "flip rate 0.1": lambda x: x.mean(x.flips_TL[:, 2].astype(float), "rate"),
    "rate 0.002": lambda x: x.mean(x.rare_T.astype(float), "rate"),
    "position slope": _slope,
    "p50": _quantile(0.5),
    "p90": _quantile(0.9),
    "p99": _quantile(0.99),
    "p99.9": _quantile(0.999),
    "std of prob diff": lambda x: std_interval(x.scored),
    "pearson": lambda x: pearson_interval(x.scored),
    "clustering ratio": lambda x: clustering_ratio_interval(x.clustering),
    "flip dispersion": lambda x: flip_dispersion_interval(x.clustering),
}


def population(truth: str, names: list[str], n_prompts: int = 100_000) -> dict[str, float]:
    """The value of every statistic in a sample so large that it stands for the truth."""
    data = DataSet(np.random.default_rng(999), n_prompts, truth)
    return {name: 0.0 if name == "position slope" else STATISTICS[name](data).value for name in names}


def measure(truth: str, n_clusters: int, n_sets: int, seed: int, true: dict[str, float]) -> dict[str, tuple[int, int]]:
    """(sets covered, sets with an interval) by statistic; sets without one count as neither."""
    rng = np.random.default_rng(seed)
    hit, given = dict.fromkeys(true, 0), dict.fromkeys(true, 0)
    for _ in range(n_sets):
        data = DataSet(rng, n_clusters, truth)
        for name in true:
            interval = STATISTICS[name](data)
            if np.isfinite(interval.low) and np.isfinite(interval.high):
                given[name] += 1
                hit[name] += interval.low <= true[name] <= interval.high
    return {name: (hit[name], given[name]) for name in true}


RARE = (0.5, 1, 2, 4, 8, 12, 16, 24, 32, 64)
"""Events expected in a whole set."""
SIGMAS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
N_WIDE = 4000


def _lengths(rng: np.random.Generator, n_clusters: int) -> Array:
    return np.clip(np.exp(rng.normal(5.5, 0.6, n_clusters)), 10, 2000).round()


def _gamma(squared_cv: float) -> Callable[[np.random.Generator, Array], Array]:
    """Prompts' rates differ: gamma with that squared coefficient of variation."""
    return lambda rng, mean_CM: rng.poisson(mean_CM * rng.gamma(1 / squared_cv, squared_cv, mean_CM.shape))


def _bursts(size: float) -> Callable[[np.random.Generator, Array], Array]:
    """Events come in bursts of one prompt, geometric with that mean."""

    def draw(rng: np.random.Generator, mean_CM: Array) -> Array:
        bursts_CM = rng.poisson(mean_CM / size)
        return bursts_CM + np.where(bursts_CM, rng.negative_binomial(np.maximum(bursts_CM, 1), 1 / size), 0)

    return draw


CLUSTERINGS: dict[str, Callable[[np.random.Generator, Array], Array]] = {
    "independent": lambda rng, mean_CM: rng.poisson(mean_CM),
    "prompts differ, CV^2 2": _gamma(2),
    "prompts differ, CV^2 5": _gamma(5),
    "bursts of 3": _bursts(3),
    "bursts of 10": _bursts(10),
    "1 prompt in 30": lambda rng, mean_CM: rng.poisson(30 * mean_CM * (rng.random(mean_CM.shape) < 1 / 30)),
}


def show_rare(n_clusters: int, seed: int) -> None:
    """Coverage of a rate's interval by the number of events expected, one row per way of clustering."""
    length_C = _lengths(np.random.default_rng(seed), n_clusters)[:, None]
    print(f"{f'{n_clusters} prompts, events:':<26}" + "".join(f"{n:>7}" for n in RARE))
    for name, draw in CLUSTERINGS.items():
        rng, cells = np.random.default_rng(seed), []
        for n_events in RARE:
            rate = n_events / length_C.sum()
            events_CM = np.minimum(draw(rng, np.tile(rate * length_C, N_WIDE)), length_C)
            found = ratio_mean_interval(events_CM, length_C, "rate")
            cells.append(np.mean((found.low_M <= rate) & (rate <= found.high_M)))
        print(f"{name:<26}" + "".join(f"{cell:7.3f}" for cell in cells), flush=True)


def show_shares(n_clusters: int, seed: int) -> None:
    """Coverage of a mean beside the typical share of its largest prompt, one row per spread of the prompts."""
    length_C = _lengths(np.random.default_rng(seed), n_clusters)[:, None]
    print(f"{f'{n_clusters} prompts':<14}{'share':>8}{'positive':>10}{'signed':>8}")
    for sigma in SIGMAS:
        rng = np.random.default_rng(seed)
        sums_CM = length_C * np.exp(rng.normal(0, sigma, (n_clusters, N_WIDE // 8)))
        truth = np.exp(sigma**2 / 2)
        found = {kind: ratio_mean_interval(sums_CM, length_C, kind) for kind in ("positive", "signed")}
        covered = [np.mean((one.low_M <= truth) & (truth <= one.high_M)) for one in found.values()]
        share = np.median(found["positive"].largest_share_M)
        print(f"{f'sigma {sigma}':<14}{share:8.2f}{covered[0]:10.3f}{covered[1]:8.3f}", flush=True)


def _cell(hits: int, given: int, n_sets: int) -> str:
    """Coverage, marked where fewer than nine sets in ten had an interval; none where fewer than half had."""
    if given < n_sets / 2:
        return f"{'none':>9}"
    return f"{hits / given:8.3f}" + ("*" if given < 0.9 * n_sets else " ")


def main() -> int:
    """Print one row per statistic and truth: measured coverage by number of prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200, help="simulated data sets per truth and number of prompts")
    parser.add_argument("--clusters", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--truths", nargs="+", default=list(_TRUTHS), choices=list(_TRUTHS))
    parser.add_argument("--statistics", nargs="+", default=list(STATISTICS), choices=list(STATISTICS))
    parser.add_argument("--tables", nargs="+", default=["tokens", "rare", "shares"])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    start = time.perf_counter()
    for truth in args.truths if "tokens" in args.tables else ():
        true = population(truth, args.statistics)
        columns = [measure(truth, c, args.sets, args.seed + c, true) for c in args.clusters]
        print(f"{truth:<20}" + "".join(f"{c:>9}" for c in args.clusters))
        for name in true:
            print(f"{name:<20}" + "".join(_cell(*column[name], args.sets) for column in columns), flush=True)
    for name, show in (("rare", show_rare), ("shares", show_shares)):
        for n_clusters in args.clusters if name in args.tables else ():
            show(n_clusters, args.seed)
    print(f"* fewer than 9 sets in 10 had an interval; {args.sets} sets, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
