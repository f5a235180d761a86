"""Routing agreement of two arms as frames and rates, from mergeable counts.

Invariants:
    - everything here is computed from :class:`~moediag.analysis.routing_counts.RoutingTotals` (and the token frame
      for costs), never from (token, layer, K) arrays;
    - rows are those *behind* the response tokens (see :mod:`moediag.run.align`), whether or not a
      log-probability came with them;
    - a pair whose arms have no expert ids gives NaN with n = 0 in every rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import AGREEMENT_BY_LAYER, FLIPS_PER_TOKEN
from moediag.analysis.metrics import HARMLESS, LOWER, ONE, Definition, Metric, declare_metrics
from moediag.analysis.routing_counts import RoutingTotals
from moediag.analysis.tokens import Source, Tokens, source_of
from moediag.statistics.intervals import Interval, Intervals, jackknife_interval, ratio_mean_interval
from moediag.statistics.quantiles import quantiles_of_groups

Float64 = NDArray[np.float64]

_FLIP: Final = Definition(
    "flip",
    "the top-K expert set differs between the arms",
    "the same set in another order is a reorder, which is harmless; the routing behind a token's log-probability is "
    "that of the token before it",
)
_OVERLAP: Final = Definition("overlap", "mean share of the K experts that both arms chose")


def _rate(name: str, direction: str, label: str = "", **rest: Any) -> Metric:
    return Metric(name, "1", direction, label, path=("routing", name), is_share=True, **rest)


RATES: Final = declare_metrics(
    _rate("flip_rate", LOWER, "flip rate: expert set differs", section="depth", counts="choice", is_headline=True,
          floor="sum", definition=_FLIP),
    _rate("any_layer_share", LOWER, "tokens with a flip in any layer", section="depth", is_headline=True, floor="sum"),
    Metric("misrouted_mass", "gate weight", LOWER, path=("routing", "misrouted_mass"), counts="choice"),
    _rate("overlap", ONE, counts="choice", definition=_OVERLAP),
    _rate("jaccard", ONE, counts="choice"),
    _rate("top1_rate", ONE, counts="choice"),
    _rate("reorder_rate", HARMLESS, counts="choice"),
    Metric("clustering_ratio", "1", ONE, path=("routing", "clustering_ratio"), is_scale=False),
    Metric("flip_dispersion", "1", ONE, path=("routing", "flip_dispersion"), is_scale=False),
)  # fmt: skip
"""The intervals of :class:`RoutingRates`, by name; ``any_layer_share`` stands beside what independent layers give."""

_DISPERSION_CLUSTERS: Final = 64
"""Prompts from which on the interval of the dispersion of flips covers."""


@dataclass(frozen=True)
class RoutingRates:
    """Routing agreement over all layers.

    Args:
        flip_rate: share of (token, layer) choices whose expert set differs; 0 is best.
        any_layer_share: share of tokens with at least one flipped layer; 0 is best.
        misrouted_mass: mean gate weight, train side, on experts that infer did not choose [gate weight]; 0 is best.
        overlap: mean abs(A & B) / K; 1 is best.
        jaccard: mean abs(A & B) / abs(A | B); 1 is best.
        top1_rate: share of choices whose heaviest expert agrees; 1 is best. NaN unless both arms gave gate weights:
            engines list experts in an order of their own, so the first id of a list means nothing.
        reorder_rate: share of choices with the same set in another order; harmless.
        independent_any_layer_share: 1 - prod(1 - p_l), what independent layers would give.
        clustering_ratio: any_layer_share over that; below 1 = flips gather in fewer tokens than chance.
        flip_dispersion: variance of flipped layers per token over what independent layers would give; above 1 =
            flips cluster. More telling than the ratio where nearly every token flips somewhere.
        n_choices, n_tokens: choices compared; tokens compared in every layer.
    """

    flip_rate: Interval
    any_layer_share: Interval
    misrouted_mass: Interval
    overlap: Interval
    jaccard: Interval
    top1_rate: Interval
    reorder_rate: Interval
    independent_any_layer_share: float
    clustering_ratio: Interval
    flip_dispersion: Interval
    n_choices: int
    n_tokens: int


def agreement_by_layer(totals: RoutingTotals, decoder_layer_L: tuple[int, ...]) -> pd.DataFrame:
    """Agreement of the expert sets by depth, per layer and cumulative (both readings of "10 % lost with depth").

    Args:
        totals: counts of the pair.
        decoder_layer_L: decoder layer of every MoE layer.

    Returns:
        Frame ``agreement_by_layer``; 1 is perfect agreement in every rate but ``reorder_rate`` (harmless).

    Source: IcePop post (one sentence, no definition); R3 (arXiv 2510.11370) for the per-layer share.
    """
    n_CL = totals.n_compared_CL
    reorder = ratio_mean_interval(totals.n_reorder_CL, n_CL, "rate")
    mass = ratio_mean_interval(totals.mass_CL, totals.n_mass_CL, "positive")
    cumulative = ratio_mean_interval(totals.n_prefix_same_CL, totals.n_prefix_CL, "rate")
    frame = pd.DataFrame(
        {
            "layer": np.arange(len(decoder_layer_L)),
            "decoder_layer": np.array(decoder_layer_L, dtype=np.int64),
            "n_tokens": n_CL.sum(axis=0),
            **_with_bounds("same_set_rate", ratio_mean_interval(totals.n_same_CL, n_CL, "rate")),
            **_with_bounds("cumulative_same_set_rate", cumulative),
            **_with_bounds("overlap", ratio_mean_interval(totals.n_common_CL, n_CL * totals.top_k, "rate")),
            "reorder_rate": reorder.value_M,
            **_with_bounds("jaccard", ratio_mean_interval(totals.jaccard_CL, n_CL, "rate")),
            **_with_bounds("top1_rate", ratio_mean_interval(totals.n_top1_CL, totals.n_top1_known_CL, "rate")),
            **_with_bounds("misrouted_mass", mass),
        }
    )
    return AGREEMENT_BY_LAYER.validate(frame)


def routing_rates(totals: RoutingTotals) -> RoutingRates:
    """Agreement over all choices and tokens, with intervals clustered by prompt.

    Args:
        totals: counts of the pair.

    Returns:
        Rates in [0, 1] and ratios; see :class:`RoutingRates` for the good end of each. NaN with n = 0 where
        nothing was compared.

    Source: R3 (arXiv 2510.11370): about 10 % of choices and 94 % of tokens on Qwen3-30B-A3B, where independent
    layers would give 99.4 %; the dispersion index is ours.
    """
    n_C = totals.n_compared_CL.sum(axis=1)

    def rate(count_CL: NDArray[Any]) -> Interval:
        return ratio_mean_interval(count_CL.sum(axis=1), n_C, "rate").one()

    return RoutingRates(
        flip_rate=rate(totals.n_compared_CL - totals.n_same_CL),
        any_layer_share=ratio_mean_interval(totals.n_any_flip_C, totals.n_complete_C, "rate").one(),
        misrouted_mass=ratio_mean_interval(totals.mass_CL.sum(axis=1), totals.n_mass_CL.sum(axis=1), "positive").one(),
        overlap=ratio_mean_interval(totals.n_common_CL.sum(axis=1), n_C * totals.top_k, "rate").one(),
        jaccard=rate(totals.jaccard_CL),
        top1_rate=ratio_mean_interval(totals.n_top1_CL.sum(axis=1), totals.n_top1_known_CL.sum(axis=1), "rate").one(),
        reorder_rate=rate(totals.n_reorder_CL),
        independent_any_layer_share=float(1 - independent_flips(layer_flip_rates(totals))[0]),
        clustering_ratio=clustering_ratio_interval(_clustering_sums(totals)),
        flip_dispersion=flip_dispersion_interval(_clustering_sums(totals)),
        n_choices=int(n_C.sum()),
        n_tokens=int(totals.n_complete_C.sum()),
    )


def layer_flip_rates(totals: RoutingTotals) -> Float64:
    """Flip rate of every MoE layer, in [0, 1]; NaN where nothing was compared."""
    n_L = totals.n_compared_CL.sum(axis=0)
    return np.asarray(1 - totals.n_same_CL.sum(axis=0) / np.where(n_L == 0, np.nan, n_L), dtype=np.float64)


def flips_per_token(tokens: Source, totals: RoutingTotals) -> pd.DataFrame:
    """How many layers flip per token, against what independent layers would give, and how much such tokens differ.

    Its differences are bare means, which mix in that hard tokens flip more; :mod:`moediag.analysis.attribution`
    compares like with like.

    Args:
        tokens: token frame of the pair.
        totals: counts of the same pair.

    Returns:
        Frame ``flips_per_token``, one row for 0 .. most flipped layers seen. A heavier tail than
        ``independent_share`` means that flips cluster in tokens.

    Source: R3 (arXiv 2510.11370) for the distribution; the Poisson-binomial reference is ours.
    """
    x = source_of(tokens)
    # tokens that were not scored, too: flips are known without log-probabilities
    n_rows = max(int(part.frame["n_flipped_layers"].max()) if len(part.frame) else -1 for part in x.parts()) + 1

    def counts(part: Tokens) -> Float64:
        all_N, n_flipped_T = part.frame["n_flipped_layers"].to_numpy(), part.column("n_flipped_layers")
        routed_T = n_flipped_T >= 0
        return np.stack(
            [
                np.bincount(all_N[all_N >= 0], minlength=n_rows),
                np.bincount(n_flipped_T[routed_T], minlength=n_rows),
                np.bincount(n_flipped_T[routed_T], part.abs_diff_T[routed_T], minlength=n_rows),
            ]
        )

    count_N, n_scored_N, sum_N = x.total(counts)

    flipped_values = x.values(lambda part: part.abs_diff_T, lambda part: part.column("n_flipped_layers"))
    p99_N = quantiles_of_groups(flipped_values, n_scored_N.astype(np.int64), np.full((1, n_rows), 0.99))[0]
    frame = pd.DataFrame(
        {
            "n_flipped_layers": np.arange(n_rows),
            "n_tokens": count_N.astype(np.int64),
            "share": count_N / max(count_N.sum(), 1),
            "independent_share": independent_flips(layer_flip_rates(totals))[:n_rows],
            "abs_logp_diff_mean": sum_N / np.where(n_scored_N, n_scored_N, np.nan),
            "abs_logp_diff_p99": p99_N,
        }
    )
    return FLIPS_PER_TOKEN.validate(frame)


def independent_flips(rate_L: Float64) -> Float64:
    """P(n layers flip), n = 0..L, when layers flip independently (Poisson-binomial, by convolution)."""
    share = np.ones(1)
    for rate in rate_L:
        share = np.convolve(share, [1 - rate, rate])
    return share


def clustering_ratio_interval(sums_CM: Float64) -> Interval:
    """Share of tokens with a flip over 1 - prod(1 - p_l); below 1 = flips gather in fewer tokens than chance.

    Args:
        sums_CM: per prompt: tokens, tokens with a flip, flips, flips squared, flips of every layer, choices of every
            layer.
    """
    return jackknife_interval(sums_CM, _clustering_ratio, "log")


def flip_dispersion_interval(sums_CM: Float64) -> Interval:
    """Variance of the flipped layers per token over sum p_l (1 - p_l); above 1 = flips cluster. Args as above."""
    return jackknife_interval(sums_CM, _flip_dispersion, "log", _DISPERSION_CLUSTERS)


def _clustering_sums(totals: RoutingTotals) -> Float64:
    """Per prompt: tokens, tokens with a flip, flips, flips squared, then flips and choices of every layer."""
    n_flip_CL = totals.n_compared_CL - totals.n_same_CL
    heads = (totals.n_complete_C, totals.n_any_flip_C, totals.n_flipped_C, totals.n_flipped_square_C)
    return np.column_stack([*heads, n_flip_CL, totals.n_compared_CL]).astype(np.float64)


def _layer_rates(sums: Float64) -> Float64:
    n_layers = (sums.shape[-1] - 4) // 2
    return np.asarray(sums[..., 4 : 4 + n_layers] / sums[..., 4 + n_layers :])


def _clustering_ratio(sums: Float64) -> Float64:
    """Share of tokens with a flip over 1 - prod(1 - p_l)."""
    independent = 1 - np.prod(1 - _layer_rates(sums), axis=-1)
    return np.asarray(sums[..., 1] / sums[..., 0] / independent)


def _flip_dispersion(sums: Float64) -> Float64:
    """Variance of the flipped layers per token over sum p_l (1 - p_l)."""
    rate = _layer_rates(sums)
    mean = sums[..., 2] / sums[..., 0]
    return np.asarray((sums[..., 3] / sums[..., 0] - mean**2) / (rate * (1 - rate)).sum(axis=-1))


def _with_bounds(name: str, intervals: Intervals) -> dict[str, Float64]:
    return {name: intervals.value_M, f"{name}_ci_low": intervals.low_M, f"{name}_ci_high": intervals.high_M}
