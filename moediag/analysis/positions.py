"""Drift of the mismatch along the response: by bins, and as a slope within sequences.

Invariants:
    - late bins hold only the sequences that got so far, so the table counts them; the *slope* compares
      each sequence with itself (its own mean removed), hence survivors do not bias it;
    - only tokens scored by both arms count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moediag.analysis.declarations import DRIFT_BY_POSITION
from moediag.analysis.measures import EXTREME_TAU
from moediag.analysis.tokens import AnyTokens, Tokens
from moediag.statistics.intervals import ratio_mean_interval

Float64 = NDArray[np.float64]

MAX_BINS: Final = 16
_QUANTILES: Final = {"abs_logp_diff_p50": 0.5, "abs_logp_diff_p90": 0.9, "abs_logp_diff_p99": 0.99}


@dataclass(frozen=True)
class PositionSlope:
    """Slope of abs(logp_diff) [nat per 1000 tokens] with its 95 % interval; 0 = no drift.

    Args:
        value, low, high: NaN where nothing can be said; ``note`` says why.
        n_tokens, n_sequences: tokens and sequences that carry the slope (two tokens or more).
        n_prompts: clusters behind the interval.
    """

    value: float
    low: float
    high: float
    n_tokens: int
    n_sequences: int
    n_prompts: int
    note: str


def drift_by_position(tokens: AnyTokens, n_layers: int = 0, bin_width: int | None = None) -> pd.DataFrame:
    """abs(logp_diff) and flips by position in the response.

    Args:
        tokens: token frame of a pair.
        n_layers: L, to turn flipped layers into a rate; 0 = dense, no rate.
        bin_width: tokens per bin; None takes the power of two that gives at most 16 bins.

    Returns:
        Frame ``drift_by_position`` [nat]; lower is better; bins without a scored token are left out.

    Source: IcePop Figs. 2-3, whose bins are not stated; ours are.
    """
    x = Tokens.of(tokens)
    if not len(x):
        return DRIFT_BY_POSITION.validate(pd.DataFrame({c.name: np.zeros(0) for c in DRIFT_BY_POSITION.columns}))
    position_T = x.column("position").astype(np.int64)
    width = bin_width or _default_width(int(position_T.max()) + 1)
    bins, bin_T = np.unique(position_T // width, return_inverse=True)
    mean = ratio_mean_interval(*_prompt_by_bin(x.abs_diff_T, x.prompt_row_T, bin_T, len(bins)), "positive")
    frame = pd.DataFrame(
        {
            "position_low": bins * width,
            "position_high": (bins + 1) * width - 1,
            "n_tokens": np.bincount(bin_T, minlength=len(bins)),
            "n_sequences": x.rows.groupby(bin_T)["seq_id"].nunique().to_numpy(),
            "abs_logp_diff_mean": mean.value_M,
            "abs_logp_diff_mean_ci_low": mean.low_M,
            "abs_logp_diff_mean_ci_high": mean.high_M,
            **_quantiles_by_bin(x.abs_diff_T, bin_T, len(bins)),
            "extreme_share_2": _mean_by_bin(x.abs_diff_T > math.log(EXTREME_TAU), bin_T, len(bins)),
            "flip_rate": _flip_rate_by_bin(x.column("n_flipped_layers"), bin_T, len(bins), n_layers),
        }
    )
    return DRIFT_BY_POSITION.validate(frame)


def position_slope(tokens: AnyTokens) -> PositionSlope:
    """Slope of abs(logp_diff) against position within sequences, per 1000 tokens.

    Least squares with one intercept per sequence, so only change *inside* a response counts; a slope
    through binned means would mix in that long responses differ from short ones.

    Args:
        tokens: token frame of a pair.

    Returns:
        Slope in nat per 1000 tokens, interval clustered by prompt; 0 is best, above 0 = grows.

    Source: fixed-effects (within) estimator, e.g. Wooldridge (2010) section 10.5.
    """
    x = Tokens.of(tokens)
    position_T = within_sequence(x.column("position").astype(np.float64), x.row_T)
    abs_diff_T = within_sequence(x.abs_diff_T, x.row_T)
    cross_C, spread_C = x.by_prompt(position_T * abs_diff_T), x.by_prompt(np.square(position_T))
    slope = ratio_mean_interval(1000 * cross_C, spread_C, "signed").one()
    used_S = x.n_S[x.n_S > 1]  # a single token has no slope
    n_tokens, n_sequences = int(used_S.sum()), len(used_S)
    return PositionSlope(slope.value, slope.low, slope.high, n_tokens, n_sequences, slope.n_clusters, slope.note)


def _default_width(longest: int) -> int:
    """Smallest power of two that cuts the longest response into at most 16 bins."""
    return int(2 ** max(0, math.ceil(math.log2(longest / MAX_BINS))))


def within_sequence(values_T: Float64, seq_T: NDArray[Any]) -> Float64:
    """Values minus the mean of their sequence, in the unit of the values."""
    index_T = np.unique(seq_T, return_inverse=True)[1]
    sum_S, n_S = np.bincount(index_T, weights=values_T), np.bincount(index_T)
    return np.asarray(values_T - (sum_S / n_S)[index_T]) if len(values_T) else values_T


def _prompt_by_bin(
    values_T: Float64, prompt_T: NDArray[Any], bin_T: NDArray[np.intp], n_bins: int
) -> tuple[Float64, Float64]:
    """(sums, counts) of the values, prompts by bins."""
    prompts, row_T = np.unique(prompt_T, return_inverse=True)
    cell_T, shape = row_T * n_bins + bin_T, (len(prompts), n_bins)
    sums = np.bincount(cell_T, weights=values_T, minlength=len(prompts) * n_bins).astype(np.float64)
    counts = np.bincount(cell_T, minlength=len(prompts) * n_bins).astype(np.float64)
    return sums.reshape(shape), counts.reshape(shape)


def _mean_by_bin(values_T: NDArray[Any], bin_T: NDArray[np.intp], n_bins: int) -> Float64:
    n_bin = np.bincount(bin_T, minlength=n_bins)
    return np.asarray(np.bincount(bin_T, weights=values_T, minlength=n_bins) / np.where(n_bin == 0, np.nan, n_bin))


def _flip_rate_by_bin(n_flipped_T: NDArray[Any], bin_T: NDArray[np.intp], n_bins: int, n_layers: int) -> Float64:
    routed_T = n_flipped_T >= 0
    if not n_layers:
        return np.full(n_bins, np.nan)
    return _mean_by_bin(n_flipped_T[routed_T] / n_layers, bin_T[routed_T], n_bins)


def _quantiles_by_bin(values_T: Float64, bin_T: NDArray[np.intp], n_bins: int) -> dict[str, Float64]:
    order = np.argsort(bin_T, kind="stable")
    groups = np.split(values_T[order], np.cumsum(np.bincount(bin_T, minlength=n_bins))[:-1])
    table = np.array([np.quantile(group, list(_QUANTILES.values())) for group in groups])
    return {name: table[:, i] for i, name in enumerate(_QUANTILES)}
